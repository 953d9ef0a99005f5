//! What backs a machine's RAM. Owns the choice (pure) between huge pages and ordinary ones, the look at the host's pools,
//! and what follows from it: how much may be locked and how long a launch may take. The agent calls it; `argv` renders it.
//!
//! Passthrough pins all RAM before QEMU answers. Measured for each GiB: 2840 ms with untouched small pages, 14 ms with
//! huge pages touched beforehand. So GPUs get huge pages where the owner reserved some, and RAM that is filled in
//! parallel as transparent huge pages otherwise. A machine without GPUs takes RAM as it uses it.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use qudata_host::size::ByteSize;

/// QEMU itself uses fewer when the host has fewer processors.
const MOST_THREADS: u64 = 16;
/// QEMU locks more than RAM: firmware, video memory, buffers for I/O.
const LOCKED_BESIDES_RAM: ByteSize = ByteSize::from_gib(1);

/// From exec to an answer when nothing is pinned. On an emulated host that was busy otherwise, a QEMU worked for 42 s.
const LAUNCH: Duration = Duration::from_secs(90);
/// For each GiB of huge pages: ten times what clearing them took one thread on hardware (0.5 s), and more than it took
/// under emulation (1.8 s).
const PER_GIB_HUGE: Duration = Duration::from_secs(5);
/// For each GiB of other pages: the slowest reported start took 210 s for 24 GiB.
const PER_GIB_SMALL: Duration = Duration::from_secs(10);

/// Pages that the owner can reserve.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum HugePage {
    /// 2 MiB.
    Mib2,
    /// 1 GiB.
    Gib1,
}

impl HugePage {
    /// Its size.
    #[must_use]
    pub const fn size(self) -> ByteSize {
        match self {
            Self::Mib2 => ByteSize::from_mib(2),
            Self::Gib1 => ByteSize::from_gib(1),
        }
    }

    /// The name of its pool in sysfs.
    const fn pool(self) -> &'static str {
        match self {
            Self::Mib2 => "hugepages-2048kB",
            Self::Gib1 => "hugepages-1048576kB",
        }
    }
}

/// Huge pages that nobody has and nobody was promised.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FreePages {
    /// Pages of 2 MiB.
    pub mib2: u64,
    /// Pages of 1 GiB.
    pub gib1: u64,
}

impl FreePages {
    const fn of(self, page: HugePage) -> u64 {
        match page {
            HugePage::Mib2 => self.mib2,
            HugePage::Gib1 => self.gib1,
        }
    }
}

/// The reserved pages of the host at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HugepagePools {
    /// On all nodes together.
    pub host: FreePages,
    /// On each NUMA node.
    pub nodes: BTreeMap<u32, FreePages>,
}

/// Reserved pages that one machine takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PagesTaken {
    /// Their size.
    pub page: HugePage,
    /// Their node; none: any.
    pub node: Option<u32>,
    /// How many.
    pub count: u64,
}

impl HugepagePools {
    /// What is left beside machines that take theirs in a moment. Where it is not said from which node, each may be it.
    #[must_use]
    pub fn beside(mut self, others: impl IntoIterator<Item = PagesTaken>) -> Self {
        for PagesTaken { page, node, count } in others {
            let taken = match page {
                HugePage::Mib2 => FreePages { mib2: count, gib1: 0 },
                HugePage::Gib1 => FreePages { mib2: 0, gib1: count },
            };
            self.host = without(self.host, taken);
            let nodes = self.nodes.iter_mut().filter(|(at, _)| node.is_none_or(|node| node == **at));
            nodes.for_each(|(_, free)| *free = without(*free, taken));
        }
        self
    }
}

/// The pools of huge pages cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("cannot read the pools of huge pages from {}", path.display())]
pub struct ObserveHugepagesError {
    /// What was read.
    pub path: PathBuf,
    /// Why it failed.
    #[source]
    pub source: io::Error,
}

/// Reads the pools below `root` (`/` on a host). A kernel without huge pages or without NUMA has none; that is no error.
///
/// # Errors
/// When a file is there and cannot be read, or holds no number.
pub fn observe_hugepages(root: &Path) -> Result<HugepagePools, ObserveHugepagesError> {
    let pools = root.join("sys/kernel/mm/hugepages");
    // The kernel counts promised pages for the whole host. Any node may be the one that has to keep the promise.
    let promised = read_pools(&pools, "resv_hugepages")?;
    let host = without(read_pools(&pools, "free_hugepages")?, promised);
    let mut nodes = BTreeMap::new();
    let dir = root.join("sys/devices/system/node");
    let fail = |source| ObserveHugepagesError { path: dir.clone(), source };
    let entries = match fs::read_dir(&dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(HugepagePools { host, nodes }),
        Err(error) => return Err(fail(error)),
    };
    for entry in entries {
        let entry = entry.map_err(fail)?;
        let name = entry.file_name();
        let node = name.to_str().and_then(|name| name.strip_prefix("node")).and_then(|n| n.parse().ok());
        if let Some(node) = node {
            let free = read_pools(&entry.path().join("hugepages"), "free_hugepages")?;
            nodes.insert(node, without(free, promised));
        }
    }
    Ok(HugepagePools { host, nodes })
}

