//! When to make frpc look for frps at once: while there is no session, frps has come (back) and frpc, which waits up to
//! 20 s between two tries, has not tried since. The only way is to restart it, which costs nothing while nothing is
//! routed. Outlives a frpc; called by `rounds`.

use std::time::Duration;

use tokio::time::Instant;

use crate::{backoff::Backoff, beacon::Beacon};

/// How long frpc may take to notice by itself.
const GRACE: Duration = Duration::from_secs(1);
/// A failure is read in the log this much after it happened, at most.
const LOG_LAG: Duration = Duration::from_millis(600);
/// Between two restarts.
const FIRST_PAUSE: Duration = Duration::from_secs(3);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// Watches frps from the moment the session is lost to the moment it is back.
#[derive(Debug)]
pub(crate) struct Lookout {
    beacon: Beacon,
    failed: Option<Instant>,
    not_before: Instant,
    pauses: Backoff,
}

impl Lookout {
    pub(crate) fn new(host: &str, port: u16) -> Self {
        Self {
            beacon: Beacon::light(host.to_owned(), port),
            failed: None,
            not_before: Instant::now(),
            pauses: Backoff::new(FIRST_PAUSE, LONGEST_PAUSE),
        }
    }

    /// frpc noted that it got no session.
    pub(crate) fn note_failure(&mut self) {
        self.failed = Some(Instant::now());
    }

    /// Whether frpc, which has run since `started`, should be made to try now.
    pub(crate) fn is_due(&self, started: Instant) -> bool {
        let now = Instant::now();
        now >= self.not_before && should_try(now, self.beacon.appeared(), self.failed, started)
    }

    /// frpc is made to try; the next time comes later.
    pub(crate) fn note_try(&mut self) {
        self.not_before = Instant::now() + self.pauses.pause();
    }
}

fn should_try(now: Instant, appeared: Option<Instant>, failed: Option<Instant>, started: Instant) -> bool {
    let Some(appeared) = appeared else { return false };
    let tried_since = failed.is_some_and(|failed| failed > appeared + LOG_LAG);
    // A frpc that is younger than this is trying.
    !tried_since && now >= appeared + GRACE && now >= started + GRACE
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frpc_is_made_to_try_once_for_each_time_frps_appears() {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let due = |now, appeared, failed, started| should_try(at(now), appeared, failed, at(started));
        assert!(!due(60_000, None, Some(at(59_000)), 0), "nobody there");
        assert!(!due(60_900, Some(at(60_000)), Some(at(50_000)), 0), "frpc may notice by itself");
        assert!(due(61_600, Some(at(60_000)), Some(at(50_000)), 0));
        assert!(due(61_600, Some(at(60_000)), Some(at(60_300)), 0), "a failure of before, read late");
        assert!(
            !due(61_600, Some(at(60_000)), Some(at(61_000)), 0),
            "it was refused: trying more does not help"
        );
        assert!(!due(61_600, Some(at(60_000)), None, 61_000), "just started");
        assert!(due(61_600, Some(at(60_000)), None, 0), "an adopted one whose last failure is not known");
    }
}
