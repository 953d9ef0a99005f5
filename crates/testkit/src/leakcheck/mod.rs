//! The leak oracle: what is on this machine now that was not there before. Called by tests and the demo around the life
//! of an instance or of a whole agent; an empty difference is a pass. It looks only at what a [`Scope`] names, because
//! the machine belongs to others as well.
//!
//! ```text
//! Baseline::take(&scope) ── the story runs ── baseline.compare() ──▶ [] = pass, or one Leak per thing left behind
//! ```

mod descriptors;
mod files;
mod firewall;
mod kernel;
mod processes;
mod snapshot;
mod sockets;
mod units;

use std::{
    collections::BTreeMap,
    fmt,
    ops::RangeInclusive,
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

pub(crate) use firewall::tables;
pub use snapshot::Snapshot;

/// What to look at.
#[derive(Debug, Clone)]
pub struct Scope {
    /// Directories: files, sockets and mounts in them count, and so do processes that use something in them.
    pub roots: Vec<PathBuf>,
    /// Paths that may appear: the state, keys, images. A directory allows everything in it.
    pub allowed: Vec<PathBuf>,
    /// Users that VMs and their network processes run as.
    pub uids: RangeInclusive<u32>,
    /// Executables that count whoever runs them.
    pub executables: Vec<PathBuf>,
    /// TCP and UDP ports that count whoever listens on them.
    pub ports: Vec<RangeInclusive<u16>>,
    /// Prefix of the names of nft tables.
    pub tables: String,
    /// Prefix of the names of cgroups and of the service manager's units.
    pub cgroups: String,
    /// The agent, to look at its descriptors, threads and children as well.
    pub agent: Option<u32>,
    /// So many more threads of one name are no leak: a runtime keeps idle ones for ten seconds.
    pub idle_threads: usize,
    /// Where sysfs is mounted; another place in tests of this oracle.
    pub sysfs: PathBuf,
}

impl Scope {
    /// A scope over `roots` and `uids` with the agent's usual names and nothing else.
    pub fn new(roots: impl IntoIterator<Item = PathBuf>, uids: RangeInclusive<u32>) -> Self {
        Self {
            roots: roots.into_iter().collect(),
            allowed: Vec::new(),
            uids,
            executables: Vec::new(),
            ports: Vec::new(),
            tables: "qudata".into(),
            cgroups: "qudata".into(),
            agent: None,
            idle_threads: 0,
            sysfs: "/sys".into(),
        }
    }
}

/// Kinds of things that can be left behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// A process, dead ones that nobody collected included.
    Process,
    /// A TCP or UDP port somebody listens on.
    Listener,
    /// A bound or connected unix socket.
    UnixSocket,
    /// A file, directory or link.
    File,
    /// A mount.
    Mount,
    /// An nft table or something in one.
    Firewall,
    /// A PCI device with another driver or override than before.
    Pci,
    /// A cgroup.
    Cgroup,
    /// A unit of the service manager.
    Unit,
    /// A descriptor of the agent.
    Descriptor,
    /// A thread of the agent.
    Thread,
}

impl Kind {
    const ALL: [Self; 11] = [
        Self::Process,
        Self::Listener,
        Self::UnixSocket,
        Self::File,
        Self::Mount,
        Self::Firewall,
        Self::Pci,
        Self::Cgroup,
        Self::Unit,
        Self::Descriptor,
        Self::Thread,
    ];
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Process => "process",
            Self::Listener => "listener",
            Self::UnixSocket => "unix socket",
            Self::File => "file",
            Self::Mount => "mount",
            Self::Firewall => "firewall",
            Self::Pci => "pci",
            Self::Cgroup => "cgroup",
            Self::Unit => "unit",
            Self::Descriptor => "descriptor",
            Self::Thread => "thread",
        })
    }
}

/// One thing left behind.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Leak {
    /// What sort of thing.
    pub kind: Kind,
    /// Which one, for a person.
    pub what: String,
}

impl fmt::Display for Leak {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.kind, self.what)
    }
}

