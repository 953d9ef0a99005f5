//! The binary as the child that works on PCI devices: hidden from people, and deaf to what is no order.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests state expectations")]

use std::{
    io::Write,
    process::{Command, Output, Stdio},
};

fn child(input: &str) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_qudata-agent"))
        .arg("pci-child")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}

#[test]
fn it_works_off_a_list_of_steps() {
    let root = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(root.path().join("sys/bus/pci/devices/0000:01:00.0")).unwrap();
    let list = serde_json::json!({
        "root": root.path(),
        "ops": [{"ExpectDriver": {"address": "0000:01:00.0", "driver": null}}],
    });
    let output = child(&list.to_string());
    assert_eq!(String::from_utf8(output.stdout).unwrap(), "{\"Done\":{\"Driver\":null}}\n");
    assert_eq!(output.status.code(), Some(0));
}

#[test]
fn it_does_nothing_with_half_a_list() {
    let output = child("{\"root\":\"/\",\"ops\":[");
    assert!(output.stdout.is_empty());
    assert_eq!(output.status.code(), Some(2));
}
