//! What has to be done to move a GPU to `vfio-pci` and back, or why it must not be. Pure: decides from a `Topology` and
//! acts on nothing; `rebind` carries the plans out.
//!
//! The whole slot travels, each function by its full address: ids are shared by all cards of a kind.

use std::{collections::BTreeMap, time::Duration};

use qudata_host::pci::PciAddress;
use serde::{Deserialize, Serialize};

use crate::{
    holders::Holder,
    nvidia::{self, Quieting, plan_nvidia},
    op::Op,
    topology::{Gpu, Topology},
};

mod refusal;
#[cfg(test)]
mod tests;

pub use refusal::BindRefusal;

/// The driver that gives a device to a VM.
pub const VFIO_PCI: &str = "vfio-pci";

/// Taking a card from a busy host driver may take seconds (it saves and frees what it has in memory); a step that takes
/// longer than this does not come back.
const BIND_DEADLINE: Duration = Duration::from_secs(20);
/// A host driver that gets a card back tests its memory.
const GIVE_BACK_DEADLINE: Duration = Duration::from_secs(45);

/// What the owner allows for a GPU and what is known about it beside the topology.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BindPolicy {
    /// The owner named this GPU: it may be taken although the firmware's console is on it.
    pub configured: bool,
    /// Who holds it.
    pub holders: Vec<Holder>,
    /// An earlier step on it never returned.
    pub wedged: bool,
}

/// Where a GPU goes after its use.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AfterUse {
    /// Back to the driver it had.
    #[default]
    Host,
    /// It stays on `vfio-pci`.
    Vfio,
}

/// One function of a GPU in a plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FunctionPlan {
    /// Where it is.
    pub address: PciAddress,
    /// The driver it has before a bind, and goes to in a give-back.
    pub original_driver: Option<String>,
}

/// How to move a GPU to `vfio-pci`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BindPlan {
    /// The GPU.
    pub gpu: Gpu,
    /// Its functions in order.
    pub functions: Vec<FunctionPlan>,
    /// The steps.
    pub ops: Vec<Op>,
    /// The steps back of each function that moves, for a bind that failed half-way.
    pub undo: Vec<Vec<Op>>,
    /// Programs of the vendor to be sent away first.
    pub quieting: Option<Quieting>,
    /// For all steps together.
    pub deadline: Duration,
}

impl BindPlan {
    /// The drivers as they are now, to be written down before the bind. Does not belong over an older note of a GPU that
    /// has not been given back since: that one knows the host driver, this one would say `vfio-pci`.
    pub fn originals(&self) -> BTreeMap<PciAddress, Option<String>> {
        self.functions.iter().map(|f| (f.address, f.original_driver.clone())).collect()
    }

    /// Whether every function is on `vfio-pci` already; then the steps only look.
    pub fn is_bound(&self) -> bool {
        self.functions.iter().all(|function| is_vfio(function.original_driver.as_deref()))
    }

    /// How many steps come before the first that writes.
    pub(crate) fn checks(&self) -> usize {
        self.ops.iter().take_while(|op| matches!(op, Op::ExpectAlive { .. })).count()
    }
}

/// How to give a GPU back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GiveBackPlan {
    /// The GPU.
    pub gpu: Gpu,
    /// Its functions in order.
    pub functions: Vec<FunctionPlan>,
    /// The steps; none when it stays on `vfio-pci`.
    pub ops: Vec<Op>,
    /// For all steps together.
    pub deadline: Duration,
}

impl GiveBackPlan {
    /// How many steps come before the first that writes.
    pub(crate) fn checks(&self) -> usize {
        self.ops.iter().take_while(|op| matches!(op, Op::ExpectUnheld { .. })).count()
    }
}

