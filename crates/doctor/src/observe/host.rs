//! The kernel and what the host has of memory and disk.

use std::path::{Path, PathBuf};

use qudata_host::{capacity::HostCapacity, causes::chain, size::ByteSize};
use rustix::process::{Resource, getrlimit};

use super::{Look, is_absent, is_file, text, text_if_any, unreadable};
use crate::observed::{Cgroup, Hugepages, Iommu, Kernel, Seen, Unseen};

/// By either of these ACPI tables the firmware tells of an IOMMU.
const IOMMU_TABLES: [(&str, Iommu); 2] = [("DMAR", Iommu::Intel), ("IVRS", Iommu::Amd)];
/// Four bytes of attributes and one that says yes or no; UEFI Specification 2.10, 3.3 "Globally Defined Variables".
const SECURE_BOOT: &str = "sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c";

/// What is here.
pub(super) struct HostLook {
    pub(super) firmware_iommu: Seen<Option<Iommu>>,
    pub(super) kernel: Kernel,
    pub(super) capacity: Seen<HostCapacity>,
    pub(super) hugepages: Seen<Hugepages>,
    pub(super) memlock: Option<ByteSize>,
    pub(super) cgroup: Seen<Cgroup>,
}

pub(super) async fn observe(look: &Look) -> HostLook {
    let tables = look.read(|look| firmware_iommu(&look.root.join("sys/firmware/acpi/tables")));
    let kernel = look.read(|look| Ok(kernel(&look.root)));
    let capacity = look.read(|look| {
        let dir = existing(&look.under(&look.settings.data_dir));
        HostCapacity::observe(&dir).map_err(|error| Unseen::Failed(chain(&error)))
    });
    let hugepages = look.read(|look| hugepages(&look.root.join("sys/kernel/mm/hugepages")));
    let cgroup = look.read(|look| cgroup(&look.root.join("sys/fs/cgroup")));
    let (tables, kernel, capacity, hugepages, cgroup) =
        tokio::join!(tables, kernel, capacity, hugepages, cgroup);
    HostLook {
        firmware_iommu: tables,
        kernel: kernel.unwrap_or_else(|unseen| unseen_kernel(&unseen)),
        capacity,
        hugepages,
        memlock: getrlimit(Resource::Memlock).current.map(ByteSize::from_bytes),
        cgroup,
    }
}

/// The file system of a directory that is not made yet is that of its nearest parent.
fn existing(dir: &Path) -> PathBuf {
    dir.ancestors().find(|dir| dir.exists()).unwrap_or(Path::new("/")).to_owned()
}

fn firmware_iommu(tables: &Path) -> Seen<Option<Iommu>> {
    for (table, kind) in IOMMU_TABLES {
        if is_file(&tables.join(table))? {
            return Ok(Some(kind));
        }
    }
    Ok(None)
}

/// Nothing of it is known: neither that it is as it should be nor that it is not.
fn unseen_kernel(unseen: &Unseen) -> Kernel {
    let unseen = || unseen.clone();
    Kernel {
        version: Err(unseen()),
        release: String::new(),
        has_vfio_pci: Err(unseen()),
        lockdown: Err(unseen()),
        secure_boot: Err(unseen()),
    }
}

fn kernel(root: &Path) -> Kernel {
    let release = text(&root.join("proc/sys/kernel/osrelease")).map(|text| text.trim().to_owned());
    let parsed = |text: String| text.parse().map_err(|error| Unseen::Failed(format!("{error}")));
    let version = release.clone().and_then(parsed);
    let modules = release.clone().map(|release| root.join("lib/modules").join(release));
    Kernel {
        version,
        has_vfio_pci: modules.and_then(|modules| has_vfio_pci(&modules)),
        // A kernel without the file cannot be locked down.
        lockdown: text_if_any(&root.join("sys/kernel/security/lockdown"))
            .map(|text| lockdown(&text.unwrap_or_default())),
        secure_boot: secure_boot(root),
        release: release.unwrap_or_default(),
    }
}

fn has_vfio_pci(modules: &Path) -> Seen<bool> {
    let mut seen = Ok(false);
    for list in ["modules.dep", "modules.builtin"] {
        match text_if_any(&modules.join(list)) {
            Ok(Some(text)) if text.contains("/vfio-pci.ko") => return Ok(true),
            Ok(_) => {}
            // The other list may still have it.
            Err(unseen) => seen = Err(unseen),
        }
    }
    seen
}

fn secure_boot(root: &Path) -> Seen<bool> {
    let path = root.join(SECURE_BOOT);
    match std::fs::read(&path) {
        Ok(bytes) => match bytes.last() {
            Some(on) => Ok(*on == 1),
            None => Err(Unseen::Failed(format!("{} is empty", path.display()))),
        },
        Err(error) if is_absent(&error) && hides_variables(root) => {
            Err(Unseen::Failed("efivarfs is not mounted on /sys/firmware/efi/efivars".to_owned()))
        }
        // Older firmware, and firmware that knows no Secure Boot.
        Err(error) if is_absent(&error) => Ok(false),
        Err(error) => Err(unreadable(&path, &error)),
    }
}

