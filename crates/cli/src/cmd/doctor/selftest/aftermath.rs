//! The end of each trial of a self-test: the instance is found, whatever became of the answer to its order, and deleted;
//! its GPU comes back. Goes on whatever fails, because nothing of a test may stay behind.

use std::time::Duration;

use qudata_api::{GpuState, GpuView, Teardown};
use qudata_doctor::Verdict;
use tokio::time::{Instant, sleep};

use super::{LOOK, RESTART, Test, Trial};
use crate::{exit::Exit, render::line};

const DELETED: &str = "selftest.deleted";
const GPU_BACK: &str = "selftest.gpu_back";

/// How long an order that was not answered may take to become an instance.
const ORDER_SETTLES: Duration = Duration::from_secs(2);
/// A guest that does not power off in time is ended by the agent well before this.
const DELETE_DEADLINE: Duration = Duration::from_secs(180);
/// The agent gives a reset and the check 90 s, and whoever still has the GPU open some time before.
const BACK_DEADLINE: Duration = Duration::from_secs(180);

impl Test<'_> {
    /// Looks for the instance of an order that was not answered. An agent that went away with the answer is waited for:
    /// only it can tell. What it does not tell is a finding, because then something may stay behind.
    pub(super) async fn find(&mut self, trial: &mut Trial<'_>) {
        sleep(ORDER_SETTLES).await;
        let end = Instant::now() + RESTART;
        let why = loop {
            match self.agent.instances().await {
                Ok(instances) => {
                    let ours = instances.iter().find(|instance| instance.name == trial.name);
                    (trial.id, trial.is_open) = (ours.map(|instance| instance.id), false);
                    return;
                }
                Err(failure) if Instant::now() > end => break failure.sentence,
                Err(_) => sleep(LOOK).await,
            }
        };
        let text = format!("whether the instance {} was made is not known: {why}", trial.name);
        let remedy = format!(
            "if `qudata-agent instance list` shows it: `qudata-agent instance delete {}`",
            trial.name
        );
        self.found(trial, DELETED, Verdict::Fail, (text, Some(&remedy)));
    }

    /// Deletes the instance and waits for its GPU. Goes on whatever fails.
    pub(super) async fn clear_away(&mut self, trial: &Trial<'_>) {
        let Some(path) = trial.path() else { return };
        let by_hand = format!("delete it by hand: `qudata-agent instance delete {}`", trial.name);
        match self.delete(&path).await {
            Ok(()) => self.found(
                trial,
                DELETED,
                Verdict::Pass,
                ("the instance and its disk are gone".to_owned(), None),
            ),
            Err(why) => return self.found(trial, DELETED, Verdict::Fail, (why, Some(&by_hand))),
        }
        let Some(gpu) = trial.gpu else { return };
        let address = line(&gpu.address);
        match self.back(&gpu.address).await {
            Ok(driver) => {
                let text = format!("reset, checked and free again; its driver is {driver}");
                self.found(trial, GPU_BACK, Verdict::Pass, (text, None));
            }
            Err(why) => {
                let remedy = format!("see `qudata-agent gpu show {address}`");
                self.found(trial, GPU_BACK, Verdict::Fail, (why, Some(&remedy)));
            }
        }
    }

    async fn delete(&self, path: &str) -> Result<(), String> {
        let end = Instant::now() + DELETE_DEADLINE;
        loop {
            let last = match self.agent.delete::<Teardown>(path).await {
                Ok(teardown) if teardown.complete => return Ok(()),
                Ok(teardown) if teardown.residues.is_empty() => "it is still being removed".to_owned(),
                Ok(teardown) => teardown.residues.join("; "),
                Err(failure) if failure.exit == Exit::NotFound => return Ok(()),
                Err(failure) => failure.sentence,
            };
            if Instant::now() > end {
                return Err(last);
            }
            sleep(LOOK).await;
        }
    }

    async fn back(&self, address: &str) -> Result<String, String> {
        let end = Instant::now() + BACK_DEADLINE;
        loop {
            let last = match self.agent.get::<GpuView>(&format!("/gpus/{address}")).await {
                Ok(gpu) if gpu.state == GpuState::Free => {
                    return Ok(gpu.driver.unwrap_or_else(|| "none".to_owned()));
                }
                Ok(gpu) if gpu.state == GpuState::Quarantined => {
                    return Err(format!("quarantined: {}", gpu.why.unwrap_or_default()));
                }
                Ok(_) => "it is still being reset and checked".to_owned(),
                Err(failure) => failure.sentence,
            };
            if Instant::now() > end {
                return Err(last);
            }
            sleep(LOOK).await;
        }
    }
}
