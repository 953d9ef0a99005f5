//! A real agent in a corner of its own: the built binary, private directories, ports and user ids, real QEMU. Called by
//! product tests and benchmarks.
//!
//! ```text
//! Setup::new(image) ── .set("QUDATA_…", …) ── .start() ──▶ TestAgent ── create, view, wait_for …
//!                                             .refused() ─▶ what it said instead of starting
//! ```
//! Everything here panics with a sentence when it cannot go on: a test on a machine that lacks something has failed,
//! not passed.
#![allow(
    clippy::panic,
    clippy::expect_used,
    reason = "dev only: a test that cannot go on stops here, with a sentence"
)]

mod events;
mod instances;
mod outside;
mod setup;
mod slot;
mod small_disk;

use std::{
    fs,
    ops::RangeInclusive,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus},
    sync::Mutex,
    thread,
    time::{Duration, Instant},
};

use rustix::process::Signal;

use self::slot::Slot;
pub use self::{
    events::{Event, Events},
    instances::TestInstance,
    setup::{Image, Setup},
    small_disk::SmallDisk,
};
use crate::{
    http::{Client, Reply},
    leakcheck::{self, Baseline, Leak, Scope},
    process::Seen,
    tool,
};

/// How long an agent may take to answer `/ping` after its start, on a busy machine in a debug build.
const START: Duration = Duration::from_secs(30);
/// How long it may take to end after SIGTERM.
const STOP: Duration = Duration::from_secs(15);
/// Threads of the runtime that wait for blocking work end after ten seconds of idleness. Not worth waiting for in every
/// test: one looks to the last thread.
const IDLE_THREADS: usize = 16;
/// What is there after that is a leak.
const SETTLE: Duration = Duration::from_secs(20);

/// A running (or killed) agent and its corner of the machine.
#[derive(Debug)]
pub struct TestAgent {
    setup: Setup,
    /// Before the slot, whose directory it is mounted in.
    disk: Option<SmallDisk>,
    slot: Slot,
    child: Mutex<Option<Child>>,
    client: Client,
}

impl TestAgent {
    fn start(setup: Setup, disk: Option<SmallDisk>, slot: Slot) -> Self {
        let client = Client {
            address: ([127, 0, 0, 1], slot.api_port()).into(),
            secret: None,
            deadline: Duration::from_secs(30),
        };
        let mut agent = Self { setup, disk, slot, child: Mutex::new(None), client };
        agent.launch();
        agent.client.secret = Some(agent.wait_for_secret());
        let tables = leakcheck::tables(&agent.slot.table()).unwrap_or_else(|e| panic!("{e}"));
        assert!(
            !tables.is_empty(),
            "the agent's nft table is not called {}: nobody would look at it",
            agent.slot.table()
        );
        agent
    }

    /// The file system of its own that [`Setup::small_disk`] gave its data.
    pub fn disk(&self) -> &SmallDisk {
        self.disk.as_ref().expect("the agent was set up with a small disk")
    }

    /// Its secret: there at once for one that stands alone, given by the control plane otherwise.
    fn wait_for_secret(&self) -> String {
        let until = Instant::now() + START;
        loop {
            match fs::read_to_string(self.data_dir().join("agent_secret")) {
                Ok(secret) => return secret.trim().to_owned(),
                Err(_) if self.setup.frpc.is_some() && Instant::now() < until => {
                    thread::sleep(Duration::from_millis(20));
                }
                Err(e) => {
                    panic!("the agent runs and left no agent_secret: {e}\n{}", self.log_tail())
                }
            }
        }
    }

    fn launch(&self) {
        let child = self.setup.command(&self.slot).spawn();
        let child = child.unwrap_or_else(|e| panic!("cannot start {}: {e}", self.setup.binary().display()));
        *self.child.lock().expect("no test panics while it holds this lock") = Some(child);
        let until = Instant::now() + START;
        while !self.client.call("GET", "/ping", None).is_ok_and(|reply| reply.status == 200) {
            if let Some(status) = self.ended() {
                panic!("the agent ended at its start with {status}:\n{}", self.log_tail());
            }
            assert!(Instant::now() < until, "no answer to /ping for {START:?}:\n{}", self.log_tail());
            thread::sleep(Duration::from_millis(10));
        }
    }

    fn with_child<T>(&self, act: impl FnOnce(&mut Child) -> T) -> Option<T> {
        self.child.lock().expect("no test panics while it holds this lock").as_mut().map(act)
    }

    /// Its exit status, once it has ended by itself.
    pub fn ended(&self) -> Option<ExitStatus> {
        self.with_child(|child| child.try_wait().expect("a child can be waited for")).flatten()
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.with_child(|child| child.id()).expect("the agent is running")
    }

    /// Its process.
    pub fn process(&self) -> Seen {
        Seen::of(self.pid()).expect("the agent is running")
    }

    /// SIGKILL, and waits until it is gone.
    pub fn kill9(&self) {
        self.with_child(|child| {
            child.kill().expect("our own child can be killed");
            child.wait().expect("a child can be waited for");
        });
        *self.child.lock().expect("no test panics while it holds this lock") = None;
    }

