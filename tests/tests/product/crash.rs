//! The agent dies or is stopped; its tenants do not notice.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use qudata_testkit::{agent::TestAgent, ssh::KeyPair};
use qudata_tests::{BOOT, SOON, blank_agent, guest, guest_agent, knock, small};
use serde_json::json;

/// L1: every start killed the renter's VM. L2: SIGTERM stopped the VM and deleted its disk.
#[test]
fn orig_l1_l2_agent_restart_keeps_the_vm() {
    let agent = guest_agent();
    let mut baseline = agent.baseline();
    let key = KeyPair::make(agent.dir(), "renter");
    let vm = agent.create(&guest(&key.public));
    agent.wait_for_phase(&vm, "ready", BOOT);
    let login = agent.login(&vm, &key.file);
    let facts = || login.run("cat /proc/sys/kernel/random/boot_id");
    let (boot, qemu, passt) = (facts(), agent.qemu(&vm), agent.passt(&vm));
    let untouched = |when: &str| {
        assert!(qemu.is_alive() && passt.is_alive(), "a process of the tenant is gone {when}");
        assert_eq!(facts(), boot, "the guest was started again {when}");
    };

    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let refusals = scope.spawn(|| refusals(vm.port(8000), &over));
        agent.kill9();
        untouched("while the agent is dead");
        agent.restart();
        agent.wait_for_state(&vm, "running", SOON);
        untouched("after kill -9");
        over.store(true, Ordering::Relaxed);
        assert_eq!(refusals.join().unwrap(), 0, "a renter was turned away because the agent was restarted");
    });

    assert!(agent.terminate().success(), "SIGTERM is an orderly end");
    untouched("while the agent is stopped");
    agent.restart();
    agent.wait_for_state(&vm, "running", SOON);
    untouched("after SIGTERM");
    assert_eq!(agent.qemu(&vm).identity(), qemu.identity());

    // The adopted VM is a whole one: keys, commands, the end.
    let second = KeyPair::make(agent.dir(), "second");
    let added = agent.call("POST", "/ssh", Some(&json!({ "ssh_pubkey": second.public })));
    assert_eq!(added.status, 200, "{}", added.text());
    agent.login(&vm, &second.file).run("true");
    agent.command(&vm, "stop");
    agent.wait_for_state(&vm, "paused", SOON);
    agent.kill9();
    agent.restart();
    agent.wait_for_state(&vm, "paused", SOON);
    agent.command(&vm, "start");
    agent.wait_for_state(&vm, "running", SOON);
    untouched("after a pause over a restart");
    agent.delete(&vm);
    agent.assert_clean(&mut baseline);
}

/// The agent dies while the guest boots: the boot goes on, and its readiness is not missed.
#[test]
fn slow_readiness_is_not_missed_while_the_agent_is_away() {
    let agent = guest_agent();
    let mut baseline = agent.baseline();
    let key = KeyPair::make(agent.dir(), "renter");
    let vm = agent.create(&guest(&key.public));
    agent.wait_for_phase(&vm, "booting", SOON);
    let qemu = agent.qemu(&vm);
    agent.kill9();
    std::thread::sleep(Duration::from_secs(25));
    agent.restart();
    agent.wait_for_state(&vm, "running", BOOT);
    assert_eq!(agent.qemu(&vm).identity(), qemu.identity());
    agent.login(&vm, &key.file).run("true");
    agent.delete(&vm);
    agent.assert_clean(&mut baseline);
}

