//! One SSH connection to a guest, kept and reused: root by the management key, host key pinned, every wait bounded.
//! Called by the instance's task once the guest has reported that it is ready.
//!
//! A command that does not end by itself (deadline, too much output, a dropped future) takes the connection with
//! it: a guest cannot hold channels, buffers or tasks of the agent. The caller connects again.

mod exec;
mod peer;

pub use exec::{ExecError, ExecOutput, MAX_OUTPUT_BYTES};

use crate::keys::{GuestKey, ManagementKey};
use peer::PinnedPeer;
use russh::{
    AlgorithmKind, Preferred, cipher,
    client::{self, Handle},
    keys::PrivateKeyWithHashAlg,
};
use std::{
    borrow::Cow,
    fmt, io,
    net::{Ipv4Addr, Shutdown, SocketAddr},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};
use tokio::{net::TcpStream, time::Instant};

/// The user the agent logs in as.
const USER: &str = "root";
/// An idle connection is asked for a sign of life this often, and given up after three silent ones.
const KEEPALIVE: Duration = Duration::from_secs(15);
/// AES first: processors have instructions for it, and so has emulation. Measured in an emulated guest, a login takes
/// 0.38 s with it and 0.5 s with ChaCha20.
const CIPHERS: [cipher::Name; 3] = [cipher::AES_256_GCM, cipher::CHACHA20_POLY1305, cipher::AES_256_CTR];
/// What the guest may send before it is read: bounds memory per command.
const WINDOW_BYTES: u32 = 256 * 1024;

/// How to reach one guest.
#[derive(Clone, Debug)]
pub struct SessionSpec {
    /// Port on the loopback address that leads to the guest's port 22.
    pub port: u16,
    /// The agent's key.
    pub management_key: ManagementKey,
    /// The key that the guest must prove to have.
    pub host_key: GuestKey,
    /// For connecting, key exchange and login together.
    pub deadline: Duration,
}

/// How far a connection attempt came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConnectStage {
    /// TCP.
    Reach,
    /// Greeting, key exchange and host key.
    Handshake,
    /// Authentication.
    Login,
}

impl fmt::Display for ConnectStage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ConnectStage::Reach => "TCP connection",
            ConnectStage::Handshake => "SSH handshake",
            ConnectStage::Login => "login",
        })
    }
}

/// No session came about.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// Nobody accepts on the port.
    #[error("cannot connect to the guest's SSH on port {port}")]
    Unreachable {
        /// Loopback port.
        port: u16,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The guest did not answer in time.
    #[error("the guest's SSH on port {port} did not finish the {stage} within {} ms", deadline.as_millis())]
    Deadline {
        /// Loopback port.
        port: u16,
        /// What it was busy with.
        stage: ConnectStage,
        /// The time it had.
        deadline: Duration,
    },
    /// Somebody else answers, or the guest's host key was replaced. Nothing was sent to it.
    #[error("the host key on port {port} is {offered}; the guest was given {expected}")]
    HostKeyMismatch {
        /// Loopback port.
        port: u16,
        /// Fingerprint of the pinned key.
        expected: String,
        /// Fingerprint of the offered key, or that none of its kind was offered.
        offered: String,
    },
    /// The guest does not let the management key in as root.
    #[error("the guest on port {port} refuses the management key")]
    LoginRefused {
        /// Loopback port.
        port: u16,
    },
    /// The other side does not speak SSH properly.
    #[error("the SSH {stage} with the guest on port {port} failed")]
    Protocol {
        /// Loopback port.
        port: u16,
        /// When.
        stage: ConnectStage,
        /// What the SSH library says.
        #[source]
        source: russh::Error,
    },
}

/// A logged-in connection. Dropping it closes the connection.
pub struct Session {
    handle: Handle<PinnedPeer>,
    line: Line,
}

impl Session {
    /// Connects, checks the host key against the pinned one, and logs in.
    ///
    /// # Errors
    /// Each cause has its variant; nothing of a failed attempt stays behind.
    pub async fn connect(spec: SessionSpec) -> Result<Session, ConnectError> {
        let SessionSpec { port, deadline, .. } = spec;
        let end = Instant::now() + deadline;
        let late = |stage| move |_| ConnectError::Deadline { port, stage, deadline };
        let unreachable = |source| ConnectError::Unreachable { port, source };

        let reach = TcpStream::connect(SocketAddr::from((Ipv4Addr::LOCALHOST, port)));
        let stream = tokio::time::timeout_at(end, reach)
            .await
            .map_err(late(ConnectStage::Reach))?
            .map_err(unreachable)?;
        let (line, stream) = Line::of(stream).map_err(unreachable)?;

        let offered = Arc::new(OnceLock::new());
        let peer = PinnedPeer { pinned: spec.host_key.clone(), offered: Arc::clone(&offered) };
        let handshake = client::connect_stream(Arc::new(config(&spec.host_key)), stream, peer);
        let mut handle = tokio::time::timeout_at(end, handshake)
            .await
            .map_err(late(ConnectStage::Handshake))?
            .map_err(|source| handshake_error(&spec, offered.get(), source))?;

        let key = PrivateKeyWithHashAlg::new(spec.management_key.private(), None);
        let login = tokio::time::timeout_at(end, handle.authenticate_publickey(USER, key))
            .await
            .map_err(late(ConnectStage::Login))?
            .map_err(|source| ConnectError::Protocol { port, stage: ConnectStage::Login, source })?;
        if !login.success() {
            return Err(ConnectError::LoginRefused { port });
        }
        Ok(Session { handle, line })
    }

