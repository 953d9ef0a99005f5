//! Keeping a machine's virtual processors near its GPUs. Owns sets of CPUs as the kernel writes them, the plan (pure) and
//! its application to the threads of a running QEMU. Called by the agent between the proof of a VM and its start.

use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
    str::FromStr,
};

use rustix::{
    process::Pid,
    thread::{CpuSet, sched_setaffinity},
};

use crate::vm::{Vm, VmError};

/// Host CPUs, from a list such as `0-31,64-95`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CpuList(BTreeSet<usize>);

/// A text that is no list of CPUs.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{value:?} is not a list of CPUs below {}, such as 0-31,64-95", CpuSet::MAX_CPU)]
pub struct ParseCpuListError {
    /// What was given, cut to 40 characters.
    pub value: String,
}

/// The CPUs of a NUMA node cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("cannot read the CPUs of a NUMA node from {}", path.display())]
pub struct ObserveCpusError {
    /// What was read.
    pub path: PathBuf,
    /// Why it failed.
    #[source]
    pub source: io::Error,
}

/// Virtual processors were not pinned. The VM runs all the same, only slower.
#[derive(Debug, thiserror::Error)]
pub enum PinError {
    /// QEMU does not name its threads.
    #[error("QEMU does not tell the threads of its processors")]
    Threads(#[source] VmError),
    /// QEMU named a thread that is not its own.
    #[error("thread {thread} of virtual processor {cpu} is no thread of QEMU's process {pid}")]
    Foreign {
        /// The virtual processor.
        cpu: u32,
        /// The thread.
        thread: u32,
        /// QEMU.
        pid: u32,
    },
    /// The kernel refused.
    #[error("cannot pin thread {thread} of virtual processor {cpu}")]
    Affinity {
        /// The virtual processor.
        cpu: u32,
        /// The thread.
        thread: u32,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl CpuList {
    /// How many.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none, as on a node that is only memory.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Their numbers, ascending.
    pub fn iter(&self) -> impl Iterator<Item = usize> {
        self.0.iter().copied()
    }

    fn to_kernel(&self) -> CpuSet {
        let mut set = CpuSet::new();
        // All are below MAX_CPU: the parser saw to it.
        self.0.iter().for_each(|cpu| set.set(*cpu));
        set
    }
}

impl FromStr for CpuList {
    type Err = ParseCpuListError;

    fn from_str(text: &str) -> Result<Self, ParseCpuListError> {
        let refuse = || ParseCpuListError { value: text.chars().take(40).collect() };
        let number = |text: &str| {
            let plain = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
            let number = plain.then(|| text.parse().ok()).flatten();
            number.filter(|cpu: &usize| *cpu < CpuSet::MAX_CPU).ok_or_else(refuse)
        };
        let mut cpus = BTreeSet::new();
        for part in text.trim().split(',').filter(|_| !text.trim().is_empty()) {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let (first, last) = (number(first)?, number(last)?);
            if first > last {
                return Err(refuse());
            }
            cpus.extend(first..=last);
        }
        Ok(Self(cpus))
    }
}

/// The CPUs of a NUMA node of the host below `root` (`/` on a host).
///
/// # Errors
/// When there is no such node or its list cannot be read.
pub fn observe_node_cpus(root: &Path, node: u32) -> Result<CpuList, ObserveCpusError> {
    let path = root.join(format!("sys/devices/system/node/node{node}/cpulist"));
    let parsed = fs::read_to_string(&path)
        .and_then(|text| text.parse().map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error)));
    parsed.map_err(|source| ObserveCpusError { path, source })
}

/// The host CPUs for each of `cpus` virtual processors: all CPUs of the GPU's node for every one, so that the scheduler
/// balances them there together with those of other machines on the node. `None`, run anywhere, when there are more
/// virtual processors than the node has CPUs: then half the host would be idle while they wait for each other.
#[must_use]
pub fn plan_pinning(cpus: u32, node: &CpuList) -> Option<Vec<CpuList>> {
    let cpus = usize::try_from(cpus).ok()?;
    (cpus <= node.len() && !node.is_empty()).then(|| vec![node.clone(); cpus])
}

impl Vm {
    /// Pins virtual processor N to the N-th set; those without one are left alone.
    ///
    /// # Errors
    /// [`PinError`], at the first thread that is not pinned. Those before it stay pinned.
    pub async fn pin(&self, sets: &[CpuList]) -> Result<(), PinError> {
        let pid = self.identity().pid;
        for vcpu in self.vcpus().await.map_err(PinError::Threads)? {
            let (cpu, thread) = (vcpu.index, vcpu.thread);
            let Some(set) = usize::try_from(cpu).ok().and_then(|cpu| sets.get(cpu)) else { continue };
            let tid = own_thread(pid, thread).ok_or(PinError::Foreign { cpu, thread, pid })?;
            sched_setaffinity(Some(tid), &set.to_kernel()).map_err(|errno| PinError::Affinity {
                cpu,
                thread,
                source: errno.into(),
            })?;
        }
        Ok(())
    }
}

/// The thread, if it is one of this process. QEMU runs a tenant's code: what it says is checked before the agent acts on it.
fn own_thread(pid: u32, thread: u32) -> Option<Pid> {
    let own = Path::new(&format!("/proc/{pid}/task/{thread}")).exists();
    i32::try_from(thread).ok().filter(|_| own).and_then(Pid::from_raw)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn list(text: &str) -> CpuList {
        text.parse().unwrap()
    }

    #[test]
    fn lists_as_the_kernel_writes_them() {
        assert_eq!(list("0-2,8,10-11\n").iter().collect::<Vec<_>>(), [0, 1, 2, 8, 10, 11]);
        assert!(list("\n").is_empty(), "a node without CPUs");
        assert_eq!(list("0-1023").len(), 1024);
        for bad in ["x", "1-", "-1", "3-1", "0,,1", "0-1024", "+1", "1 2", "0-99999999999999999999"] {
            assert!(bad.parse::<CpuList>().is_err(), "{bad}");
        }
    }

    #[test]
    fn processors_stay_on_the_node_that_can_hold_them() {
        let node = list("8-11");
        assert_eq!(plan_pinning(4, &node), Some(vec![node.clone(); 4]));
        assert_eq!(plan_pinning(1, &node), Some(vec![node.clone()]));
        assert_eq!(plan_pinning(5, &node), None);
        assert_eq!(plan_pinning(0, &CpuList::default()), None, "a node of memory alone");
    }

    #[test]
    fn nodes_of_a_host() {
        let root = tempfile::tempdir().unwrap();
        let node = root.path().join("sys/devices/system/node/node1");
        fs::create_dir_all(&node).unwrap();
        fs::write(node.join("cpulist"), "4-7\n").unwrap();
        assert_eq!(observe_node_cpus(root.path(), 1).unwrap(), list("4-7"));
        let error = observe_node_cpus(root.path(), 0).unwrap_err();
        assert!(error.to_string().ends_with("node0/cpulist"), "{error}");
        fs::write(node.join("cpulist"), "many\n").unwrap();
        assert_eq!(observe_node_cpus(root.path(), 1).unwrap_err().source.kind(), io::ErrorKind::InvalidData);
    }

    #[test]
    fn a_thread_of_another_process_is_not_touched() {
        let me = std::process::id();
        assert_eq!(own_thread(me, me), Some(rustix::process::getpid()));
        for foreign in [0, 1, u32::MAX] {
            assert_eq!(own_thread(me, foreign), None, "{foreign}");
        }
    }

    proptest! {
        #[test]
        fn parsing_never_panics(text in "[0-9,x -]{0,30}") {
            if let Ok(cpus) = text.parse::<CpuList>() {
                prop_assert!(cpus.iter().all(|cpu| cpu < CpuSet::MAX_CPU));
                let _ = cpus.to_kernel();
            }
        }
    }
}
