//! What this host is made of, for `/init/host`. Owns reading it from the kernel's files; `keeper` sends it. What cannot be
//! read is 0 or empty with a line in the log: a host is not kept from its work by an odd table of its firmware.

mod cpu;
mod dmi;
mod gpu;
mod network;

use std::{
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
};

use qudata_host::{causes::chain, pci::PciAddress, size::ByteSize};
use qudata_vfio::{names::PciIds, topology};
use serde::Serialize;

use self::cpu::Cpu;

/// Where to look.
#[derive(Debug, Clone)]
pub struct HostLook {
    /// Root of the file system; `/` but in tests.
    pub root: PathBuf,
    /// Where the disks are; its file system is what can be rented.
    pub data_dir: PathBuf,
    /// The GPUs that may be rented, empty meaning all but the host's console; none where no GPU is rented.
    pub gpus: Option<Vec<PciAddress>>,
    /// Where the host stands, as its owner says.
    pub location: Location,
}

/// Where a host stands.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Location {
    /// City.
    pub city: String,
    /// Country.
    pub country: String,
    /// Region of the tunnel server.
    pub region: String,
}

/// The body of `/init/host`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct HostFacts {
    /// Model without vendor and spaces, `TeslaT4`; of several models the most frequent one.
    gpu_name: String,
    gpu_amount: u32,
    /// GiB of one GPU; 0 where it cannot be told from outside.
    vram: f64,
    /// Only a driver knows, and the host need not have one.
    max_cuda: f64,
    location: Location,
    configuration: Configuration,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
struct Configuration {
    ram: Amount,
    disk: Amount,
    cpu_name: String,
    /// Logical ones: what a renter gets as one vCPU.
    cpu_cores: u32,
    /// GHz.
    cpu_freq: f64,
    /// MT/s.
    memory_speed: u32,
    /// Mbit/s of the interface that leads outside, both ways.
    ethernet_in: u32,
    ethernet_out: u32,
    /// The original's figure: cores × GHz × GiB of RAM / 100.
    capacity: f64,
    max_cuda_version: f64,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
struct Amount {
    amount: f64,
    unit: &'static str,
}

impl Amount {
    fn of(size: ByteSize) -> Self {
        Self { amount: decimals(gib(size)), unit: "gb" }
    }
}

fn gib(size: ByteSize) -> f64 {
    size.bytes() as f64 / f64::from(1 << 30)
}

/// Two decimals say enough.
fn decimals(value: f64) -> f64 {
    (value * 100.0).round() / 100.0
}

/// Looks at the host. Blocks for as long as the kernel takes for a few hundred small files.
pub(super) fn observe(look: &HostLook) -> HostFacts {
    let root = &look.root;
    let Cpu { name, cores, ghz } = cpu::observe(root);
    let ram = memory(root);
    let gpus = look.gpus.as_deref().map(|configured| gpus(root, configured)).unwrap_or_default();
    let speed = network::observe(root).unwrap_or_else(|| unknown("the speed of the network interface"));
    let configuration = Configuration {
        ram: Amount::of(ram),
        disk: Amount::of(disk(&look.data_dir)),
        capacity: decimals(f64::from(cores) * ghz * gib(ram) / 100.0),
        cpu_name: name,
        cpu_cores: cores,
        cpu_freq: decimals(ghz),
        memory_speed: dmi::observe(root).unwrap_or_else(|| unknown("the speed of the memory")),
        ethernet_in: speed,
        ethernet_out: speed,
        max_cuda_version: 0.0,
    };
    HostFacts {
        gpu_name: gpus.name,
        gpu_amount: gpus.amount,
        vram: gpus.vram,
        max_cuda: 0.0,
        location: look.location.clone(),
        configuration,
    }
}

/// The machine's id, which systemd made when the host was installed; `unknown` where there is none, as in the original.
pub(super) fn machine_id(root: &Path) -> String {
    let plain = |text: &String| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    let places = ["etc/machine-id", "var/lib/dbus/machine-id"];
    let found = places.iter().find_map(|place| {
        read_text(&root.join(place), 128).ok().map(|text| text.trim().to_owned()).filter(plain)
    });
    found.unwrap_or_else(|| "unknown".to_owned())
}

fn gpus(root: &Path, configured: &[PciAddress]) -> gpu::GpuFacts {
    let ids = PciIds::load(root);
    match topology::observe(root) {
        Ok(topology) => gpu::plan_gpus(&topology, configured, &|vendor, device| ids.name(vendor, device)),
        Err(error) => {
            tracing::warn!(error = %chain(&error), "the control plane is told of no GPU");
            gpu::GpuFacts::default()
        }
    }
}

fn memory(root: &Path) -> ByteSize {
    let text = read_text(&root.join("proc/meminfo"), 64 << 10).unwrap_or_default();
    let total = text
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix("kB")?.trim().parse().ok());
    let bytes =
        total.map(|kib: u64| kib.saturating_mul(1024)).unwrap_or_else(|| unknown("the size of the memory"));
    ByteSize::from_bytes(bytes)
}

