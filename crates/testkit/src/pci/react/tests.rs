use std::{sync::Arc, time::Duration};

use super::*;
use crate::pci::{Device, FakeProcess};

const PORT: &str = "0000:00:01.0";
const GPU: &str = "0000:01:00.0";

fn kernel() -> FakeKernel {
    FakeKernel::new(FakeHost::with([Device::bridge(PORT, 1), Device::gpu(GPU).under(PORT).group(7)]).unwrap())
}

fn write(kernel: &FakeKernel, file: &str, text: &str) -> Result<(), Option<i32>> {
    let path = kernel.host().path("sys/bus/pci").join(file);
    kernel.write_at(&path, 0, text.as_bytes()).map_err(|error| error.raw_os_error())
}

fn set_override(kernel: &FakeKernel, text: &str) {
    write(kernel, &format!("devices/{GPU}/driver_override"), text).unwrap();
}

#[test]
fn an_override_decides_who_may_bind() {
    let kernel = kernel();
    assert_eq!(write(&kernel, "drivers/vfio-pci/bind", GPU), Err(Some(EBUSY)), "bound to nvidia");
    assert_eq!(write(&kernel, "drivers/vfio-pci/unbind", GPU), Err(Some(ENODEV)), "not by vfio-pci");
    write(&kernel, "drivers/nvidia/unbind", GPU).unwrap();
    assert_eq!(write(&kernel, "drivers/vfio-pci/bind", GPU), Err(Some(ENODEV)), "not in its table");
    set_override(&kernel, "vfio-pci");
    assert_eq!(write(&kernel, "drivers/nvidia/bind", GPU), Err(Some(ENODEV)), "overridden");
    write(&kernel, "drivers/vfio-pci/bind", GPU).unwrap();
    assert_eq!(kernel.host().driver_of(GPU).as_deref(), Some("vfio-pci"));
    set_override(&kernel, "\n");
    assert_eq!(kernel.override_of(GPU), None);
}

#[test]
fn a_probe_reports_success_for_a_driver_that_is_not_there() {
    let kernel = kernel();
    write(&kernel, "drivers/nvidia/unbind", GPU).unwrap();
    set_override(&kernel, "nosuchdriver");
    write(&kernel, "drivers_probe", GPU).unwrap();
    assert_eq!(kernel.host().driver_of(GPU), None);
    set_override(&kernel, "\n");
    write(&kernel, "drivers_probe", GPU).unwrap();
    assert_eq!(kernel.host().driver_of(GPU).as_deref(), Some("nvidia"));
}

#[test]
fn a_held_device_does_not_leave_vfio_until_it_is_let_go() {
    let kernel = Arc::new(kernel());
    kernel.host().move_to_driver(GPU, Some("vfio-pci")).unwrap();
    let files = vec!["/dev/vfio/7".into()];
    let process = FakeProcess { pid: 9, name: "qemu".into(), cgroup: "/".into(), files };
    kernel.host().add_process(&process).unwrap();
    let unbinding = thread::spawn({
        let kernel = kernel.clone();
        move || write(&kernel, "drivers/vfio-pci/unbind", GPU)
    });
    thread::sleep(Duration::from_millis(50));
    assert!(!unbinding.is_finished());
    fs::remove_dir_all(kernel.host().path("proc/9")).unwrap();
    unbinding.join().unwrap().unwrap();
    assert_eq!(kernel.host().driver_of(GPU), None);
}

#[test]
fn a_stuck_device_takes_its_override_and_reset_along_and_no_other_file() {
    let kernel = Arc::new(kernel());
    kernel.fault(GPU, Fault::HangsOnUnbind);
    let start = |file: &'static str, text: &'static str| {
        let kernel = kernel.clone();
        thread::spawn(move || write(&kernel, file, text))
    };
    let unbind = start("drivers/nvidia/unbind", GPU);
    thread::sleep(Duration::from_millis(20));
    let others =
        [start("devices/0000:01:00.0/driver_override", "vfio-pci"), start("devices/0000:01:00.0/reset", "1")];
    write(&kernel, "devices/0000:01:00.0/reset_method", "bus").unwrap();
    thread::sleep(Duration::from_millis(20));
    assert!(!unbind.is_finished() && others.iter().all(|other| !other.is_finished()));
    kernel.repair(GPU);
    unbind.join().unwrap().unwrap();
    others.into_iter().for_each(|other| other.join().unwrap().unwrap());
}

#[test]
fn a_device_off_the_bus_keeps_its_ids_and_takes_a_reset() {
    let kernel = kernel();
    kernel.fall_off_the_bus(GPU).unwrap();
    let dir = kernel.host().device_dir(GPU);
    write(&kernel, "devices/0000:01:00.0/reset", "1").unwrap();
    assert_eq!(fs::read(dir.join("config")).unwrap()[..4], [0xff; 4]);
    assert_eq!(fs::read_to_string(dir.join("vendor")).unwrap(), "0x10de\n");
}

#[test]
fn a_bridges_register_resets_what_is_below_and_nobody_restores_it() {
    let kernel = kernel();
    let config = kernel.host().device_dir(GPU).join("config");
    let before = fs::read(&config).unwrap();
    let control = kernel.host().path(format!("sys/bus/pci/devices/{PORT}/config"));
    kernel.write_at(&control, 0x3e, &[0x40, 0]).unwrap();
    kernel.write_at(&control, 0x3e, &[0, 0]).unwrap();
    let after = fs::read(&config).unwrap();
    assert_eq!(after[..4], before[..4]);
    assert_ne!(before[0x10..0x28], after[0x10..0x28]);
    assert_eq!(after[0x10..0x28].iter().filter(|byte| **byte & 0xf0 != 0).count(), 0);
}

#[test]
#[should_panic(expected = "drivers/nvidia/new_id")]
fn a_write_that_nobody_expects_fails_the_test() {
    let kernel = kernel();
    let _ = write(&kernel, "drivers/nvidia/new_id", "10de 20b5");
}