fn read_pools(dir: &Path, file: &str) -> Result<FreePages, ObserveHugepagesError> {
    let read = |page: HugePage| read_count(dir.join(page.pool()).join(file));
    Ok(FreePages { mib2: read(HugePage::Mib2)?, gib1: read(HugePage::Gib1)? })
}

fn read_count(path: PathBuf) -> Result<u64, ObserveHugepagesError> {
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        Err(source) => return Err(ObserveHugepagesError { path, source }),
    };
    text.trim().parse().map_err(|error| ObserveHugepagesError {
        path,
        source: io::Error::new(io::ErrorKind::InvalidData, error),
    })
}

const fn without(free: FreePages, promised: FreePages) -> FreePages {
    FreePages { mib2: free.mib2.saturating_sub(promised.mib2), gib1: free.gib1.saturating_sub(promised.gib1) }
}

/// RAM that a machine is to have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryWish {
    /// How much; whole MiB are used.
    pub ram: ByteSize,
    /// Whether a device of the host will reach all of it.
    pub passthrough: bool,
    /// The NUMA node it should be on.
    pub node: Option<u32>,
}

/// What backs a machine's RAM. The default is ordinary memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MemoryPlan {
    /// The kind of memory.
    pub backing: Backing,
    /// The NUMA node: binding for reserved pages, which were counted there, and a preference otherwise, because the
    /// kernel kills who may take memory from one full node only.
    pub node: Option<u32>,
}

/// A kind of memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Backing {
    /// Taken as it is used; can be swapped; nothing is pinned.
    #[default]
    OnDemand,
    /// Filled at the start, as transparent huge pages where the kernel has them.
    Transparent,
    /// From the pool of reserved pages, filled at the start.
    Reserved(HugePage),
}

/// Chooses what backs the RAM: for passthrough the largest reserved pages of which enough are free, on the wanted node
/// where one is wanted, and transparent huge pages when there are not enough. Pages reserved elsewhere are left for the
/// GPUs there.
#[must_use]
pub fn plan_memory(wish: MemoryWish, pools: &HugepagePools) -> MemoryPlan {
    if !wish.passthrough {
        return MemoryPlan::default();
    }
    let free = match wish.node {
        Some(node) => pools.nodes.get(&node).copied().unwrap_or_default(),
        None => pools.host,
    };
    let enough = |page: &HugePage| {
        let (ram, size) = (whole_mib(wish.ram), page.size().bytes());
        ram > 0 && ram % size == 0 && ram / size <= free.of(*page)
    };
    let page = [HugePage::Gib1, HugePage::Mib2].into_iter().find(enough);
    MemoryPlan { backing: page.map_or(Backing::Transparent, Backing::Reserved), node: wish.node }
}

impl MemoryPlan {
    /// The reserved pages that `ram` takes; none where it takes other memory.
    #[must_use]
    pub fn takes(self, ram: ByteSize) -> Option<PagesTaken> {
        match self.backing {
            Backing::OnDemand | Backing::Transparent => None,
            Backing::Reserved(page) => {
                let count = whole_mib(ram) / page.size().bytes();
                Some(PagesTaken { page, node: self.node, count })
            }
        }
    }

    /// Threads that fill `ram` at the start.
    #[must_use]
    pub fn threads(self, ram: ByteSize) -> u64 {
        ram.gib().clamp(1, MOST_THREADS)
    }

    /// The limit of locked memory (`RLIMIT_MEMLOCK`) that QEMU needs with `ram`; `None` when it pins nothing. VFIO counts
    /// RAM once, however many GPUs share it.
    #[must_use]
    pub fn memlock(self, ram: ByteSize) -> Option<ByteSize> {
        match self.backing {
            Backing::OnDemand => None,
            Backing::Transparent | Backing::Reserved(_) => Some(ram.saturating_add(LOCKED_BESIDES_RAM)),
        }
    }

    /// How long QEMU may take until it answers over QMP. Wide: a QEMU that ends is noticed at once, so this is about one
    /// that hangs.
    #[must_use]
    pub fn launch_deadline(self, ram: ByteSize) -> Duration {
        let gib = u32::try_from(ram.bytes().div_ceil(1 << 30)).unwrap_or(u32::MAX);
        let per_gib = match self.backing {
            Backing::OnDemand => return LAUNCH,
            Backing::Transparent => PER_GIB_SMALL,
            Backing::Reserved(_) => PER_GIB_HUGE,
        };
        LAUNCH.saturating_add(per_gib.saturating_mul(gib))
    }
}

const fn whole_mib(size: ByteSize) -> u64 {
    size.mib() << 20
}

#[cfg(test)]
mod tests;
