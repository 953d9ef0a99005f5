//! Views that the goldens are made of. Tests only.

mod gpus;

use std::collections::BTreeMap;

use jiff::Timestamp;
use qudata_api::{HostView, InstanceState, InstanceView, Problem, Sample, SshEndpoint};

pub(crate) use self::gpus::{gpus, topology};
use crate::screen::Look;

pub(crate) const NOW: &str = "2026-01-02T12:00:00Z";

pub(crate) fn at(text: &str) -> Timestamp {
    text.parse().unwrap()
}

pub(crate) fn look(width: Option<u16>) -> Look {
    Look { width, colour: false, now: at(NOW) }
}

/// A running instance with SSH.
pub(crate) fn instance(name: &str, id: &str) -> InstanceView {
    let state = InstanceState::Running;
    InstanceView {
        id: id.parse().unwrap(),
        name: name.to_owned(),
        status: state.status(),
        state,
        since: at("2026-01-02T11:46:40Z"),
        reason: None,
        ports: BTreeMap::from([("22".to_owned(), "10001".to_owned())]),
        local_ports: BTreeMap::new(),
        routes: Vec::new(),
        ssh: Some(SshEndpoint { host: "127.0.0.1".to_owned(), port: 10001, user: "root".to_owned() }),
        ssh_host_key: "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIHostKeyOfTheGuest".to_owned(),
        ssh_keys: vec!["SHA256:uNiVztksCsDhcc0u9e8BrrJXVsNmmlXa9fcr1S7Xb0A".to_owned()],
        cpus: 4,
        memory: 8 << 30,
        storage: 50 << 30,
        gpus: Vec::new(),
        created_at: at("2026-01-02T11:46:20Z"),
        ready_at: Some(at("2026-01-02T11:46:38.400Z")),
        sample: None,
        problems: Vec::new(),
    }
}

/// One of each kind that matters.
pub(crate) fn instances() -> Vec<InstanceView> {
    let mut busy = instance("training", "019b7f3a-1b00-7c2e-9d41-5f0a3b6c7d01");
    busy.cpus = 64;
    busy.memory = 512 << 30;
    busy.storage = 2 << 40;
    busy.gpus = vec!["0000:65:00.0".to_owned(), "0000:66:00.0".to_owned()];
    let ports = [("22", "10001"), ("80", "20003"), ("6006", "20001"), ("8888", "20000"), ("11434", "20002")];
    busy.ports = ports.map(|(g, p)| (g.to_owned(), p.to_owned())).into();
    busy.sample = Some(Sample {
        at: at("2026-01-02T11:59:57Z"),
        cpu_percent: Some(81.26),
        ram_percent: 40.0,
        net_rx_bytes: 5 << 30,
        net_tx_bytes: 700 << 20,
        gpu_percent: Some(99.0),
        gpu_celsius: Some(71.0),
        gpu_memory_percent: Some(92.5),
    });

    let mut booting =
        instance("a-name-as-long-as-a-host-owner-might-choose", "019b7f3a-64d8-7a10-8b3f-0c9e2d4f6a12");
    booting.state = InstanceState::Booting;
    booting.status = booting.state.status();
    booting.since = at("2026-01-02T11:59:52Z");
    booting.ready_at = None;

    let mut failed = instance("broken", "019b7f3f-0a3c-7e55-a1c2-93d4e5f60718");
    failed.state = InstanceState::Failed;
    failed.status = failed.state.status();
    failed.reason =
        Some("QEMU ended by itself: killed by signal 9; the disk is kept until DELETE".to_owned());
    failed.ports.clear();
    failed.ssh = None;
    failed.problems = vec![Problem {
        code: "vm_ended".to_owned(),
        message: "the VM of broken ended by itself: killed by signal 9".to_owned(),
        remedy: "look at the console with `qudata-agent instance console broken`, then start or delete it"
            .to_owned(),
        since: at("2026-01-02T10:46:40Z"),
    }];
    vec![busy, booting, failed]
}

pub(crate) fn host() -> HostView {
    HostView {
        version: "0.1.0".to_owned(),
        started_at: at("2026-01-02T09:47:00Z"),
        standalone: true,
        accel: "kvm".to_owned(),
        firmware: "uefi".to_owned(),
        tunnel: "none".to_owned(),
        tunnel_link: None,
        control_plane: None,
        listen: "127.0.0.1".to_owned(),
        port: 15001,
        cpus: 128,
        memory_total: 1 << 40,
        memory_free: 480 << 30,
        disk_total: 7 << 40,
        disk_free: 4 << 40,
        instances: 3,
        problems: Vec::new(),
    }
}
