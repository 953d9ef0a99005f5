//! The ways in which starting, reaching and driving a VM fail. None of them harms the process. Returned by [`super`].

use std::path::PathBuf;

use qudata_host::{
    launch::LaunchError,
    process::{ExitReport, ProcessError},
};
use uuid::Uuid;

use crate::qmp::{ConnectError, QmpError};

/// A VM did not start. The process, if there is one, is left alone: the identity file names it.
#[derive(Debug, thiserror::Error)]
pub enum LaunchVmError {
    /// QEMU could not be started.
    #[error("cannot start QEMU")]
    Start(#[source] LaunchError),
    /// QEMU ended before it could be spoken to; usually it refuses an option, and says so.
    #[error("QEMU ended with {report} before it could be spoken to: {log}")]
    Ended {
        /// How.
        report: ExitReport,
        /// The end of what it printed.
        log: String,
    },
    /// QEMU runs and could not be spoken to or is not the right one.
    #[error("QEMU runs but was not proven to be the machine")]
    Connect(#[source] ConnectVmError),
    /// The process cannot be watched.
    #[error("cannot watch QEMU")]
    Watch(#[source] ProcessError),
}

/// No connection to a VM, or not to the right one. The process is left alone.
#[derive(Debug, thiserror::Error)]
pub enum ConnectVmError {
    /// The QMP socket gives no usable connection.
    #[error("QMP does not answer")]
    Connect(#[source] ConnectError),
    /// It does, and then does not say who it is.
    #[error("QEMU does not tell its UUID")]
    Identify(#[source] QmpError),
    /// Another machine answered.
    #[error("the machine behind {} is {found}, not {expected}", socket.display())]
    OtherMachine {
        /// The socket.
        socket: PathBuf,
        /// Who should have answered.
        expected: Uuid,
        /// Who did.
        found: Uuid,
    },
    /// Another process answered.
    #[error("process {found:?} listens on {}, not QEMU with pid {expected}", socket.display())]
    OtherProcess {
        /// The socket.
        socket: PathBuf,
        /// The process we know.
        expected: u32,
        /// The process that listens, if the kernel tells.
        found: Option<u32>,
    },
}

/// A VM of an earlier agent could not be taken over. The process is left alone.
#[derive(Debug, thiserror::Error)]
pub enum AdoptError {
    /// Whether the process lives cannot be told.
    #[error("cannot take hold of the QEMU process")]
    Process(#[source] ProcessError),
    /// The process lives and another one, or another machine, answers on its socket.
    #[error("the QEMU process is not the machine that is looked for")]
    Identity(#[source] ConnectVmError),
}

/// A running VM did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// There is no QMP connection; [`super::Vm::reconnect`] tries to get one.
    #[error("the VM does not answer: there is no QMP connection")]
    Unresponsive,
    /// QMP failed.
    #[error("the VM did not do what was asked")]
    Qmp(#[source] QmpError),
}
