//! Shutting a guest down in good order because the host goes down, or somebody stops the VM's unit by hand. Runs as a
//! process of its own (`ExecStop=` of that unit: as QEMU's user, in its sandbox) over a control channel of its own, because
//! the agent may be gone by then. Called by systemd through the agent's binary.

use std::{ffi::OsString, io::Write, path::Path, time::Duration};

use tokio::time::{sleep, timeout};

use crate::qmp::{CloseReason, ConnectError, Qmp, QmpError, QmpEvents, RunState};

/// The argument of the agent's binary that calls [`main`].
pub const COMMAND: &str = "shutdown-guest";
/// How long a guest may take; as long as systemd gives the host's own services by default.
pub const PATIENCE: Duration = Duration::from_secs(90);
/// Between two presses of the power button: a guest that is still booting does not hear the first.
const PRESS_PERIOD: Duration = Duration::from_secs(10);
/// Between two questions to a QEMU that is too busy to answer one.
const PAUSE: Duration = Duration::from_secs(1);

/// The guest was not shut down; what is left is to take its power.
#[derive(Debug, thiserror::Error)]
pub enum ShutdownError {
    /// Called without a socket.
    #[error("usage: {COMMAND} SOCKET")]
    Usage,
    /// This process could not be set up.
    #[error("cannot wait for sockets")]
    Runtime(#[source] std::io::Error),
    /// QEMU is gone.
    #[error("there is no VM to shut down")]
    Gone(#[source] ConnectError),
    /// QEMU takes the connection and says nothing, or something else than QMP.
    #[error("the VM does not answer")]
    Silent(#[source] ConnectError),
    /// QEMU refuses.
    #[error("the VM cannot be shut down")]
    Qmp(#[source] QmpError),
    /// The connection was lost, and not because QEMU ended.
    #[error("the connection to the VM was lost: {0}")]
    Lost(CloseReason),
    /// A guest that does not execute cannot shut down.
    #[error("the guest does not run: QEMU says {0}")]
    NotRunning(RunState),
    /// It did not react, or not fast enough.
    #[error("the guest did not shut down within {} s", .0.as_secs())]
    TooSlow(Duration),
}

/// The process: its second argument is the socket. Returns its exit code, 0 when the guest has shut down, or was gone
/// before: systemd calls this also after a VM has ended by itself.
#[must_use]
pub fn main() -> u8 {
    let result = match std::env::args_os().nth(2) {
        Some(socket) => run(&socket),
        None => Err(ShutdownError::Usage),
    };
    let error = match result {
        Ok(()) | Err(ShutdownError::Gone(_)) => return 0,
        Err(error) => error,
    };
    // It goes to QEMU's log, which the restart takes along; that it failed goes to the journal.
    let _ = writeln!(std::io::stderr().lock(), "shutdown: {}", qudata_host::causes::chain(&error));
    1
}

fn run(socket: &OsString) -> Result<(), ShutdownError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(ShutdownError::Runtime)?.block_on(shut_down(Path::new(socket), PATIENCE))
}

/// Presses the power button and waits until QEMU closes the connection, which it does when it ends. A paused guest is
/// continued first: it holds what its disk does not have yet. A QEMU that is too busy to answer is asked again: it maps a
/// GPU's memory, or writes what all guests of the host write at this moment.
///
/// # Errors
/// [`ShutdownError`].
pub async fn shut_down(socket: &Path, patience: Duration) -> Result<(), ShutdownError> {
    let told = async {
        let (qmp, events) = Qmp::connect(socket, patience).await.map_err(|error| match error {
            ConnectError::Connect { .. } => ShutdownError::Gone(error),
            _ => ShutdownError::Silent(error),
        })?;
        tokio::select! {
            reason = closed(events) => match reason {
                CloseReason::Ended | CloseReason::Broken(_) => Ok(()),
                other => Err(ShutdownError::Lost(other)),
            },
            error = drive(&qmp) => Err(error),
        }
    };
    timeout(patience, told).await.unwrap_or(Err(ShutdownError::TooSlow(patience)))
}

async fn closed(mut events: QmpEvents) -> CloseReason {
    loop {
        if let Err(reason) = events.next().await {
            return reason;
        }
    }
}

/// Lets the guest run and presses the button again and again. Returns only when that cannot help.
async fn drive(qmp: &Qmp) -> ShutdownError {
    loop {
        let pressed = async {
            match qmp.query_status().await?.state {
                RunState::Running => {}
                RunState::Paused => qmp.cont().await?,
                // On its way out.
                RunState::Shutdown => return Ok(None),
                other => return Ok(Some(other)),
            }
            qmp.system_powerdown().await?;
            Ok(None)
        };
        match pressed.await {
            Ok(None) => sleep(PRESS_PERIOD).await,
            Ok(Some(state)) => return ShutdownError::NotRunning(state),
            Err(QmpError::Timeout { .. }) => sleep(PAUSE).await,
            // How it ended is for the events to say.
            Err(QmpError::Closed { .. }) => std::future::pending().await,
            Err(error) => return ShutdownError::Qmp(error),
        }
    }
}

#[cfg(test)]
mod tests;
