//! The guest reboots, powers itself off, and is shut down because its host goes down.

use std::process::Command;

use qudata_testkit::ssh::KeyPair;
use qudata_tests::{BOOT, SOON, guest, guest_agent};

#[test]
fn slow_reboot_and_power_off_from_inside_and_start_again() {
    let agent = guest_agent();
    let mut baseline = agent.baseline();
    let key = KeyPair::make(agent.dir(), "renter");
    let vm = agent.create(&guest(&key.public));
    agent.wait_for_phase(&vm, "ready", BOOT);
    let login = agent.login(&vm, &key.file);
    let boot_id = || login.run("cat /proc/sys/kernel/random/boot_id");
    let (first, qemu) = (boot_id(), agent.qemu(&vm));
    login.run("echo kept > /root/kept");
    login.run_later("systemctl reboot");

    agent.wait_for_phase(&vm, "rebooting", BOOT);
    agent.wait_for_phase(&vm, "ready", BOOT);
    assert_ne!(boot_id(), first);
    assert_eq!(agent.qemu(&vm).identity(), qemu.identity(), "a reboot resets in place");

    login.run_later("systemctl poweroff");
    agent.wait_for_phase(&vm, "stopped", BOOT);
    assert_eq!((agent.state(&vm), agent.field(&vm, "status")), ("stopped".into(), "paused".into()));
    assert!(!qemu.is_alive());
    // A new agent knows the difference between powered off and lost.
    agent.kill9();
    agent.restart();
    agent.wait_for_state(&vm, "stopped", SOON);

    agent.command(&vm, "start");
    agent.wait_for_state(&vm, "running", BOOT);
    assert_eq!(agent.login(&vm, &key.file).run("cat /root/kept"), "kept\n");
    agent.delete(&vm);
    agent.assert_clean(&mut baseline);
}

/// What systemd does with the unit of a VM when the host goes down, or an owner stops it.
#[test]
fn slow_a_host_that_goes_down_shuts_its_guests_down_in_good_order() {
    let agent = guest_agent();
    let mut baseline = agent.baseline();
    let key = KeyPair::make(agent.dir(), "renter");
    let vm = agent.create(&guest(&key.public));
    agent.wait_for_phase(&vm, "ready", BOOT);
    let qemu = agent.qemu(&vm);
    // A guest that is cut off loses this: nothing has told its kernel to write it yet.
    let unwritten = "head -c 3000000 /dev/urandom >/root/unwritten; sha256sum </root/unwritten";
    let digest = agent.login(&vm, &key.file).run(unwritten);

    let socket = agent.run_dir().join("vms").join(&vm.id).join("1/qemu/power.sock");
    assert!(socket.exists(), "{} is missing", socket.display());
    let program = std::env::var_os("QUDATA_TEST_AGENT").unwrap();
    let ended = Command::new(program).arg("shutdown-guest").arg(socket).output().unwrap();
    assert!(ended.status.success(), "{}", String::from_utf8_lossy(&ended.stderr));

    agent.wait_for_state(&vm, "stopped", SOON);
    assert!(!qemu.is_alive());
    assert!(agent.field(&vm, "reason").contains("stopped on the host"), "{}", agent.view(&vm));
    agent.command(&vm, "start");
    agent.wait_for_state(&vm, "running", BOOT);
    assert_eq!(agent.login(&vm, &key.file).run("sha256sum </root/unwritten"), digest);
    agent.delete(&vm);
    agent.assert_clean(&mut baseline);
}
