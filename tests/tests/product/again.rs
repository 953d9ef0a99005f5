//! An instance is started again, or taken over, with something of an earlier VM in the way, or with a store that takes
//! nothing: nothing that lives is ended by it.

use std::{fs, path::PathBuf, process::Command};

use qudata_testkit::{
    agent::{Image, Setup, TestAgent, TestInstance},
    ssh::KeyPair,
};
use qudata_tests::{BOOT, SOON, guest};

#[test]
fn slow_what_is_left_of_an_earlier_vm_costs_nobody_the_new_one() {
    let agent = Setup::new(Image::Direct).small_disk(5 << 30).set("QUDATA_HOST_RESERVE_DISK", "0M").start();
    let mut baseline = agent.baseline();
    let key = KeyPair::make(agent.dir(), "renter");
    let vm = agent.create(&guest(&key.public));
    agent.wait_for_phase(&vm, "ready", BOOT);
    agent.login(&vm, &key.file).run_later("systemctl poweroff");
    agent.wait_for_phase(&vm, "stopped", BOOT);

    // An agent that knows of no VM ends it: one that cannot be written down does not begin.
    let store = Immutable::make(agent.data_dir().join("agent.redb"));
    let refused = agent.put(&vm, "start");
    assert_eq!(refused.status, 500, "{}", refused.text());
    assert!(refused.error().contains("written down"), "{}", refused.text());
    assert_eq!(agent.state(&vm), "stopped");
    assert!(agent.process_of(&vm, "qemu").is_none());
    drop(store);

    // As an end leaves it that something resisted.
    let gone = agent.run_dir().join("vms").join(format!("{}.gone", vm.id));
    fs::create_dir_all(gone.join("1")).unwrap();
    agent.command(&vm, "start");
    agent.wait_for_state(&vm, "running", BOOT);
    assert!(!gone.exists(), "what was left is still there");
    let qemu = agent.qemu(&vm);
    fs::create_dir_all(gone.join("1")).unwrap();
    agent.kill9();
    agent.restart();
    agent.wait_for_state(&vm, "running", SOON);
    assert_eq!(agent.qemu(&vm).identity(), qemu.identity(), "the tenant's VM was ended");

    // One that cannot be identified is left alone, also when somebody says start.
    agent.kill9();
    let identity = identity_file(&agent, &vm);
    let text = fs::read(&identity).unwrap();
    fs::write(&identity, "no identity").unwrap();
    agent.restart();
    agent.wait_for_state(&vm, "failed", SOON);
    let refused = agent.put(&vm, "start");
    assert!(refused.status >= 400, "{}", refused.text());
    assert!(qemu.is_alive(), "start has ended a VM");
    agent.kill9();
    fs::write(&identity, text).unwrap();
    agent.restart();
    agent.wait_for_state(&vm, "running", SOON);
    assert_eq!(agent.qemu(&vm).identity(), qemu.identity());
    agent.delete(&vm);
    agent.assert_clean(&mut baseline);
}

/// Where it is written who the VM's process is.
fn identity_file(agent: &TestAgent, vm: &TestInstance) -> PathBuf {
    let incarnations = fs::read_dir(agent.run_dir().join("vms").join(&vm.id)).unwrap();
    let found =
        incarnations.map(|dir| dir.unwrap().path().join("qemu.process.json")).find(|file| file.exists());
    found.unwrap()
}

/// A file that takes no write until this is dropped.
struct Immutable(PathBuf);

impl Immutable {
    fn make(file: PathBuf) -> Self {
        chattr("+i", &file);
        Self(file)
    }
}

impl Drop for Immutable {
    fn drop(&mut self) {
        chattr("-i", &self.0);
    }
}

fn chattr(change: &str, file: &PathBuf) {
    let done = Command::new("chattr").arg(change).arg(file).output().unwrap();
    assert!(done.status.success(), "chattr {change}: {}", String::from_utf8_lossy(&done.stderr));
}
