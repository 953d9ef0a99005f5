//! Units as files under `tests/golden`, and what `systemd-analyze` thinks of them.
//! `UPDATE_GOLDEN=1 cargo test -p qudata-host` rewrites the files; the diff is then read like any other change.

use std::{ffi::OsString, fs, os::unix::ffi::OsStringExt, path::PathBuf, process::Command};

use proptest::prelude::*;

use super::*;
use crate::{
    launch::{Confinement, Ending},
    size::ByteSize,
};

const RUN: &str = "/run/qudata/vms/0198c1de-7d3c-7000-8000-0123456789ab/3";

fn qemu() -> Launch {
    Launch {
        program: "/usr/bin/qemu-system-x86_64".into(),
        args: ["-name", "guest=it's $HOME 100%", "-S"].map(Into::into).into(),
        uid: 720_004,
        gid: 720_004,
        groups: vec![104],
        dir: RUN.into(),
        name: "qemu".into(),
        nice: 0,
        no_files: 1024,
        confinement: Confinement {
            description: "VM box (0198c1de-7d3c-7000-8000-0123456789ab)".into(),
            devices: ["/dev/kvm", "/dev/vfio/vfio", "/dev/vfio/12"].map(Into::into).into(),
            writable: [format!("{RUN}/qemu"), "/var/lib/qudata/instances/a/disk.qcow2".into()]
                .map(Into::into)
                .into(),
            readable: vec!["/var/lib/qudata/images/qudata-base.qcow2".into()],
            memory_max: Some(ByteSize::from_gib(10)),
            memlock: Some(ByteSize::from_gib(11)),
            tasks_max: Some(260),
            private_network: true,
            own_sandbox: false,
            writes_code: false,
        },
        ending: Some(Ending {
            program: "/usr/bin/qudata-agent".into(),
            args: ["shutdown-guest".into(), format!("{RUN}/qemu/power.sock").into()].into(),
            patience: Duration::from_secs(90),
            before: vec!["passt".into()],
        }),
    }
}

fn passt() -> Launch {
    Launch {
        program: "/usr/bin/passt".into(),
        args: vec!["--foreground".into()],
        uid: 720_005,
        gid: 720_005,
        groups: Vec::new(),
        name: "passt".into(),
        nice: 5,
        no_files: 65_536,
        confinement: Confinement {
            description: "network of VM box".into(),
            writable: vec![format!("{RUN}/passt").into()],
            memory_max: Some(ByteSize::from_gib(1)),
            tasks_max: Some(8),
            own_sandbox: true,
            ..Confinement::default()
        },
        ending: None,
        ..qemu()
    }
}

/// A tenant of a development machine: emulated, with everything below `/var/tmp` and an image in a home.
fn emulated() -> Launch {
    let mut launch = qemu();
    launch.dir = "/var/tmp/qudata-dev/run/vms/a/1".into();
    launch.confinement = Confinement {
        writable: vec!["/var/tmp/qudata-dev/run/vms/a/1/qemu".into()],
        readable: vec!["/home/me/base.qcow2".into()],
        private_network: true,
        writes_code: true,
        ..Confinement::default()
    };
    launch
}

