//! A corner of the machine that one test has alone: a directory, a range of user ids, ranges of ports. Owns the lock that
//! keeps other tests out, also those of other processes. Called by `Setup::start`.

use std::{
    fs::{self, File, Permissions, TryLockError},
    ops::RangeInclusive,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    thread,
};

/// Where corners are: on a disk with room for guests, and open to the VMs' users, as a home directory is not.
const PARENT: &str = "/var/tmp";
/// How many tests and benchmarks can run at the same time on one machine.
const SLOTS: u16 = 32;

#[derive(Debug)]
pub(super) struct Slot {
    number: u16,
    dir: PathBuf,
    /// The lock ends with the open file.
    _lock: File,
}

impl Slot {
    /// The first free corner, emptied.
    pub(super) fn take() -> Self {
        for number in 0..SLOTS {
            let path = format!("{PARENT}/qudata-test-{number}.lock");
            let file = File::options().create(true).truncate(false).write(true).open(&path);
            let file = file.unwrap_or_else(|e| panic!("cannot open {path}: {e}"));
            match file.try_lock() {
                Ok(()) => return Self::open(number, file),
                Err(TryLockError::WouldBlock) => {}
                Err(TryLockError::Error(e)) => panic!("cannot lock {path}: {e}"),
            }
        }
        panic!("all {SLOTS} corners for test agents are taken: {PARENT}/qudata-test-*.lock");
    }

    fn open(number: u16, lock: File) -> Self {
        let dir = tempfile::Builder::new().prefix(&format!("qudata-test-{number}-")).tempdir_in(PARENT);
        let dir = dir.unwrap_or_else(|e| panic!("cannot make a directory in {PARENT}: {e}")).keep();
        fs::set_permissions(&dir, Permissions::from_mode(0o755))
            .expect("our own directory can be opened to others");
        Self { number, dir, _lock: lock }
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// The agent's binary: a link of its own, so that processes of this agent are told from all others by executable,
    /// and a build beside the tests does not pull it away.
    pub(super) fn binary(&self) -> PathBuf {
        self.dir.join("qudata-agent")
    }

    /// All users of this corner: that of frpc, then those of the VMs.
    pub(super) fn uids(&self) -> RangeInclusive<u32> {
        let first = 800_000 + 1000 * u32::from(self.number);
        first..=first + 999
    }

    /// Users of the VMs. The agent runs frpc as the one before the first.
    pub(super) fn vm_uids(&self) -> RangeInclusive<u32> {
        self.uids().start() + 1..=*self.uids().end()
    }

    pub(super) fn api_port(&self) -> u16 {
        15_400 + 2 * self.number
    }

    pub(super) fn second_api_port(&self) -> u16 {
        self.api_port() + 1
    }

    pub(super) fn ssh_ports(&self) -> RangeInclusive<u16> {
        Self::range(13_000 + 50 * self.number)
    }

    pub(super) fn app_ports(&self) -> RangeInclusive<u16> {
        Self::range(27_000 + 50 * self.number)
    }

    pub(super) fn management_ports(&self) -> RangeInclusive<u16> {
        Self::range(30_300 + 50 * self.number)
    }

    fn range(first: u16) -> RangeInclusive<u16> {
        first..=first + 49
    }

    pub(super) fn port_ranges(&self) -> Vec<RangeInclusive<u16>> {
        vec![
            self.ssh_ports(),
            self.app_ports(),
            self.management_ports(),
            self.api_port()..=self.second_api_port(),
        ]
    }

    /// Name of the nft table of the agent in this corner: it is named after the end of its data directory.
    pub(super) fn table(&self) -> String {
        let plain = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '_' };
        let text: String = self.data_dir().to_string_lossy().chars().map(plain).collect();
        format!("qudata_{}", text.get(text.len().saturating_sub(24)..).unwrap_or_default())
    }

    pub(super) fn data_dir(&self) -> PathBuf {
        self.dir.join("data")
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("--- what the failed test left is kept in {}", self.dir.display());
            return;
        }
        // The test is over; what cannot be removed is only rubbish.
        let _ = fs::remove_dir_all(&self.dir);
    }
}
