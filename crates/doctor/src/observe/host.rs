//! The kernel and what the host has of memory and disk.

use std::path::{Path, PathBuf};

use qudata_host::{capacity::HostCapacity, causes::chain, size::ByteSize};
use rustix::process::{Resource, getrlimit};

use super::{Look, text};
use crate::observed::{Cgroup, Hugepages, Iommu, Kernel, Seen, Unseen};

/// By either of these ACPI tables the firmware tells of an IOMMU.
const IOMMU_TABLES: [(&str, Iommu); 2] = [("DMAR", Iommu::Intel), ("IVRS", Iommu::Amd)];
/// Four bytes of attributes and one that says yes or no; UEFI Specification 2.10, 3.3 "Globally Defined Variables".
const SECURE_BOOT: &str = "sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c";

/// What is here.
pub(super) struct HostLook {
    pub(super) firmware_iommu: Option<Iommu>,
    pub(super) kernel: Kernel,
    pub(super) capacity: Seen<HostCapacity>,
    pub(super) hugepages: Seen<Hugepages>,
    pub(super) memlock: Option<ByteSize>,
    pub(super) cgroup: Cgroup,
}

pub(super) async fn observe(look: &Look) -> HostLook {
    let tables = look.read(|look| {
        let dir = look.root.join("sys/firmware/acpi/tables");
        Ok(IOMMU_TABLES.iter().find(|(table, _)| dir.join(table).exists()).map(|(_, kind)| *kind))
    });
    let kernel = look.read(|look| Ok(kernel(&look.root)));
    let capacity = look.read(|look| {
        let dir = existing(&look.under(&look.settings.data_dir));
        HostCapacity::observe(&dir).map_err(|error| Unseen::Failed(chain(&error)))
    });
    let hugepages = look.read(|look| hugepages(&look.root.join("sys/kernel/mm/hugepages")));
    let cgroup = look.read(|look| Ok(cgroup(&look.root.join("sys/fs/cgroup"))));
    let (tables, kernel, capacity, hugepages, cgroup) =
        tokio::join!(tables, kernel, capacity, hugepages, cgroup);
    HostLook {
        firmware_iommu: tables.unwrap_or_default(),
        kernel: kernel.unwrap_or_else(unknown_kernel),
        capacity,
        hugepages,
        memlock: getrlimit(Resource::Memlock).current.map(ByteSize::from_bytes),
        cgroup: cgroup.unwrap_or(Cgroup::Absent),
    }
}

/// The file system of a directory that is not made yet is that of its nearest parent.
fn existing(dir: &Path) -> PathBuf {
    dir.ancestors().find(|dir| dir.exists()).unwrap_or(Path::new("/")).to_owned()
}

fn unknown_kernel(unseen: Unseen) -> Kernel {
    Kernel {
        version: Err(unseen),
        release: String::new(),
        has_vfio_pci: false,
        lockdown: "none".to_owned(),
        secure_boot: false,
    }
}

fn kernel(root: &Path) -> Kernel {
    let release = text(&root.join("proc/sys/kernel/osrelease")).map(|text| text.trim().to_owned());
    let parsed = |text: String| text.parse().map_err(|error| Unseen::Failed(format!("{error}")));
    let version = release.clone().and_then(parsed);
    let release = release.unwrap_or_default();
    let modules = root.join("lib/modules").join(&release);
    let lists = ["modules.dep", "modules.builtin"];
    let has = |list: &&str| text(&modules.join(list)).is_ok_and(|text| text.contains("/vfio-pci.ko"));
    Kernel {
        version,
        has_vfio_pci: lists.iter().any(has),
        lockdown: lockdown(&text(&root.join("sys/kernel/security/lockdown")).unwrap_or_default()),
        secure_boot: std::fs::read(root.join(SECURE_BOOT)).is_ok_and(|bytes| bytes.last() == Some(&1)),
        release,
    }
}

/// The word in brackets of `none [integrity] confidentiality`; a kernel without lockdown has none.
fn lockdown(text: &str) -> String {
    let inner = text.split_once('[').and_then(|(_, rest)| rest.split_once(']'));
    inner.map_or("none", |(word, _)| word).to_owned()
}

