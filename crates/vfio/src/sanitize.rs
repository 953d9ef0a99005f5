//! Makes a GPU fit for the next tenant, or says why it is not. Called by the agent between two tenants, when the GPU is
//! on `vfio-pci` (or on no driver) and its VM is gone.
//!
//! ```text
//! nobody holds it ─▶ it answers ─▶ reset of the whole slot ─▶ it answers as before: ids, link, BARs
//! ```
//! Any doubt is an error, and the caller's answer to an error is quarantine.

use std::time::{Duration, Instant};

use qudata_host::pci::PciAddress;

use crate::{
    door::{Door, DoorError},
    health::{Baseline, Unhealthy},
    op::{BridgeReset, Op, Reply, configs},
    plan::VFIO_PCI,
    reset::Method,
    topology::{Gpu, Topology},
};

/// The kernel itself waits up to a minute for a device to come back from a reset.
const DEADLINE: Duration = Duration::from_secs(90);

/// A GPU that was reset and is what it was.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sanitized {
    /// How it was reset.
    pub method: Method,
    /// How the bridge did it, where it was the bridge.
    pub bridge: Option<BridgeReset>,
    /// How long it took.
    pub took: Duration,
}

/// A GPU must not be given to the next tenant.
#[derive(Debug, thiserror::Error)]
pub enum SanitizeError {
    /// There is no way to reset it.
    #[error("GPU {gpu} cannot be reset as a whole, so it cannot be cleaned")]
    NoReset {
        /// The GPU.
        gpu: PciAddress,
    },
    /// The host uses it.
    #[error("{function} is bound to {driver}; GPU {gpu} is reset on {VFIO_PCI} only")]
    HostDriver {
        /// The GPU.
        gpu: PciAddress,
        /// The function.
        function: PciAddress,
        /// Its driver.
        driver: String,
    },
    /// There is nothing to compare it with.
    #[error("{function} of GPU {gpu} has no record of what it was")]
    NoBaseline {
        /// The GPU.
        gpu: PciAddress,
        /// The function.
        function: PciAddress,
    },
    /// A step failed.
    #[error("GPU {gpu} could not be cleaned")]
    Failed {
        /// The GPU.
        gpu: PciAddress,
        /// The step.
        #[source]
        source: Box<DoorError>,
    },
    /// It was reset and is not what it was.
    #[error("GPU {gpu} is not healthy after its reset ({method})")]
    Unhealthy {
        /// The GPU.
        gpu: PciAddress,
        /// How it was reset.
        method: Method,
        /// The difference.
        #[source]
        source: Unhealthy,
    },
}

impl SanitizeError {
    /// The step that failed, where it got so far.
    pub fn door(&self) -> Option<&DoorError> {
        match self {
            Self::Failed { source, .. } => Some(source),
            Self::NoReset { .. }
            | Self::HostDriver { .. }
            | Self::NoBaseline { .. }
            | Self::Unhealthy { .. } => None,
        }
    }
}

/// Resets the GPU and proves that it is what it was. `topology` is a fresh one.
///
/// # Errors
/// [`SanitizeError`].
pub async fn sanitize(
    door: &Door,
    gpu: &Gpu,
    topology: &Topology,
    baseline: &Baseline,
) -> Result<Sanitized, SanitizeError> {
    sanitize_within(door, gpu, topology, baseline, DEADLINE).await
}

/// As [`sanitize`], with another deadline.
///
/// # Errors
/// As [`sanitize`].
pub async fn sanitize_within(
    door: &Door,
    gpu: &Gpu,
    topology: &Topology,
    baseline: &Baseline,
    deadline: Duration,
) -> Result<Sanitized, SanitizeError> {
    let address = gpu.address;
    let method = Method::choose(topology, gpu).ok_or(SanitizeError::NoReset { gpu: address })?;
    let ops = steps(gpu, topology, baseline, &method)?;
    let begun = Instant::now();
    let replies = door
        .run(&ops, deadline)
        .await
        .map_err(|error| SanitizeError::Failed { gpu: address, source: Box::new(error) })?;
    let bridge = replies.iter().find_map(|reply| match reply {
        Reply::Reset(how) => Some(*how),
        _ => None,
    });
    match baseline.check(&configs(&ops, replies)) {
        Ok(()) => Ok(Sanitized { method, bridge, took: begun.elapsed() }),
        Err(source) => Err(SanitizeError::Unhealthy { gpu: address, method, source }),
    }
}

fn steps(
    gpu: &Gpu,
    topology: &Topology,
    baseline: &Baseline,
    method: &Method,
) -> Result<Vec<Op>, SanitizeError> {
    let mut ops = Vec::new();
    for function in &gpu.functions {
        let (gpu, function) = (gpu.address, *function);
        let driver = topology.devices.get(&function).and_then(|device| device.driver.clone());
        if let Some(driver) = driver.filter(|driver| driver != VFIO_PCI) {
            return Err(SanitizeError::HostDriver { gpu, function, driver });
        }
        let was = baseline.functions.get(&function).ok_or(SanitizeError::NoBaseline { gpu, function })?;
        // A reset through sysfs succeeds while a VM has the function: who holds it is asked first.
        ops.push(Op::ExpectUnheld { address: function });
        ops.push(Op::ExpectAlive { address: function, vendor: was.vendor, device: was.device });
    }
    ops.extend(method.ops(gpu));
    ops.extend(baseline.ops());
    Ok(ops)
}