/// L8: the state was saved only after the boot, so a crash before it left what nobody knew of.
#[test]
fn orig_l8_kill_during_create_is_finished_or_undone() {
    let agent = blank_agent();
    let mut baseline = agent.baseline();
    for phase in ["accepted", "disk_created", "seed_written", "network_started", "qemu_started", "booting"] {
        let vm = agent.create(&small());
        agent.wait_for_phase(&vm, phase, SOON);
        agent.kill9();
        let qemu = agent.process_of(&vm, "qemu-system");
        agent.restart();
        if agent.get(&vm).status == 404 {
            assert_eq!(agent.vm_processes(), [], "undone after a kill at {phase}, and something runs");
            assert!(qemu.is_none(), "a running VM was undone after a kill at {phase}");
            continue;
        }
        agent.wait_for_state(&vm, "booting", SOON);
        let now = agent.qemu(&vm);
        assert!(
            qemu.is_none_or(|qemu| qemu.identity() == now.identity()),
            "another QEMU after a kill at {phase}"
        );
        agent.delete(&vm);
        nothing_runs(&agent);
    }
    agent.assert_clean(&mut baseline);
}

/// The agent dies in the middle of a DELETE: the next one finishes it.
#[test]
fn kill_during_delete_is_finished() {
    let agent = blank_agent();
    let mut baseline = agent.baseline();
    for delay in [0, 1, 3, 10, 30] {
        let vm = agent.create(&small());
        agent.wait_for_phase(&vm, "booting", SOON);
        std::thread::scope(|scope| {
            scope.spawn(|| agent.client().call("DELETE", &vm.path(), None));
            std::thread::sleep(Duration::from_millis(delay));
            agent.kill9();
        });
        agent.restart();
        if agent.get(&vm).status == 200 {
            agent.delete(&vm);
        }
        nothing_runs(&agent);
    }
    agent.assert_clean(&mut baseline);
}

/// Connects to a published port all the time; how often the host refused. Nobody listens in the guest, and still the
/// connection comes about: passt takes it first.
fn refusals(port: u16, over: &AtomicBool) -> usize {
    let mut refusals = 0;
    while !over.load(Ordering::Relaxed) {
        refusals += usize::from(knock(port).0.is_err());
        std::thread::sleep(Duration::from_millis(10));
    }
    refusals
}

fn nothing_runs(agent: &TestAgent) {
    assert_eq!(agent.vm_processes(), []);
}

/// An agent that did not start because of what only new VMs need would leave its tenants alone.
#[test]
fn what_only_new_vms_need_may_be_missing() {
    let mut agent = blank_agent();
    let vm = agent.create(&small());
    agent.wait_for_state(&vm, "booting", SOON);
    let qemu = agent.qemu(&vm);
    agent.kill9();
    // An order that was cut off before it was accepted, and what nobody knows.
    let instances = agent.data_dir().join("instances");
    let [cut_off, unknown] = ["01900000-0000-7000-8000-000000000001", "01900000-0000-7000-8000-000000000002"]
        .map(|id| instances.join(id));
    std::fs::create_dir(&cut_off).unwrap();
    std::fs::create_dir(&unknown).unwrap();
    std::fs::write(unknown.join("disk.qcow2"), "somebody's").unwrap();
    agent.change("QUDATA_BASE_IMAGE", "/none.qcow2");
    agent.restart();
    agent.wait_for_state(&vm, "booting", SOON);
    assert_eq!(agent.qemu(&vm).identity(), qemu.identity());
    let problems = agent.call("GET", "/host", None).data()["problems"].to_string();
    assert!(problems.contains("program_missing") && problems.contains("/none.qcow2"), "{problems}");
    assert!(!cut_off.exists() && unknown.join("disk.qcow2").exists());
    assert!(problems.matches("belongs to no instance").count() == 1, "{problems}");
    let refused = agent.call("POST", "/instances", Some(&small()));
    assert_eq!((refused.status, refused.code().as_str()), (500, "host_fault"), "{}", refused.text());
    let folders = std::fs::read_dir(&instances).unwrap().count();
    assert_eq!(folders, 2, "a refusal left a folder");

    // Without tenants it is a reason not to start.
    agent.delete(&vm);
    assert!(agent.terminate().success());
    let said = agent.refuses(&agent.rival().set("QUDATA_BASE_IMAGE", "/none.qcow2"));
    assert!(said.stderr.contains("/none.qcow2"), "{}", said.stderr);
    std::fs::remove_dir_all(&unknown).unwrap();
}
