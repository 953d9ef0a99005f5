//! What `--plan` prints, for hosts of many kinds.

use std::fs;

use qudata_testkit::pci::Device;

use super::world::{GPU, World, tree, usual, wish, world};
use crate::{
    text,
    wish::{GpuWish, Wish},
};

fn planned(world: &World, wish: Wish) -> String {
    let before = tree(world.host.root());
    let (observed, plan) = world.look(wish).unwrap();
    let text = text::describe(&observed, &plan);
    assert_eq!(tree(world.host.root()), before, "a plan changes nothing");
    text
}

#[test]
fn intel_with_grub_and_the_iommu_off() {
    insta::assert_snapshot!(planned(&usual(), wish()));
}

#[test]
fn amd_needs_no_parameter() {
    let world = world(vec![Device::gpu(GPU).group(7)]);
    world.file("proc/cpuinfo", "vendor_id : AuthenticAMD\nflags : svm\n");
    fs::rename(
        world.host.path("sys/firmware/acpi/tables/DMAR"),
        world.host.path("sys/firmware/acpi/tables/IVRS"),
    )
    .unwrap();
    let text = planned(&world, wish());
    assert!(!text.contains("iommu"), "{text}");
    insta::assert_snapshot!(text);
}

#[test]
fn graphics_of_an_amd_processor_are_left_out_and_its_cards_are_not() {
    let (inside, usb) = ("0000:0e:00.0", "0000:0e:00.3");
    let world = world(vec![
        Device::gpu(GPU),
        Device::bridge("0000:00:08.1", 0x0e),
        Device::gpu(inside).ids(0x1002, 0x164e).under("0000:00:08.1"),
        Device::new(usb).class(0x0c_03_30).ids(0x1022, 0x15b6).under("0000:00:08.1"),
        Device::bridge("0000:00:01.2", 0x03),
        Device::gpu("0000:03:00.0").ids(0x1002, 0x744c).under("0000:00:01.2"),
    ]);
    let text = planned(&world, wish());
    assert!(text.contains(&format!("GPUs to rent out: 0000:03:00.0, {GPU}")), "{text}");
    assert!(text.contains(&format!("{inside}  left out: graphics inside the processor")), "{text}");
}

#[test]
fn systemd_boot() {
    let world = usual();
    fs::remove_dir_all(world.host.path("boot/grub")).unwrap();
    world.file("boot/efi/loader/entries/a.conf", "title Debian\nlinux /a\noptions root=/dev/sda1 ro quiet\n");
    insta::assert_snapshot!(planned(&world, wish()));
    world.file("etc/kernel/cmdline", "root=/dev/sda1 ro quiet splash\n");
    insta::assert_snapshot!("systemd_boot_with_a_file", planned(&world, wish()));
}

#[test]
fn an_owners_own_parameters_are_left_alone() {
    let world = world(vec![Device::gpu(GPU).group(7)]);
    world.file("etc/default/grub", "GRUB_CMDLINE_LINUX=\"console=ttyS0 iommu=pt intel_iommu=on,sm_off\"\n");
    world.file("proc/cmdline", "root=/dev/sda1 ro console=ttyS0 iommu=pt intel_iommu=on,sm_off\n");
    let text = planned(&world, wish());
    assert!(!text.contains("grub.d"), "{text}");
    insta::assert_snapshot!(text);
}

#[test]
fn parameters_that_grub_was_not_told_yet_are_told_and_not_repeated() {
    let world = usual();
    world.file("etc/default/grub", "GRUB_CMDLINE_LINUX=\"intel_iommu=on iommu=pt\"\n");
    let text = planned(&world, wish());
    assert!(text.contains("run the tools of GRUB; the kernel is told: intel_iommu=on iommu=pt"), "{text}");
    assert!(!text.contains("grub.d") && text.contains("restart this host"), "{text}");
}

#[test]
fn the_display_stays_with_the_owner_also_among_twins() {
    let twin = |address| Device::gpu(address).ids(0x10de, 0x2684);
    let world = world(vec![twin("0000:01:00.0").group(1).boot_vga(true), twin("0000:02:00.0").group(2)]);
    let text = planned(&world, wish());
    assert!(!text.contains("10de:2684\"") && !text.contains("vfio-pci ids"), "{text}");
    insta::assert_snapshot!(text);
    let named = Wish { gpus: GpuWish::Only(vec!["01:00.0".parse().unwrap()]), ..wish() };
    let text = planned(&world, named);
    assert!(text.contains("GPUs to rent out: 0000:01:00.0\n"), "{text}");
    assert!(text.contains("+gpu_pci_addrs = \"0000:01:00.0\""), "{text}");
}

#[test]
fn nouveau_is_kept_off_by_address() {
    let world = world(vec![Device::gpu(GPU).group(7).driver("nouveau")]);
    let text = planned(&world, wish());
    assert!(text.contains(&format!("KERNEL==\"{GPU}\"")) && text.contains("nouveau has GPU"), "{text}");
    insta::assert_snapshot!(text);
}

#[test]
fn the_management_controllers_display_is_left_out_and_said_to_the_agent() {
    let aspeed = Device::new("0000:03:00.0").class(0x03_0000).ids(0x1a03, 0x2000).group(3);
    let world = world(vec![aspeed, Device::gpu(GPU).group(7)]);
    let text = planned(&world, wish());
    assert!(text.contains("0000:03:00.0  left out: the display of the management controller"), "{text}");
    assert!(text.contains(&format!("+gpu_pci_addrs = \"{GPU}\"")), "{text}");
}

#[test]
fn an_owners_parameter_that_switches_off_is_overruled_only_when_asked() {
    let world = usual();
    world.file(
        "etc/default/grub.d/10-provider.cfg",
        "GRUB_CMDLINE_LINUX=\"$GRUB_CMDLINE_LINUX intel_iommu=off\"\n",
    );
    let error = world.look(wish()).unwrap_err();
    assert_eq!(error.code.as_str(), "iommu_off");
    assert!(error.what.contains("10-provider.cfg") && error.next.contains("--iommu on"), "{error:?}");
    let text = planned(&world, Wish { iommu_on: true, ..wish() });
    assert!(text.contains("GRUB_CMDLINE_LINUX_DEFAULT intel_iommu=on iommu=pt"), "{text}");
    // Of several the last counts, theirs as well as ours.
    world.file("etc/default/grub", "GRUB_CMDLINE_LINUX=\"intel_iommu=on iommu=pt\"\n");
    let text = planned(&world, Wish { iommu_on: true, ..wish() });
    assert!(text.contains("GRUB_CMDLINE_LINUX_DEFAULT intel_iommu=on\""), "{text}");
    world.file("etc/default/grub.d/20-me.cfg", "GRUB_CMDLINE_LINUX=\"$GRUB_CMDLINE_LINUX intel_iommu=on\"\n");
    assert!(!planned(&world, wish()).contains("90-qudata"));
}
