//! Moves GPUs between their host drivers and `vfio-pci`, as `plan` says, through the `door`. Called by the agent.
//!
//! ```text
//! bind:       look ─▶ reserve, unbind, bind ─▶ look again         failed: back to what it was; hung: hands off
//! give back:  nobody holds it ─▶ clear, unbind, bind ─▶ look      failed or hung: left as it is
//! ```
//! One child per GPU and list, so several GPUs move at the same time and one that hangs holds up none.

use std::time::Instant;

use qudata_host::{causes::chain, pci::PciAddress};

use crate::{
    door::{Door, DoorError},
    nvidia::{self, NvidiaError, Tools},
    op::Op,
    plan::{BindPlan, GiveBackPlan},
};

/// A GPU was not moved.
#[derive(Debug, thiserror::Error)]
pub enum RebindError {
    /// Its vendor's programs hold it. Nothing was touched.
    #[error("GPU {gpu} was not taken from its host driver")]
    Busy {
        /// The GPU.
        gpu: PciAddress,
        /// Why.
        #[source]
        source: NvidiaError,
    },
    /// A step failed; the GPU is where it was.
    #[error("GPU {gpu} was not moved and is as it was")]
    Undone {
        /// The GPU.
        gpu: PciAddress,
        /// The step that failed.
        #[source]
        source: Box<DoorError>,
    },
    /// A step failed and the GPU is between two drivers.
    #[error("GPU {gpu} is left half-way{}; do not use it before it was checked", also(undo.as_deref()))]
    Left {
        /// The GPU.
        gpu: PciAddress,
        /// The step that failed first.
        #[source]
        source: Box<DoorError>,
        /// Why the way back failed too, where it was tried.
        undo: Option<String>,
    },
    /// A step never returned. Nothing on this GPU may be touched before the host was rebooted.
    #[error("GPU {gpu} is wedged; reboot the host to get it back")]
    Wedged {
        /// The GPU.
        gpu: PciAddress,
        /// The step that hangs.
        #[source]
        source: Box<DoorError>,
    },
}

fn also(undo: Option<&str>) -> String {
    undo.map_or_else(String::new, |why| format!(", as the way back failed too ({why})"))
}

impl RebindError {
    /// The step that failed first, where it got so far.
    pub fn door(&self) -> Option<&DoorError> {
        match self {
            Self::Busy { .. } => None,
            Self::Undone { source, .. } | Self::Left { source, .. } | Self::Wedged { source, .. } => {
                Some(source)
            }
        }
    }
}

/// Brings all functions of a GPU to `vfio-pci`. What is there already stays untouched.
///
/// # Errors
/// [`RebindError`], which tells where the GPU is.
pub async fn bind(door: &Door, plan: &BindPlan) -> Result<(), RebindError> {
    bind_with(&Tools::default(), door, plan).await
}

/// As [`bind`], with the vendor's programs where `tools` says.
///
/// # Errors
/// As [`bind`].
pub async fn bind_with(tools: &Tools, door: &Door, plan: &BindPlan) -> Result<(), RebindError> {
    let gpu = plan.gpu.address;
    let Some(quieting) = &plan.quieting else { return move_to_vfio(door, plan).await };
    nvidia::quiet(tools, quieting).await.map_err(|source| RebindError::Busy { gpu, source })?;
    let moved = move_to_vfio(door, plan).await;
    if matches!(moved, Err(RebindError::Wedged { .. })) {
        // They would open the wedged card and hang with it.
        tracing::error!(%gpu, services = ?quieting.services, "stopped and not started again; reboot the host");
    } else if let Err(error) = nvidia::resume(tools, quieting).await {
        tracing::error!(%gpu, "{error}");
    }
    moved
}

async fn move_to_vfio(door: &Door, plan: &BindPlan) -> Result<(), RebindError> {
    let gpu = plan.gpu.address;
    let begun = Instant::now();
    let Err(source) = door.run(&plan.ops, plan.deadline).await else {
        if !plan.is_bound() {
            // A host driver that needs seconds to let go is worth knowing: each start waits for it.
            tracing::info!(%gpu, took_ms = begun.elapsed().as_secs_f64() * 1e3, "taken to vfio-pci");
        }
        return Ok(());
    };
    let source = Box::new(source);
    if let DoorError::Hung { .. } = *source {
        return Err(RebindError::Wedged { gpu, source });
    }
    // A bind of a GPU that was bound, or that did not get past its checks, has nothing to undo.
    if plan.undo.is_empty() || source.step().is_none_or(|step| step < plan.checks()) {
        return Err(RebindError::Undone { gpu, source });
    }
    if let DoorError::Unmet { op: Op::ExpectAlive { .. }, .. } = *source {
        // It died on the way. A host driver that gets a dead device may take the host with it.
        return Err(RebindError::Left { gpu, source, undo: None });
    }
    let mut failures = Vec::new();
    // Each function by itself: one that cannot go back does not keep the others.
    for ops in &plan.undo {
        match door.run(ops, plan.deadline).await {
            Ok(_) => {}
            Err(undo @ DoorError::Hung { .. }) => {
                return Err(RebindError::Wedged { gpu, source: Box::new(undo) });
            }
            Err(undo) => failures.push(chain(&undo)),
        }
    }
    if failures.is_empty() {
        return Err(RebindError::Undone { gpu, source });
    }
    Err(RebindError::Left { gpu, source, undo: Some(failures.join("; ")) })
}

/// Gives all functions of a GPU back. What is back already stays untouched.
///
/// # Errors
/// [`RebindError`]; a GPU that somebody holds is not touched.
pub async fn give_back(door: &Door, plan: &GiveBackPlan) -> Result<(), RebindError> {
    if plan.ops.is_empty() {
        return Ok(());
    }
    let gpu = plan.gpu.address;
    let Err(source) = door.run(&plan.ops, plan.deadline).await else { return Ok(()) };
    let source = Box::new(source);
    if let DoorError::Hung { .. } = *source {
        return Err(RebindError::Wedged { gpu, source });
    }
    if source.step().is_none_or(|step| step < plan.checks()) {
        return Err(RebindError::Undone { gpu, source });
    }
    Err(RebindError::Left { gpu, source, undo: None })
}
