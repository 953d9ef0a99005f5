//! What the host's owner may decide. Owns reading `agent.toml` and the environment into one checked [`Settings`]; called
//! once at start by the CLI's `serve`, and for its documentation by `describe`.
//!
//! One flat namespace: key `x_y` of the file is `QUDATA_X_Y` in the environment. Weakest first: default, file,
//! environment, flag. Nothing is guessed: an unknown key or a malformed value, also one that a stronger place overrides,
//! is a [`Problem`], and all of them are told at once.

mod keys;
mod layers;
mod nearest;
mod values;

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr},
    path::{Path, PathBuf},
    time::Duration,
};

use qudata_host::{pci::PciAddress, size::ByteSize};
use qudata_qemu::machine::{Accel, CacheMode};
use qudata_vfio::plan::AfterUse;
use secrecy::SecretString;

use crate::{
    control_plane::{Location, ServiceUrl},
    publishing::plan::TCP_PORTS,
};

pub use self::{
    keys::{SettingDoc, describe},
    layers::{LoadFrom, ReadFileError, SettingsFile},
    values::PortRange,
};

/// Where the file is when nobody says otherwise.
pub const DEFAULT_FILE: &str = "/etc/qudata/agent.toml";

/// How a VM starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FirmwareKind {
    /// OVMF, as cloud images expect.
    Uefi,
    /// SeaBIOS.
    Bios,
    /// Kernel and initrd beside the image: the fastest.
    Direct,
}

impl fmt::Display for FirmwareKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Uefi => "uefi",
            Self::Bios => "bios",
            Self::Direct => "direct",
        })
    }
}

/// How ports are published to the outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TunnelKind {
    /// By frpc.
    Frp,
    /// Not at all: they are on [`Settings::listen`].
    None,
}

impl fmt::Display for TunnelKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Frp => "frp",
            Self::None => "none",
        })
    }
}

/// What keeps VMs running while the agent does not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LauncherKind {
    /// systemd where it runs the host, otherwise the agent itself.
    Auto,
    /// Transient units of systemd, confined.
    Systemd,
    /// Processes in sessions of their own.
    Detached,
}

impl fmt::Display for LauncherKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Systemd => "systemd",
            Self::Detached => "detached",
        })
    }
}

/// Everything the host's owner decided, checked. Each field is described in the table that `describe` prints.
#[derive(Debug, Clone)]
pub struct Settings {
    /// No control plane and no tunnel.
    pub standalone: bool,
    /// Runs without a GPU, and logs more.
    pub debug: bool,
    /// Address of the API and of the VMs' ports.
    pub listen: IpAddr,
    /// TCP port of the API; none: the first free one of 15001 to 15300.
    pub agent_port: Option<u16>,
    /// What executes guest instructions.
    pub accel: Accel,
    /// How a VM starts.
    pub firmware: FirmwareKind,
    /// How ports are published.
    pub tunnel: TunnelKind,
    /// What VMs run under.
    pub launcher: LauncherKind,
    /// What is kept over reboots.
    pub data_dir: PathBuf,
    /// Logs.
    pub log_dir: PathBuf,
    /// What lives for one boot: the API's socket and the VMs' sockets.
    pub vm_run_dir: PathBuf,
    /// Guest images.
    pub image_dir: PathBuf,
    /// The image that disks are made from.
    pub base_image: PathBuf,
    /// QEMU.
    pub qemu_binary: PathBuf,
    /// Makes disks.
    pub qemu_img: PathBuf,
    /// Network of a VM.
    pub passt_binary: PathBuf,
    /// UEFI firmware.
    pub ovmf_code: PathBuf,
    /// Template of a VM's UEFI variables.
    pub ovmf_vars: PathBuf,
    /// vCPUs where a caller names none.
    pub vm_cpus: u32,
    /// RAM where a caller names none.
    pub vm_memory: ByteSize,
    /// Disk in GiB where a caller names none.
    pub vm_storage_gb: u64,
    /// GPUs that may be rented out.
    pub gpu_pci_addrs: Vec<PciAddress>,
    /// Where a GPU goes after an instance.
    pub gpu_after: AfterUse,
    /// Guests reach GPU memory without mapping it.
    pub gpu_no_mmap: bool,
    /// Key for the control plane.
    pub api_key: Option<SecretString>,
    /// Base address of the control plane.
    pub service_url: ServiceUrl,
    /// Address that the control plane is told for this host; none: the one it uses towards the internet.
    pub public_address: Option<Ipv4Addr>,
    /// City and country that the control plane is told.
    pub location_city: String,
    /// See [`Settings::location_city`].
    pub location_country: String,
    /// The control plane is told that this is a test.
    pub test_mode: bool,
    /// The agent's own SSH key for its guests.
    pub management_key: PathBuf,
    /// The tunnel client.
    pub frpc_binary: PathBuf,
    /// The tunnel client's configuration, written by the agent.
    pub frpc_config: PathBuf,
    /// Name or address of the tunnel server; none: that of the region, see [`Settings::frp_server`].
    pub frp_server: Option<String>,
    /// Its port.
    pub frp_port: u16,
    /// What the tunnel server lets clients in by.
    pub frp_token: Option<SecretString>,
    /// Certificate authorities that the tunnel server is checked against; none: it is not checked.
    pub frp_ca: Option<PathBuf>,
    /// Instances start again after a reboot of the host.
    pub start_after_reboot: bool,
    /// How long a guest may take to get ready.
    pub ready_timeout: Duration,
    /// vCPUs that may be promised per CPU of the host.
    pub cpu_overcommit: u32,
    /// First of the user ids that VMs run as.
    pub vm_uid_base: u32,
    /// Networks of the host's side that guests may reach all the same, as CIDR.
    pub egress_allow: Vec<String>,
    /// Use of the host's page cache for disks.
    pub disk_cache: CacheMode,
    /// RAM that is never rented out.
    pub host_reserve_memory: ByteSize,
    /// Disk space that is never rented out.
    pub host_reserve_disk: ByteSize,
    /// Host ports for the guests' SSH.
    pub ssh_ports: PortRange,
    /// Host ports for the guests' other ports.
    pub app_ports: PortRange,
    /// Host ports for the agent's own SSH to its guests.
    pub management_ports: PortRange,
    /// Region of the tunnel server.
    pub region: String,
}

