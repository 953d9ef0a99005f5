//! Records of the numeric users that units run as. systemd starts nothing as a user whom the host's user database does
//! not know (status 217), and a VM's user is a number and no more; so the number gets a record for as long as something
//! runs as it: a drop-in of nss-systemd (systemd 249 and newer), gone with the next boot.

use std::{io, path::Path};

use crate::durable::{self, DurableError};

/// Where systemd looks for records that others made; see nss-systemd(8).
const RECORDS: &str = "/run/userdb";
const SWITCH: &str = "/etc/nsswitch.conf";

/// Makes the record of `uid` with the group `gid`.
pub(super) fn announce(uid: u32, gid: u32) -> Result<(), DurableError> {
    durable::create_dir(Path::new(RECORDS), 0o755)?;
    let record = serde_json::json!({
        "userName": format!("qudata-vm-{uid}"),
        "realName": "A process of a qudata instance",
        "uid": uid,
        "gid": gid,
        "disposition": "system",
        "locked": true,
        "homeDirectory": "/",
        "shell": "/usr/sbin/nologin",
    });
    durable::publish(&record_path(uid), record.to_string().as_bytes(), 0o644)
}

/// Removes the record of `uid`; absence is fine.
pub(super) fn withdraw(uid: u32) -> Result<(), DurableError> {
    durable::remove_file(&record_path(uid)).map(|_| ())
}

fn record_path(uid: u32) -> std::path::PathBuf {
    Path::new(RECORDS).join(format!("{uid}.user"))
}

/// Whether this host asks nss-systemd for users at all.
pub(super) fn are_consulted() -> io::Result<bool> {
    Ok(asks_systemd(&std::fs::read_to_string(SWITCH)?))
}

fn asks_systemd(switch: &str) -> bool {
    let line = switch.lines().find_map(|line| line.trim().strip_prefix("passwd:"));
    line.is_some_and(|sources| sources.split_ascii_whitespace().any(|source| source == "systemd"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_switch_is_read_like_libc_reads_it() {
        let table = [
            ("passwd:         files systemd\ngroup: files systemd\n", true),
            ("# passwd: systemd\npasswd: files\n", false),
            ("passwd: files systemd [NOTFOUND=return] sss\n", true),
            ("group: files systemd\n", false),
            ("passwd: files systemd-not\n", false),
            ("", false),
        ];
        for (switch, expected) in table {
            assert_eq!(asks_systemd(switch), expected, "{switch}");
        }
    }
}
