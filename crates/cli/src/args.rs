//! The command line. Owns every word a user may write and its help; parsed once, by `main`.

use std::{ffi::OsString, path::PathBuf};

use clap::{Args, Parser, Subcommand, ValueHint, builder::NonEmptyStringValueParser};
use qudata_host::pci::PciAddress;

use crate::exit;

pub(crate) mod doctor;
pub(crate) mod image;
pub(crate) mod setup;

const EVERYWHERE: &str = "Options of every command";

/// Turns a GPU server into rentable virtual machines.
///
/// `serve` is the daemon. `install`, `uninstall`, `image` and `doctor` work on this host themselves; all other commands talk
/// to the daemon over its local socket, as root or as a member of group qudata.
#[derive(Debug, Parser)]
#[command(name = "qudata-agent", version, max_term_width = 100, after_long_help = exit::TABLE)]
#[command(subcommand_required = true, arg_required_else_help = true, disable_help_subcommand = true)]
pub(crate) struct CommandLine {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Options of every command.
#[derive(Debug, Clone, Args)]
pub(crate) struct Global {
    /// Print the API's data as JSON
    #[arg(long, global = true, help_heading = EVERYWHERE)]
    pub(crate) json: bool,
    /// Socket of the agent [default: agent.sock in $QUDATA_VM_RUN_DIR or /var/run/qudata]
    #[arg(long, global = true, help_heading = EVERYWHERE, value_name = "PATH", value_hint = ValueHint::FilePath)]
    pub(crate) socket: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run the daemon
    Serve(Serve),
    /// Create instances and work with them
    #[command(subcommand, visible_alias = "i")]
    Instance(Instance),
    /// Show the GPUs, take one out of business or back
    #[command(subcommand)]
    Gpu(Gpu),
    /// Show the host, its instances and what is wrong
    Status,
    /// Find out what keeps this host from renting its GPUs out, and what to do
    Doctor(doctor::Doctor),
    /// Build base images and look after them
    #[command(subcommand)]
    Image(image::Image),
    /// Turn this server into a host: plan, packages, boot loader, image, reboot, self-test, agent
    Install(setup::Install),
    /// Take back everything that `install` changed
    Uninstall(setup::Uninstall),
    /// List all settings: name in agent.toml, environment variable, default, meaning
    Settings,
    /// Print the completions for a shell
    Completions {
        /// Which shell
        shell: clap_complete::Shell,
    },
    /// Write the manual pages
    Man {
        /// Folder to write them to
        #[arg(value_hint = ValueHint::DirPath)]
        dir: PathBuf,
    },
    /// Find out whether KVM runs guests here
    #[command(hide = true)]
    ProbeKvm {
        /// QEMU to try it with
        #[arg(long, default_value = "/usr/bin/qemu-system-x86_64")]
        qemu: PathBuf,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Serve {
    /// Work without a control plane and without a tunnel; the API's secret is made up and kept in the data folder
    #[arg(long)]
    pub(crate) standalone: bool,
    /// Settings file [default: /etc/qudata/agent.toml, if it exists]
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) config: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Instance {
    /// Create an instance and wait until one can log in
    Create(Create),
    /// List the instances
    #[command(visible_alias = "ls")]
    List,
    /// Show one instance
    Show(Which),
    /// Log in, or run a command in the guest
    ///
    /// Runs the system's ssh as root of the guest and trusts only the host key that the agent made for this instance.
    Ssh(Ssh),
    /// Show what the guest wrote to its serial console
    Console(Console),
    /// Let a paused instance go on, or boot one that is powered off
    Start(Which),
    /// Pause an instance; its memory is kept
    Stop(Which),
    /// Reset an instance, as the reset button does
    Restart(Risky),
    /// Delete an instance with its disk
    Delete(Risky),
    /// Show what happened to an instance
    Events(Events),
    /// Change who may log in
    #[command(subcommand)]
    Key(Key),
}

/// Names an instance.
#[derive(Debug, Clone, Args)]
pub(crate) struct Which {
    /// Name, id, or a beginning of the id that no other has; may be left out when there is only one instance
    #[arg(value_name = "INSTANCE")]
    pub(crate) instance: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Risky {
    #[command(flatten)]
    pub(crate) which: Which,
    /// Do not ask
    #[arg(long, short)]
    pub(crate) yes: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Create {
    /// Name, unique on this host: lower-case letters, digits and dashes
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// vCPUs
    #[arg(long, value_name = "N")]
    pub(crate) cpus: Option<u32>,
    /// RAM, for example 32G
    #[arg(long, value_name = "SIZE")]
    pub(crate) memory: Option<String>,
    /// Disk in GiB, for example 100 or 100G
    #[arg(long, value_name = "GIB", value_parser = storage)]
    pub(crate) storage: Option<u64>,
    /// Guest port to publish; may be given several times
    #[arg(long = "port", value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    pub(crate) ports: Vec<u16>,
    /// Do not publish SSH
    #[arg(long, conflicts_with = "ssh_keys")]
    pub(crate) no_ssh: bool,
    /// Public key that may log in, as text or as a file; may be given several times [default:
    /// ~/.ssh/id_ed25519.pub, if it exists]
    #[arg(long = "ssh-key", value_name = "FILE|KEY", value_hint = ValueHint::FilePath)]
    pub(crate) ssh_keys: Vec<String>,
    /// How many GPUs; with neither this nor --gpu: all that are free
    #[arg(long, value_name = "N", conflicts_with = "gpu_addrs")]
    pub(crate) gpus: Option<u32>,
    /// GPU by its PCI address, for example 65:00.0; may be given several times
    #[arg(long = "gpu", value_name = "ADDRESS")]
    pub(crate) gpu_addrs: Vec<PciAddress>,
    /// cloud-init user-data
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) user_data: Option<PathBuf>,
    /// Domain label of the renter's tunnel; other users of this host can see it while this command runs
    #[arg(long, value_name = "TOKEN")]
    pub(crate) tunnel_token: Option<String>,
    /// Return as soon as it is accepted
    #[arg(long)]
    pub(crate) no_wait: bool,
    /// How long to wait until it is ready, in seconds; it goes on booting after that
    #[arg(long, value_name = "SECONDS", default_value_t = 900, conflicts_with = "no_wait")]
    pub(crate) wait: u64,
}

#[derive(Debug, Args)]
pub(crate) struct Ssh {
    #[command(flatten)]
    pub(crate) which: Which,
    /// Command to run instead of a shell
    #[arg(last = true, value_name = "COMMAND")]
    pub(crate) command: Vec<OsString>,
}

#[derive(Debug, Args)]
pub(crate) struct Console {
    #[command(flatten)]
    pub(crate) which: Which,
    /// Go on as the guest writes more
    #[arg(long, short, conflicts_with = "json")]
    pub(crate) follow: bool,
    /// Only the last so many bytes
    #[arg(long, value_name = "BYTES")]
    pub(crate) tail: Option<u32>,
    /// Leave in what a terminal would obey (colours, cursor movements); the guest decides what that is
    #[arg(long)]
    pub(crate) raw: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Events {
    #[command(flatten)]
    pub(crate) which: Which,
    /// Go on as more happens, until the instance is gone
    #[arg(long, short)]
    pub(crate) follow: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Key {
    /// Let somebody log in
    Add(KeyOf),
    /// Let somebody log in no longer
    Remove(KeyOf),
}

#[derive(Debug, Args)]
pub(crate) struct KeyOf {
    /// Public key, as text or as a file
    #[arg(value_name = "FILE|KEY", value_hint = ValueHint::FilePath)]
    pub(crate) key: String,
    #[command(flatten)]
    pub(crate) which: Which,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Gpu {
    /// List the GPUs, whose they are, and what keeps one from being rented
    #[command(visible_alias = "ls")]
    List,
    /// Show how far the GPUs are from each other, with NUMA nodes and IOMMU groups
    ///
    /// The letters are those of `nvidia-smi topo`, worked out without any driver.
    Topo,
    /// Show one GPU: hardware, driver, who holds it, what is wrong with it and what to do
    Show(GpuAddress),
    /// Rent a GPU out no longer, until it is released
    ///
    /// An instance that has it keeps it.
    Quarantine(Quarantine),
    /// Bring a GPU back from quarantine: it is reset and checked, and free only when it passes
    ///
    /// One that is not in the host any more is forgotten; put back where it was, it is quarantined again.
    Release(Release),
}

/// Names a GPU.
#[derive(Debug, Clone, Args)]
pub(crate) struct GpuAddress {
    /// PCI address of the GPU or of another function of its slot, for example 0000:65:00.0 or 65:00.0
    #[arg(value_name = "ADDRESS")]
    pub(crate) address: PciAddress,
}

#[derive(Debug, Args)]
pub(crate) struct Quarantine {
    #[command(flatten)]
    pub(crate) gpu: GpuAddress,
    /// Why, for whoever looks at it later
    #[arg(long, value_name = "TEXT", value_parser = NonEmptyStringValueParser::new())]
    pub(crate) reason: String,
    /// Do not ask
    #[arg(long, short)]
    pub(crate) yes: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Release {
    #[command(flatten)]
    pub(crate) gpu: GpuAddress,
    /// Do not ask
    #[arg(long, short)]
    pub(crate) yes: bool,
}

/// The API counts disks in GiB; people write sizes.
fn storage(text: &str) -> Result<u64, String> {
    if let Ok(gib) = text.parse() {
        return Ok(gib);
    }
    let size: qudata_host::size::ByteSize = text
        .parse()
        .map_err(|_| format!("{text:?} is not a size: write GiB as a number, or for example 100G"))?;
    if !size.bytes().is_multiple_of(1 << 30) {
        return Err(format!("{text:?} is not a whole number of GiB"));
    }
    Ok(size.gib())
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, error::ErrorKind};

    use super::*;

    fn parse(line: &str) -> Result<CommandLine, ErrorKind> {
        let line = line.replace("SHA512", &"ab".repeat(64));
        let words = std::iter::once("qudata-agent").chain(line.split_whitespace());
        CommandLine::try_parse_from(words).map_err(|e| e.kind())
    }

    #[test]
    fn the_definition_is_sound() {
        CommandLine::command().debug_assert();
    }

    #[test]
    fn lines_that_are_understood() {
        for line in [
            "serve",
            "serve --standalone --config /etc/other.toml",
            "instance create",
            "instance create --cpus 8 --memory 32G --storage 100 --port 22 --port 8888 --name a --gpus 2",
            "instance create --storage 2T --gpu 0000:65:00.0 --gpu 66:00.0",
            "instance create --no-ssh --no-wait",
            "instance create --ssh-key a.pub --ssh-key b.pub --user-data u.yaml --tunnel-token t --wait 5",
            "instance list --json",
            "--json i ls",
            "instance show",
            "instance show a --socket /tmp/a.sock",
            "instance ssh",
            "instance ssh a -- uname -a",
            "instance ssh -- ls --json",
            "instance console -f",
            "instance console a --tail 4096 --raw",
            "instance start a",
            "instance stop",
            "instance restart a --yes",
            "instance delete a -y",
            "instance events a --follow",
            "instance key add k.pub",
            "instance key remove k.pub a",
            "gpu list",
            "gpu ls --json",
            "gpu topo",
            "gpu show 65:00.0",
            "gpu quarantine 0000:65:00.0 --reason loud --yes",
            "gpu release 10000:e1:00.0 -y",
            "image build",
            "image build --from debian-12 --sha512 SHA512 --driver open:570 --size 20 --package htop --package tmux",
            "image build --from /srv/a.qcow2 --no-customise --prune --json",
            "image build --mirror https://mirror.example/noble --jupyter --container-toolkit",
            "image build --from https://a.example/a.img --checksums /s --signature /s.gpg --keyring /k.gpg",
            "image ls",
            "image verify 0123",
            "image remove 0123 -y",
            "status",
            "doctor",
            "doctor --quiet --strict --config /etc/other.toml",
            "doctor --explain",
            "doctor --explain gpu.reset --json",
            "doctor selftest --gpu 65:00.0 --gpu 66:00.0 --keep --timeout 60",
            "settings",
            "completions bash",
            "man /tmp",
            "probe-kvm",
            "install --plan",
            "install --package a.deb --gpus all --reboot never --iommu on -y --set vm_cpus=8 --set tunnel=none",
            "install --gpus 65:00.0,0000:66:00.0 --image debian-12 --image-option driver=none --image-option jupyter",
            "install --standalone --service-url https://a/v0 --api-key-file k --offline --skip-selftest",
            "install --continue",
            "uninstall --plan",
            "uninstall --purge --yes",
        ] {
            assert!(parse(line).is_ok(), "{line}: {:?}", parse(line).err());
        }
    }

    #[test]
    fn lines_that_are_refused() {
        use ErrorKind::*;
        let table = [
            ("", DisplayHelpOnMissingArgumentOrSubcommand),
            ("instance", DisplayHelpOnMissingArgumentOrSubcommand),
            ("instances", InvalidSubcommand),
            ("launch-shim", InvalidSubcommand),
            ("instance create a", UnknownArgument),
            ("instance create --cpus -1", UnknownArgument),
            ("instance create --cpus many", ValueValidation),
            ("instance create --port 0", ValueValidation),
            ("instance create --port 65536", ValueValidation),
            ("instance create --storage 1.5G", ValueValidation),
            ("instance create --storage 512M", ValueValidation),
            ("instance create --gpus 1 --gpu 65:00.0", ArgumentConflict),
            ("instance create --gpu 65", ValueValidation),
            ("instance create --no-ssh --ssh-key a", ArgumentConflict),
            ("instance create --no-wait --wait 3", ArgumentConflict),
            ("instance show a b", UnknownArgument),
            ("instance ssh a uname", UnknownArgument),
            ("instance stop a --yes", UnknownArgument),
            ("instance console -f --json", ArgumentConflict),
            ("instance key add", MissingRequiredArgument),
            ("gpu", DisplayHelpOnMissingArgumentOrSubcommand),
            ("gpu show", MissingRequiredArgument),
            ("gpu show 65", ValueValidation),
            ("gpu show 65:00.0 66:00.0", UnknownArgument),
            ("gpu quarantine 65:00.0", MissingRequiredArgument),
            ("gpu quarantine 65:00.0 --reason=", InvalidValue),
            ("gpu release --yes", MissingRequiredArgument),
            ("gpu release 65:00.0 --reason fixed", UnknownArgument),
            ("image", DisplayHelpOnMissingArgumentOrSubcommand),
            ("image build debian-12", UnknownArgument),
            ("image build --from http://a.example/a.img", ValueValidation),
            ("image build --sha512 abcd", ValueValidation),
            ("image build --driver latest", ValueValidation),
            ("image build --size 0", ValueValidation),
            ("image build --no-customise --jupyter", ArgumentConflict),
            ("image build --no-customise --driver none", ArgumentConflict),
            ("image remove", MissingRequiredArgument),
            ("doctor --explain gpu.reset --quiet", ArgumentConflict),
            ("doctor --strict selftest", ArgumentConflict),
            ("doctor selftest --gpu 65", ValueValidation),
            ("doctor selftest --timeout 0", ValueValidation),
            ("completions tcsh", InvalidValue),
            ("man", MissingRequiredArgument),
            ("install ak-0123", UnknownArgument),
            ("install --api-key ak-0123", UnknownArgument),
            ("install --gpus 65", ValueValidation),
            ("install --set vm_cpus", ValueValidation),
            ("install --image-option --prune", UnknownArgument),
            ("install --image-option=--prune", ValueValidation),
            ("install --reboot later", InvalidValue),
            ("install --continue --gpus all", ArgumentConflict),
            ("uninstall --force", UnknownArgument),
        ];
        for (line, kind) in table {
            assert_eq!(parse(line).err(), Some(kind), "{line}");
        }
    }

    fn help(words: &[&str]) -> String {
        let line = ["qudata-agent"].iter().chain(words).chain(&["--help"]);
        let error = CommandLine::command().term_width(100).try_get_matches_from(line).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::DisplayHelp);
        error.to_string()
    }

    #[test]
    fn help_is_as_published() {
        insta::assert_snapshot!("help", help(&[]));
        insta::assert_snapshot!("help_instance", help(&["instance"]));
        insta::assert_snapshot!("help_create", help(&["instance", "create"]));
        insta::assert_snapshot!("help_gpu", help(&["gpu"]));
        insta::assert_snapshot!("help_gpu_quarantine", help(&["gpu", "quarantine"]));
    }
}
