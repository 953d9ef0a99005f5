//! What an instance gets of a GPU, and how it does not get one. Part of `gpus`.

use std::collections::BTreeSet;

use qudata_host::{durable, pci::PciAddress};
use qudata_vfio::{
    rebind::RebindError,
    topology::{Bar, Gpu, Topology},
};

use super::AdvanceError;

/// A GPU on `vfio-pci`, for one VM. Not `Clone`: who has it may start a VM on it.
#[derive(Debug)]
pub struct BoundGpu {
    /// The GPU.
    pub address: PciAddress,
    /// All functions of its slot, in order.
    pub functions: Vec<BoundFunction>,
    /// The IOMMU groups of its functions: QEMU opens `/dev/vfio/<group>` of each.
    pub groups: BTreeSet<u32>,
    /// Its NUMA node.
    pub numa_node: Option<u32>,
}

/// One function of a bound GPU.
#[derive(Debug)]
pub struct BoundFunction {
    /// Where it is.
    pub address: PciAddress,
    /// Its memory regions.
    pub bars: Vec<Bar>,
}

impl BoundGpu {
    /// None where it has no IOMMU group.
    pub(super) fn of(gpu: &Gpu, topology: &Topology) -> Option<Self> {
        let device = topology.devices.get(&gpu.address)?;
        let function = |address: &PciAddress| BoundFunction {
            address: *address,
            bars: topology.devices.get(address).map(|device| device.bars.clone()).unwrap_or_default(),
        };
        Some(Self {
            address: gpu.address,
            functions: gpu.functions.iter().map(function).collect(),
            groups: gpu
                .functions
                .iter()
                .map(|function| topology.devices.get(function)?.group)
                .collect::<Option<_>>()?,
            numa_node: device.numa_node,
        })
    }
}

/// A GPU could not be handed over.
#[derive(Debug, thiserror::Error)]
pub enum GpuError {
    /// It is not in a state from which it may be lent.
    #[error("GPU {address} cannot be lent: {reason}")]
    NotLendable {
        /// The GPU.
        address: PciAddress,
        /// Why, with the remedy.
        reason: String,
    },
    /// Its drivers could not be changed.
    #[error("GPU {address} could not be bound to vfio-pci")]
    Rebind {
        /// The GPU.
        address: PciAddress,
        /// Why.
        #[source]
        source: Box<RebindError>,
    },
    /// QEMU's user could not be given the device file.
    #[error("the device file of GPU {address} could not be handed to its VM")]
    Node {
        /// The GPU.
        address: PciAddress,
        /// Why.
        #[source]
        source: durable::DurableError,
    },
    /// The binding task ended early: a defect.
    #[error("binding the GPUs was interrupted: {reason}")]
    Interrupted {
        /// How.
        reason: String,
    },
    /// The step could not be written down.
    #[error("GPU {address} was not touched")]
    Advance {
        /// The GPU.
        address: PciAddress,
        /// Why.
        #[source]
        source: AdvanceError,
    },
}
