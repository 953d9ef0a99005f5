//! What is particular about NVIDIA's driver on the host: programs of its own keep every card open, and an open card
//! cannot be unbound. Owns their names and the order in which they go and come back; called by `plan` (pure) and
//! `rebind`.
//!
//! ```text
//! persistence mode of this card off ─▶ stop the services that hold it ─▶ (unbind) ─▶ start them again
//! ```
//! The module is never unloaded: other cards run on it.

use std::{collections::BTreeSet, io, path::PathBuf, time::Duration};

use qudata_host::{
    command::{Tool, ToolError},
    pci::PciAddress,
};

use crate::{
    door::{Door, DoorError},
    holders::{Holder, HoldingProcess},
    op::{Op, Reply},
};

/// The host driver that needs this.
pub const DRIVER: &str = "nvidia";

/// Services that look at cards and can be told to look away for a moment: the persistence daemon and what monitors
/// (DCGM under its names). Not the fabric manager, which keeps the links between all cards alive, and nothing that
/// computes.
const YIELDING: &[&str] = &[
    "nvidia-persistenced.service",
    "nvidia-dcgm.service",
    "dcgm.service",
    "nv-hostengine.service",
    "dcgm-exporter.service",
    "nvidia-dcgm-exporter.service",
];

/// DCGM takes a while to let go of its watches.
const STOP_DEADLINE: Duration = Duration::from_secs(30);
/// The tool opens the driver, which may wake a card first.
const SMI_DEADLINE: Duration = Duration::from_secs(15);

/// Waking a card that sleeps takes a second or two.
const MINOR_DEADLINE: Duration = Duration::from_secs(10);

/// Which `/dev/nvidiaN` is `gpu`'s; none where the driver does not have it.
///
/// # Errors
/// When the driver does not answer.
pub async fn minor(door: &Door, gpu: PciAddress) -> Result<Option<u32>, DoorError> {
    let replies = door.run(&[Op::NvidiaMinor { address: gpu }], MINOR_DEADLINE).await?;
    Ok(replies.into_iter().find_map(|reply| if let Reply::Minor(minor) = reply { minor } else { None }))
}

/// What has to happen before a card can be unbound from NVIDIA's driver.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Quieting {
    /// The card whose persistence mode is turned off.
    pub gpu: PciAddress,
    /// The services that are stopped before and started afterwards.
    pub services: Vec<String>,
}

/// Where the programs are; names are looked up in the system path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tools {
    /// `nvidia-smi`.
    pub nvidia_smi: PathBuf,
    /// `systemctl`.
    pub systemctl: PathBuf,
}

impl Default for Tools {
    fn default() -> Self {
        Self { nvidia_smi: "nvidia-smi".into(), systemctl: "systemctl".into() }
    }
}

/// A card could not be made quiet, so it was not unbound.
#[derive(Debug, thiserror::Error)]
pub enum NvidiaError {
    /// Persistence mode is still on.
    #[error("cannot turn off persistence mode of GPU {gpu}; try `nvidia-smi -i {gpu} -pm 0`")]
    Persistence {
        /// The card.
        gpu: PciAddress,
        /// Why.
        #[source]
        source: ToolError,
    },
    /// A service holds it or is down now.
    #[error("cannot {attempt} {service}; try `systemctl {attempt} {service}`")]
    Service {
        /// `stop` or `start`.
        attempt: &'static str,
        /// The unit.
        service: String,
        /// Why.
        #[source]
        source: ToolError,
    },
}

/// Whether this holder can be told to let go, and comes back afterwards.
pub fn yields(holder: &Holder) -> bool {
    matches!(holder, Holder::Process(HoldingProcess { unit: Some(unit), .. }) if YIELDING.contains(&unit.as_str()))
}

/// What to send away before `gpu` is unbound. Only services that hold it: the others do not notice.
pub fn plan_nvidia(gpu: PciAddress, holders: &[Holder]) -> Quieting {
    let unit = |holder: &Holder| match holder {
        Holder::Process(process) if yields(holder) => process.unit.clone(),
        _ => None,
    };
    let held: BTreeSet<String> = holders.iter().filter_map(unit).collect();
    // Monitors before the daemon they talk to; the list is the other way round for the start.
    let order = YIELDING.iter().rev().filter(|service| held.contains(**service));
    Quieting { gpu, services: order.map(|service| (*service).to_owned()).collect() }
}

/// Makes the card quiet. On failure what was stopped is running again.
///
/// # Errors
/// [`NvidiaError`]. A missing `nvidia-smi` is none: then no persistence mode was ever turned on with it.
pub async fn quiet(tools: &Tools, plan: &Quieting) -> Result<(), NvidiaError> {
    let gpu = plan.gpu;
    let run = Tool::new(&tools.nvidia_smi)
        .args(["-i".to_owned(), gpu.to_string(), "-pm".to_owned(), "0".to_owned()])
        .deadline(SMI_DEADLINE)
        .run()
        .await;
    match run {
        Ok(_) => {}
        Err(ToolError::Start { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
        Err(source) => return Err(NvidiaError::Persistence { gpu, source }),
    }
    for (stopped, service) in plan.services.iter().enumerate() {
        if let Err(error) = systemctl(tools, "stop", service).await {
            let stopped = plan.services.iter().take(stopped + 1).cloned().collect();
            if let Err(error) = resume(tools, &Quieting { gpu, services: stopped }).await {
                tracing::error!(%gpu, "{error}");
            }
            return Err(error);
        }
    }
    Ok(())
}

/// Starts what was stopped, in the opposite order. All are tried.
///
/// # Errors
/// The first failure.
pub async fn resume(tools: &Tools, plan: &Quieting) -> Result<(), NvidiaError> {
    let mut outcome = Ok(());
    for service in plan.services.iter().rev() {
        let started = systemctl(tools, "start", service).await;
        outcome = outcome.and(started);
    }
    outcome
}

async fn systemctl(tools: &Tools, attempt: &'static str, service: &str) -> Result<(), NvidiaError> {
    let run = Tool::new(&tools.systemctl).args([attempt, service]).deadline(STOP_DEADLINE).run().await;
    run.map(drop).map_err(|source| NvidiaError::Service { attempt, service: service.to_owned(), source })
}