/// One thing that is wrong with the settings, as a sentence with the key, the value where it is no secret, and what is
/// allowed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem(pub(crate) String);

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The agent must not start like this. Displays one problem a line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct SettingsError {
    /// Everything that is wrong.
    pub problems: Vec<Problem>,
}

impl fmt::Display for SettingsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the settings are refused:")?;
        self.problems.iter().try_for_each(|problem| write!(f, "\n  {problem}"))
    }
}

impl Settings {
    /// Settings from everything that can hold one. Looks at nothing but its argument.
    ///
    /// # Errors
    /// With every problem that was found.
    pub fn load(from: &LoadFrom<'_>) -> Result<Self, SettingsError> {
        let (layers, mut problems) = layers::stack(from);
        let mut settings = Self::defaults();
        problems.extend(layers.apply(&mut settings));
        settings.derive_paths(from, |key| layers.is_set(key));
        settings.find_secrets(&layers, from, &mut problems);
        settings.join_tunnel(layers.is_set("tunnel"), &mut problems);
        settings.check_ports(&mut problems);
        if problems.is_empty() { Ok(settings) } else { Err(SettingsError { problems }) }
    }

    /// Defaults that depend on nothing; the table in `keys` repeats them as text.
    fn defaults() -> Self {
        Self {
            standalone: false,
            debug: false,
            listen: Ipv4Addr::LOCALHOST.into(),
            agent_port: None,
            accel: Accel::Kvm,
            firmware: FirmwareKind::Uefi,
            tunnel: TunnelKind::Frp,
            launcher: LauncherKind::Auto,
            data_dir: "/var/lib/qudata".into(),
            log_dir: "/var/log/qudata".into(),
            vm_run_dir: "/var/run/qudata".into(),
            image_dir: PathBuf::new(),
            base_image: PathBuf::new(),
            qemu_binary: "/usr/bin/qemu-system-x86_64".into(),
            qemu_img: "/usr/bin/qemu-img".into(),
            passt_binary: "/usr/bin/passt".into(),
            ovmf_code: PathBuf::new(),
            ovmf_vars: PathBuf::new(),
            vm_cpus: 4,
            vm_memory: ByteSize::from_gib(8),
            vm_storage_gb: 50,
            gpu_pci_addrs: Vec::new(),
            start_after_reboot: true,
            gpu_after: AfterUse::Host,
            gpu_no_mmap: false,
            api_key: None,
            service_url: ServiceUrl::default(),
            public_address: None,
            location_city: String::new(),
            location_country: String::new(),
            test_mode: false,
            management_key: PathBuf::new(),
            frpc_binary: "/usr/local/bin/frpc".into(),
            frpc_config: "/etc/qudata/frpc.toml".into(),
            frp_server: None,
            frp_port: 7000,
            frp_token: None,
            frp_ca: None,
            ready_timeout: Duration::from_secs(600),
            cpu_overcommit: 1,
            vm_uid_base: 720_000,
            egress_allow: Vec::new(),
            disk_cache: CacheMode::Direct,
            host_reserve_memory: ByteSize::from_gib(1),
            host_reserve_disk: ByteSize::from_gib(2),
            ssh_ports: PortRange { first: 10_000, last: 15_000 },
            app_ports: PortRange { first: 20_000, last: 30_000 },
            management_ports: PortRange { first: 30_001, last: 32_000 },
            region: "ru1".into(),
        }
    }