/// The machine could not be looked at: no verdict, which is not a pass.
#[derive(Debug, thiserror::Error)]
#[error("the leak check cannot look at {what}: {reason}")]
pub struct LookError {
    /// What was looked at.
    pub what: String,
    /// Why it failed.
    pub reason: String,
}

impl LookError {
    fn new(what: impl Into<String>, reason: impl fmt::Display) -> Self {
        Self { what: what.into(), reason: reason.to_string() }
    }
}

/// Things by what names them, with how many there are: descriptors and threads have no names of their own.
type Sightings = BTreeMap<(Kind, String), Sighting>;

#[derive(Debug, Clone)]
struct Sighting {
    count: usize,
    what: String,
}

/// Adds one thing. `key` tells it from all others of its kind, `what` is for the report.
fn note(sightings: &mut Sightings, kind: Kind, key: impl Into<String>, what: impl Into<String>) {
    let entry =
        sightings.entry((kind, key.into())).or_insert_with(|| Sighting { count: 0, what: what.into() });
    entry.count += 1;
}

fn look(scope: &Scope) -> Result<Sightings, LookError> {
    let mut seen = Sightings::new();
    processes::look(scope, &mut seen)?;
    sockets::look(scope, &mut seen)?;
    files::look(scope, &mut seen)?;
    files::look_at_mounts(scope, &mut seen)?;
    firewall::look(scope, &mut seen)?;
    kernel::look_at_pci(scope, &mut seen)?;
    kernel::look_at_cgroups(scope, &mut seen)?;
    units::look(scope, &mut seen)?;
    descriptors::look(scope, &mut seen)?;
    Ok(seen)
}

/// What is `now` and was not `before`, in a stable order; so many more threads of one name are tolerated.
fn difference(before: &Sightings, now: &Sightings, idle_threads: usize) -> Vec<Leak> {
    let mut leaks = Vec::new();
    for ((kind, key), now) in now {
        let before = before.get(&(*kind, key.clone())).map_or(0, |sighting| sighting.count);
        let tolerated = if *kind == Kind::Thread { idle_threads } else { 0 };
        let more = match now.count.saturating_sub(before) {
            more if more <= tolerated => 0,
            more => more,
        };
        if more > 1 || (more == 1 && before > 0) {
            leaks.push(Leak { kind: *kind, what: format!("{more} more: {}", now.what) });
        } else if more == 1 {
            leaks.push(Leak { kind: *kind, what: now.what.clone() });
        }
    }
    leaks.sort();
    leaks
}

/// What was there before.
#[derive(Debug, Clone)]
pub struct Baseline {
    scope: Scope,
    before: Sightings,
}

impl Baseline {
    /// Looks at everything in `scope` and remembers it.
    ///
    /// # Errors
    /// When something cannot be looked at.
    pub fn take(scope: &Scope) -> Result<Self, LookError> {
        Ok(Self { scope: scope.clone(), before: look(scope)? })
    }

    /// The agent was started again: its descriptors and threads are compared with those of the one before.
    pub fn follow_agent(&mut self, pid: u32) {
        self.scope.agent = Some(pid);
    }

    /// What is there now and was not before, in a stable order. Empty = pass.
    ///
    /// # Errors
    /// When something cannot be looked at: that is no pass.
    pub fn compare(&self) -> Result<Vec<Leak>, LookError> {
        Ok(difference(&self.before, &look(&self.scope)?, self.scope.idle_threads))
    }

    /// Like [`Self::compare`], but gives things that end by themselves (idle threads, closing connections) until
    /// `deadline`. Returns as soon as nothing is left.
    ///
    /// # Errors
    /// When something cannot be looked at.
    pub fn settle(&self, deadline: Duration) -> Result<Vec<Leak>, LookError> {
        let until = Instant::now() + deadline;
        loop {
            let leaks = self.compare()?;
            if leaks.is_empty() || Instant::now() > until {
                return Ok(leaks);
            }
            thread::sleep(Duration::from_millis(100));
        }
    }
}

#[cfg(test)]
mod tests;