/// A host that was booted by UEFI, whose firmware always has variables, and none can be seen.
fn hides_variables(root: &Path) -> bool {
    let efi = root.join("sys/firmware/efi");
    let variables = std::fs::read_dir(efi.join("efivars"));
    efi.is_dir() && variables.map_or(true, |mut entries| entries.next().is_none())
}

/// The word in brackets of `none [integrity] confidentiality`; a kernel without lockdown has none.
fn lockdown(text: &str) -> String {
    let inner = text.split_once('[').and_then(|(_, rest)| rest.split_once(']'));
    inner.map_or("none", |(word, _)| word).to_owned()
}

fn hugepages(dir: &Path) -> Seen<Hugepages> {
    let mut pages = Hugepages::default();
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        // A kernel without such pages.
        Err(error) if is_absent(&error) => return Ok(pages),
        Err(error) => return Err(unreadable(dir, &error)),
    };
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

fn cgroup(dir: &Path) -> Seen<Cgroup> {
    Ok(match text_if_any(&dir.join("cgroup.controllers"))? {
        Some(list) => Cgroup::V2(list.split_ascii_whitespace().map(str::to_owned).collect()),
        None if dir.join("memory").is_dir() || dir.join("systemd").is_dir() => Cgroup::V1,
        None => Cgroup::Absent,
    })
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
        assert_eq!((plain.release.as_str(), plain.lockdown), ("6.12.41-amd64", Ok("none".to_owned())));
        assert_eq!(plain.version.unwrap().to_string(), "6.12");
        assert_eq!((plain.has_vfio_pci, plain.secure_boot), (Ok(false), Ok(false)));
        put(root, "lib/modules/6.12.41-amd64/modules.dep", "kernel/drivers/vfio/pci/vfio-pci.ko.xz: x\n");
        put(root, "sys/kernel/security/lockdown", "none [integrity] confidentiality\n");
        put(root, SECURE_BOOT, [6, 0, 0, 0, 1]);
        let locked = kernel(root);
        assert_eq!(
            (locked.lockdown, locked.secure_boot, locked.has_vfio_pci),
            (Ok("integrity".to_owned()), Ok(true), Ok(true))
        );
    }

    /// Reading it fails, for root as well: a loop of links.
    fn spoil(root: &Path, file: &str) {
        let path = root.join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::os::unix::fs::symlink(&path, &path).unwrap();
    }

    #[test]
    fn what_cannot_be_read_is_neither_off_nor_missing() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        put(root, "proc/sys/kernel/osrelease", "6.12.41-amd64\n");
        spoil(root, "sys/kernel/security/lockdown");
        spoil(root, SECURE_BOOT);
        spoil(root, "lib/modules/6.12.41-amd64/modules.dep");
        let seen = kernel(root);
        assert!(matches!(&seen.lockdown, Err(Unseen::Failed(why)) if why.contains("lockdown")), "{seen:?}");
        assert!(seen.secure_boot.is_err() && seen.has_vfio_pci.is_err(), "{seen:?}");
        put(root, "lib/modules/6.12.41-amd64/modules.builtin", "kernel/drivers/vfio/pci/vfio-pci.ko\n");
        assert_eq!(kernel(root).has_vfio_pci, Ok(true), "the other list has it");
        spoil(root, "sys/fs/cgroup/cgroup.controllers");
        assert!(cgroup(&root.join("sys/fs/cgroup")).is_err());
        spoil(root, "sys/firmware/acpi/tables/DMAR");
        assert!(firmware_iommu(&root.join("sys/firmware/acpi/tables")).is_err());
        spoil(root, "sys/kernel/mm/hugepages");
        assert!(hugepages(&root.join("sys/kernel/mm/hugepages")).is_err());
    }

    #[test]
    fn a_firmware_whose_variables_are_hidden_is_not_one_without_secure_boot() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("sys/firmware/efi/efivars")).unwrap();
        let seen = secure_boot(dir.path());
        assert!(matches!(&seen, Err(Unseen::Failed(why)) if why.contains("efivarfs")), "{seen:?}");
        put(dir.path(), "sys/firmware/efi/efivars/BootOrder-8be4df61", [6, 0, 0, 0, 1]);
        assert_eq!(secure_boot(dir.path()), Ok(false));
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
        assert_eq!(cgroup(dir.path()), Ok(Cgroup::Absent));
        fs::create_dir(dir.path().join("memory")).unwrap();
        assert_eq!(cgroup(dir.path()), Ok(Cgroup::V1));
        put(dir.path(), "cgroup.controllers", "cpuset cpu memory\n");
        let list = ["cpuset", "cpu", "memory"].map(str::to_owned).to_vec();
        assert_eq!(cgroup(dir.path()), Ok(Cgroup::V2(list)));
    }

    #[test]
    fn space_is_looked_for_where_the_data_will_be() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(existing(&dir.path().join("var/lib/qudata")), dir.path());
    }
}
