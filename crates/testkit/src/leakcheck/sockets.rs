//! Sockets in scope: listening TCP and bound UDP by user, port or owner, unix sockets by path. Called by
//! `leakcheck::look`.

use std::{collections::BTreeSet, fs, path::Path};

use super::{Kind, LookError, Scope, Sightings, note};

/// State of a listening TCP socket in /proc/net/tcp; UDP has no such state and shows 07.
const LISTEN: &str = "0A";
const UNCONNECTED: &str = "07";

pub(super) fn look(scope: &Scope, seen: &mut Sightings) -> Result<(), LookError> {
    let own = scope.agent.map(sockets_of).unwrap_or_default();
    for (protocol, state) in [("tcp", LISTEN), ("tcp6", LISTEN), ("udp", UNCONNECTED), ("udp6", UNCONNECTED)]
    {
        let path = format!("/proc/net/{protocol}");
        // A kernel without IPv6 has no such file.
        let Ok(table) = fs::read_to_string(&path) else { continue };
        for socket in table.lines().skip(1).filter_map(Socket::parse) {
            let counts = scope.uids.contains(&socket.uid)
                || scope.ports.iter().any(|range| range.contains(&socket.port))
                || own.contains(&socket.inode);
            if socket.state == state && counts {
                let what = format!("{protocol} port {} of uid {}", socket.port, socket.uid);
                note(seen, Kind::Listener, format!("{protocol} {}", socket.local), what);
            }
        }
    }
    look_at_unix(scope, &own, seen)
}

fn look_at_unix(scope: &Scope, own: &BTreeSet<String>, seen: &mut Sightings) -> Result<(), LookError> {
    let table = fs::read_to_string("/proc/net/unix").map_err(|e| LookError::new("/proc/net/unix", e))?;
    for line in table.lines().skip(1) {
        // Columns: number, references, protocol, flags, type, state, inode, path.
        let fields: Vec<&str> = line.split_whitespace().collect();
        let (Some(inode), Some(path)) = (fields.get(6), fields.get(7)) else { continue };
        // The agent's own are counted among its descriptors: the table shows the name a socket was bound by, which may
        // be a temporary one that differs from start to start.
        if own.contains(*inode) {
            continue;
        }
        if scope.roots.iter().any(|root| Path::new(path).starts_with(root)) {
            note(seen, Kind::UnixSocket, *path, *path);
        }
    }
    Ok(())
}

/// One line of /proc/net/tcp or udp.
struct Socket {
    local: String,
    port: u16,
    state: String,
    uid: u32,
    inode: String,
}

impl Socket {
    fn parse(line: &str) -> Option<Self> {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let local = (*fields.get(1)?).to_owned();
        let port = u16::from_str_radix(local.rsplit(':').next()?, 16).ok()?;
        Some(Self {
            port,
            state: (*fields.get(3)?).to_owned(),
            uid: fields.get(7)?.parse().ok()?,
            inode: (*fields.get(9)?).to_owned(),
            local,
        })
    }
}

/// Inodes of the sockets a process holds.
fn sockets_of(pid: u32) -> BTreeSet<String> {
    let Ok(fds) = fs::read_dir(format!("/proc/{pid}/fd")) else { return BTreeSet::new() };
    fds.filter_map(Result::ok)
        .filter_map(|fd| fs::read_link(fd.path()).ok())
        .filter_map(|link| link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']').map(str::to_owned))
        .collect()
}
