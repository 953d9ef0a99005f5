//! QEMU dies, stops answering, or starts a guest that never gets ready.

use std::time::Instant;

use qudata_testkit::agent::{Image, Setup};
use qudata_tests::{AT_ONCE, SOON, blank_agent, small};
use rustix::process::Signal;

#[test]
fn a_guest_that_never_gets_ready_is_an_error_with_the_reason() {
    let agent = Setup::new(Image::Blank).set("QUDATA_READY_TIMEOUT", "5").start();
    let mut baseline = agent.baseline();
    let vm = agent.create(&small());
    agent.wait_for_state(&vm, "failed", SOON);
    assert_eq!(agent.field(&vm, "status"), "error");
    let reason = agent.field(&vm, "reason");
    assert!(reason.contains("ready") && reason.contains('5'), "{reason}");
    agent.delete(&vm);
    agent.assert_clean(&mut baseline);
}

/// L12: with QEMU gone the original said "running" or "error" for ever, without a reason.
#[test]
fn orig_l12_qemu_killed_from_outside_is_an_error_and_the_disk_is_kept() {
    let agent = blank_agent();
    let mut baseline = agent.baseline();
    let vm = agent.create(&small());
    agent.wait_for_phase(&vm, "booting", SOON);
    let disk = agent.data_dir().join("instances").join(&vm.id).join("disk.qcow2");
    assert!(agent.qemu(&vm).signal(Signal::KILL));
    agent.wait_for_state(&vm, "failed", SOON);
    assert_eq!(agent.field(&vm, "status"), "error");
    assert!(agent.field(&vm, "reason").contains("QEMU"), "{}", agent.view(&vm));
    assert!(disk.is_file(), "only DELETE destroys a disk");

    // So does a start of the agent that finds it so.
    agent.kill9();
    agent.restart();
    agent.wait_for_state(&vm, "failed", SOON);
    assert!(disk.is_file(), "only DELETE destroys a disk");
    agent.delete(&vm);
    assert!(!disk.exists());
    agent.assert_clean(&mut baseline);
}

/// The same while nobody looks: the next agent cannot know how it ended, says so, and boots it again when told to.
#[test]
fn qemu_killed_while_the_agent_is_away() {
    let agent = blank_agent();
    let mut baseline = agent.baseline();
    let vm = agent.create(&small());
    agent.wait_for_phase(&vm, "booting", SOON);
    let qemu = agent.qemu(&vm);
    agent.kill9();
    assert!(qemu.signal(Signal::KILL));
    agent.restart();
    // It was never ready, so its bring-up is finished by the new agent.
    agent.wait_for_state(&vm, "booting", SOON);
    assert_ne!(agent.qemu(&vm).identity(), qemu.identity());
    agent.delete(&vm);
    agent.assert_clean(&mut baseline);
}

/// C1: one lock held while QEMU was silent stopped every call. L6: what did not answer was killed.
#[test]
fn orig_c1_l6_a_silent_qemu_stops_nobody_and_is_left_alone() {
    let agent = blank_agent();
    let mut baseline = agent.baseline();
    let vm = agent.create(&small());
    agent.wait_for_phase(&vm, "booting", SOON);
    let qemu = agent.qemu(&vm);
    assert!(qemu.signal(Signal::STOP));
    for path in ["/instances", "/host", &vm.path(), "/metrics"] {
        let start = Instant::now();
        assert_eq!(agent.call("GET", path, None).status, 200, "{path}");
        assert!(start.elapsed() < AT_ONCE, "GET {path} took {:?}", start.elapsed());
    }
    agent.wait_for_state(&vm, "unresponsive", SOON * 2);
    assert_eq!(agent.field(&vm, "status"), "error");

    // A new agent finds it silent and leaves it alone, too.
    agent.kill9();
    agent.restart();
    agent.wait_for_state(&vm, "unresponsive", SOON * 2);
    assert!(qemu.is_alive());
    assert!(qemu.signal(Signal::CONT));
    agent.wait_for_state(&vm, "booting", SOON * 2);
    assert_eq!(agent.qemu(&vm).identity(), qemu.identity());

    // C7: DELETE does not wait for a silent QEMU.
    assert!(qemu.signal(Signal::STOP));
    agent.delete(&vm);
    assert!(!qemu.is_alive());
    agent.assert_clean(&mut baseline);
}
