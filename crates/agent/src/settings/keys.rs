//! The table of all settings: name, default, what is allowed, what it means, and where its value goes. The only place
//! that has to change when a setting is added; `describe` makes the documentation from it.

use std::{collections::BTreeSet, time::Duration};

use qudata_host::{pci::PciAddress, size::ByteSize};
use qudata_qemu::machine::{Accel, CacheMode};

use qudata_vfio::plan::AfterUse;

use super::{FirmwareKind, LauncherKind, Settings, TunnelKind, values};

/// Where Debian and Ubuntu have OVMF; the 4M builds are the ones that are still maintained.
pub(super) const OVMF_CODE: [&str; 2] = ["/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_CODE.fd"];
/// The variables that belong to [`OVMF_CODE`], in the same order.
pub(super) const OVMF_VARS: [&str; 2] = ["/usr/share/OVMF/OVMF_VARS_4M.fd", "/usr/share/OVMF/OVMF_VARS.fd"];

/// One setting.
pub(super) struct Key {
    /// Key in the file; upper-cased with `QUDATA_` before it, the environment's name.
    pub(super) name: &'static str,
    /// Default, as documentation.
    pub(super) default: &'static str,
    /// What is allowed, as the end of the sentence "… is allowed".
    pub(super) allowed: &'static str,
    /// What it means.
    pub(super) meaning: &'static str,
    /// Whether the file may have an array here.
    pub(super) list: bool,
    /// Whether its value must never be printed.
    pub(super) secret: bool,
    /// Puts a value in its place; `None`: not allowed.
    pub(super) set: fn(&mut Settings, &str) -> Option<()>,
}

impl Key {
    /// Name in the environment.
    pub(super) fn env(&self) -> String {
        env_name(self.name)
    }
}

/// The environment's name of a key.
pub(super) fn env_name(key: &str) -> String {
    format!("QUDATA_{}", key.to_ascii_uppercase())
}

/// One setting as documentation shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SettingDoc {
    /// Key in the file.
    pub key: &'static str,
    /// Name in the environment.
    pub env: String,
    /// Default.
    pub default: &'static str,
    /// What is allowed.
    pub allowed: &'static str,
    /// What it means.
    pub meaning: &'static str,
}

/// Every setting, for `--help`, the man page and the docs.
pub fn describe() -> Vec<SettingDoc> {
    let doc = |key: &Key| SettingDoc {
        key: key.name,
        env: key.env(),
        default: key.default,
        allowed: key.allowed,
        meaning: key.meaning,
    };
    KEYS.iter().map(doc).collect()
}

fn put<T>(field: &mut T, value: Option<T>) -> Option<()> {
    *field = value?;
    Some(())
}

fn put_number<T: TryFrom<u64>>(field: &mut T, value: Option<u64>) -> Option<()> {
    put(field, T::try_from(value?).ok())
}

const BOOLEAN: &str = "true, false, 1 or 0";
const PATH: &str = "an absolute path";
const SIZE: &str = "a size such as 512M, 8G or 1T";
const API_KEY: &str = "a key that starts with \"ak-\"";
const PLACE: &str = "a name of up to 64 characters";
const TOKEN: &str = "a text of 1 to 512 printable characters without spaces, quotes, backslashes and braces";
const PORTS: &str = "two ports from 1024 to 65535 such as 10000-15000";

macro_rules! key {
    ($name:literal, $default:expr, $allowed:expr, $meaning:literal, $set:expr) => {
        Key {
            name: $name,
            default: $default,
            allowed: $allowed,
            meaning: $meaning,
            list: false,
            secret: false,
            set: $set,
        }
    };
}

