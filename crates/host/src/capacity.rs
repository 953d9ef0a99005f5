//! What the host has: CPUs, memory, disk. Observed fresh on every admission, never cached, because the owner's own
//! programs use the same machine.

use std::{
    io,
    path::{Path, PathBuf},
};

use crate::size::ByteSize;

/// Capacity at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostCapacity {
    /// Logical CPUs this process may run on.
    pub cpus: u32,
    /// `MemTotal`.
    pub memory_total: ByteSize,
    /// `MemAvailable`: what can be taken without swapping, by the kernel's estimate.
    pub memory_available: ByteSize,
    /// Size of the file system that holds the disks.
    pub disk_total: ByteSize,
    /// Free space there for ordinary users.
    pub disk_free: ByteSize,
}

/// The host's capacity could not be read.
#[derive(Debug, thiserror::Error)]
#[error("cannot read the capacity of this host from {path}")]
pub struct CapacityError {
    /// The file or directory that was read.
    pub path: PathBuf,
    /// Why it failed.
    #[source]
    pub source: io::Error,
}

impl HostCapacity {
    /// Reads `/proc/meminfo`, the CPU affinity and the file system that `dir` is on.
    ///
    /// # Errors
    /// When one of them cannot be read.
    pub fn observe(dir: &Path) -> Result<Self, CapacityError> {
        let meminfo = Path::new("/proc/meminfo");
        let fail = |path: &Path| {
            let path = path.to_owned();
            move |source| CapacityError { path, source }
        };
        let text = std::fs::read_to_string(meminfo).map_err(fail(meminfo))?;
        let field = |name: &str| {
            meminfo_kib(&text, name).map(|kib| ByteSize::from_bytes(kib.saturating_mul(1024))).ok_or_else(
                || fail(meminfo)(io::Error::new(io::ErrorKind::InvalidData, format!("no {name}"))),
            )
        };
        let fs = rustix::fs::statvfs(dir).map_err(|e| fail(dir)(e.into()))?;
        let cpus = std::thread::available_parallelism().map_err(fail(Path::new("/proc/self/status")))?;
        Ok(Self {
            cpus: u32::try_from(cpus.get()).unwrap_or(u32::MAX),
            memory_total: field("MemTotal")?,
            memory_available: field("MemAvailable")?,
            disk_total: ByteSize::from_bytes(fs.f_blocks.saturating_mul(fs.f_frsize)),
            disk_free: ByteSize::from_bytes(fs.f_bavail.saturating_mul(fs.f_frsize)),
        })
    }
}

fn meminfo_kib(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(':'))?;
    line.trim().strip_suffix("kB")?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_host_has_something() {
        let capacity = HostCapacity::observe(Path::new("/")).unwrap();
        assert!(capacity.cpus > 0 && capacity.memory_total.mib() > 0);
        assert!(
            capacity.memory_available <= capacity.memory_total && capacity.disk_free <= capacity.disk_total
        );
    }

    #[test]
    fn meminfo_fields_are_matched_whole() {
        let text = "MemTotalX: 1 kB\nMemTotal:       24 kB\n";
        assert_eq!(meminfo_kib(text, "MemTotal"), Some(24));
        assert_eq!(meminfo_kib(text, "Mem"), None);
    }
}
