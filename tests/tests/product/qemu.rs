//! QEMU dies, stops answering, or starts a guest that never gets ready.

use std::{os::unix::process::CommandExt, process::Command, thread, time::Instant};

use qudata_testkit::{
    agent::{Image, Setup},
    tool,
};
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

/// L6: whatever had "qemu-system" and the socket's path in its command line was taken for the VM and killed.
#[test]
fn orig_l6_a_stranger_that_mentions_the_vm_is_left_alone() {
    let agent = blank_agent();
    let mut baseline = agent.baseline();
    let vm = agent.create(&small());
    agent.wait_for_phase(&vm, "booting", SOON);
    let words = agent.qemu(&vm).args.join(" ");
    let script = format!("sleep 300; : qemu-system-x86_64 {words}");
    let mut stranger = Command::new("sh").args(["-c", &script]).process_group(0).spawn().unwrap();
    agent.kill9();
    agent.restart();
    agent.delete(&vm);
    let alive = stranger.try_wait().unwrap().is_none();
    tool::run(Command::new("kill").args(["-9", "--", &format!("-{}", stranger.id())]), SOON).unwrap();
    stranger.wait().unwrap();
    assert!(alive, "the agent killed a process that is none of its own");
    agent.assert_clean(&mut baseline);
}

#[test]
fn a_network_process_that_ends_is_a_problem_with_a_remedy_and_no_more() {
    let agent = blank_agent();
    let mut baseline = agent.baseline();
    let vm = agent.create(&small());
    agent.wait_for_phase(&vm, "booting", SOON);
    let qemu = agent.qemu(&vm);
    assert!(agent.passt(&vm).signal(Signal::KILL));
    let until = Instant::now() + SOON;
    let problem = loop {
        let problem = agent.view(&vm)["problems"][0].clone();
        if !problem.is_null() {
            break problem;
        }
        assert!(Instant::now() < until, "no problem is shown: {}", agent.view(&vm));
    };
    assert_eq!(problem["code"], "network_lost");
    assert!(!problem["remedy"].as_str().unwrap().is_empty());
    assert!(qemu.is_alive());
    agent.delete(&vm);
    agent.assert_clean(&mut baseline);
}

/// Somebody reloads the host's firewall: guests must not stay unconfined.
#[test]
fn a_flushed_firewall_is_put_back() {
    let agent = blank_agent();
    let mut baseline = agent.baseline();
    let vm = agent.create(&small());
    agent.wait_for_phase(&vm, "booting", SOON);
    let table = agent.table();
    let nft = |verb: &str| {
        tool::run(Command::new("nft").args(["-s", verb, "table", "inet", &table]), SOON).unwrap()
    };
    let before = nft("list");
    assert!(before.status.success() && before.stdout.contains(&vm.port(22).to_string()), "{before:?}");
    // The agent looks every 20 s by itself; this is quicker, for it is told.
    let until = Instant::now() + SOON;
    for _ in 0..4 {
        assert!(nft("delete").status.success());
        while nft("list").stdout != before.stdout {
            assert!(Instant::now() < until, "was:\n{}\nis:\n{}", before.stdout, nft("list").stdout);
            thread::sleep(AT_ONCE / 10);
        }
    }
    agent.delete(&vm);
    agent.assert_clean(&mut baseline);
}
