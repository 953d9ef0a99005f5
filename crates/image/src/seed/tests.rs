use std::{fs, os::unix::fs::PermissionsExt, process::Command};

use super::*;

fn all() -> (Customisation, DriverPlan) {
    let wish = Customisation {
        packages: vec!["htop".into(), "g++".into()],
        jupyter: true,
        container_toolkit: true,
        ..Customisation::default()
    };
    (wish, DriverPlan { version: "570.133".into(), modules: Some(Modules::Open), least: 570, most: None })
}

#[test]
fn shells_accept_the_script() {
    let (wish, driver) = all();
    for text in [script(&wish, Some(&driver), "abc"), script(&Customisation::default(), None, "abc")] {
        for shell in ["dash", "bash"] {
            let checked = Command::new(shell).args(["-n", "-c", &text]).output().unwrap();
            assert!(checked.status.success(), "{shell}: {}", String::from_utf8_lossy(&checked.stderr));
        }
    }
}

#[test]
fn every_step_that_is_counted_begins_in_the_script() {
    let (wish, driver) = all();
    for step in steps(&wish, Some(&driver)) {
        assert!(SCRIPT.contains(&format!("    begin {step}\n")), "{step}");
    }
    let begun = SCRIPT.lines().filter(|line| line.trim_start().starts_with("begin ")).count();
    assert_eq!(begun, steps(&wish, Some(&driver)).len());
}

#[test]
fn failure_is_never_swallowed() {
    for line in SCRIPT.lines() {
        assert!(!line.contains("|| true") && !line.contains("|| :"), "{line}");
    }
    assert!(SCRIPT.contains("\nset -eu\n") && SCRIPT.trim_end().ends_with("echo \"done $NONCE\" >&3"));
}

#[test]
fn what_was_asked_stands_before_the_script() {
    let (wish, driver) = all();
    let head: String = script(&wish, Some(&driver), "abc").lines().take(8).collect::<Vec<_>>().join("\n");
    insta::assert_snapshot!("script_head", head);
}

/// Functions of the script, as they stand there.
fn functions(names: &[&str]) -> String {
    let cut = |name: &&str| {
        let begin = SCRIPT.find(&format!("\n{name}() {{\n")).unwrap();
        let length = SCRIPT[begin..].find("\n}\n").unwrap();
        SCRIPT[begin..begin + length + 3].to_owned()
    };
    names.iter().map(cut).collect()
}

