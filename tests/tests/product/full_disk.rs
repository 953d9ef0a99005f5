//! The file system of the agent's data fills up to the last byte under running VMs: nothing of a tenant is lost, the
//! agent says what is wrong, and DELETE makes room.

use std::fs;

use qudata_testkit::{
    agent::{Image, Setup},
    ssh::KeyPair,
};
use qudata_tests::{BOOT, SOON, guest};

#[test]
fn slow_a_full_disk_harms_no_tenant_and_delete_makes_room() {
    let agent = Setup::new(Image::Direct).small_disk(5 << 30).set("QUDATA_HOST_RESERVE_DISK", "0M").start();
    let disk = agent.disk();
    let key = KeyPair::make(agent.dir(), "renter");
    let vm = agent.create(&guest(&key.public));
    agent.wait_for_phase(&vm, "ready", BOOT);
    let login = agent.login(&vm, &key.file);
    // From here on it writes nothing by itself: a guest that does stands still sooner than this story wants it to.
    login.run(
        "echo kept > /root/kept; sync; echo u > /proc/sysrq-trigger; while touch /root/kept 2> /dev/null; do sleep 0.1; done",
    );
    let (qemu, boot_id) = (agent.qemu(&vm), login.run("cat /proc/sys/kernel/random/boot_id"));
    disk.fill();

    // Whatever is asked now is answered, and nobody new comes in.
    let refused = agent.call("POST", "/instances", Some(&guest(&key.public)));
    assert!(matches!(refused.status, 500 | 507), "{} {}", refused.status, refused.text());
    assert!(!refused.error().contains(agent.data_dir().to_str().unwrap()), "{}", refused.text());
    assert_eq!(agent.ids().len(), 1);
    agent.command(&vm, "stop");
    agent.wait_for_state(&vm, "paused", SOON);
    agent.command(&vm, "start");
    agent.wait_for_state(&vm, "running", SOON);

    // The next agent has nowhere to write either, and takes over all the same.
    agent.kill9();
    agent.restart();
    agent.wait_for_state(&vm, "running", SOON);
    assert_eq!(agent.qemu(&vm).identity(), qemu.identity());
    assert_eq!(login.run("cat /proc/sys/kernel/random/boot_id"), boot_id, "the guest noticed nothing");

    // The guest writes more than there is room for: it stands still instead of losing what it wrote.
    login.run_later("mount -o remount,rw /; dd if=/dev/urandom of=/root/more bs=1M count=600 oflag=direct");
    agent.wait_for_state(&vm, "paused", BOOT);
    let view = agent.view(&vm).to_string();
    assert!(view.contains("disk_error") && view.contains("file system is full"), "{view}");
    disk.relieve();
    agent.command(&vm, "start");
    agent.wait_for_state(&vm, "running", SOON);
    assert_eq!(
        agent.login(&vm, &key.file).run("cat /root/kept; cat /proc/sys/kernel/random/boot_id"),
        format!("kept\n{boot_id}")
    );

    // DELETE needs no room of its own.
    disk.fill();
    agent.delete(&vm);
    assert!(agent.ids().is_empty() && !qemu.is_alive());
    disk.relieve();
    let left: Vec<_> = fs::read_dir(agent.data_dir().join("instances")).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
    agent.terminate();
}
