//! The door through which everything goes that may hang: one short-lived child per list of steps, with a deadline. Owns
//! the protocol between agent and child; called by `rebind` and `sanitize`, and by the binary as `pci-child`.
//!
//! ```text
//! agent ── {root, ops} ──▶ child        one JSON line per finished step comes back, at the latest before the next that
//!       ◀── outcome ⏎ ───              may hang, so the agent knows which one it was
//! ```
//! Past the deadline the child is left where it is: not waited for, and not killed, because a signal would turn its wait
//! into one that nothing ends. Its pipes are closed, so should the kernel ever let it go, it stops before the next step.
//! The same happens when the agent dies.

use std::{
    ffi::OsString,
    fs, io,
    path::{Path, PathBuf},
    process::Stdio,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines},
    process::{Child, ChildStdout, Command},
    sync::mpsc,
    time::{Instant, timeout_at},
};

use crate::op::{Kernel, Op, Reply};

mod child;

pub use child::child_main;

/// First argument of the agent's binary when it is the child.
pub const CHILD_COMMAND: &str = "pci-child";

/// Where lists of steps are carried out.
#[derive(Debug, Clone)]
pub enum Door {
    /// In a child of its own per list.
    Child {
        /// A program that calls [`child_main`].
        program: PathBuf,
        /// Its arguments.
        args: Vec<OsString>,
        /// Root of the file system the child works on; `/` but in tests.
        root: PathBuf,
    },
    /// As `Child`, with children that were started ahead. See [`Door::ready`].
    Ready(Arc<Ready>),
    /// On a thread of this process, for tests with a kernel that reacts.
    InProcess(Arc<dyn Kernel>),
}

/// Children that wait for their list. They end when this is dropped.
#[derive(Debug)]
pub struct Ready {
    program: PathBuf,
    args: Vec<OsString>,
    root: PathBuf,
    waiting: Mutex<Vec<Child>>,
}

/// A list of steps was not carried out to its end. Nothing after the step named was begun.
#[derive(Debug, thiserror::Error)]
pub enum DoorError {
    /// The child could not be started or spoken to: nothing was begun.
    #[error("cannot start {program} to work on PCI devices")]
    Start {
        /// The program.
        program: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The kernel refused a step.
    #[error("{op} failed")]
    Refused {
        /// The step.
        op: Op,
        /// Its place in the list, from 0.
        step: usize,
        /// Its answer.
        #[source]
        source: io::Error,
    },
    /// The host is not as it must be.
    #[error("{op}: {found}")]
    Unmet {
        /// The expectation.
        op: Op,
        /// Its place in the list, from 0.
        step: usize,
        /// What was found instead.
        found: Reply,
    },
    /// A step has not returned. It may never.
    #[error("{op} has not returned for {} s{}", after.as_secs_f32(), waits_in(*pid, wchan.as_deref()))]
    Hung {
        /// The step.
        op: Op,
        /// Its place in the list, from 0.
        step: usize,
        /// The child that was left, where there is one.
        pid: Option<u32>,
        /// The kernel function it waits in, as far as the kernel tells.
        wchan: Option<String>,
        /// The deadline of the list.
        after: Duration,
    },
    /// The child ended in the middle of a step.
    #[error("{op}: the child that did it ended early ({how})")]
    Died {
        /// The step.
        op: Op,
        /// Its place in the list, from 0.
        step: usize,
        /// Its exit status, or what it wrote instead of an outcome.
        how: String,
    },
}

impl DoorError {
    /// Which step of the list it was, from 0; none when nothing was begun.
    pub fn step(&self) -> Option<usize> {
        match self {
            Self::Start { .. } => None,
            Self::Refused { step, .. }
            | Self::Unmet { step, .. }
            | Self::Hung { step, .. }
            | Self::Died { step, .. } => Some(*step),
        }
    }
}

fn waits_in(pid: Option<u32>, wchan: Option<&str>) -> String {
    match (pid, wchan) {
        (Some(pid), Some(wchan)) => format!(" (process {pid} waits in {wchan})"),
        (Some(pid), None) => format!(" (process {pid})"),
        (None, _) => String::new(),
    }
}

/// What goes to the child.
#[derive(Debug, Serialize, Deserialize)]
struct Batch {
    root: PathBuf,
    ops: Vec<Op>,
}

/// What comes back per step.
#[derive(Debug, Serialize, Deserialize)]
enum Outcome {
    Done(Reply),
    Unmet(Reply),
    Refused { kind: Kind, text: String },
}

/// What is kept of an error's kind on its way through the pipe: what callers tell apart.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
enum Kind {
    NotFound,
    PermissionDenied,
    Other,
}

impl Outcome {
    /// Does one step.
    fn of(kernel: &dyn Kernel, op: &Op) -> Self {
        match kernel.apply(op) {
            Ok(reply) if op.accepts(&reply) => Self::Done(reply),
            Ok(reply) => Self::Unmet(reply),
            Err(error) => {
                let kind = match error.kind() {
                    io::ErrorKind::NotFound => Kind::NotFound,
                    io::ErrorKind::PermissionDenied => Kind::PermissionDenied,
                    _ => Kind::Other,
                };
                Self::Refused { kind, text: error.to_string() }
            }
        }
    }

