//! DELETE at any moment: it takes effect at once, leaves nothing, and never hits anybody else.

use std::{thread, time::Instant};

use qudata_testkit::ssh::KeyPair;
use qudata_tests::{BOOT, SOON, blank_agent, guest, guest_agent, small};

/// Deletes as soon as `phase` is seen.
fn delete_at(agent: &qudata_testkit::agent::TestAgent, wish: &serde_json::Value, phase: &str) {
    let vm = agent.create(wish);
    agent.wait_for_phase(&vm, phase, BOOT);
    let start = Instant::now();
    agent.delete(&vm);
    assert!(start.elapsed() < SOON / 3, "DELETE at {phase} took {:?}", start.elapsed());
    assert_eq!(agent.vm_processes(), [], "after DELETE at {phase}");
}

#[test]
fn at_every_phase_before_the_guest() {
    let agent = blank_agent();
    let mut baseline = agent.baseline();
    for phase in ["accepted", "disk_created", "seed_written", "network_started", "qemu_started", "booting"] {
        delete_at(&agent, &small(), phase);
    }
    agent.assert_clean(&mut baseline);
}

#[test]
fn slow_when_the_guest_is_up_and_before_it_is_ready() {
    let agent = guest_agent();
    let mut baseline = agent.baseline();
    let key = KeyPair::make(agent.dir(), "renter");
    delete_at(&agent, &guest(&key.public), "guest_up");
    agent.assert_clean(&mut baseline);
}

/// C3: DELETE answered first, worked later, and had no id: a late or repeated one killed the next tenant.
#[test]
fn orig_c3_late_delete_never_hits_a_newer_instance() {
    let agent = blank_agent();
    let mut baseline = agent.baseline();
    let old = agent.create(&small());
    agent.delete(&old);
    let new = agent.create(&small());
    agent.wait_for_phase(&new, "booting", SOON);
    let qemu = agent.qemu(&new);
    for path in [old.path(), format!("/instances?id={}", old.id)] {
        let reply = agent.call("DELETE", &path, None);
        assert_eq!((reply.status, reply.code().as_str()), (404, "no_such_instance"), "{path}");
    }
    assert!(qemu.is_alive());
    agent.delete(&new);
    agent.assert_clean(&mut baseline);
}

/// C3, second half, and C2: DELETE before the VM existed did nothing and left a zombie; a new order met the old one's boot.
#[test]
fn orig_c2_c3_delete_right_after_create_and_create_again() {
    let agent = blank_agent();
    let mut baseline = agent.baseline();
    for _ in 0..5 {
        let vm = agent.create(&small());
        assert_eq!(agent.call("DELETE", &vm.path(), None).status, 200);
    }
    let last = agent.create(&small());
    agent.wait_for_phase(&last, "booting", SOON);
    agent.delete(&last);
    assert_eq!(agent.vm_processes(), []);
    agent.assert_clean(&mut baseline);
}

/// C5: ports were released from the state at request time: twice, or never.
#[test]
fn orig_c5_ports_are_released_once() {
    let agent = blank_agent();
    let mut baseline = agent.baseline();
    let first = agent.create(&small());
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| agent.call("DELETE", &first.path(), None));
        }
    });
    let vms = [(); 3].map(|()| agent.create(&small()));
    let mut ports: Vec<u16> = vms.iter().flat_map(|vm| [vm.port(22), vm.port(8000)]).collect();
    ports.sort_unstable();
    ports.dedup();
    assert_eq!(ports.len(), 6, "a port was given twice: {ports:?}");
    for vm in &vms {
        agent.delete(vm);
    }
    agent.assert_clean(&mut baseline);
}
