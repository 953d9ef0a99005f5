//! The seed's documents as JSON, which every YAML reader reads: no text is ever pasted into YAML.
//! Keys stand in alphabetical order so that the output does not depend on serde_json's features.

use super::{SeedSpec, StaticNetwork};
use crate::keys::GuestKey;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

const READY_SCRIPT: &str = include_str!("ready.sh");

/// Starts the ready unit, once per boot, without waiting for it. It is ordered behind what writes sshd's keys, not behind
/// sshd: it starts beside it and watches, because being started by systemd takes longer than a look every 50 ms.
/// At this moment the boot transaction still holds the jobs of those units (unknown ones order nothing).
/// The `mkdir` is the "once": this entry may stand twice in a merged configuration.
const START_READY_UNIT: &str = "mkdir /run/qudata-ready 2>/dev/null || exit 0
systemd-run --quiet --no-block --collect --unit=qudata-ready --description='Tell the host that SSH is up' \
--property='After=cloud-init.service cloud-init-network.service' --property=CPUWeight=10000 \
--property=Restart=always --property=RestartSec=1 --property=StartLimitIntervalSec=0 \
--property=TimeoutStopSec=2 -- \"$(command -v bash || echo /bin/sh)\" -c \"$1\" || rmdir /run/qudata-ready
";

/// Root logs in by key, nobody by password, and only the pinned host key is offered. The file is the one that
/// cloud-init itself would write for `ssh_pwauth: false`; finding it, cloud-init does not restart sshd in mid-boot.
const SSHD_CONFIG: &str = "HostKey /etc/ssh/ssh_host_ed25519_key
KbdInteractiveAuthentication no
PasswordAuthentication no
PermitRootLogin prohibit-password
";

/// What the agent needs in every guest, split by how cloud-init must merge it into a renter's configuration.
pub(super) struct Ours {
    /// Put in front of theirs.
    pub(super) lists: Map<String, Value>,
    /// Put in place of theirs.
    pub(super) pins: Map<String, Value>,
}

impl Ours {
    pub(super) fn of(spec: &SeedSpec<'_>) -> Ours {
        // cloud-init drops equal lines, but not equal keys with other comments.
        let mut keys = vec![spec.management_key];
        for key in spec.ssh_keys {
            if !keys.contains(&key) {
                keys.push(key);
            }
        }
        let keys: Vec<String> = keys.into_iter().map(GuestKey::to_line).collect();
        let lists = json!({
            "bootcmd": [["sh", "-c", START_READY_UNIT, "qudata-ready", READY_SCRIPT]],
            "ssh_authorized_keys": keys,
            // Without the image's default user: its copy of the keys would survive their removal from root's file.
            "users": [{"lock_passwd": true, "name": "root"}],
            "write_files": [{
                "content": SSHD_CONFIG,
                "path": "/etc/ssh/sshd_config.d/50-cloud-init.conf",
                "permissions": "0644",
            }],
        });
        let pins = json!({
            "disable_root": false,
            "ssh_deletekeys": true,
            "ssh_keys": {
                "ed25519_private": spec.host_key.private_openssh(),
                "ed25519_public": spec.host_key.public().to_line(),
            },
            "ssh_pwauth": false,
        });
        Ours { lists: object(lists), pins: object(pins) }
    }

    /// Both kinds, for a guest without a renter's configuration and for the first part of a merged one.
    pub(super) fn whole(&self) -> Map<String, Value> {
        let sorted: BTreeMap<_, _> = self.lists.iter().chain(&self.pins).collect();
        sorted.into_iter().map(|(key, value)| (key.clone(), value.clone())).collect()
    }
}

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Array(_) => Map::new(),
    }
}

/// A `#cloud-config` document.
pub(super) fn document(content: &Map<String, Value>) -> String {
    format!("#cloud-config\n{:#}\n", Value::Object(content.clone()))
}

pub(super) fn meta_data(spec: &SeedSpec<'_>) -> String {
    format!("{:#}\n", json!({"instance-id": spec.instance_id, "local-hostname": spec.hostname}))
}

/// Version 2 without what renderers older than netplan reject: `0.0.0.0/0` instead of `default`, and a name set
/// by MAC, because the ifupdown renderer takes the key for the interface's name.
pub(super) fn network_config(network: &StaticNetwork) -> String {
    let [a, b, c, d, e, f] = network.mac;
    let interface = json!({
        "accept-ra": false,
        "addresses": [format!("{}/{}", network.address, network.prefix)],
        "dhcp4": false,
        "dhcp6": false,
        "match": {"macaddress": format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")},
        "mtu": network.mtu,
        "nameservers": {"addresses": [network.dns]},
        "routes": [{"to": "0.0.0.0/0", "via": network.gateway}],
        "set-name": "eth0",
    });
    format!("{:#}\n", json!({"ethernets": {"eth0": interface}, "version": 2}))
}

/// Defaults that a renter's configuration may replace.
pub(super) fn vendor_data() -> String {
    document(&object(json!({
        "growpart": {"devices": ["/"], "ignore_growroot_disabled": false, "mode": "auto"},
        // Keeps the rest of /etc/hosts, and the renter's changes to it, as they are.
        "manage_etc_hosts": "localhost",
        "no_ssh_fingerprints": true,
        "package_reboot_if_required": false,
        "package_update": false,
        "package_upgrade": false,
        "resize_rootfs": true,
        "ssh": {"emit_keys_to_console": false},
    })))
}

#[cfg(test)]
mod tests {
    use super::{super::READY_PORT_NAME, *};

    #[test]
    fn systemd_finds_nothing_to_expand_in_the_ready_script() {
        for expanded in ["%", "${", "$$"] {
            assert!(!READY_SCRIPT.contains(expanded), "{expanded}");
        }
        assert!(READY_SCRIPT.contains(READY_PORT_NAME));
    }

    #[test]
    fn shells_accept_the_scripts() {
        for script in [READY_SCRIPT, START_READY_UNIT] {
            for shell in ["dash", "bash"] {
                let checked = std::process::Command::new(shell).args(["-n", "-c", script]).status().unwrap();
                assert!(checked.success(), "{shell}");
            }
        }
    }
}
