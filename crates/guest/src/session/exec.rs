//! One command on a session: feeds stdin and collects output at the same time, both bounded.

use super::PinnedPeer;
use russh::{ChannelMsg, ChannelReadHalf, client::Handle};
use std::time::Duration;

/// The most that a command may say, stdout and stderr together, in bytes.
pub const MAX_OUTPUT_BYTES: usize = 64 * 1024;

/// What a command that ended by itself left.
#[derive(Clone, PartialEq, Eq)]
pub struct ExecOutput {
    /// Exit status.
    pub status: u32,
    /// Written to standard output.
    pub stdout: Vec<u8>,
    /// Written to standard error.
    pub stderr: Vec<u8>,
}

impl std::fmt::Debug for ExecOutput {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (out, err) = (self.stdout.len(), self.stderr.len());
        write!(f, "ExecOutput(status {}, {out} and {err} bytes)", self.status)
    }
}

/// A command did not run to an exit status.
#[derive(Debug, thiserror::Error)]
pub enum ExecError {
    /// It took too long.
    #[error("the guest did not finish the command within {} ms", deadline.as_millis())]
    Deadline {
        /// The time it had.
        deadline: Duration,
    },
    /// It said too much.
    #[error("the guest's answer is larger than {limit} bytes")]
    OutputTooLarge {
        /// The most that is read.
        limit: usize,
    },
    /// The connection ended before or during the command.
    #[error("the SSH connection to the guest is closed")]
    Disconnected,
    /// The guest does not start commands.
    #[error("the guest refuses to run a command")]
    Refused,
    /// A signal ended it.
    #[error("the command in the guest was ended by a signal")]
    Signalled {
        /// As the guest names it, made printable.
        signal: String,
    },
    /// It ended and the guest does not say how.
    #[error("the command in the guest ended without an exit status")]
    NoStatus,
    /// The other side does not speak SSH properly.
    #[error("the SSH connection to the guest failed")]
    Protocol {
        /// What the SSH library says.
        #[source]
        source: russh::Error,
    },
}

fn protocol(source: russh::Error) -> ExecError {
    match source {
        russh::Error::SendError | russh::Error::Disconnect | russh::Error::HUP => ExecError::Disconnected,
        russh::Error::ChannelOpenFailure(_) => ExecError::Refused,
        source => ExecError::Protocol { source },
    }
}

pub(super) async fn run(
    handle: &Handle<PinnedPeer>,
    command: &str,
    stdin: &[u8],
) -> Result<ExecOutput, ExecError> {
    let channel = handle.channel_open_session().await.map_err(protocol)?;
    channel.exec(true, command).await.map_err(protocol)?;
    let (mut from_guest, to_guest) = channel.split();
    let feed = async {
        if !stdin.is_empty() {
            to_guest.data_bytes(stdin.to_vec()).await?;
        }
        to_guest.eof().await
    };
    tokio::pin!(feed);
    let collect = collect(&mut from_guest);
    tokio::pin!(collect);
    tokio::select! {
        // A command may end without reading its input: then feeding never does.
        result = &mut collect => result,
        // The command went away while it was fed: its last words say how.
        _fed = &mut feed => collect.await,
    }
}

/// Reads until the guest closes the channel, which frees it on both sides.
async fn collect(from_guest: &mut ChannelReadHalf) -> Result<ExecOutput, ExecError> {
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    let mut end = None;
    loop {
        match from_guest.wait().await {
            Some(ChannelMsg::Data { data }) => stdout.extend_from_slice(&data),
            Some(ChannelMsg::ExtendedData { data, .. }) => stderr.extend_from_slice(&data),
            Some(ChannelMsg::ExitStatus { exit_status }) => end = Some(Ok(exit_status)),
            Some(ChannelMsg::ExitSignal { signal_name, .. }) => {
                let signal = format!("{signal_name:?}").chars().take(40).collect();
                end = Some(Err(ExecError::Signalled { signal }));
            }
            Some(ChannelMsg::Failure | ChannelMsg::OpenFailure(_)) => return Err(ExecError::Refused),
            Some(ChannelMsg::Close) => break,
            None => return Err(ExecError::Disconnected),
            Some(_) => {}
        }
        if stdout.len() + stderr.len() > MAX_OUTPUT_BYTES {
            return Err(ExecError::OutputTooLarge { limit: MAX_OUTPUT_BYTES });
        }
    }
    let status = end.unwrap_or(Err(ExecError::NoStatus))?;
    Ok(ExecOutput { status, stdout, stderr })
}
