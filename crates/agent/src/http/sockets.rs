//! The two sockets that callers reach the agent by. Owns how they are bound and who may connect; the daemon binds them
//! before it touches any VM, and hands them to `serve`.

use std::{
    fs::{self, Permissions},
    io,
    net::{IpAddr, SocketAddr},
    ops::RangeInclusive,
    os::unix::fs::{PermissionsExt, lchown},
    path::{Path, PathBuf},
};

use nix::unistd::Group;
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};

use super::auth::GROUP;

/// Where the TCP port is taken from when none is set.
pub const AGENT_PORTS: RangeInclusive<u16> = 15_001..=15_300;

/// Unacknowledged answers are given up after this time, so that a caller that vanished frees its place.
const UNACKNOWLEDGED_MS: u32 = 30_000;

/// The agent cannot be reached.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The port that was asked for is not to be had.
    #[error(
        "cannot listen on {address}: set QUDATA_LISTEN and QUDATA_AGENT_PORT to an address and port that are free"
    )]
    Port {
        /// Address and port.
        address: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// No port of the range is to be had.
    #[error(
        "cannot listen on any port of {address} from {} to {}: set QUDATA_AGENT_PORT to one that is free",
        AGENT_PORTS.start(), AGENT_PORTS.end()
    )]
    NoPort {
        /// The address.
        address: IpAddr,
        /// What the last port said.
        #[source]
        source: io::Error,
    },
    /// Another agent answers on the local socket.
    #[error("another agent is running: it answers on {}", path.display())]
    Running {
        /// The socket.
        path: PathBuf,
    },
    /// The local socket cannot be made.
    #[error("cannot make the local socket {}", path.display())]
    Local {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Binds the TCP socket: `port`, or the first free one of [`AGENT_PORTS`].
///
/// # Errors
/// When no port can be bound.
pub async fn listen_tcp(listen: IpAddr, port: Option<u16>) -> Result<TcpListener, ListenError> {
    if let Some(port) = port {
        let address = SocketAddr::new(listen, port);
        return TcpListener::bind(address).await.map_err(|source| ListenError::Port { address, source });
    }
    let mut last = io::Error::from(io::ErrorKind::AddrInUse);
    for port in AGENT_PORTS {
        match TcpListener::bind(SocketAddr::new(listen, port)).await {
            Ok(listener) => return Ok(listener),
            // Only a taken port makes another one worth trying.
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => last = error,
            Err(source) => return Err(ListenError::NoPort { address: listen, source }),
        }
    }
    Err(ListenError::NoPort { address: listen, source: last })
}

/// Binds the local socket at `path`: for root and the group `qudata`, or for root alone where there is no such group.
/// What a dead agent left there is replaced.
///
/// # Errors
/// When another agent answers there, or the socket cannot be made.
pub async fn listen_unix(path: &Path) -> Result<UnixListener, ListenError> {
    let failed = |source| ListenError::Local { path: path.to_owned(), source };
    if UnixStream::connect(path).await.is_ok() {
        return Err(ListenError::Running { path: path.to_owned() });
    }
    // Made under another name and moved: nobody can connect before the mode is right, and the name is never missing.
    let fresh = path.with_extension(format!("new-{}", std::process::id()));
    if let Err(error) = fs::remove_file(&fresh)
        && error.kind() != io::ErrorKind::NotFound
    {
        return Err(failed(error));
    }
    let listener = UnixListener::bind(&fresh).map_err(failed)?;
    protect(&fresh).and_then(|()| fs::rename(&fresh, path)).map_err(|error| {
        let _ = fs::remove_file(&fresh);
        failed(error)
    })?;
    Ok(listener)
}

fn protect(socket: &Path) -> io::Result<()> {
    let group = Group::from_name(GROUP).ok().flatten();
    if let Some(group) = &group {
        lchown(socket, None, Some(group.gid.as_raw()))?;
    }
    fs::set_permissions(socket, Permissions::from_mode(if group.is_some() { 0o660 } else { 0o600 }))
}

/// Settings of an accepted TCP connection. None of them is worth losing the caller for.
pub(super) fn tune(stream: &TcpStream) {
    let _ = stream.set_nodelay(true);
    let _ = rustix::net::sockopt::set_tcp_user_timeout(stream, UNACKNOWLEDGED_MS);
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    #[tokio::test]
    async fn a_taken_port_is_refused_when_it_was_asked_for() {
        let held = listen_tcp(Ipv4Addr::LOCALHOST.into(), None).await.unwrap();
        let port = held.local_addr().unwrap().port();
        assert!(AGENT_PORTS.contains(&port));
        let error = listen_tcp(Ipv4Addr::LOCALHOST.into(), Some(port)).await.unwrap_err().to_string();
        assert!(error.contains(&port.to_string()) && error.contains("QUDATA_AGENT_PORT"), "{error}");
        let next = listen_tcp(Ipv4Addr::LOCALHOST.into(), None).await.unwrap();
        assert_ne!(next.local_addr().unwrap().port(), port);
    }

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent.sock");
        let first = listen_unix(&path).await.unwrap();
        let mode = fs::metadata(&path).unwrap().permissions().mode() & 0o777;
        let expected = if Group::from_name(GROUP).unwrap().is_some() { 0o660 } else { 0o600 };
        assert_eq!(mode, expected, "{mode:o}");
        assert!(matches!(listen_unix(&path).await, Err(ListenError::Running { .. })));
        assert!(UnixStream::connect(&path).await.is_ok(), "the refused start did not touch the socket");
        drop(first);
        assert!(path.exists(), "a killed agent leaves its socket");
        let _second = listen_unix(&path).await.unwrap();
        assert!(UnixStream::connect(&path).await.is_ok());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[tokio::test]
    async fn a_failed_bind_names_the_path() {
        let error = listen_unix(Path::new("/nonexistent/agent.sock")).await.unwrap_err().to_string();
        assert!(error.contains("/nonexistent/agent.sock"), "{error}");
    }
}
