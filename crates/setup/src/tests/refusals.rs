//! Hosts that cannot be hosts: each its own code, nothing written.

use std::fs;

use qudata_testkit::pci::Device;

use super::world::{GPU, World, tree, usual, wish, world};
use crate::{outside::KeyVerdict, wish::Wish};

fn refused(world: &World, wish: Wish, code: &str, named: &str) {
    let before = tree(world.host.root());
    let error = world.install(wish).unwrap_err();
    assert_eq!(error.code.as_str(), code, "{error:?}");
    let text = format!("{error} {} {}", error.remedy, error.next);
    assert!(text.contains(named) && !error.next.is_empty(), "{error:?}");
    assert_eq!(tree(world.host.root()), before, "{code}: something was written");
    assert!(!world.commands.borrow().iter().any(|c| c.contains("apt-get") || c.contains("enable ")));
}

fn with(path: &str, text: &str) -> World {
    let world = usual();
    world.file(path, text);
    world
}

#[test]
fn hardware() {
    refused(&world(Vec::new()), wish(), "no_gpu", "no GPU");
    let display = world(vec![Device::gpu(GPU).boot_vga(true)]);
    refused(&display, wish(), "no_gpu", &format!("--gpus {GPU}"));
    let shared = world(vec![Device::gpu(GPU).group(7), Device::new("0000:66:00.0").group(7)]);
    refused(&shared, wish(), "group_shared", "0000:66:00.0");
    let no_table = with("sys/firmware/acpi/tables/FACP", "");
    fs::remove_file(no_table.host.path("sys/firmware/acpi/tables/DMAR")).unwrap();
    refused(&no_table, wish(), "iommu_off_in_firmware", "VT-d");
    let forging = world(vec![Device::gpu(GPU).group(7)]);
    forging.host.set_interrupt_remapping(false).unwrap();
    refused(&forging, wish(), "no_interrupt_remapping", "remapping");
    refused(&with("proc/meminfo", "MemTotal: 1000000 kB\n"), wish(), "memory_too_small", "976 MiB");
    let no_kvm = with("proc/cpuinfo", "vendor_id : GenuineIntel\nflags : fpu\n");
    fs::remove_file(no_kvm.host.path("dev/kvm")).unwrap();
    refused(&no_kvm, wish(), "no_kvm", "VT-x");
}

#[test]
fn software() {
    let other = with("etc/os-release", "ID=fedora\nVERSION_ID=41\nPRETTY_NAME=\"Fedora 41\"\n");
    refused(&other, wish(), "unsupported_distribution", "Fedora 41");
    let old = with("etc/os-release", "ID=ubuntu\nVERSION_ID=\"20.04\"\n");
    refused(&old, wish(), "unsupported_distribution", "22.04");
    let loader = usual();
    fs::remove_dir_all(loader.host.path("boot/grub")).unwrap();
    refused(&loader, wish(), "bootloader_unknown", "intel_iommu=on iommu=pt");
    refused(&usual(), Wish { package: None, ..wish() }, "no_package", "--package");
    let image = Wish { image: Some("/srv/none.qcow2".into()), ..wish() };
    refused(&usual(), image, "image_failed", "/srv/none.qcow2");
}

#[test]
fn wishes() {
    let set = |key: &str, value: &str| Wish { settings: vec![(key.into(), value.into())], ..wish() };
    refused(&usual(), set("vm_cpuss", "4"), "bad_settings", "did you mean vm_cpus");
    refused(&usual(), set("api_key", "ak-canary"), "bad_settings", "api_key_file");
    let key = usual();
    key.verdict.replace(KeyVerdict::Refused(401));
    refused(&key, wish(), "bad_key", "401");
    key.verdict.replace(KeyVerdict::Unreachable("no route".into()));
    refused(&key, wish(), "control_plane_unreachable", "--offline");
    assert!(key.install(Wish { offline: true, ..wish() }).is_ok());
}