/// As the lines of a unit file, as far as its names differ from those on the bus.
fn unit_file(properties: &Properties) -> String {
    let quoted = |words: &[String]| {
        let quote = |word: &String| format!("\"{}\"", word.replace('%', "%%"));
        words.iter().map(quote).collect::<Vec<_>>().join(" ")
    };
    let mut head = String::from("[Unit]\n");
    let mut body = String::from("[Service]\n");
    for (name, property) in properties {
        let (name, value) = match (*name, property) {
            ("AddRef", _) => continue,
            (_, Property::Checks(checks)) => {
                checks.iter().for_each(|(name, _, _, path)| head.push_str(&format!("{name}={path}\n")));
                continue;
            }
            ("Description" | "CollectMode", Property::Text(text)) => {
                head.push_str(&format!("{name}={text}\n"));
                continue;
            }
            ("IgnoreOnIsolate", Property::Flag(true)) => {
                head.push_str("IgnoreOnIsolate=yes\n");
                continue;
            }
            ("After", Property::Texts(texts)) => {
                head.push_str(&format!("{name}={}\n", texts.join(" ")));
                continue;
            }
            ("StandardOutputFileToAppend", Property::Text(path)) => {
                ("StandardOutput", format!("append:{path}"))
            }
            ("StandardErrorFileToAppend", Property::Text(path)) => {
                ("StandardError", format!("append:{path}"))
            }
            ("TimeoutStopUSec", Property::Number(usec)) => ("TimeoutStopSec", format!("{usec}us")),
            ("CapabilityBoundingSet" | "AmbientCapabilities", Property::Number(0)) => (*name, String::new()),
            ("RestrictNamespaces", Property::Number(0)) => (*name, "yes".into()),
            ("RestrictNamespaces", Property::Number(OWN_SANDBOX)) => (*name, "mnt uts ipc user pid".into()),
            ("SystemCallErrorNumber", Property::Signed(EPERM)) => (*name, "EPERM".into()),
            ("IPAddressDeny", Property::Networks(_)) => (*name, "any".into()),
            ("UMask", Property::Short(mask)) => (*name, format!("0{mask:o}")),
            (name, Property::Commands(commands)) => (name, quoted(&commands[0].1)),
            (name, Property::Text(text)) => (name, text.clone()),
            (name, Property::Texts(texts)) => (name, texts.join(" ")),
            (name, Property::Flag(flag)) => (name, if *flag { "yes" } else { "no" }.into()),
            (name, Property::Signed(number)) => (name, number.to_string()),
            (name, Property::Short(number)) => (name, number.to_string()),
            (name, Property::Number(number)) => (name, number.to_string()),
            (name, Property::Listed(true, names)) => (name, names.join(" ")),
            (name, Property::Listed(false, names)) => (name, format!("~{}", names.join(" "))),
            (name, Property::Pairs(pairs)) => {
                pairs.iter().for_each(|(node, rights)| body.push_str(&format!("{name}={node} {rights}\n")));
                continue;
            }
            (name, Property::Binds(binds)) => {
                binds.iter().for_each(|(from, to, ..)| body.push_str(&format!("{name}={from}:{to}:rbind\n")));
                continue;
            }
            other => panic!("{other:?} has no line"),
        };
        body.push_str(&format!("{name}={value}\n"));
    }
    format!("{head}\n{body}")
}

#[test]
fn units_are_as_the_goldens_show() {
    for (name, launch, version) in [
        ("qemu-249.service", qemu(), 249),
        ("qemu-257.service", qemu(), 257),
        ("passt-252.service", passt(), 252),
        ("emulated-252.service", emulated(), 252),
    ] {
        let text = unit_file(&plan_unit(&launch, version).unwrap());
        let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            fs::write(&path, &text).unwrap();
        }
        let golden = fs::read_to_string(&path).unwrap();
        assert!(golden == text, "{name} differs; rerun with UPDATE_GOLDEN=1 if that is meant\n{text}");
    }
}

/// The promise is 2.0 at most, in the tenths that systemd-analyze counts.
#[test]
fn systemd_finds_little_to_blame() {
    for (launch, most) in [(qemu(), 10), (passt(), 20)] {
        let dir = tempfile::tempdir().unwrap();
        let unit = dir.path().join(unit_name(&launch.dir, &launch.name));
        fs::write(&unit, unit_file(&plan_unit(&launch, 252).unwrap())).unwrap();
        let verdict = Command::new("systemd-analyze")
            .args(["security", "--offline=true", "--no-pager", &format!("--threshold={most}")])
            .arg(&unit)
            .output()
            .expect("this test needs systemd-analyze of systemd 250 or newer");
        let said = String::from_utf8_lossy(&verdict.stdout);
        assert!(said.contains("Overall exposure level"), "{said}");
        assert!(verdict.status.success(), "{said}");
    }
}

#[test]
fn names_tell_the_instance_and_are_names() {
    assert_eq!(
        unit_name(RUN.as_ref(), "qemu"),
        "qudata-vm-0198c1de-7d3c-7000-8000-0123456789ab-3-qemu.service"
    );
    let mut launch = qemu();
    launch.dir = PathBuf::from("/a/b c.d/ü%@");
    assert_eq!(unit_name(&launch.dir, &launch.name), "qudata-vm-b_c_d-___-qemu.service");
}

#[test]
fn what_is_no_text_is_refused_with_a_reason() {
    let mut launch = qemu();
    launch.args.push(OsString::from_vec(vec![b'a', 0xff]));
    let error = plan_unit(&launch, 252).unwrap_err().to_string();
    assert!(error.contains("UTF-8"), "{error}");
}

#[test]
fn a_program_without_devices_gets_none() {
    let unit = plan_unit(&passt(), 252).unwrap();
    assert!(unit.contains(&("PrivateDevices", Property::Flag(true))));
    assert!(!unit.iter().any(|(name, _)| *name == "DeviceAllow"));
}

proptest! {
    #[test]
    fn any_directory_gives_a_name_that_systemd_takes(dir in "(/[^/\0]{1,80}){0,4}", name in "[^/\0]{0,80}") {
        let launch = Launch { dir: dir.into(), name, ..qemu() };
        let unit = unit_name(&launch.dir, &launch.name);
        prop_assert!(unit.len() < 256);
        prop_assert!(unit.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b)), "{}", unit);
    }
}
