//! Tells the control plane how the oldest instance does: `/stats` every five seconds while there is one, and its end once
//! the last has gone. The other task of the client.
//!
//! A report that fails is dropped: the next one says more. Only the end is said until the service has heard it, because
//! nothing comes after it. There is never more than one report under way.

use std::sync::{Arc, atomic::Ordering};

use axum::http::Method;
use qudata_host::causes::chain;
use tokio::time::{MissedTickBehavior, interval, sleep};

use super::{
    Shared,
    call::{Call, CallError, Credential},
    pace::Pace,
    wire::StatsBody,
};

pub(super) async fn run(shared: Arc<Shared>) {
    let mut clock = interval(shared.timing.stats);
    clock.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut pace = Pace::new(shared.timing.pauses);
    let mut failing = false;
    loop {
        clock.tick().await;
        let Some((credential, body, is_end)) = due(&shared) else { continue };
        let call = Call {
            method: Method::POST,
            path: "/stats",
            credential: &credential,
            body: serde_json::to_vec(&body).unwrap_or_default(),
            wants_reply: false,
        };
        let Err(error) = shared.caller.call(&call).await else {
            if is_end {
                shared.end_owed.store(false, Ordering::Relaxed);
            }
            (failing, _) = (false, pace.calm());
            continue;
        };
        if !failing {
            tracing::warn!(error = %chain(&error), "a report to the control plane was dropped");
        }
        failing = true;
        let mut asked = None;
        if let CallError::Status { status, retry_after, .. } = error {
            asked = retry_after;
            if matches!((status, &credential), (401 | 403, Credential::Secret(secret)) if shared.is_known(secret))
            {
                shared.refused.notify_one();
            }
        }
        sleep(pace.failed(asked)).await;
    }
}

/// What is to be said now, by whom, and whether it is the end.
fn due(shared: &Shared) -> Option<(Credential, StatsBody, bool)> {
    let credential = Credential::Secret(shared.known()?);
    match (shared.stats)() {
        Some(input) => {
            shared.end_owed.store(true, Ordering::Relaxed);
            Some((credential, StatsBody::of(&input), false))
        }
        None => {
            let owed = shared.end_owed.load(Ordering::Relaxed);
            owed.then(|| (credential, StatsBody::destroyed(), true))
        }
    }
}