fn disk(dir: &Path) -> ByteSize {
    let bytes = rustix::fs::statvfs(dir).map(|fs| fs.f_blocks.saturating_mul(fs.f_frsize));
    ByteSize::from_bytes(bytes.unwrap_or_else(|_| unknown("the size of the file system with the disks")))
}

/// What is said in place of a fact.
fn unknown<T: Default>(what: &str) -> T {
    tracing::warn!("{what} cannot be told; the control plane gets nothing for it");
    T::default()
}

/// The start of a file, as text; what is no text becomes replacement characters.
fn read_text(path: &Path, most: u64) -> io::Result<String> {
    read_bytes(path, most).map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
}

fn read_bytes(path: &Path, most: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(most).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn write(root: &Path, path: &str, bytes: impl AsRef<[u8]>) {
        let path = root.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }

    fn look(root: &Path) -> HostLook {
        HostLook {
            root: root.to_owned(),
            data_dir: root.to_owned(),
            gpus: Some(Vec::new()),
            location: Location { city: "Riga".into(), country: "LV".into(), region: "eu-1".into() },
        }
    }

    #[test]
    fn a_server_is_described_with_the_names_of_the_contract() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        write(root, "proc/meminfo", "MemTotal:       67108864 kB\nMemFree: 1 kB\n");
        write(
            root,
            "proc/cpuinfo",
            "processor\t: 0\nmodel name\t: Some CPU @ 2.50GHz\nprocessor\t: 1\nmodel name\t: Some CPU @ 2.50GHz\n",
        );
        write(
            root,
            "proc/net/route",
            "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\neth0\t00000000\t0100000A\t0003\t0\t0\t100\t00000000\n",
        );
        write(root, "sys/class/net/eth0/speed", "10000\n");
        fs::create_dir_all(root.join("sys/bus/pci/devices")).unwrap();
        let facts = serde_json::to_value(observe(&look(root))).unwrap();
        let configuration = &facts["configuration"];
        assert_eq!(configuration["ram"], serde_json::json!({"amount": 64.0, "unit": "gb"}));
        assert_eq!(configuration["cpu_name"], "Some CPU @ 2.50GHz");
        assert_eq!((&configuration["cpu_cores"], &configuration["cpu_freq"]), (&2.into(), &2.5.into()));
        assert_eq!(
            (&configuration["ethernet_in"], &configuration["ethernet_out"]),
            (&10000.into(), &10000.into())
        );
        assert_eq!(configuration["capacity"], 3.2);
        assert!(configuration["disk"]["amount"].as_f64().unwrap() > 0.0);
        assert_eq!(facts["location"], serde_json::json!({"city": "Riga", "country": "LV", "region": "eu-1"}));
        assert_eq!((&facts["gpu_name"], &facts["gpu_amount"]), (&"".into(), &0.into()));
        let names: Vec<&String> = facts.as_object().unwrap().keys().collect();
        assert_eq!(names, ["configuration", "gpu_amount", "gpu_name", "location", "max_cuda", "vram"]);
        let names: Vec<&String> = configuration.as_object().unwrap().keys().collect();
        assert_eq!(
            names,
            [
                "capacity",
                "cpu_cores",
                "cpu_freq",
                "cpu_name",
                "disk",
                "ethernet_in",
                "ethernet_out",
                "max_cuda_version",
                "memory_speed",
                "ram"
            ]
        );
    }

    #[test]
    fn a_host_that_shows_nothing_is_described_all_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let facts = observe(&look(dir.path()));
        assert_eq!((facts.gpu_amount, facts.configuration.memory_speed), (0, 0));
        let no_gpus = observe(&HostLook { gpus: None, ..look(dir.path()) });
        assert_eq!(no_gpus.gpu_amount, 0);
    }

    #[test]
    fn this_host_is_read() {
        let facts = observe(&HostLook { root: "/".into(), ..look(Path::new("/")) });
        assert!(facts.configuration.cpu_cores > 0 && facts.configuration.ram.amount > 0.1);
        assert!(!facts.configuration.cpu_name.is_empty());
    }

    #[test]
    fn the_machine_id_is_hex_or_unknown() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(machine_id(dir.path()), "unknown");
        write(dir.path(), "var/lib/dbus/machine-id", "0123456789abcdef0123456789abcdef\n");
        assert_eq!(machine_id(dir.path()), "0123456789abcdef0123456789abcdef");
        write(dir.path(), "etc/machine-id", "uninitialized\n");
        assert_eq!(machine_id(dir.path()), "0123456789abcdef0123456789abcdef");
        write(dir.path(), "etc/machine-id", "fedcba9876543210fedcba9876543210\n");
        assert_eq!(machine_id(dir.path()), "fedcba9876543210fedcba9876543210");
    }
}
