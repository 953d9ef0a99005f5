//! The words of `install` and `uninstall`.

use std::path::PathBuf;

use clap::{Args, ValueEnum, ValueHint};
use qudata_host::pci::PciAddress;
use qudata_setup::wish::{GpuWish, RebootWay};

/// See [`super::Command::Install`].
#[derive(Debug, Args)]
#[command(
    after_help = "The API key is read from $QUDATA_API_KEY or --api-key-file, never from the command line, which other \
                        users of this host can read.\nKilled anywhere, the same command goes on."
)]
pub(crate) struct Install {
    /// Print every file, package, unit and kernel parameter that would be changed, and change nothing
    #[arg(long)]
    pub(crate) plan: bool,
    /// Package to install [default: the one that is installed]
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) package: Option<PathBuf>,
    /// GPUs to rent out: all (but the host's own display), or PCI addresses [default: what is set, else all]
    #[arg(long, value_name = "all|ADDRESS,…", value_parser = gpus)]
    pub(crate) gpus: Option<GpuWish>,
    /// What to do when a restart is needed: count down and do it, ask on the terminal, or only say so
    #[arg(long, value_enum, value_name = "WAY", default_value = "auto")]
    pub(crate) reboot: Way,
    /// What to do when parameters of your own switch the IOMMU off: keep them, or add one that has the last word
    #[arg(long, value_enum, value_name = "WAY", default_value = "keep")]
    pub(crate) iommu: Iommu,
    /// Do not ask; restart also while instances run
    #[arg(long, short)]
    pub(crate) yes: bool,
    /// What the base image is made from: debian-12, ubuntu-22.04, ubuntu-24.04, a URL, or a file, which is taken as it is
    /// unless there are --image-option
    #[arg(long, value_name = "NAME|URL|FILE")]
    pub(crate) image: Option<String>,
    /// Option of `image build` without its dashes, for example driver=none; may be given several times
    #[arg(long = "image-option", value_name = "NAME[=VALUE]", value_parser = image_option)]
    pub(crate) image_options: Vec<String>,
    /// Without a control plane and a tunnel
    #[arg(long)]
    pub(crate) standalone: bool,
    /// Address of the control plane
    #[arg(long, value_name = "URL", value_hint = ValueHint::Url)]
    pub(crate) service_url: Option<String>,
    /// Setting for agent.toml, see `qudata-agent settings`; may be given several times
    #[arg(long = "set", value_name = "KEY=VALUE", value_parser = setting)]
    pub(crate) settings: Vec<(String, String)>,
    /// File with the API key
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) api_key_file: Option<PathBuf>,
    /// Do not ask the control plane about the key, and go on when it does not answer
    #[arg(long)]
    pub(crate) offline: bool,
    /// Do not try out a VM
    #[arg(long)]
    pub(crate) skip_selftest: bool,
    /// Go on with the installation that was begun, with its options
    #[arg(long = "continue", conflicts_with_all = [
        "package", "gpus", "reboot", "iommu", "image", "image_options", "standalone", "service_url", "settings",
        "api_key_file", "offline", "skip_selftest",
    ])]
    pub(crate) go_on: bool,
}

/// What to do when a restart is needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Way {
    /// Count down, then do it
    Auto,
    /// Ask on the terminal
    Ask,
    /// Only say so
    Never,
}

impl From<Way> for RebootWay {
    fn from(way: Way) -> Self {
        match way {
            Way::Auto => Self::Auto,
            Way::Ask => Self::Ask,
            Way::Never => Self::Never,
        }
    }
}

/// What to do about an owner's own parameter that switches the IOMMU off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Iommu {
    /// Keep it, and refuse
    Keep,
    /// Add a parameter that has the last word
    On,
}

/// See [`super::Command::Uninstall`].
#[derive(Debug, Args)]
pub(crate) struct Uninstall {
    /// Print what would be taken back, and change nothing
    #[arg(long)]
    pub(crate) plan: bool,
    /// Delete instances, disks, images and logs as well, after asking
    #[arg(long)]
    pub(crate) purge: bool,
    /// Do not ask
    #[arg(long, short)]
    pub(crate) yes: bool,
}

fn gpus(text: &str) -> Result<GpuWish, String> {
    if text == "all" {
        return Ok(GpuWish::All);
    }
    let addresses: Result<Vec<PciAddress>, _> = text.split(',').map(|part| part.trim().parse()).collect();
    addresses.map(GpuWish::Only).map_err(|error| error.to_string())
}

fn setting(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("write KEY=VALUE, for example vm_cpus=8")?;
    Ok((key.trim().to_owned(), value.trim().to_owned()))
}

/// It becomes an option of another command line: dashes before it would be another one.
fn image_option(text: &str) -> Result<String, String> {
    let name = text.split('=').next().unwrap_or_default();
    let plain = !name.is_empty()
        && name.bytes().all(|b| b.is_ascii_lowercase() || b == b'-')
        && !name.starts_with('-');
    if plain {
        Ok(text.to_owned())
    } else {
        Err("write NAME or NAME=VALUE, for example driver=none".to_owned())
    }
}
