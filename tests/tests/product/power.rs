//! The guest reboots and powers itself off.

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