/// The steps that move `gpu` to `vfio-pci`. Functions that are there already are left alone, so the plan for a GPU that
/// is bound, or half-bound by an agent that was killed, is a good one too.
///
/// # Errors
/// [`BindRefusal`]: why it must not be moved.
pub fn plan_bind(topology: &Topology, gpu: &Gpu, policy: &BindPolicy) -> Result<BindPlan, BindRefusal> {
    refusal::check(topology, gpu, policy)?;
    let devices = gpu.functions.iter().filter_map(|address| topology.devices.get(address));
    let (mut functions, mut checks) = (Vec::new(), Vec::new());
    for device in devices {
        let address = device.address;
        checks.push(Op::ExpectAlive { address, vendor: device.vendor, device: device.device });
        functions.push(FunctionPlan { address, original_driver: device.driver.clone() });
    }
    let to_move: Vec<&FunctionPlan> =
        functions.iter().filter(|function| !is_vfio(function.original_driver.as_deref())).collect();
    let vfio = || VFIO_PCI.to_owned();
    let mut ops = checks.clone();
    // All reserved before any is free: nothing else can take a function of the slot in between.
    ops.extend(to_move.iter().map(|f| Op::Override { address: f.address, driver: Some(vfio()) }));
    ops.extend(
        to_move
            .iter()
            .filter_map(|f| Some(Op::Unbind { address: f.address, driver: f.original_driver.clone()? })),
    );
    ops.extend(to_move.iter().map(|f| Op::Bind { address: f.address, driver: vfio() }));
    ops.extend(functions.iter().map(|f| Op::ExpectDriver { address: f.address, driver: Some(vfio()) }));
    if !to_move.is_empty() {
        // A driver that lets go may switch the card off.
        ops.extend(checks.iter().cloned());
    }
    let undo = to_move.iter().map(|function| back(function)).collect();
    let quieting = to_move
        .iter()
        .any(|function| function.original_driver.as_deref() == Some(nvidia::DRIVER))
        .then(|| plan_nvidia(gpu.address, &policy.holders));
    Ok(BindPlan { gpu: gpu.clone(), functions, ops, undo, quieting, deadline: BIND_DEADLINE })
}

/// The steps that give `gpu` back to the drivers in `originals`. A GPU of which no function had a driver of the host
/// stays on `vfio-pci`, as does one whose owner wants it so.
///
/// What has been given back is left alone, so the plan for a GPU that is half-way, or back already, is a good one too.
pub fn plan_give_back(
    topology: &Topology,
    gpu: &Gpu,
    originals: &BTreeMap<PciAddress, Option<String>>,
    after: AfterUse,
) -> GiveBackPlan {
    let there = gpu.functions.iter().filter(|address| topology.devices.contains_key(address));
    let functions: Vec<FunctionPlan> = there
        .map(|address| FunctionPlan {
            address: *address,
            original_driver: originals.get(address).cloned().flatten(),
        })
        .collect();
    let has_home = |f: &FunctionPlan| f.original_driver.is_some() && !is_vfio(f.original_driver.as_deref());
    let stays = after == AfterUse::Vfio || !functions.iter().any(has_home);
    let mut ops = Vec::new();
    if !stays {
        ops.extend(functions.iter().map(|f| Op::ExpectUnheld { address: f.address }));
        let travels = |f: &&FunctionPlan| !is_vfio(f.original_driver.as_deref());
        ops.extend(functions.iter().filter(travels).flat_map(back));
    }
    GiveBackPlan { gpu: gpu.clone(), functions, ops, deadline: GIVE_BACK_DEADLINE }
}

/// One function from `vfio-pci` to the driver it had, or to none.
fn back(function: &FunctionPlan) -> Vec<Op> {
    let address = function.address;
    let mut ops =
        vec![Op::Override { address, driver: None }, Op::Unbind { address, driver: VFIO_PCI.to_owned() }];
    ops.extend(function.original_driver.clone().map(|driver| Op::Bind { address, driver }));
    ops.push(Op::ExpectDriver { address, driver: function.original_driver.clone() });
    ops
}

fn is_vfio(driver: Option<&str>) -> bool {
    driver == Some(VFIO_PCI)
}
