//! The life of an instance from the order to its end, and of two at once.

use std::{net::SocketAddr, path::Path, thread, time::Instant};

use qudata_testkit::{
    agent::{Image, Setup, TestAgent, TestInstance},
    http::Client,
    leakcheck::{Baseline, Scope},
    ssh::{KeyPair, Login},
};
use qudata_tests::{AT_ONCE, BOOT, SOON, guest, guest_agent, knock, small};
use serde_json::{Value, json};

/// The status of `GET /` on an application's port, asked until the application is up.
fn app_status(port: u16) -> u16 {
    let address = SocketAddr::from(([127, 0, 0, 1], port));
    let client = Client { address, secret: None, deadline: SOON };
    let until = Instant::now() + SOON;
    loop {
        match client.call("GET", "/", None) {
            Ok(reply) => return reply.status,
            Err(e) => assert!(Instant::now() < until, "no answer from the application: {e}"),
        }
        thread::sleep(std::time::Duration::from_millis(200));
    }
}

fn boot_id(login: &Login) -> String {
    login.run("cat /proc/sys/kernel/random/boot_id")
}

#[test]
fn life_of_an_instance() {
    let agent = guest_agent();
    // This one looks to the last thread.
    let scope = Scope { idle_threads: 0, ..agent.scope() };
    let mut baseline = Baseline::take(&scope).unwrap();
    let key = KeyPair::make(agent.dir(), "renter");
    let mut wish = guest(&key.public);
    wish["user_data"] =
        json!("#cloud-config\nwrite_files:\n- path: /root/from-user-data\n  content: renter\n");
    let vm = agent.create(&wish);
    agent.wait_for_phase(&vm, "ready", BOOT);
    assert_eq!((agent.field(&vm, "status"), agent.state(&vm)), ("running".into(), "running".into()));

    let login = agent.login(&vm, &key.file);
    assert_eq!(login.run("id -un; cat /root/from-user-data"), "root\nrenter");
    let console = agent.call("GET", &format!("{}/console", vm.path()), None).text();
    assert!(
        console.contains("cloud-init") || console.contains("Linux version"),
        "no boot on the console: {console}"
    );
    let verdict = login.run("cloud-init schema --config-file /var/lib/cloud/instance/cloud-config.txt");
    assert!(verdict.contains("Valid cloud-config"), "cloud-init finds fault with the seed: {verdict}");
    login.run("systemd-run --quiet python3 -m http.server 8000 --directory /run");
    assert_eq!(app_status(vm.port(8000)), 200);

    pause_and_resume(&agent, &vm, &login);
    change_keys(&agent, &vm, &login, &agent.dir().join("second"));

    agent.delete(&vm);
    assert_eq!(agent.call("DELETE", &vm.path(), None).status, 404, "a repeated DELETE");
    assert_eq!(agent.call("GET", "/instances", None).data()["status"], "destroyed");
    assert_eq!(agent.call("DELETE", "/instances", None).json(), json!({ "ok": true }));
    agent.assert_clean(&mut baseline);
}

fn pause_and_resume(agent: &TestAgent, vm: &TestInstance, login: &Login) {
    let (boot, qemu) = (boot_id(login), agent.qemu(vm));
    agent.command(vm, "stop");
    agent.wait_for_state(vm, "paused", SOON);
    assert_eq!(agent.field(vm, "status"), "paused");
    // Whoever connects now does not keep passt busy.
    let before = agent.passt(vm).cpu;
    // Not more: sshd turns people away when ten have not logged in yet.
    let waiting = [(); 4].map(|()| knock(vm.port(22)));
    thread::sleep(AT_ONCE);
    let used = agent.passt(vm).cpu - before;
    assert!(used.as_millis() < 300, "passt used {used:?} in two seconds while the VM was paused");
    drop(waiting);
    agent.command(vm, "start");
    agent.wait_for_state(vm, "running", SOON);
    assert_eq!(boot_id(login), boot);
    assert_eq!(agent.qemu(vm).identity(), qemu.identity());
}

fn restart(agent: &TestAgent, vm: &TestInstance, login: &Login) {
    let (boot, qemu) = (boot_id(login), agent.qemu(vm));
    agent.command(vm, "restart");
    agent.wait_for_phase(vm, "rebooting", SOON);
    agent.wait_for_phase(vm, "ready", BOOT);
    assert_ne!(boot_id(login), boot);
    assert_eq!(agent.qemu(vm).identity(), qemu.identity(), "a restart resets in place");
}