    /// Runs `command` by root's login shell with `stdin`, and collects what it says.
    ///
    /// # Errors
    /// Anything but an exit with a status. After [`ExecError::Deadline`] and [`ExecError::OutputTooLarge`] the
    /// session is closed.
    pub async fn exec(
        &self,
        command: &str,
        stdin: &[u8],
        deadline: Duration,
    ) -> Result<ExecOutput, ExecError> {
        if self.is_closed() {
            return Err(ExecError::Disconnected);
        }
        let cut = CutUnlessFinished { line: &self.line, finished: false };
        let run = exec::run(&self.handle, command, stdin);
        let result =
            tokio::time::timeout(deadline, run).await.unwrap_or(Err(ExecError::Deadline { deadline }));
        cut.finish(&result);
        result
    }

    /// Whether the connection is gone; then a new one is needed.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.line.is_cut() || self.handle.is_closed()
    }
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session").field("closed", &self.is_closed()).finish_non_exhaustive()
    }
}

fn config(pinned: &GuestKey) -> client::Config {
    client::Config {
        window_size: WINDOW_BYTES,
        channel_buffer_size: 8,
        keepalive_interval: Some(KEEPALIVE),
        keepalive_max: 3,
        nodelay: true,
        preferred: Preferred {
            // Other kinds of host keys could only mismatch.
            key: Cow::Owned(vec![pinned.public().algorithm()]),
            cipher: Cow::Borrowed(&CIPHERS),
            ..Preferred::DEFAULT
        },
        ..client::Config::default()
    }
}

fn handshake_error(spec: &SessionSpec, offered: Option<&String>, source: russh::Error) -> ConnectError {
    let port = spec.port;
    let mismatch = |offered: String| ConnectError::HostKeyMismatch {
        port,
        expected: spec.host_key.fingerprint(),
        offered,
    };
    match (offered, source) {
        (Some(offered), _) => mismatch(offered.clone()),
        (None, russh::Error::NoCommonAlgo { kind: AlgorithmKind::Key, .. }) => {
            mismatch(format!("of another kind than {}", spec.host_key.algorithm()))
        }
        (None, source) => ConnectError::Protocol { port, stage: ConnectStage::Handshake, source },
    }
}

/// A second descriptor of the connection's socket. The SSH library's task outlives its handle and any timeout
/// around it; shutting the socket down is what ends it for certain.
struct Line {
    socket: std::net::TcpStream,
    cut: AtomicBool,
}

impl Line {
    fn of(stream: TcpStream) -> io::Result<(Line, TcpStream)> {
        stream.set_nodelay(true)?;
        let stream = stream.into_std()?;
        let line = Line { socket: stream.try_clone()?, cut: AtomicBool::new(false) };
        Ok((line, TcpStream::from_std(stream)?))
    }

    fn cut(&self) {
        self.cut.store(true, Ordering::Release);
        // Fails only when the other side was faster.
        let _ = self.socket.shutdown(Shutdown::Both);
    }

    fn is_cut(&self) -> bool {
        self.cut.load(Ordering::Acquire)
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.cut();
    }
}

/// Cuts the line when a command is abandoned, also by dropping its future.
struct CutUnlessFinished<'a> {
    line: &'a Line,
    finished: bool,
}

impl CutUnlessFinished<'_> {
    fn finish(mut self, result: &Result<ExecOutput, ExecError>) {
        self.finished = match result {
            Ok(_) | Err(ExecError::Refused | ExecError::Signalled { .. } | ExecError::NoStatus) => true,
            Err(
                ExecError::Deadline { .. }
                | ExecError::OutputTooLarge { .. }
                | ExecError::Disconnected
                | ExecError::Protocol { .. },
            ) => false,
        };
    }
}

impl Drop for CutUnlessFinished<'_> {
    fn drop(&mut self) {
        if !self.finished {
            self.line.cut();
        }
    }
}

#[cfg(test)]
pub(crate) mod fake_guest;
#[cfg(test)]
mod tests;
