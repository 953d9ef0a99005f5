//! Commands of the host (apt-get, update-grub, systemctl, …). Owns how they are run: a clean environment, no standard
//! input, a deadline, their words line by line. Called by everything here that changes more than a file.

use std::{
    fmt,
    io::{BufRead, BufReader, Read},
    process::{Command, Stdio},
    sync::mpsc::{self, RecvTimeoutError},
    time::{Duration, Instant},
};

use secrecy::{ExposeSecret, SecretString};

const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Of a command's words, so many lines are kept.
const KEPT: usize = 20_000;
/// Of a failed command's words, so many lines are shown.
const SHOWN: usize = 12;

/// One run of a command, described.
#[derive(Debug)]
pub struct Order {
    /// The program, looked up in the system's path.
    pub program: &'static str,
    /// Its arguments; no secret is ever among them.
    pub args: Vec<String>,
    /// What it reads.
    pub stdin: Option<SecretString>,
    /// When it is ended.
    pub deadline: Duration,
}

/// A run without arguments and with a minute's time.
#[must_use]
pub fn order(program: &'static str) -> Order {
    Order { program, args: Vec::new(), stdin: None, deadline: Duration::from_secs(60) }
}

impl Order {
    /// Adds arguments.
    #[must_use]
    pub fn args<A: Into<String>>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }

    /// Another deadline.
    #[must_use]
    pub fn within(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// Something to read.
    #[must_use]
    pub fn reads(mut self, text: SecretString) -> Self {
        self.stdin = Some(text);
        self
    }
}

impl fmt::Display for Order {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.program)?;
        self.args.iter().try_for_each(|arg| write!(f, " {arg}"))
    }
}

/// How a command ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// Exit code; none: a signal.
    pub code: Option<i32>,
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
}

impl Answer {
    /// Whether it did its work.
    #[must_use]
    pub fn ok(&self) -> bool {
        self.code == Some(0)
    }

    /// Its last words.
    #[must_use]
    pub fn last_words(&self) -> String {
        let text = if self.err.trim().is_empty() { &self.out } else { &self.err };
        let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
        let from = lines.len().saturating_sub(SHOWN);
        lines.get(from..).unwrap_or_default().join(" | ")
    }
}

/// A command did not do its work.
#[derive(Debug, thiserror::Error)]
pub enum OrderError {
    /// It could not be started.
    #[error("cannot run {command}")]
    Start {
        /// Program and arguments.
        command: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It ended with something other than 0.
    #[error("`{command}` ended with {status}: {words}")]
    Failed {
        /// Program and arguments.
        command: String,
        /// Exit code, or that it was a signal.
        status: String,
        /// Its last words.
        words: String,
    },
    /// It was still running at its deadline.
    #[error("`{command}` was still running after {after:?} and was ended")]
    Late {
        /// Program and arguments.
        command: String,
        /// The deadline.
        after: Duration,
    },
}

/// Runs commands.
pub trait Hands: fmt::Debug {
    /// Runs one to its end, whatever its exit code; `heard` gets every line of both outputs as it comes.
    ///
    /// # Errors
    /// When it cannot be run, or is late.
    fn run(&self, order: &Order, heard: &mut dyn FnMut(&str)) -> Result<Answer, OrderError>;
}

/// Runs a command that must end with 0.
///
/// # Errors
/// When it does not.
pub fn must(hands: &dyn Hands, order: &Order) -> Result<Answer, OrderError> {
    let answer = hands.run(order, &mut |_| {})?;
    if answer.ok() { Ok(answer) } else { Err(failed(order, &answer)) }
}

/// The error for an answer that is no success.
#[must_use]
pub fn failed(order: &Order, answer: &Answer) -> OrderError {
    let status = answer.code.map_or_else(|| "a signal".to_owned(), |code| code.to_string());
    OrderError::Failed { command: order.to_string(), status, words: answer.last_words() }
}

/// The system's commands.
#[derive(Debug)]
pub struct SystemHands;

enum Heard {
    Out(String),
    Err(String),
}

impl Hands for SystemHands {
    fn run(&self, order: &Order, heard: &mut dyn FnMut(&str)) -> Result<Answer, OrderError> {
        let start = |source| OrderError::Start { command: order.to_string(), source };
        let begun = Instant::now();
        let mut child = Command::new(order.program)
            .args(&order.args)
            .env_clear()
            .env("PATH", PATH)
            .env("LC_ALL", "C")
            .env("HOME", "/root")
            .env("DEBIAN_FRONTEND", "noninteractive")
            .stdin(if order.stdin.is_some() { Stdio::piped() } else { Stdio::null() })
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(start)?;
        if let (Some(mut pipe), Some(text)) = (child.stdin.take(), &order.stdin) {
            // A command that refuses early closes the pipe; its exit code tells the story better.
            let _ = std::io::Write::write_all(&mut pipe, text.expose_secret().as_bytes());
        }
        let (says, lines) = mpsc::channel();
        let readers = [
            child.stdout.take().map(|pipe| listen(pipe, says.clone(), Heard::Out)),
            child.stderr.take().map(|pipe| listen(pipe, says, Heard::Err)),
        ];
        let mut answer = Answer { code: None, out: String::new(), err: String::new() };
        let mut kept = 0;
        loop {
            let left = order.deadline.saturating_sub(begun.elapsed());
            match lines.recv_timeout(left) {
                Ok(line) => {
                    let (text, to) = match line {
                        Heard::Out(text) => (text, &mut answer.out),
                        Heard::Err(text) => (text, &mut answer.err),
                    };
                    heard(&text);
                    kept += 1;
                    if kept <= KEPT {
                        to.push_str(&text);
                        to.push('\n');
                    }
                }
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => {
                    let _ = child.kill();
                    let _ = child.wait();
                    return Err(OrderError::Late { command: order.to_string(), after: order.deadline });
                }
            }
        }
        answer.code = child.wait().map_err(start)?.code();
        for reader in readers.into_iter().flatten() {
            // It has nothing to tell: what it read was sent.
            let _ = reader.join();
        }
        Ok(answer)
    }
}

fn listen(
    pipe: impl Read + Send + 'static,
    says: mpsc::Sender<Heard>,
    which: fn(String) -> Heard,
) -> std::thread::JoinHandle<()> {
    std::thread::spawn(move || {
        for line in BufReader::new(pipe).split(b'\n') {
            let Ok(line) = line else { break };
            let text = String::from_utf8_lossy(&line).trim_end_matches('\r').to_owned();
            if says.send(which(text)).is_err() {
                break;
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_come_line_by_line_and_codes_are_told() {
        let mut heard = Vec::new();
        let order = order("sh").args(["-c", "cat; echo out; echo bad >&2; exit 3"]).reads("in\n".into());
        let answer = SystemHands.run(&order, &mut |line| heard.push(line.to_owned())).unwrap();
        assert_eq!((answer.code, answer.out.as_str(), answer.err.as_str()), (Some(3), "in\nout\n", "bad\n"));
        heard.sort();
        assert_eq!(heard, ["bad", "in", "out"]);
        assert!(failed(&order, &answer).to_string().ends_with("ended with 3: bad"));
    }

    #[test]
    fn a_command_that_hangs_is_ended() {
        let order = order("sleep").args(["60"]).within(Duration::from_millis(50));
        assert!(matches!(must(&SystemHands, &order), Err(OrderError::Late { .. })));
    }
}