    fn result(self, step: usize, op: &Op) -> Result<Reply, DoorError> {
        let op = || op.clone();
        match self {
            Self::Done(reply) => Ok(reply),
            Self::Unmet(found) => Err(DoorError::Unmet { op: op(), step, found }),
            Self::Refused { kind, text } => {
                let kind = match kind {
                    Kind::NotFound => io::ErrorKind::NotFound,
                    Kind::PermissionDenied => io::ErrorKind::PermissionDenied,
                    Kind::Other => io::ErrorKind::Other,
                };
                Err(DoorError::Refused { op: op(), step, source: io::Error::new(kind, text) })
            }
        }
    }
}

impl Door {
    /// Children of `program`, on the real sysfs.
    pub fn child(program: PathBuf, args: Vec<OsString>) -> Self {
        Self::Child { program, args, root: PathBuf::from("/") }
    }

    /// The same door with `count` children started ahead, one for each list that is to come: to start a program takes
    /// longer than most lists. Further lists start theirs. Whoever knows that GPUs will move calls this while there is
    /// something else to wait for.
    #[must_use]
    pub fn ready(&self, count: usize) -> Self {
        let Self::Child { program, args, root } = self else { return self.clone() };
        // One that cannot be started is missed, and reported, when it is needed.
        let waiting = (0..count).map_while(|_| spawn(program, args).ok()).collect();
        let (program, args, root) = (program.clone(), args.clone(), root.clone());
        Self::Ready(Arc::new(Ready { program, args, root, waiting: Mutex::new(waiting) }))
    }