/// Runs a part of the script among programs that only say what is written here. Tells whether it succeeded, and what it said.
fn run(script: &str, programs: &[(&str, &str)]) -> (bool, String) {
    let dir = tempfile::tempdir().unwrap();
    for (name, body) in programs {
        let path = dir.path().join(name);
        fs::write(&path, format!("#!/bin/sh\n{body}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }
    let others = "get() { echo \"get $*\"; }\nupdate() { :; }\nadd_components() { :; }";
    let text = format!("set -eu\n{others}\n{}\n{script}", functions(&["fail"]));
    let path = format!("{}:/usr/bin:/bin", dir.path().display());
    let out = Command::new("sh").args(["-c", &text]).env("PATH", path).output().unwrap();
    let said = [out.stdout, out.stderr].concat();
    (out.status.success(), String::from_utf8_lossy(&said).into_owned())
}

fn driver(system: &str, wish: &str, modules: &str, most: u32) -> (bool, String) {
    let search = "for b in 535 570 580 590; do echo \"nvidia-driver-$b-server - x\"; done";
    let madison = "for v in 590.44.01 580.95.05 570.133.07; do echo \" nvidia-driver | 1:$v-1 | x\"; done";
    let cache = format!("case $1 in madison) {madison} ;; *) {search} ;; esac");
    let head = format!("DRIVER={wish} DRIVER_MODULES={modules} DRIVER_LEAST=0 DRIVER_MOST={most}");
    let functions = functions(&["choose_modules", "debian_driver", "ubuntu_driver"]);
    run(&format!("{head}\n{functions}\n{system}_driver"), &[("apt-cache", &cache)])
}

#[test]
fn old_gpus_get_the_newest_branch_that_still_serves_them() {
    for (system, newest, old) in [
        ("ubuntu", "nvidia-driver-590-server", "nvidia-driver-580-server"),
        ("debian", "nvidia-driver=1:590.44.01-1", "nvidia-driver=1:580.95.05-1"),
    ] {
        let (good, said) = driver(system, "distro", "proprietary", 99_999);
        assert!(good && said.contains(newest), "{system}: {said}");
        let (good, said) = driver(system, "distro", "proprietary", 580);
        assert!(good && said.contains(old) && !said.contains("590"), "{system}: {said}");
        let (good, said) = driver(system, "570", "proprietary", 580);
        assert!(good && said.contains("570"), "{system}: {said}");
        // A distribution that has nothing so old.
        let (good, said) = driver(system, "distro", "proprietary", 500);
        assert!(!good && said.contains("this release has no nvidia-driver"), "{system}: {said}");
    }
}

/// Kernels and their modules: each file says the name inside and the version.
const MODULES: [(&str, &str, &str); 5] = [
    // As Debian names them.
    ("6.2.0/updates/dkms", "nvidia-current-uvm.ko", "nvidia_uvm 580.95.05"),
    ("6.2.0/updates/dkms", "nvidia-current.ko", "nvidia 580.95.05"),
    // As Ubuntu does.
    ("6.3.0/kernel/nvidia-580srv", "nvidia.ko.zst", "nvidia 580.95.05"),
    ("6.4.0/updates/dkms", "nvidia-current-uvm.ko", "nvidia_uvm 580.95.05"),
    ("6.5.0/updates/dkms", "nvidia.ko", "nvidia 535.309.01"),
];

fn check_whole(driver: &str, audit: &str, newest: &str) -> (bool, String) {
    let dir = tempfile::tempdir().unwrap();
    for (folder, file, says) in MODULES.into_iter().filter(|(folder, ..)| folder.starts_with(newest)) {
        let folder = dir.path().join(folder);
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join(file), says).unwrap();
    }
    fs::create_dir_all(dir.path().join("6.1.0")).unwrap();
    fs::create_dir_all(dir.path().join(newest)).unwrap();
    let head = format!("DRIVER={driver} driver=580.95.05");
    let body = functions(&["newest_kernel", "driver_of", "check_whole"]);
    let body = body.replace("/lib/modules", &dir.path().display().to_string());
    let modinfo = r#"[ "$1" = -F ]; read name version <"$3" || :; eval "echo \$$2""#;
    let dpkg = format!("[ \"$1\" = --audit ]; printf '{audit}'");
    run(&format!("{head}\n{body}\ncheck_whole"), &[("modinfo", modinfo), ("dpkg", &dpkg)])
}

#[test]
fn packages_that_are_half_installed_or_a_kernel_without_driver_are_no_image() {
    assert_eq!(check_whole("580", "", "6.2.0"), (true, String::new()), "nvidia-current.ko");
    assert_eq!(check_whole("580", "", "6.3.0"), (true, String::new()), "nvidia.ko.zst");
    assert_eq!(check_whole("none", "", "6.9.0"), (true, String::new()));
    for without in ["6.4.0", "6.5.0", "6.9.0"] {
        let (good, said) = check_whole("580", "", without);
        let wanted = format!("the kernel {without} has no module of the driver 580.95.05");
        assert!(!good && said.contains(&wanted), "{said}");
    }
    let (good, said) = check_whole("none", "half: linux-image", "6.2.0");
    assert!(!good && said.contains("half: linux-image"), "{said}");
}

#[test]
fn nothing_updates_the_system_during_the_work_and_nothing_stays_masked() {
    let seed = image("script", "abc").unwrap();
    let text = String::from_utf8_lossy(&seed);
    let boot = &text[text.find("\"bootcmd\"").unwrap()..text.find("\"growpart\"").unwrap()];
    for unit in QUIET.into_iter().chain(TIMERS) {
        assert!(boot.contains(&format!("\"{unit}\"")), "{unit}");
    }
    assert_eq!(boot.matches("\"mask\"").count(), boot.matches("\"--runtime\"").count());
    let (stop, mask) = boot.split_once("\"mask\"").unwrap();
    assert!(TIMERS.iter().all(|timer| stop.contains(timer) && mask.contains(timer)), "{boot}");
}