    /// SIGTERM, as a service manager stops it; its exit status.
    pub fn terminate(&self) -> ExitStatus {
        self.process().signal(Signal::TERM);
        let until = Instant::now() + STOP;
        let status = loop {
            if let Some(status) = self.ended() {
                break status;
            }
            assert!(
                Instant::now() < until,
                "the agent did not end within {STOP:?} of SIGTERM:\n{}",
                self.log_tail()
            );
            thread::sleep(Duration::from_millis(10));
        };
        *self.child.lock().expect("no test panics while it holds this lock") = None;
        status
    }

    /// Changes a variable of its environment, from the next start on.
    pub fn change(&mut self, variable: &str, value: &str) {
        self.setup = self.setup.clone().set(variable, value);
    }

    /// Starts it again in the same corner with the same settings, after [`Self::kill9`] or [`Self::terminate`].
    pub fn restart(&self) {
        assert!(self.with_child(|_| ()).is_none(), "the agent still runs");
        self.launch();
    }

    /// The API with the right secret.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// One call of the API that must be answered, whatever the answer.
    #[track_caller]
    pub fn call(&self, method: &str, path: &str, body: Option<&serde_json::Value>) -> Reply {
        match self.client.call(method, path, body) {
            Ok(reply) => reply,
            Err(e) => panic!("{method} {path} was not answered: {e}\n{}", self.log_tail()),
        }
    }

    /// Everything it printed so far, over all its starts.
    pub fn logs(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.setup.log_file(&self.slot)).unwrap_or_default()).into_owned()
    }

    fn log_tail(&self) -> String {
        let logs = self.logs();
        let lines: Vec<&str> = logs.lines().collect();
        lines.get(lines.len().saturating_sub(40)..).unwrap_or_default().join("\n")
    }

    /// The corner's directory; everything of this agent is in it.
    pub fn dir(&self) -> &Path {
        self.slot.dir()
    }

    /// `QUDATA_DATA_DIR`.
    pub fn data_dir(&self) -> PathBuf {
        self.slot.data_dir()
    }

    /// `QUDATA_VM_RUN_DIR`.
    pub fn run_dir(&self) -> PathBuf {
        self.dir().join("run")
    }

    /// `QUDATA_LOG_DIR`.
    pub fn log_dir(&self) -> PathBuf {
        self.dir().join("log")
    }

    /// Name of its nft table.
    pub fn table(&self) -> String {
        self.slot.table()
    }

    /// A second agent's settings on the same directories, with ports of its own.
    pub fn rival(&self) -> Setup {
        self.setup.clone().set("QUDATA_AGENT_PORT", &self.slot.second_api_port().to_string())
    }

    /// What a second agent said instead of starting; panics when it started.
    pub fn refuses(&self, rival: &Setup) -> tool::Output {
        rival.run_to_end(&self.slot)
    }

    /// Processes of this agent's VMs and their networks.
    pub fn vm_processes(&self) -> Vec<Seen> {
        let all = Seen::all().expect("/proc can be listed");
        all.into_iter().filter(|p| self.slot.vm_uids().contains(&p.uid) && p.state != 'Z').collect()
    }

    /// `QUDATA_SSH_PORTS` of its corner.
    pub fn ssh_ports(&self) -> RangeInclusive<u16> {
        self.slot.ssh_ports()
    }

    /// A look at the corner, to be compared after the story.
    pub fn baseline(&self) -> Baseline {
        Baseline::take(&self.scope()).unwrap_or_else(|e| panic!("{e}"))
    }

    /// What belongs to this agent.
    pub fn scope(&self) -> Scope {
        let mut scope = Scope::new([self.data_dir(), self.run_dir(), self.log_dir()], self.slot.uids());
        scope.executables = [self.slot.binary()].into_iter().chain(self.frpc_path()).collect();
        scope.ports = self.slot.port_ranges();
        scope.tables = self.slot.table();
        scope.agent = self.with_child(|child| child.id());
        scope.idle_threads = IDLE_THREADS;
        scope
    }

    /// Nothing was left behind since `baseline`, apart from what ends by itself in a while.
    #[track_caller]
    pub fn assert_clean(&self, baseline: &mut Baseline) {
        baseline.follow_agent(self.pid());
        let leaks = baseline.settle(SETTLE).unwrap_or_else(|e| panic!("{e}"));
        let lines: Vec<String> = leaks.iter().map(Leak::to_string).collect();
        assert!(leaks.is_empty(), "left behind:\n{}\n{}", lines.join("\n"), self.log_tail());
    }
}

impl Drop for TestAgent {
    fn drop(&mut self) {
        if thread::panicking() {
            // After the failed test's own words, what the agent was doing.
            eprintln!("--- end of the log of the agent in {}:\n{}", self.dir().display(), self.log_tail());
        }
        if self.ended().is_none() {
            self.kill9();
        }
        for process in self.vm_processes().into_iter().chain(self.frpc_processes()) {
            process.signal(Signal::KILL);
        }
        for (family, name) in leakcheck::tables(&self.slot.table()).unwrap_or_default() {
            let mut nft = Command::new("nft");
            // Best effort: the next test has a table of its own.
            let _ = tool::run(nft.args(["delete", "table", &family, &name]), Duration::from_secs(10));
        }
    }
}
