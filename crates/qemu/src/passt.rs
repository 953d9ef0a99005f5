//! The guest's network: one unprivileged passt process per machine. Owns its command line (pure), the addresses that
//! the guest is configured with, and the wait for its socket; called by the agent's bring-up.
//!
//! ```text
//! guest 10.0.2.15 ── virtio-net ── QEMU ══ unix socket ══ passt ── sockets of its own uid ── host network
//! ```
//!
//! passt copies between frames and ordinary sockets, so what it may reach is decided by its uid: see `egress`.
//! It ends when QEMU closes the socket (`--one-off`), and it must not be started as root: it would change to
//! `nobody`, whom the egress policy does not know.
//!
//! Two limits were measured with the passt of Debian 12 (2023-03). It completes a connection towards the guest only
//! when the client has sent something: SSH and HTTP clients do, but a service that speaks first to a silent client
//! stalls; the guest's MTU makes no difference. And a guest whose outward TCP connection the egress policy refuses sees
//! a timeout, not a refusal.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::time::{Instant, sleep};

use crate::machine::MacAddress;

/// Address of every guest; each has a segment of its own.
pub const GUEST_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
/// Prefix length of the guest's segment.
pub const GUEST_PREFIX: u8 = 24;
/// The guest's default gateway. It stands for the outside, not for the host.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
/// The guest's resolver. Nobody is there: the egress policy leads port 53 to the host's resolver.
pub const DNS: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 3);
/// MTU inside the guest. There is no wire behind it: the larger the frame, the fewer copies.
pub const MTU: u16 = 65520;

/// Largest log passt keeps; it drops the oldest lines.
const LOG_BYTES: &str = "262144";

/// One passt process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Passt {
    /// Where it waits for QEMU. Its directory must be writable by passt's uid.
    pub socket: PathBuf,
    /// Its bounded log. Refusals at start also go to standard error.
    pub log: PathBuf,
    /// Where the renter's ports are bound.
    pub listen: Ipv4Addr,
    /// The renter's ports.
    pub forwards: Vec<Forward>,
    /// The agent's own way to the guest's SSH, on 127.0.0.1 whatever `listen` is.
    pub management: Forward,
}

/// A TCP port of the host that leads to a port of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Forward {
    /// Bound on the host.
    pub host_port: u16,
    /// Reached in the guest.
    pub guest_port: u16,
}

/// passt's command line, for passt 2023-03 (Debian 12) and newer.
pub fn plan_argv(passt: &Passt) -> Vec<OsString> {
    let mut argv: Vec<OsString> =
        ["--foreground", "--quiet", "--one-off", "--ipv4-only"].map(Into::into).into();
    let mut pair = |flag: &str, value: OsString| argv.extend([flag.into(), value]);
    pair("--socket", passt.socket.clone().into());
    pair("--log-file", passt.log.clone().into());
    pair("--log-size", LOG_BYTES.into());
    pair("--address", GUEST_ADDRESS.to_string().into());
    pair("--netmask", GUEST_PREFIX.to_string().into());
    pair("--gateway", GATEWAY.to_string().into());
    pair("--mac-addr", MacAddress::GATEWAY.to_string().into());
    // The egress policy leads the guest's resolver to the host's. passt's own way there (--dns-forward) forwards to
    // nothing when the host's resolv.conf names a stub on the loopback, and in 2023-03 also next to --dns.
    pair("--dns", "none".into());
    // One port per option: passt ends when an option binds nothing, but goes on when a list binds in part.
    let management = (Ipv4Addr::LOCALHOST, passt.management);
    let renters = passt.forwards.iter().map(|&forward| (passt.listen, forward));
    for (address, Forward { host_port, guest_port }) in std::iter::once(management).chain(renters) {
        pair("--tcp-ports", format!("{address}/{host_port}:{guest_port}").into());
    }
    // Said aloud because passt otherwise opens the UDP ports of the same numbers.
    pair("--udp-ports", "none".into());
    // The seed configures the guest: no answers to DHCP and its relatives, and no way from the gateway to the host.
    argv.extend(["--no-map-gw", "--no-dhcp", "--no-dhcpv6", "--no-ndp", "--no-ra"].map(Into::into));
    argv
}

/// The socket did not come up.
#[derive(Debug, thiserror::Error)]
pub enum SocketReadyError {
    /// passt is slow, hangs, or ended: its log and standard error say which.
    #[error("passt did not listen on {} within {after:?}", socket.display())]
    TimedOut {
        /// The socket.
        socket: PathBuf,
        /// The deadline.
        after: Duration,
    },
    /// The kernel's list of sockets cannot be read.
    #[error("cannot look for the socket {}", socket.display())]
    Look {
        /// The socket.
        socket: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// Waits until passt listens on `socket`; its TCP ports are bound by then. Watch the process at the same time: one
/// that ended never listens.
///
/// # Errors
/// At the deadline, or when the kernel's list of sockets cannot be read.
pub async fn socket_ready(socket: &Path, deadline: Duration) -> Result<(), SocketReadyError> {
    let end = Instant::now() + deadline;
    // passt listens after a few milliseconds, and every machine waits for it: looking often costs a read of a small
    // file; doubling the pause at once lost up to 20 ms of each start.
    let eager = Instant::now() + Duration::from_millis(100);
    loop {
        let pause = Duration::from_millis(if Instant::now() < eager { 1 } else { 20 });
        // A connection would be taken for QEMU's, so the kernel is asked instead.
        match listens(socket) {
            Ok(true) => return Ok(()),
            Ok(false) => {}
            Err(source) => return Err(SocketReadyError::Look { socket: socket.into(), source }),
        }
        if Instant::now() + pause > end {
            return Err(SocketReadyError::TimedOut { socket: socket.into(), after: deadline });
        }
        sleep(pause).await;
    }
}

/// The flag of a listening socket in `/proc/net/unix`.
const LISTENING: u64 = 1 << 16;

fn listens(socket: &Path) -> io::Result<bool> {
    if !socket.exists() {
        return Ok(false);
    }
    let sockets = fs::read("/proc/net/unix")?;
    Ok(lists_listener(&String::from_utf8_lossy(&sockets), &socket.to_string_lossy()))
}

/// Lines are: address, reference count, protocol, flags, type, state, inode, path; the path may hold blanks.
fn lists_listener(table: &str, socket: &str) -> bool {
    table.lines().filter(|line| line.ends_with(socket)).any(|line| {
        let head = line.strip_suffix(socket).unwrap_or_default();
        let mut fields = head.split_ascii_whitespace();
        let flags = fields.nth(3).and_then(|flags| u64::from_str_radix(flags, 16).ok());
        head.ends_with(' ') && fields.count() == 3 && flags.is_some_and(|flags| flags & LISTENING != 0)
    })
}

#[cfg(test)]
mod tests;
