//! The ways in which QMP fails: no connection, no reply, the end of a connection. Returned by [`super::client`].

use std::{io, path::PathBuf, time::Duration};

/// No usable connection to QEMU.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The socket cannot be connected to.
    #[error("cannot connect to the QMP socket {}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The socket took the connection and nothing followed.
    #[error(
        "no greeting on the QMP socket {} within {after:?}: another client holds it, or the process is stopped or busy",
        path.display()
    )]
    NoGreeting {
        /// The socket.
        path: PathBuf,
        /// How long was waited.
        after: Duration,
    },
    /// Something else than QEMU's greeting came.
    #[error("the QMP socket {} sent no greeting but: {sent}", path.display())]
    NotQmp {
        /// The socket.
        path: PathBuf,
        /// What came instead.
        sent: String,
    },
    /// The greeting came, the rest of the handshake failed.
    #[error("the QMP handshake on {} failed", path.display())]
    Negotiate {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: QmpError,
    },
}

/// A command brought no usable reply.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// No reply in time. The command may still take effect, unless it was not yet written.
    #[error("QEMU did not answer {command} within {after:?}")]
    Timeout {
        /// The command.
        command: String,
        /// The deadline.
        after: Duration,
    },
    /// The connection ended before the reply. The command may have taken effect.
    #[error("no answer to {command}: {reason}")]
    Closed {
        /// The command.
        command: String,
        /// How the connection ended.
        reason: CloseReason,
    },
    /// QEMU refused the command.
    #[error("QEMU refused {command}: {desc} ({class})")]
    Refused {
        /// The command.
        command: String,
        /// QEMU's class of the error, such as `CommandNotFound` or `GenericError`.
        class: String,
        /// QEMU's sentence.
        desc: String,
    },
    /// The reply has not the shape we know.
    #[error("QEMU's answer to {command} is not understood")]
    Malformed {
        /// The command.
        command: String,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
}

/// How a connection ended. Only `Ended` and `Broken` hint at the process; none proves that it is gone.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CloseReason {
    /// QEMU closed it, usually because it ended.
    #[error("QEMU closed the QMP connection")]
    Ended,
    /// The socket failed.
    #[error("the QMP connection failed: {0}")]
    Broken(io::ErrorKind),
    /// A message was longer than [`super::FRAME_LIMIT`].
    #[error("QEMU sent a QMP message of more than {limit} bytes")]
    FrameTooLong {
        /// The limit.
        limit: usize,
    },
    /// A message was no JSON object.
    #[error("QEMU sent something that is no QMP message: {0}")]
    Malformed(String),
    /// QEMU answered something we never sent, so replies can no longer be told apart.
    #[error("QEMU could not read what was sent: {0}")]
    Desynchronised(String),
    /// The owner did not take events and [`super::EVENT_CAPACITY`] was reached.
    #[error("more than {capacity} QMP events waited for their owner")]
    EventOverflow {
        /// The capacity.
        capacity: usize,
    },
    /// QEMU did not read what was sent.
    #[error("QEMU did not read from the QMP socket for {after:?}")]
    WriteStalled {
        /// How long.
        after: Duration,
    },
    /// We closed it: the last [`super::Qmp`] is gone.
    #[error("the QMP connection was given up")]
    Dropped,
}

impl CloseReason {
    /// QEMU ends without reading what was sent last, were it a line end; the kernel calls that a reset.
    pub(super) fn of(error: &io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => Self::Ended,
            kind => Self::Broken(kind),
        }
    }
}
