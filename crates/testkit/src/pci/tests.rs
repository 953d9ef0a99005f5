use std::{
    fs::{self, OpenOptions},
    os::unix::fs::{FileTypeExt, OpenOptionsExt},
};

use super::{Device, FakeHost};

const O_NONBLOCK: i32 = 0o4000;
const ENXIO: i32 = 6;

#[test]
fn a_device_is_inside_its_bridges_and_linked_from_everywhere() {
    let host = FakeHost::with([
        Device::bridge("0000:00:01.0", 1),
        Device::gpu("0000:01:00.0").under("0000:00:01.0").group(7).numa(0),
    ])
    .unwrap();
    let dir = host.path("sys/devices/pci0000:00/0000:00:01.0/0000:01:00.0");
    assert_eq!(host.device_dir("0000:01:00.0"), dir);
    for link in [
        "sys/bus/pci/devices/0000:01:00.0",
        "sys/bus/pci/drivers/nvidia/0000:01:00.0",
        "sys/kernel/iommu_groups/7/devices/0000:01:00.0",
    ] {
        assert_eq!(fs::canonicalize(host.path(link)).unwrap(), fs::canonicalize(&dir).unwrap(), "{link}");
    }
    assert_eq!(fs::read_to_string(dir.join("class")).unwrap(), "0x030200\n");
    assert_eq!(fs::read(dir.join("config")).unwrap()[..4], [0xde, 0x10, 0xb5, 0x20]);
}

#[test]
fn drivers_and_devices_come_and_go() {
    let host = FakeHost::with([Device::gpu("0000:01:00.0").group(7)]).unwrap();
    assert_eq!(host.driver_of("0000:01:00.0").unwrap(), "nvidia");
    host.move_to_driver("0000:01:00.0", Some("vfio-pci")).unwrap();
    assert_eq!(host.driver_of("0000:01:00.0").unwrap(), "vfio-pci");
    assert!(!host.path("sys/bus/pci/drivers/nvidia/0000:01:00.0").is_symlink());
    host.move_to_driver("0000:01:00.0", None).unwrap();
    assert_eq!(host.driver_of("0000:01:00.0"), None);
    assert!(host.move_to_driver("0000:01:00.0", Some("absent")).is_err());
    host.unplug("0000:01:00.0").unwrap();
    assert_eq!(fs::read_dir(host.path("sys/bus/pci/devices")).unwrap().count(), 0);
}

/// A test that reads a hanging file must not pass: opening one without waiting says that nobody is at its other end.
#[test]
fn what_hangs_really_hangs() {
    let host = FakeHost::with([Device::gpu("0000:01:00.0").reset("flr")]).unwrap();
    host.wedge("0000:01:00.0").unwrap();
    host.hang("proc/7/maps").unwrap();
    let dir = host.device_dir("0000:01:00.0");
    for path in [dir.join("driver_override"), dir.join("uevent"), dir.join("reset"), host.path("proc/7/maps")]
    {
        assert!(fs::metadata(&path).unwrap().file_type().is_fifo(), "{}", path.display());
        let opened = OpenOptions::new().write(true).custom_flags(O_NONBLOCK).open(&path);
        assert_eq!(opened.unwrap_err().raw_os_error(), Some(ENXIO), "{}", path.display());
    }
    assert_eq!(host.driver_of("0000:01:00.0").unwrap(), "nvidia", "the link stays safe");
}

#[test]
fn a_device_below_nothing_is_refused() {
    let error = FakeHost::with([Device::gpu("0000:01:00.0").under("0000:00:01.0")]).unwrap_err();
    assert!(error.to_string().contains("add the bridge 0000:00:01.0"), "{error}");
}
