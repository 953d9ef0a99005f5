//! Shutting a guest down in good order because the host goes down, or somebody stops the VM's unit by hand. Runs as a
//! process of its own (`ExecStop=` of that unit: as QEMU's user, in its sandbox) over a control channel of its own, because
//! the agent may be gone by then. Called by systemd through the agent's binary.

use std::{ffi::OsString, io::Write, path::Path, time::Duration};

use tokio::time::{sleep, timeout};

use crate::qmp::{ConnectError, Qmp, QmpError, QmpEvents, RunState};

/// The argument of the agent's binary that calls [`main`].
pub const COMMAND: &str = "shutdown-guest";
/// How long a guest may take; as long as systemd gives the host's own services by default.
pub const PATIENCE: Duration = Duration::from_secs(90);
/// A QEMU that does not greet is stopped by a signal or hangs in the kernel: asking it is no use.
const GREETING: Duration = Duration::from_secs(5);
/// Between two presses of the power button: a guest that is still booting does not hear the first.
const PRESS_PERIOD: Duration = Duration::from_secs(10);

/// The guest was not shut down; what is left is to take its power.
#[derive(Debug, thiserror::Error)]
pub enum ShutdownError {
    /// Called without a socket.
    #[error("usage: {COMMAND} SOCKET")]
    Usage,
    /// This process could not be set up.
    #[error("cannot wait for sockets")]
    Runtime(#[source] std::io::Error),
    /// QEMU is gone or silent.
    #[error("the VM does not answer")]
    Connect(#[source] ConnectError),
    /// QEMU refuses.
    #[error("the VM cannot be shut down")]
    Qmp(#[source] QmpError),
    /// A guest that does not execute cannot shut down.
    #[error("the guest does not run: QEMU says {0}")]
    NotRunning(RunState),
    /// It did not react, or not fast enough.
    #[error("the guest did not shut down within {} s", .0.as_secs())]
    TooSlow(Duration),
}

/// The process: its second argument is the socket. Returns its exit code, 0 when the guest has shut down.
#[must_use]
pub fn main() -> u8 {
    let result = match std::env::args_os().nth(2) {
        Some(socket) => run(&socket),
        None => Err(ShutdownError::Usage),
    };
    let Err(error) = result else { return 0 };
    // It goes to QEMU's log.
    let _ = writeln!(std::io::stderr().lock(), "shutdown: {}", qudata_host::causes::chain(&error));
    1
}

fn run(socket: &OsString) -> Result<(), ShutdownError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(ShutdownError::Runtime)?.block_on(shut_down(Path::new(socket), PATIENCE))
}

/// Presses the power button and waits until QEMU is gone. A paused guest is continued first: it holds what its disk does
/// not have yet.
///
/// # Errors
/// [`ShutdownError`].
pub async fn shut_down(socket: &Path, patience: Duration) -> Result<(), ShutdownError> {
    let (qmp, events) = Qmp::connect(socket, GREETING).await.map_err(ShutdownError::Connect)?;
    match qmp.query_status().await.map_err(ShutdownError::Qmp)?.state {
        RunState::Running => {}
        RunState::Paused => qmp.cont().await.map_err(ShutdownError::Qmp)?,
        other => return Err(ShutdownError::NotRunning(other)),
    }
    let over = async {
        tokio::select! {
            () = closed(events) => Ok(()),
            error = press(&qmp) => Err(ShutdownError::Qmp(error)),
        }
    };
    match timeout(patience, over).await {
        // QEMU closes the connection when it ends, and a press that comes just then fails of it.
        Ok(Err(ShutdownError::Qmp(QmpError::Closed { .. }))) => Ok(()),
        Ok(done) => done,
        Err(_) => Err(ShutdownError::TooSlow(patience)),
    }
}

async fn closed(mut events: QmpEvents) {
    while events.next().await.is_ok() {}
}

async fn press(qmp: &Qmp) -> QmpError {
    loop {
        if let Err(error) = qmp.system_powerdown().await {
            return error;
        }
        sleep(PRESS_PERIOD).await;
    }
}

#[cfg(test)]
mod tests;