fn hugepages(dir: &Path) -> Seen<Hugepages> {
    let mut pages = Hugepages::default();
    let Ok(entries) = std::fs::read_dir(dir) else { return Ok(pages) };
    for entry in entries.filter_map(Result::ok) {
        let name = entry.file_name();
        let size = name.to_str().and_then(|name| name.strip_prefix("hugepages-")?.strip_suffix("kB"));
        let Some(kib) = size.and_then(|kib| kib.parse::<u64>().ok()) else { continue };
        let bytes = |file: &str| -> Seen<ByteSize> {
            let path = entry.path().join(file);
            let count: u64 = text(&path)?
                .trim()
                .parse()
                .map_err(|_| Unseen::Failed(format!("{} holds no number", path.display())))?;
            Ok(ByteSize::from_bytes(count.saturating_mul(kib).saturating_mul(1024)))
        };
        pages.reserved = pages.reserved.saturating_add(bytes("nr_hugepages")?);
        pages.free = pages.free.saturating_add(bytes("free_hugepages")?);
    }
    Ok(pages)
}

fn cgroup(dir: &Path) -> Cgroup {
    match text(&dir.join("cgroup.controllers")) {
        Ok(list) => Cgroup::V2(list.split_ascii_whitespace().map(str::to_owned).collect()),
        Err(_) if dir.join("memory").is_dir() || dir.join("systemd").is_dir() => Cgroup::V1,
        Err(_) => Cgroup::Absent,
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn put(root: &Path, file: &str, content: impl AsRef<[u8]>) {
        let path = root.join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }

    #[test]
    fn kernels() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        assert!(kernel(root).version.is_err());
        put(root, "proc/sys/kernel/osrelease", "6.12.41-amd64\n");
        let plain = kernel(root);
        assert_eq!((plain.release.as_str(), plain.lockdown.as_str()), ("6.12.41-amd64", "none"));
        assert_eq!(plain.version.unwrap().to_string(), "6.12");
        assert!(!plain.has_vfio_pci && !plain.secure_boot);
        put(root, "lib/modules/6.12.41-amd64/modules.dep", "kernel/drivers/vfio/pci/vfio-pci.ko.xz: x\n");
        put(root, "sys/kernel/security/lockdown", "none [integrity] confidentiality\n");
        put(root, SECURE_BOOT, [6, 0, 0, 0, 1]);
        let locked = kernel(root);
        assert_eq!(
            (locked.lockdown.as_str(), locked.secure_boot, locked.has_vfio_pci),
            ("integrity", true, true)
        );
    }

    #[test]
    fn reserved_pages_are_added_up() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        assert_eq!(hugepages(&root.join("none")).unwrap().reserved, ByteSize::default());
        put(root, "hugepages-2048kB/nr_hugepages", "512\n");
        put(root, "hugepages-2048kB/free_hugepages", "256\n");
        put(root, "hugepages-1048576kB/nr_hugepages", "3\n");
        put(root, "hugepages-1048576kB/free_hugepages", "0\n");
        let pages = hugepages(root).unwrap();
        assert_eq!((pages.reserved, pages.free), (ByteSize::from_gib(4), ByteSize::from_mib(512)));
        put(root, "hugepages-2048kB/nr_hugepages", "many\n");
        assert!(hugepages(root).is_err());
    }

    #[test]
    fn versions_of_cgroups() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(cgroup(dir.path()), Cgroup::Absent);
        fs::create_dir(dir.path().join("memory")).unwrap();
        assert_eq!(cgroup(dir.path()), Cgroup::V1);
        put(dir.path(), "cgroup.controllers", "cpuset cpu memory\n");
        assert_eq!(cgroup(dir.path()), Cgroup::V2(["cpuset", "cpu", "memory"].map(str::to_owned).to_vec()));
    }

    #[test]
    fn space_is_looked_for_where_the_data_will_be() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(existing(&dir.path().join("var/lib/qudata")), dir.path());
    }
}
