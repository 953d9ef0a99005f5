//! Changes that frpc does not take although it answers, as when it cannot write its store: noted once, and after a while
//! told by the tunnel's state. Routes that are there stay. Called by `rounds`.

use std::time::Duration;

use qudata_host::causes::chain;
use tokio::time::Instant;

use crate::{publish::PublishError, status::TunnelState};

/// How long it may last before the tunnel counts as out of order.
const PATIENCE: Duration = Duration::from_secs(3);

/// Whether frpc takes changes.
#[derive(Debug, Default)]
pub(crate) struct Balk {
    since: Option<Instant>,
    error: Option<PublishError>,
}

impl Balk {
    /// frpc did not take every change. Whether it is the first time.
    pub(crate) fn note(&mut self, error: PublishError, now: Instant) -> bool {
        let first = self.since.is_none();
        if first {
            tracing::warn!(error = chain(&error), "frpc did not take every change; it is tried again");
        }
        self.since.get_or_insert(now);
        self.error = Some(error);
        first
    }

    /// frpc has taken everything, or there is nothing to take.
    pub(crate) fn end(&mut self) {
        if self.since.take().is_some() {
            tracing::info!("frpc has all changes");
        }
        self.error = None;
    }

    /// What the tunnel is to say of it, if it has lasted.
    pub(crate) fn state(&self, now: Instant) -> Option<TunnelState> {
        let error = self.error.as_ref().filter(|_| self.since.is_some_and(|at| now >= at + PATIENCE))?;
        let (code, remedy) = error.advice();
        let reason = format!("frpc carries its routes and does not take every change: {}", chain(error));
        Some(TunnelState::Down { code, reason, remedy: remedy.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin::AdminError;

    fn refused() -> PublishError {
        AdminError::Refused { attempt: "add a route", status: 500, words: "no space left".into() }.into()
    }

    #[test]
    fn it_is_noted_once_and_told_when_it_lasts() {
        let mut balk = Balk::default();
        let start = Instant::now();
        let later = start + Duration::from_secs(4);
        assert!(balk.note(refused(), start));
        assert_eq!(balk.state(start), None, "it may pass");
        assert!(!balk.note(refused(), later));
        let Some(TunnelState::Down { code, reason, remedy }) = balk.state(later) else { panic!() };
        assert_eq!(code, "frpc_admin");
        assert!(reason.contains("no space left") && remedy.contains("room"), "{reason}; {remedy}");
        balk.end();
        assert_eq!(balk.state(later), None);
        assert!(balk.note(refused(), later), "another time");
    }
}
