//! The host's resolvers, as a guest can use them. Owns the reading of resolv.conf; called by the agent when it installs
//! the policy.

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;

/// Where systemd-resolved writes the servers behind its own stub on 127.0.0.53.
const BEHIND_STUB: &str = "run/systemd/resolve/resolv.conf";
/// resolv.conf(5) reads no more.
const MAX_RESOLVERS: usize = 3;

/// IPv4 resolvers of the host whose root directory is `root`, in order. Those on the loopback are not reachable from a
/// guest; when the host has only such, the servers behind systemd-resolved are taken.
///
/// # Errors
/// When `etc/resolv.conf` exists and cannot be read.
pub fn resolvers(root: &Path) -> io::Result<Vec<Ipv4Addr>> {
    let direct = read(&root.join("etc/resolv.conf"))?;
    if direct.is_empty() { read(&root.join(BEHIND_STUB)) } else { Ok(direct) }
}

fn read(path: &Path) -> io::Result<Vec<Ipv4Addr>> {
    match fs::read(path) {
        Ok(bytes) => Ok(parse(&String::from_utf8_lossy(&bytes))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

fn parse(text: &str) -> Vec<Ipv4Addr> {
    let server = |line: &str| {
        let mut words = line.split_ascii_whitespace();
        let address = (words.next()? == "nameserver").then(|| words.next())??;
        match address.parse().ok()? {
            IpAddr::V4(v4) => (!v4.is_loopback() && !v4.is_unspecified()).then_some(v4),
            IpAddr::V6(_) => None,
        }
    };
    text.lines().filter_map(server).take(MAX_RESOLVERS).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_that_a_guest_can_use() {
        let text = "# nameserver 192.0.2.1\nsearch example\nnameserver 192.0.2.2 # ours\n\
            nameserver fe80::1%eth0\nnameserver 127.0.0.1\nnameserver\t198.51.100.1\nnameserver x\nnameserver\n";
        assert_eq!(parse(text), [Ipv4Addr::new(192, 0, 2, 2), Ipv4Addr::new(198, 51, 100, 1)]);
    }

    #[test]
    fn a_stub_leads_to_the_servers_behind_it() {
        let root = tempfile::tempdir().unwrap();
        assert!(resolvers(root.path()).unwrap().is_empty(), "no file, no resolvers");
        fs::create_dir_all(root.path().join("etc")).unwrap();
        fs::create_dir_all(root.path().join("run/systemd/resolve")).unwrap();
        fs::write(root.path().join("etc/resolv.conf"), "nameserver 127.0.0.53\n").unwrap();
        fs::write(root.path().join(BEHIND_STUB), "nameserver 192.0.2.9\n").unwrap();
        assert_eq!(resolvers(root.path()).unwrap(), [Ipv4Addr::new(192, 0, 2, 9)]);
    }
}
