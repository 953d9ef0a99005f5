//! The hardware of an instance's machine as far as GPUs decide it: slots, address space, memory and processors near the
//! GPUs. Pure but for a few looks at the host; called by `provision` once the GPUs are bound.

use std::{path::Path, time::Duration};

use qudata_host::{causes::chain, size::ByteSize};
use qudata_qemu::{
    firmware::Firmware,
    machine::Accel,
    memory::{MemoryPlan, MemoryWish},
    mmio::{AddressWidth, AddressWidthError, MmioPlan, PlanMmioError, plan_mmio},
    passthrough::{
        MemoryBar, PassthroughFunction, PassthroughSlot, PassthroughSlotError, SlowBars, warn_of_slow_bars,
    },
    pinning::{CpuList, observe_node_cpus, plan_pinning},
    version::observe_kernel,
};
use qudata_vfio::topology::Bar;

use super::{events::EventLog, record::InstanceRecord};
use crate::{
    gpus::{BoundFunction, BoundGpu},
    pages::Promise,
    site::Site,
};

/// What GPUs make of a machine.
#[derive(Debug)]
pub(super) struct Hardware {
    /// A slot for each GPU.
    pub(super) slots: Vec<PassthroughSlot>,
    /// Address space for their BARs.
    pub(super) mmio: Option<MmioPlan>,
    /// What backs the RAM.
    pub(super) backing: MemoryPlan,
    /// Its reserved pages, until QEMU has taken them.
    pub(super) promise: Option<Promise>,
    /// Host CPUs for each vCPU, where they should be near the GPUs.
    pub(super) pins: Option<Vec<CpuList>>,
    /// `RLIMIT_MEMLOCK` of QEMU, where it pins memory.
    pub(super) memlock: Option<ByteSize>,
    /// How long QEMU may take until it answers.
    pub(super) deadline: Duration,
    /// What makes the start slow on this host, for the log and the events.
    pub(super) slow: Option<SlowBars>,
}

/// The GPUs do not fit into a machine.
#[derive(Debug, thiserror::Error)]
pub(super) enum HardwareError {
    /// They are no slots.
    #[error("a GPU cannot be a slot of the machine")]
    Slot(#[source] PassthroughSlotError),
    /// The processor does not tell its address bits.
    #[error("the processor of this host is not understood")]
    Width(#[source] AddressWidthError),
    /// Their memory windows have no room.
    #[error("the GPUs do not fit into the guest's address space")]
    Mmio(#[source] PlanMmioError),
    /// `/proc/cpuinfo` cannot be read.
    #[error("/proc/cpuinfo cannot be read")]
    CpuInfo(#[source] std::io::Error),
}

/// Plans the hardware around `gpus`.
pub(super) async fn plan_hardware(
    site: &Site,
    record: &InstanceRecord,
    firmware: &Firmware,
    gpus: &[BoundGpu],
    events: &EventLog,
) -> Result<Hardware, HardwareError> {
    let no_mmap = site.settings.gpu_no_mmap;
    let slots = gpus.iter().map(|gpu| slot(gpu, no_mmap)).collect::<Result<Vec<_>, _>>();
    let slots = slots.map_err(HardwareError::Slot)?;
    let ram = record.spec.memory;
    let mmio = if slots.is_empty() {
        None
    } else {
        plan_mmio(&slots, ram, width(site.settings.accel)?, firmware).map_err(HardwareError::Mmio)?
    };
    let root = Path::new("/");
    let node = common_node(gpus);
    let wish = MemoryWish { ram, passthrough: !gpus.is_empty(), node };
    let waits = || events.add("waiting_for_huge_pages", Some("VMs that start take theirs first".to_owned()));
    let (backing, promise) = site.pages.plan(wish, waits).await;
    let pins = node.and_then(|node| match observe_node_cpus(root, node) {
        Ok(cpus) => plan_pinning(record.spec.cpus, &cpus),
        Err(error) => {
            tracing::warn!(error = %chain(&error), "vCPUs are not pinned");
            None
        }
    });
    let slow = match (observe_kernel(), &site.qemu_version) {
        (Ok(kernel), Some(qemu)) => warn_of_slow_bars(&slots, kernel, *qemu),
        _ => None,
    };
    let (memlock, deadline) = (backing.memlock(ram), backing.launch_deadline(ram));
    Ok(Hardware { slots, mmio, backing, promise, pins, memlock, deadline, slow })
}

fn width(accel: Accel) -> Result<AddressWidth, HardwareError> {
    match accel {
        Accel::Tcg => Ok(AddressWidth::EMULATED),
        Accel::Kvm => {
            let text = std::fs::read_to_string("/proc/cpuinfo").map_err(HardwareError::CpuInfo)?;
            AddressWidth::of_host(&text).map_err(HardwareError::Width)
        }
    }
}

fn slot(gpu: &BoundGpu, no_mmap: bool) -> Result<PassthroughSlot, PassthroughSlotError> {
    PassthroughSlot::new(gpu.functions.iter().map(function).collect(), no_mmap)
}

fn function(function: &BoundFunction) -> PassthroughFunction {
    let bar = |bar: &Bar| MemoryBar {
        size: ByteSize::from_bytes(bar.size),
        is_64bit: bar.is_64bit,
        prefetchable: bar.prefetchable,
    };
    PassthroughFunction { address: function.address, bars: function.bars.iter().map(bar).collect() }
}

/// The node that all GPUs are on. With GPUs on several nodes there is no place near all of them.
fn common_node(gpus: &[BoundGpu]) -> Option<u32> {
    let (first, rest) = gpus.split_first()?;
    let node = first.numa_node?;
    rest.iter().all(|gpu| gpu.numa_node == Some(node)).then_some(node)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gpu(node: Option<u32>) -> BoundGpu {
        BoundGpu {
            address: "01:00.0".parse().unwrap(),
            functions: Vec::new(),
            groups: [1].into(),
            numa_node: node,
        }
    }

    #[test]
    fn memory_goes_where_all_gpus_are() {
        assert_eq!(common_node(&[]), None);
        assert_eq!(common_node(&[gpu(Some(1)), gpu(Some(1))]), Some(1));
        assert_eq!(common_node(&[gpu(Some(1)), gpu(Some(0))]), None);
        assert_eq!(common_node(&[gpu(Some(1)), gpu(None)]), None);
        assert_eq!(common_node(&[gpu(None)]), None);
    }
}
