//! What the agent tells the systemd that runs it: ready, alive, ending (sd_notify(3)). Without systemd nothing is told.
//! Called by `daemon`.

use std::time::Duration;

use sd_notify::NotifyState;

use crate::instances::Instances;

/// Recovery is over and the API is open.
pub fn tell_ready(instances: &Instances) {
    let status = status(instances);
    tell(&[NotifyState::Ready, NotifyState::Status(&status)]);
}

/// The agent ends; VMs live on.
pub fn tell_stopping() {
    tell(&[NotifyState::Stopping, NotifyState::Status("stopping; VMs live on")]);
}

/// Tells for ever that the agent is alive, twice as often as systemd wants to hear it. What it does for that is what the
/// API does: a turn of the runtime and the lock of the instances. A runtime that is stuck stays silent, and systemd
/// starts a new agent, which takes the VMs over.
pub async fn prove_life(instances: Instances) {
    let Some(period) =
        sd_notify::watchdog_enabled().map(|wanted| (wanted / 2).max(Duration::from_millis(100)))
    else {
        return;
    };
    let mut clock = tokio::time::interval(period);
    clock.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        clock.tick().await;
        let status = status(&instances);
        tell(&[NotifyState::Watchdog, NotifyState::Status(&status)]);
    }
}

fn status(instances: &Instances) -> String {
    match instances.list().len() {
        1 => "1 instance".to_owned(),
        n => format!("{n} instances"),
    }
}

fn tell(news: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(news) {
        tracing::warn!(%error, "systemd was not told");
    }
}
