//! One-shot tools (qemu-img, nft, …): argv in, whole output or a full error out. Every run has a deadline, a clean
//! environment and an output cap, so that no tool can hang the agent, read its secrets or fill its memory.

use std::{ffi::OsString, io, path::PathBuf, process::Stdio, time::Duration};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWriteExt},
    process::Command,
    time::timeout,
};

/// More output than this is an error; our tools print kilobytes.
const OUTPUT_CAP: u64 = 1 << 20;
/// What an error shows of a tool's stderr.
const STDERR_TAIL: usize = 2000;
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// One run of a tool, described.
#[derive(Debug)]
pub struct Tool {
    program: PathBuf,
    args: Vec<OsString>,
    stdin: Vec<u8>,
    deadline: Duration,
}

/// What a successful run printed.
#[derive(Debug, Clone, Default)]
pub struct ToolOutput {
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
}

/// A tool did not do its work.
#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    /// It could not be started, usually because it is not installed.
    #[error("cannot start {program}")]
    Start {
        /// The program.
        program: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It ended with a status other than 0.
    #[error("{command} ended with {status}: {stderr}")]
    Failed {
        /// Program and arguments.
        command: String,
        /// Exit status or signal, in words.
        status: String,
        /// Exit code, when it was not a signal.
        code: Option<i32>,
        /// The end of its standard error.
        stderr: String,
    },
    /// It was still running at the deadline and was killed.
    #[error("{command} was still running after {after:?} and was killed")]
    TimedOut {
        /// Program and arguments.
        command: String,
        /// The deadline.
        after: Duration,
    },
    /// Talking to it failed, or it printed more than the cap.
    #[error("cannot read the output of {command}")]
    Output {
        /// Program and arguments.
        command: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl Tool {
    /// A run of `program` (a name looked up in the system path, or an absolute path) without arguments, 10 s deadline.
    pub fn new(program: impl Into<PathBuf>) -> Self {
        Self {
            program: program.into(),
            args: Vec::new(),
            stdin: Vec::new(),
            deadline: Duration::from_secs(10),
        }
    }

    /// Adds one argument.
    #[must_use]
    pub fn arg(mut self, arg: impl Into<OsString>) -> Self {
        self.args.push(arg.into());
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<A: Into<OsString>>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }

    /// Gives the tool something to read; otherwise its standard input is empty.
    #[must_use]
    pub fn stdin(mut self, bytes: Vec<u8>) -> Self {
        self.stdin = bytes;
        self
    }

    /// Sets the deadline for the whole run.
    #[must_use]
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// Runs the tool to its end.
    ///
    /// # Errors
    /// [`ToolError`], also for an exit status other than 0. Dropping the future kills the tool.
    pub async fn run(self) -> Result<ToolOutput, ToolError> {
        let command = self.describe();
        let deadline = self.deadline;
        match timeout(deadline, self.run_unbounded(&command)).await {
            Ok(result) => result,
            Err(_) => Err(ToolError::TimedOut { command, after: deadline }),
        }
    }

    fn describe(&self) -> String {
        let mut text = self.program.display().to_string();
        for arg in &self.args {
            text.push(' ');
            text.push_str(&arg.to_string_lossy());
        }
        text
    }

    async fn run_unbounded(self, command: &str) -> Result<ToolOutput, ToolError> {
        let mut child = Command::new(&self.program)
            .args(&self.args)
            .env_clear()
            .env("PATH", PATH)
            .env("LC_ALL", "C")
            .stdin(if self.stdin.is_empty() { Stdio::null() } else { Stdio::piped() })
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(|source| ToolError::Start { program: self.program.display().to_string(), source })?;
        let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let write = async {
            if let Some(mut pipe) = stdin {
                // A tool that refuses early closes the pipe; its status tells the story better than EPIPE.
                let _ = pipe.write_all(&self.stdin).await;
            }
            Ok(())
        };
        let gathered = tokio::try_join!(write, read_capped(stdout), read_capped(stderr));
        let ((), stdout, stderr) =
            gathered.map_err(|source| ToolError::Output { command: command.to_owned(), source })?;
        let status =
            child.wait().await.map_err(|source| ToolError::Output { command: command.to_owned(), source })?;
        if status.success() {
            return Ok(ToolOutput { stdout, stderr });
        }
        let tail = stderr.len().saturating_sub(STDERR_TAIL);
        let stderr = String::from_utf8_lossy(stderr.get(tail..).unwrap_or_default()).trim().to_owned();
        Err(ToolError::Failed {
            command: command.to_owned(),
            status: status.to_string(),
            code: status.code(),
            stderr,
        })
    }
}

async fn read_capped(pipe: Option<impl AsyncRead + Unpin>) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let Some(pipe) = pipe else { return Ok(bytes) };
    pipe.take(OUTPUT_CAP + 1).read_to_end(&mut bytes).await?;
    if u64::try_from(bytes.len()).unwrap_or(u64::MAX) > OUTPUT_CAP {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("more than {OUTPUT_CAP} bytes")));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sh(script: &str) -> Tool {
        Tool::new("sh").args(["-c", script])
    }

    #[tokio::test]
    async fn output_and_stdin_pass_through() {
        let out = sh("cat; echo err >&2").stdin(b"hello".to_vec()).run().await.unwrap();
        assert_eq!((out.stdout.as_slice(), out.stderr.as_slice()), (&b"hello"[..], &b"err\n"[..]));
    }

    #[tokio::test]
    async fn the_environment_is_clean() {
        let out = Tool::new("env").run().await.unwrap();
        let text = String::from_utf8(out.stdout).unwrap();
        let names: Vec<_> = text.lines().filter_map(|l| l.split_once('=').map(|(n, _)| n)).collect();
        assert!(names.iter().all(|n| ["PATH", "LC_ALL"].contains(n)), "{names:?}");
    }

    #[tokio::test]
    async fn failures_say_what_happened() {
        let error = sh("echo no such pool >&2; exit 3").run().await.unwrap_err();
        assert!(
            matches!(&error, ToolError::Failed { code: Some(3), stderr, .. } if stderr == "no such pool")
        );
        let error = Tool::new("no-such-tool").run().await.unwrap_err();
        assert!(matches!(error, ToolError::Start { .. }));
    }

    #[tokio::test]
    async fn a_hanging_tool_is_killed_at_its_deadline() {
        let error = sh("sleep 60").deadline(Duration::from_millis(50)).run().await.unwrap_err();
        assert!(matches!(error, ToolError::TimedOut { .. }), "{error}");
    }

    #[tokio::test]
    async fn endless_output_is_an_error() {
        let error = Tool::new("yes").run().await.unwrap_err();
        assert!(matches!(error, ToolError::Output { .. }), "{error}");
    }
}