fn change_keys(agent: &TestAgent, vm: &TestInstance, first: &Login, file: &Path) {
    let second = KeyPair::make(file.parent().unwrap(), file.file_name().unwrap().to_str().unwrap());
    let body = json!({ "ssh_pubkey": second.public });
    for _ in 0..2 {
        assert_eq!(agent.call("POST", "/ssh", Some(&body)).json(), json!({ "ok": true }));
    }
    let login = agent.login(vm, &second.file);
    let lines = login.run("grep -c . /root/.ssh/authorized_keys");
    assert_eq!(lines.trim(), "3", "the agent's key and two of the renter");
    for _ in 0..2 {
        assert_eq!(agent.call("DELETE", "/ssh", Some(&body)).json(), json!({ "ok": true }));
    }
    login.assert_refused();
    refuse_what_is_no_key(agent);
    first.run("true");
    assert_eq!(first.run("ls /").matches("pwned").count(), 0);
}

/// §1.6: keys went into a shell command; "." removed every key, the agent's own too.
fn refuse_what_is_no_key(agent: &TestAgent) {
    for text in
        [".", "", ".*", "'; touch /pwned; echo '", "$(touch /pwned)", "ssh-ed25519 AAAA\nssh-ed25519 AAAA"]
    {
        for method in ["POST", "DELETE"] {
            let reply = agent.call(method, "/ssh", Some(&json!({ "ssh_pubkey": text })));
            assert_eq!((reply.status, reply.code().as_str()), (400, "invalid_field"), "{method} {text:?}");
        }
    }
}

#[test]
fn slow_life_with_uefi_firmware() {
    let agent = Setup::new(Image::Uefi).start();
    let mut baseline = agent.baseline();
    let key = KeyPair::make(agent.dir(), "renter");
    let vm = agent.create(&guest(&key.public));
    agent.wait_for_phase(&vm, "ready", BOOT);
    let login = agent.login(&vm, &key.file);
    assert_eq!(login.run("test -d /sys/firmware/efi && echo uefi"), "uefi\n");
    restart(&agent, &vm, &login);
    agent.delete(&vm);
    agent.assert_clean(&mut baseline);
}

#[test]
fn slow_two_guests_at_once() {
    let agent = guest_agent();
    let mut baseline = agent.baseline();
    let keys = [KeyPair::make(agent.dir(), "one"), KeyPair::make(agent.dir(), "two")];
    let [one, two] = [0, 1].map(|n| agent.create(&guest(&keys[n].public)));
    for vm in [&one, &two] {
        agent.wait_for_phase(vm, "ready", BOOT);
    }
    assert_ne!(agent.field(&one, "ssh_host_key"), agent.field(&two, "ssh_host_key"));
    let login = agent.login(&two, &keys[1].file);
    let (boot, qemu) = (boot_id(&login), agent.qemu(&two));
    agent.login(&one, &keys[0].file).run("true");
    agent.login(&one, &keys[1].file).assert_refused();

    agent.delete(&one);
    assert_eq!(agent.qemu(&two).identity(), qemu.identity());
    assert_eq!(boot_id(&login), boot);
    assert_eq!(agent.call("GET", "/instances", None).data()["status"], "running");
    // The sole one is meant again.
    assert_eq!(agent.call("DELETE", "/instances", None).json()["ok"], true);
    agent.assert_clean(&mut baseline);
}

#[test]
fn calls_without_id_are_never_guessed() {
    let agent = qudata_tests::blank_agent();
    let mut baseline = agent.baseline();
    let vms = [agent.create(&small()), agent.create(&small())];
    let before: Vec<Value> = vms.iter().map(|vm| agent.view(vm)).collect();
    let calls = [
        ("PUT", "/instances", json!({ "command": "stop" })),
        ("DELETE", "/instances", Value::Null),
        ("POST", "/ssh", json!({ "ssh_pubkey": KeyPair::make(agent.dir(), "key").public })),
        ("DELETE", "/ssh", json!({ "ssh_pubkey": KeyPair::make(agent.dir(), "other").public })),
    ];
    for (method, path, body) in calls {
        let reply = agent.call(method, path, Some(&body).filter(|body| !body.is_null()));
        assert_eq!((reply.status, reply.code().as_str()), (409, "ambiguous_instance"), "{method} {path}");
    }
    assert_eq!(agent.ids().len(), 2);
    assert_eq!(before[0]["name"], agent.view(&vms[0])["name"]);
    let by_query = format!("/instances?id={}", vms[0].id);
    assert_eq!(agent.call("DELETE", &by_query, None).status, 200);
    agent.delete(&vms[1]);
    agent.assert_clean(&mut baseline);
}