/// In the order of the documentation.
pub(super) const KEYS: &[Key] = &[
    key!(
        "standalone",
        "false",
        BOOLEAN,
        "Run without control plane and tunnel, with a secret made here.",
        |s, t| { put(&mut s.standalone, values::boolean(t)) }
    ),
    key!("debug", "false", BOOLEAN, "Run without a GPU and log more.", |s, t| put(
        &mut s.debug,
        values::boolean(t)
    )),
    key!(
        "listen",
        "127.0.0.1",
        "an IP address",
        "Address of the API and of the VMs' ports. Anything but a loopback address shows both to the network.",
        |s, t| put(&mut s.listen, t.parse().ok())
    ),
    key!(
        "agent_port",
        "the first free one of 15001-15300",
        "a port from 1 to 65535",
        "TCP port of the API.",
        |s, t| {
            s.agent_port = Some(u16::try_from(values::number(t, 1..=65535)?).ok()?);
            Some(())
        }
    ),
    key!(
        "accel",
        "kvm",
        "kvm or tcg",
        "What executes guest instructions: the processor, or emulation (slow, for tests).",
        |s, t| {
            s.accel = match t {
                "kvm" => Accel::Kvm,
                "tcg" => Accel::Tcg,
                _ => return None,
            };
            Some(())
        }
    ),
    key!(
        "firmware",
        "uefi",
        "uefi, bios or direct",
        "How a VM starts; direct takes kernel and initrd from beside the image.",
        |s, t| {
            s.firmware = match t {
                "uefi" => FirmwareKind::Uefi,
                "bios" => FirmwareKind::Bios,
                "direct" => FirmwareKind::Direct,
                _ => return None,
            };
            Some(())
        }
    ),
    key!(
        "tunnel",
        "frp; none when standalone",
        "frp or none",
        "How ports are published: through the control plane's tunnel server, or not at all. frp needs a control plane.",
        |s, t| {
            s.tunnel = match t {
                "frp" => TunnelKind::Frp,
                "none" => TunnelKind::None,
                _ => return None,
            };
            Some(())
        }
    ),
    key!(
        "launcher",
        "auto",
        "auto, systemd or detached",
        "What VMs run under: confined units of systemd, or detached processes; auto takes systemd where it can.",
        |s, t| {
            s.launcher = match t {
                "auto" => LauncherKind::Auto,
                "systemd" => LauncherKind::Systemd,
                "detached" => LauncherKind::Detached,
                _ => return None,
            };
            Some(())
        }
    ),
    key!(
        "data_dir",
        "/var/lib/qudata",
        PATH,
        "What is kept over reboots: disks, state, the secret.",
        |s, t| { put(&mut s.data_dir, values::path(t)) }
    ),
    key!(
        "log_dir",
        "/var/log/qudata",
        PATH,
        "Logs. Not used in this version: the agent logs to stderr.",
        |s, t| { put(&mut s.log_dir, values::path(t)) }
    ),
    key!(
        "vm_run_dir",
        "/var/run/qudata",
        PATH,
        "What lives for one boot: the local API socket and the VMs' sockets.",
        |s, t| put(&mut s.vm_run_dir, values::path(t))
    ),
    key!("image_dir", "<data_dir>/images", PATH, "Guest images.", |s, t| put(
        &mut s.image_dir,
        values::path(t)
    )),
    key!(
        "base_image",
        "<image_dir>/qudata-base.qcow2",
        PATH,
        "The cloud-init image that disks are made from.",
        |s, t| put(&mut s.base_image, values::path(t))
    ),
    key!("qemu_binary", "/usr/bin/qemu-system-x86_64", PATH, "QEMU.", |s, t| put(
        &mut s.qemu_binary,
        values::path(t)
    )),
    key!("qemu_img", "/usr/bin/qemu-img", PATH, "Makes the disks.", |s, t| put(
        &mut s.qemu_img,
        values::path(t)
    )),
    key!("passt_binary", "/usr/bin/passt", PATH, "The network of a VM.", |s, t| put(
        &mut s.passt_binary,
        values::path(t)
    )),
    key!(
        "ovmf_code",
        "the first of /usr/share/OVMF/OVMF_CODE_4M.fd, OVMF_CODE.fd that exists",
        PATH,
        "UEFI firmware.",
        |s, t| put(&mut s.ovmf_code, values::path(t))
    ),
    key!(
        "ovmf_vars",
        "the first of /usr/share/OVMF/OVMF_VARS_4M.fd, OVMF_VARS.fd that exists",
        PATH,
        "Template of a VM's UEFI variables; belongs to ovmf_code.",
        |s, t| put(&mut s.ovmf_vars, values::path(t))
    ),
    key!("vm_cpus", "4", "a number from 1 to 1024", "vCPUs where a caller names none.", |s, t| {
        put_number(&mut s.vm_cpus, values::number(t, 1..=1024))
    }),
    key!("vm_memory", "8G", SIZE, "RAM where a caller names none.", |s, t| {
        put(&mut s.vm_memory, t.parse().ok().filter(|size: &ByteSize| size.mib() > 0))
    }),
    key!(
        "vm_storage_gb",
        "50",
        "a number from 1 to 1048576",
        "Disk in GiB where a caller names none.",
        |s, t| { put_number(&mut s.vm_storage_gb, values::number(t, 1..=1_048_576)) }
    ),
    Key {
        name: "gpu_pci_addrs",
        default: "",
        allowed: "PCI addresses such as 0000:65:00.0, each once, with commas between them",
        meaning: "The GPUs that may be rented out.",
        list: true,
        secret: false,
        set: |s, t| {
            let addresses: Vec<PciAddress> = values::list(t, |item| item.parse().ok())?;
            let different: BTreeSet<_> = addresses.iter().collect();
            (different.len() == addresses.len()).then_some(())?;
            put(&mut s.gpu_pci_addrs, Some(addresses))
        },
    },
    key!(
        "gpu_pci_addr",
        "",
        "a PCI address such as 0000:65:00.0",
        "One GPU that may be rented out; added to gpu_pci_addrs.",
        |s, t| {
            let address = t.parse().ok()?;
            if !s.gpu_pci_addrs.contains(&address) {
                s.gpu_pci_addrs.push(address);
            }
            Some(())
        }
    ),
    key!(
        "gpu_after",
        "host",
        "host or vfio",
        "Where a GPU goes after an instance: back to the driver it had, or it stays on vfio-pci.",
        |s, t| {
            s.gpu_after = match t {
                "host" => AfterUse::Host,
                "vfio" => AfterUse::Vfio,
                _ => return None,
            };
            Some(())
        }
    ),
    key!(
        "gpu_no_mmap",
        "false",
        BOOLEAN,
        "Guests reach GPU memory without mapping it: for host kernels on which large GPUs boot slowly.",
        |s, t| put(&mut s.gpu_no_mmap, values::boolean(t))
    ),
    Key {
        name: "api_key",
        default: "",
        allowed: API_KEY,
        meaning: "Key for the control plane. Better: api_key_file, or a systemd credential named api_key.",
        list: false,
        secret: true,
        set: |s, t| put(&mut s.api_key, values::api_key(t).map(Some)),
    },
    key!(
        "api_key_file",
        "$CREDENTIALS_DIRECTORY/api_key",
        PATH,
        "File with the key for the control plane; api_key wins.",
        // Looked up by itself, after all layers are known; here only its form is checked.
        |_, t| values::path(t).map(drop)
    ),
    key!(
        "service_url",
        "https://internal.qudata.ai/v0",
        "an https address without user and query, or an http one of this machine itself,",
        "Control plane. It is called when there is an api_key, or this host was registered before, and not when standalone.",
        |s, t| put(&mut s.service_url, t.parse().ok())
    ),
    key!(
        "public_address",
        "the address used towards the internet",
        "an IPv4 address",
        "Address of this host as the control plane is told it.",
        |s, t| put(&mut s.public_address, t.parse().ok().map(Some))
    ),
    key!("location_city", "", PLACE, "City of this host, for the control plane.", |s, t| put(
        &mut s.location_city,
        values::place(t)
    )),
    key!("location_country", "", PLACE, "Country of this host, for the control plane.", |s, t| put(
        &mut s.location_country,
        values::place(t)
    )),
    key!(
        "test_mode",
        "false",
        BOOLEAN,
        "The control plane is told that this host is for tests.",
        |s, t| put(&mut s.test_mode, values::boolean(t))
    ),
    key!(
        "management_key",
        "<data_dir>/.ssh/management_key",
        PATH,
        "The agent's own SSH key for its guests; made when it is missing.",
        |s, t| put(&mut s.management_key, values::path(t))
    ),
    key!("frpc_binary", "/usr/local/bin/frpc", PATH, "Tunnel client.", |s, t| put(
        &mut s.frpc_binary,
        values::path(t)
    )),
    key!(
        "frpc_config",
        "/etc/qudata/frpc.toml",
        PATH,
        "The tunnel client's configuration, written by the agent.",
        |s, t| put(&mut s.frpc_config, values::path(t))
    ),
    key!(
        "frp_server",
        "agent.<region>.qudata.ai",
        "a host name or an IP address",
        "Tunnel server.",
        |s, t| put(&mut s.frp_server, values::host(t).map(Some))
    ),
    key!("frp_port", "7000", "a port from 1 to 65535", "Port of the tunnel server.", |s, t| put_number(
        &mut s.frp_port,
        values::number(t, 1..=65535)
    )),
    Key {
        name: "frp_token",
        default: "",
        allowed: TOKEN,
        meaning: "What the tunnel server lets clients in by. Better: frp_token_file, or a systemd credential named frp_token.",
        list: false,
        secret: true,
        set: |s, t| put(&mut s.frp_token, values::token(t).map(Some)),
    },
    key!(
        "frp_token_file",
        "$CREDENTIALS_DIRECTORY/frp_token",
        PATH,
        "File with the token of the tunnel server; frp_token wins.",
        |_, t| values::path(t).map(drop)
    ),
    key!(
        "frp_ca",
        "",
        PATH,
        "Certificate authorities (PEM) that the tunnel server is checked against; without it it is not checked.",
        |s, t| put(&mut s.frp_ca, values::path(t).map(Some))
    ),
    key!(
        "after_reboot",
        "start",
        "start or stop",
        "What becomes of instances after a reboot of the host: they start again, or stay stopped with their disks kept.",
        |s, t| {
            s.start_after_reboot = match t {
                "start" => true,
                "stop" => false,
                _ => return None,
            };
            Some(())
        }
    ),
    key!(
        "ready_timeout",
        "600",
        "seconds from 1 to 86400",
        "How long a guest may take until its SSH was proven.",
        |s, t| put(&mut s.ready_timeout, values::number(t, 1..=86_400).map(Duration::from_secs))
    ),
    key!(
        "cpu_overcommit",
        "1",
        "a number from 1 to 16",
        "vCPUs that may be promised per CPU of the host; 1 gives every vCPU a CPU of its own.",
        |s, t| put_number(&mut s.cpu_overcommit, values::number(t, 1..=16))
    ),
    key!(
        "vm_uid_base",
        "720000",
        "a number from 10000 to 4000000000",
        "First of the user ids that VMs and their networks run as; nobody else may use them.",
        |s, t| put_number(&mut s.vm_uid_base, values::number(t, 10_000..=4_000_000_000))
    ),
    Key {
        name: "egress_allow",
        default: "",
        allowed: "networks such as 10.1.0.0/16 or single addresses, with commas between them",
        meaning: "Networks that guests may reach although they are private or this host is attached to them; without it they reach the public internet only, and there no port 25.",
        list: true,
        secret: false,
        set: |s, t| put(&mut s.egress_allow, values::list(t, values::network)),
    },
    key!(
        "disk_cache",
        "none",
        "none or writeback",
        "Use of the host's page cache for disks; writeback where a file system has no direct I/O.",
        |s, t| {
            s.disk_cache = match t {
                "none" => CacheMode::Direct,
                "writeback" => CacheMode::PageCache,
                _ => return None,
            };
            Some(())
        }
    ),
    key!("host_reserve_memory", "1G", SIZE, "RAM that is never rented out.", |s, t| put(
        &mut s.host_reserve_memory,
        t.parse().ok()
    )),
    key!("host_reserve_disk", "2G", SIZE, "Disk space that is never rented out.", |s, t| put(
        &mut s.host_reserve_disk,
        t.parse().ok()
    )),
    key!("ssh_ports", "10000-15000", PORTS, "Host ports for the guests' SSH.", |s, t| put(
        &mut s.ssh_ports,
        values::ports(t)
    )),
    key!("app_ports", "20000-30000", PORTS, "Host ports for the guests' other ports.", |s, t| put(
        &mut s.app_ports,
        values::ports(t)
    )),
    key!(
        "management_ports",
        "30001-32000",
        PORTS,
        "Host ports for the agent's own SSH to its guests; always on 127.0.0.1.",
        |s, t| put(&mut s.management_ports, values::ports(t))
    ),
    key!(
        "region",
        "ru1",
        "1 to 32 lower-case letters, digits and dashes",
        "Region of the tunnel server, and of this host as the control plane is told it.",
        |s, t| put(&mut s.region, values::label(t))
    ),
];

/// A secret that may also be in a file, which `<name>_file` names, or be a systemd credential of its own name.
pub(super) struct SecretKey {
    pub(super) name: &'static str,
    pub(super) allowed: &'static str,
    pub(super) set: fn(&mut Settings, &str) -> Option<()>,
}

/// All of them.
pub(super) const SECRETS: [SecretKey; 2] = [
    SecretKey {
        name: "api_key",
        allowed: API_KEY,
        set: |s, t| put(&mut s.api_key, values::api_key(t).map(Some)),
    },
    SecretKey {
        name: "frp_token",
        allowed: TOKEN,
        set: |s, t| put(&mut s.frp_token, values::token(t).map(Some)),
    },
];

/// The key with this name.
pub(super) fn find(name: &str) -> Option<&'static Key> {
    KEYS.iter().find(|key| key.name == name)
}
