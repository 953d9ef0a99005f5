//! What the QEMU of a machine may touch: its own files, its GPUs, nothing else. Pure; called by [`super::VmLaunch::exec`].

use std::path::PathBuf;

use qudata_host::{launch::Confinement, size::ByteSize};

use super::VmLaunch;
use crate::{firmware::Firmware, machine::Accel};

/// QEMU's own memory beside the guest's RAM: a twentieth, and at least this much.
const OVERHEAD: ByteSize = ByteSize::from_gib(2);
/// Threads beside the vCPUs: workers of block devices, of memory allocation, of the program itself.
const THREADS: u64 = 256;

pub(super) fn plan_confinement(launch: &VmLaunch<'_>) -> Confinement {
    let machine = launch.machine;
    let mut devices = Vec::new();
    if machine.accel == Accel::Kvm {
        devices.push(PathBuf::from("/dev/kvm"));
    }
    if !launch.iommu_groups.is_empty() {
        devices.push(PathBuf::from("/dev/vfio/vfio"));
        devices.extend(launch.iommu_groups.iter().map(|group| format!("/dev/vfio/{group}").into()));
    }
    let mut writable = vec![launch.paths.qemu_dir(), machine.disk.overlay.clone()];
    let mut readable = vec![machine.seed.clone()];
    readable.extend(launch.base_image.clone());
    readable.extend(launch.shutdown.clone());
    match &machine.firmware {
        Firmware::Uefi { code, vars } => {
            readable.push(code.clone());
            writable.push(vars.clone());
        }
        Firmware::Bios => {}
        Firmware::Direct { kernel, initrd, .. } => readable.extend([kernel.clone(), initrd.clone()]),
    }
    let overhead = ByteSize::from_bytes(machine.memory.bytes() / 20).max(OVERHEAD);
    Confinement {
        description: format!("VM {} ({})", machine.name, machine.uuid),
        devices,
        writable,
        readable,
        memory_max: Some(machine.memory.saturating_add(overhead)),
        memlock: launch.memlock,
        tasks_max: Some(u64::from(machine.cpus) + THREADS),
        private_network: true,
        own_sandbox: false,
        writes_code: machine.accel == Accel::Tcg,
    }
}