    /// Carries out `ops` in order, up to the first that fails. Dropping the future leaves the child: it stops after the
    /// step it is in.
    ///
    /// # Errors
    /// [`DoorError`], at the latest at the deadline.
    pub async fn run(&self, ops: &[Op], deadline: Duration) -> Result<Vec<Reply>, DoorError> {
        let end = Instant::now() + deadline;
        let mut source = match self {
            Self::Child { program, args, root } => {
                let start = |source| DoorError::Start { program: program.clone(), source };
                let child = spawn(program, args).map_err(start)?;
                give(child, root, ops, end).await.map_err(start)?
            }
            Self::Ready(ready) => {
                let start = |source| DoorError::Start { program: ready.program.clone(), source };
                let waiting = ready.waiting.lock().unwrap_or_else(PoisonError::into_inner).pop();
                let child = match waiting {
                    Some(child) => child,
                    None => spawn(&ready.program, &ready.args).map_err(start)?,
                };
                give(child, &ready.root, ops, end).await.map_err(start)?
            }
            Self::InProcess(kernel) => Source::Thread(on_thread(kernel.clone(), ops.to_vec())),
        };
        let mut replies = Vec::with_capacity(ops.len());
        for (step, op) in ops.iter().enumerate() {
            match timeout_at(end, source.next()).await {
                Ok(Ok(outcome)) => replies.push(outcome.result(step, op)?),
                Ok(Err(how)) => return Err(DoorError::Died { op: op.clone(), step, how }),
                Err(_) => {
                    let (pid, wchan) = source.stuck();
                    let error = DoorError::Hung { op: op.clone(), step, pid, wchan, after: deadline };
                    tracing::error!(device = %op.address(), "{error}; left alone");
                    return Err(error);
                }
            }
        }
        // All is done; the child only has to go, and the runtime reaps it.
        Ok(replies)
    }
}

/// A child at work.
struct Running {
    child: Child,
    lines: Option<Lines<BufReader<ChildStdout>>>,
}

/// Where outcomes come from.
enum Source {
    Child(Box<Running>),
    Thread(mpsc::UnboundedReceiver<Outcome>),
}

impl Source {
    /// The next outcome, or how the child ended.
    async fn next(&mut self) -> Result<Outcome, String> {
        match self {
            Self::Thread(outcomes) => outcomes.recv().await.ok_or_else(|| "its thread panicked".to_owned()),
            Self::Child(running) => {
                let line = match &mut running.lines {
                    Some(lines) => lines.next_line().await.map_err(|error| error.to_string())?,
                    None => None,
                };
                match line {
                    Some(line) => serde_json::from_str(&line).map_err(|_| format!("it wrote {line:.80}")),
                    None => Err(running.child.wait().await.map_or_else(|e| e.to_string(), |s| s.to_string())),
                }
            }
        }
    }

    /// The child and the kernel function it waits in.
    fn stuck(&self) -> (Option<u32>, Option<String>) {
        let pid = match self {
            Self::Child(running) => running.child.id(),
            Self::Thread(_) => None,
        };
        let wchan = pid
            .and_then(|pid| fs::read_to_string(format!("/proc/{pid}/wchan")).ok())
            .filter(|wchan| !wchan.is_empty() && wchan != "0");
        (pid, wchan)
    }
}

fn spawn(program: &Path, args: &[OsString]) -> io::Result<Child> {
    Command::new(program)
        .args(args)
        .env_clear()
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        // A Ctrl-C meant for an agent in the foreground must not reach a child that waits in the kernel.
        .process_group(0)
        .kill_on_drop(false)
        .spawn()
}

/// Sends the list and listens.
async fn give(mut child: Child, root: &Path, ops: &[Op], end: Instant) -> io::Result<Source> {
    let text = serde_json::to_vec(&Batch { root: root.to_owned(), ops: ops.to_vec() })?;
    if let Some(mut pipe) = child.stdin.take() {
        match timeout_at(end, pipe.write_all(&text)).await {
            Ok(sent) => sent?,
            Err(_) => return Err(io::ErrorKind::TimedOut.into()),
        }
    }
    let lines = child.stdout.take().map(|pipe| BufReader::new(pipe).lines());
    Ok(Source::Child(Box::new(Running { child, lines })))
}

/// Not on a thread of the runtime: one that hangs would keep the runtime from ending.
fn on_thread(kernel: Arc<dyn Kernel>, ops: Vec<Op>) -> mpsc::UnboundedReceiver<Outcome> {
    let (sender, outcomes) = mpsc::unbounded_channel();
    std::thread::spawn(move || {
        for op in &ops {
            let outcome = Outcome::of(kernel.as_ref(), op);
            let stop = !matches!(outcome, Outcome::Done(_));
            if sender.send(outcome).is_err() || stop {
                return;
            }
        }
    });
    outcomes
}
