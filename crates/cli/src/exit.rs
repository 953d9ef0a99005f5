//! How commands end: exit codes and the sentence that goes with them. Owns the mapping from the API's error codes;
//! used by every command and by `main`.

use std::{fmt, process::ExitCode};

use qudata_api::{ErrorBody, ErrorCode};

/// The table shown by `--help` and in the manual pages.
pub(crate) const TABLE: &str = "\
Exit codes:
  0  done
  1  failed; for `status`: something is wrong on this host
  2  wrong usage, or a value that is not allowed
  3  the agent cannot be reached: it is not running, or this user may not talk to it
  4  there is no such instance, or no such GPU
  5  refused as things are: ambiguous, wrong state, taken, or busy
  6  no capacity: GPU, memory, disk or CPUs
  7  waited too long, or the wait was interrupted; the work goes on

`instance ssh` ends with the exit code of ssh.";

/// Exit codes, as in [`TABLE`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exit {
    /// Done.
    Done = 0,
    /// Failed.
    Failed = 1,
    /// Wrong usage.
    Usage = 2,
    /// Agent not reachable.
    Unreachable = 3,
    /// No such instance or GPU.
    NotFound = 4,
    /// Refused as things are.
    Refused = 5,
    /// No capacity.
    NoCapacity = 6,
    /// Waited too long.
    TimedOut = 7,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// A command that did not do what was asked.
#[derive(Debug)]
pub(crate) struct Failure {
    /// How the program ends.
    pub(crate) exit: Exit,
    /// What to tell; empty when there is nobody to tell it to.
    pub(crate) sentence: String,
}

impl Failure {
    /// A failure with its sentence.
    pub(crate) fn new(exit: Exit, sentence: impl Into<String>) -> Self {
        Self { exit, sentence: sentence.into() }
    }

    /// What the agent answered.
    pub(crate) fn refused(body: ErrorBody) -> Self {
        let exit = exit_of(body.code);
        if exit == Exit::Unreachable {
            return Self::new(exit, format!("{}: run as root or join group qudata", body.error));
        }
        Self::new(exit, body.error)
    }

    /// The reader of the output went away, as in `… | head`: not worth a word.
    pub(crate) fn reader_gone() -> Self {
        Self::new(Exit::Done, "")
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.sentence)
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        // The alternate form appends the causes.
        Self::new(Exit::Failed, format!("{error:#}"))
    }
}

fn exit_of(code: ErrorCode) -> Exit {
    match code {
        // The body is made by this program: if it is malformed, the versions do not fit.
        ErrorCode::MalformedBody
        | ErrorCode::NoSuchPath
        | ErrorCode::MethodNotAllowed
        | ErrorCode::RequestTimeout
        | ErrorCode::Internal
        | ErrorCode::HostFault
        | ErrorCode::GuestFault => Exit::Failed,
        ErrorCode::InvalidField | ErrorCode::BodyTooLarge | ErrorCode::HeaderTooLarge => Exit::Usage,
        ErrorCode::SecretMissing | ErrorCode::Forbidden => Exit::Unreachable,
        ErrorCode::NoSuchInstance | ErrorCode::NoSuchGpu => Exit::NotFound,
        ErrorCode::AmbiguousInstance
        | ErrorCode::WrongState
        | ErrorCode::GpuTaken
        | ErrorCode::GpuUnfit
        | ErrorCode::PortTaken
        | ErrorCode::Busy => Exit::Refused,
        ErrorCode::NoGpu | ErrorCode::NoMemory | ErrorCode::NoDisk | ErrorCode::NoCpus => Exit::NoCapacity,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causes_are_told_with_the_failure() {
        let error = anyhow::anyhow!("permission denied").context("cannot write the page");
        let failure = Failure::from(error);
        assert_eq!(
            (failure.exit, failure.sentence.as_str()),
            (Exit::Failed, "cannot write the page: permission denied")
        );
    }

    #[test]
    fn a_forbidden_user_learns_what_to_do() {
        let failure = Failure::refused(ErrorBody::new(ErrorCode::Forbidden, "user 1000 is not allowed"));
        assert_eq!(failure.exit, Exit::Unreachable);
        assert!(failure.sentence.ends_with("run as root or join group qudata"));
    }
}
