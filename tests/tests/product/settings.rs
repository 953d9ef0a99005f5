//! Settings that are refused at the start, and two agents on one data directory.

use std::{process::Command, time::Duration};

use qudata_testkit::{
    agent::{Image, Setup},
    tool,
};
use qudata_tests::blank_agent;

/// What an agent with these settings says instead of starting.
fn said(setup: &Setup) -> String {
    let refusal = setup.refused();
    assert_eq!(refusal.status.code(), Some(1), "{}", refusal.stderr);
    refusal.stderr
}

#[test]
fn bad_settings_are_refused_with_key_value_and_what_is_allowed() {
    let base = || Setup::new(Image::Blank);
    let cases = [
        (base().set("QUDATA_ACCEL", "hvf"), ["QUDATA_ACCEL", "hvf", "kvm"]),
        (base().set("QUDATA_ACEL", "tcg"), ["QUDATA_ACEL", "QUDATA_ACCEL", ""]),
        (base().set("QUDATA_AGENT_PORT", "70000"), ["QUDATA_AGENT_PORT", "70000", "65535"]),
        (base().set("QUDATA_SSH_PORTS", "10-x"), ["QUDATA_SSH_PORTS", "10-x", "10000-15000"]),
        (base().set("QUDATA_DEBUG", "maybe"), ["QUDATA_DEBUG", "maybe", "true"]),
        (base().set("QUDATA_VM_MEMORY", "8Q"), ["QUDATA_VM_MEMORY", "8Q", "8G"]),
        (base().set("QUDATA_DATA_DIR", "var/lib"), ["QUDATA_DATA_DIR", "var/lib", "absolute"]),
        (base().file("firmwre = \"bios\"\n"), ["firmwre", "firmware", ""]),
        (base().file("vm_cpus = \"many\"\n"), ["vm_cpus", "many", "1024"]),
        (
            base().unset("QUDATA_STANDALONE").set("QUDATA_TUNNEL", "frp"),
            ["QUDATA_TUNNEL=none", "standalone", ""],
        ),
    ];
    for (setup, words) in cases {
        let said = said(&setup);
        for word in words {
            assert!(said.contains(word), "no {word:?} in: {said}");
        }
    }
}

#[test]
fn all_problems_are_told_at_once_and_no_secret_with_them() {
    let said = said(
        &Setup::new(Image::Blank)
            .set("QUDATA_ACCEL", "hvf")
            .set("QUDATA_VM_CPUS", "0")
            .set("QUDATA_API_KEY", "canary-no-prefix")
            .file("listen = \"nowhere\"\n"),
    );
    for word in ["QUDATA_ACCEL", "QUDATA_VM_CPUS", "QUDATA_API_KEY", "listen"] {
        assert!(said.contains(word), "no {word:?} in: {said}");
    }
    assert!(!said.contains("canary"), "{said}");
}

/// `/dev/kvm` that exists and does not work is found out before a VM is sold.
#[test]
fn kvm_is_believed_only_after_it_ran_instructions() {
    let setup = Setup::new(Image::Blank).set("QUDATA_ACCEL", "kvm");
    let agent = std::env::var_os("QUDATA_TEST_AGENT").unwrap();
    let probe = tool::run(Command::new(agent).arg("probe-kvm"), Duration::from_secs(30)).unwrap();
    if probe.status.success() {
        let agent = setup.start();
        assert_eq!(agent.call("GET", "/host", None).data()["accel"], "kvm");
    } else {
        assert!(said(&setup).contains("QUDATA_ACCEL=tcg"), "the refusal names the way out");
    }
}

#[test]
fn a_second_agent_on_the_same_data_directory_refuses() {
    let agent = blank_agent();
    let mut baseline = agent.baseline();
    let refusal = agent.refuses(&agent.rival());
    assert_eq!(refusal.status.code(), Some(1), "{}", refusal.stderr);
    assert!(refusal.stderr.contains(agent.data_dir().to_str().unwrap()), "{}", refusal.stderr);
    assert_eq!(agent.call("GET", "/instances", None).status, 200, "the first one goes on");
    agent.assert_clean(&mut baseline);
}