    /// Defaults that follow from other settings or from what is installed.
    fn derive_paths(&mut self, from: &LoadFrom<'_>, is_set: impl Fn(&str) -> bool) {
        let Self { data_dir, image_dir, base_image, management_key, ovmf_code, ovmf_vars, .. } = self;
        let default = |key: &str, field: &mut PathBuf, value: PathBuf| {
            if !is_set(key) {
                *field = value;
            }
        };
        default("image_dir", image_dir, data_dir.join("images"));
        default("base_image", base_image, image_dir.join("qudata-base.qcow2"));
        default("management_key", management_key, data_dir.join(".ssh/management_key"));
        default("ovmf_code", ovmf_code, first_there(from, &keys::OVMF_CODE));
        default("ovmf_vars", ovmf_vars, first_there(from, &keys::OVMF_VARS));
    }

    /// A secret given directly wins over one in a file.
    fn find_secrets(&mut self, layers: &layers::Layers, from: &LoadFrom<'_>, problems: &mut Vec<Problem>) {
        for key in keys::SECRETS.iter().filter(|key| !layers.is_set(key.name)) {
            match layers::secret_text(key.name, layers, from) {
                Ok(None) => {}
                Ok(Some((place, text))) => {
                    if (key.set)(self, text.trim()).is_none() {
                        problems.push(Problem(format!(
                            "{place}: what is in it is not allowed; {} is",
                            key.allowed
                        )));
                    }
                }
                Err(problem) => problems.push(problem),
            }
        }
    }

    /// Tunnels are published through the control plane's server. Whether there is a control plane is decided when the
    /// saved registration is looked at (`control_plane::Membership`): an API key is not needed by a host that has one.
    fn join_tunnel(&mut self, chosen: bool, problems: &mut Vec<Problem>) {
        if self.standalone {
            if chosen && self.tunnel == TunnelKind::Frp {
                problems.push(Problem(
                    "QUDATA_STANDALONE=true excludes QUDATA_TUNNEL=frp: take one of the two away".into(),
                ));
            }
            self.tunnel = TunnelKind::None;
        }
    }

    /// Name or address of the tunnel server.
    pub fn frp_server(&self) -> String {
        self.frp_server.clone().unwrap_or_else(|| format!("agent.{}.qudata.ai", self.region))
    }

    /// Where this host stands, for the control plane.
    pub fn location(&self) -> Location {
        Location {
            city: self.location_city.clone(),
            country: self.location_country.clone(),
            region: self.region.clone(),
        }
    }

    fn check_ports(&self, problems: &mut Vec<Problem>) {
        let ranges = [
            ("QUDATA_SSH_PORTS", self.ssh_ports),
            ("QUDATA_APP_PORTS", self.app_ports),
            ("QUDATA_MANAGEMENT_PORTS", self.management_ports),
        ];
        for (i, (name, range)) in ranges.iter().enumerate() {
            for (other_name, other) in ranges.iter().skip(i + 1).filter(|(_, other)| range.overlaps(*other)) {
                problems.push(Problem(format!(
                    "{name} ({range}) and {other_name} ({other}) overlap: a port may be in one of them only"
                )));
            }
        }
        let reached = self.listen.is_unspecified() || self.listen == Ipv4Addr::LOCALHOST;
        if self.tunnel == TunnelKind::Frp && !reached {
            problems.push(Problem(format!(
                "QUDATA_LISTEN={}: behind a tunnel 127.0.0.1 and 0.0.0.0 are allowed, because the tunnel client connects to \
                 127.0.0.1; take it away, or set QUDATA_TUNNEL=none",
                self.listen
            )));
        }
        let (first, last) = (TCP_PORTS.start(), TCP_PORTS.end());
        let ssh = self.ssh_ports;
        if self.tunnel == TunnelKind::Frp
            && !(TCP_PORTS.contains(&ssh.first) && TCP_PORTS.contains(&ssh.last))
        {
            problems.push(Problem(format!(
                "QUDATA_SSH_PORTS ({ssh}): behind a tunnel, ports from {first} to {last} are allowed; the others are web names"
            )));
        }
    }
}

/// The first path that exists, or the first one, so that an error about it names a path that makes sense.
fn first_there(from: &LoadFrom<'_>, candidates: &[&str]) -> PathBuf {
    let there = candidates.iter().find(|path| (from.exists)(Path::new(path)));
    there.or(candidates.first()).map(PathBuf::from).unwrap_or_default()
}

#[cfg(test)]
mod tests;
