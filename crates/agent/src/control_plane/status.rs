//! How the control plane's client is doing, for people. Owns the states, since when, and what to do about a failure;
//! `keeper` enters them, `GET /host` shows them.

use jiff::Timestamp;
use qudata_host::causes::chain;

use super::{call::CallError, dial::DialError, registration::RegistrationError, wire::ReplyError};

/// How the client is doing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ControlPlaneState {
    /// Since its start, the service has not answered yet.
    Registering,
    /// The service knows this host and answers.
    Registered,
    /// It does not; the client goes on trying. Instances, tunnel and local API do without it.
    Down {
        /// Stable code.
        code: &'static str,
        /// What is wrong, one sentence without secrets.
        reason: String,
        /// What to do.
        remedy: &'static str,
    },
}

/// A state and its beginning.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ControlPlaneStatus {
    /// The state.
    pub state: ControlPlaneState,
    /// Since when. While it is down, since when it has been down for whatever reasons.
    pub since: Timestamp,
}

impl ControlPlaneStatus {
    pub(super) fn beginning() -> Self {
        Self { state: ControlPlaneState::Registering, since: Timestamp::now() }
    }

    /// Enters a state; whether anything changed.
    pub(super) fn enter(&mut self, state: ControlPlaneState) -> bool {
        use ControlPlaneState::Down;
        if self.state == state {
            return false;
        }
        match (&self.state, &state) {
            (Down { code: before, .. }, Down { code, .. }) if before == code => {}
            (_, Down { code, reason, .. }) => tracing::warn!(code, reason, "no control plane"),
            (_, state) => tracing::info!(?state, "control plane"),
        }
        if !matches!((&self.state, &state), (Down { .. }, Down { .. })) {
            self.since = Timestamp::now();
        }
        self.state = state;
        true
    }
}

/// Something the client tried did not work.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    /// No answer, or one that is no success.
    #[error("the control plane cannot be used")]
    Call(#[source] CallError),
    /// A success that is none.
    #[error("the control plane's answer cannot be used")]
    Reply(#[source] ReplyError),
    /// What it gave cannot be kept, so it is not used.
    #[error("what the control plane gave cannot be used")]
    Save(#[source] RegistrationError),
    /// Neither a key nor a secret is left to try.
    #[error("the control plane cannot be called: there is no API key and no secret that it gave")]
    NoCredential,
}

const UNREACHABLE: &str = "nothing is needed if the service is down: VMs, tunnel and local API go on without it, and the \
    agent comes back by itself; otherwise check this host's network and QUDATA_SERVICE_URL";
const TLS: &str =
    "check this host's clock and certificate authorities (package ca-certificates), and QUDATA_SERVICE_URL";
const REFUSED: &str =
    "check QUDATA_API_KEY: the service must know it, and it is needed when the saved secret is not taken";
const ODD: &str = "check QUDATA_SERVICE_URL: what answers there may not be the control plane (redirects are not followed); \
    if it is, its answers do not suit this version of the agent";
const NOT_SAVED: &str =
    "free space on the file system of the agent's data directory and see that it can be written";

impl Failure {
    pub(super) fn state(&self) -> ControlPlaneState {
        let (code, remedy) = match self {
            Self::Call(error) => sort(error),
            Self::Reply(_) => ("control_plane_reply", ODD),
            Self::Save(_) => ("registration_not_saved", NOT_SAVED),
            Self::NoCredential => ("control_plane_refused", REFUSED),
        };
        ControlPlaneState::Down { code, reason: chain(self), remedy }
    }

    /// Whether the service does not take who calls.
    pub(super) fn is_refusal(&self) -> bool {
        matches!(self, Self::Call(CallError::Status { status: 401 | 403, .. }))
    }

    /// How long the service wants to be left alone.
    pub(super) fn retry_after(&self) -> Option<std::time::Duration> {
        match self {
            Self::Call(CallError::Status { retry_after, .. }) => *retry_after,
            _ => None,
        }
    }
}

fn sort(error: &CallError) -> (&'static str, &'static str) {
    match error {
        CallError::Status { status: 401 | 403, .. } => ("control_plane_refused", REFUSED),
        CallError::Status { status: 408 | 429 | 500.., .. } => ("control_plane_unreachable", UNREACHABLE),
        CallError::Status { .. } | CallError::TooLarge { .. } => ("control_plane_reply", ODD),
        CallError::Dial(DialError::Tls { .. } | DialError::Trust(_) | DialError::NotLoopback { .. }) => {
            ("control_plane_tls", TLS)
        }
        CallError::Dial(DialError::Resolve { .. } | DialError::Connect { .. })
        | CallError::Deadline { .. }
        | CallError::Request(_)
        | CallError::Http { .. }
        | CallError::Cut { .. } => ("control_plane_unreachable", UNREACHABLE),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn down(code: &'static str, reason: &str) -> ControlPlaneState {
        ControlPlaneState::Down { code, reason: reason.into(), remedy: "r" }
    }

    #[test]
    fn an_outage_keeps_its_beginning_whatever_its_reasons() {
        let mut status = ControlPlaneStatus::beginning();
        status.since = Timestamp::UNIX_EPOCH;
        assert!(status.enter(down("a", "1")));
        let begun = status.since;
        assert_ne!(begun, Timestamp::UNIX_EPOCH);
        assert!(status.enter(down("a", "2")) && status.enter(down("b", "2")));
        assert!(!status.enter(down("b", "2")), "nothing new");
        assert_eq!((status.since, &status.state), (begun, &down("b", "2")));
        status.since = Timestamp::UNIX_EPOCH;
        assert!(status.enter(ControlPlaneState::Registered));
        assert_ne!(status.since, Timestamp::UNIX_EPOCH);
    }

    #[test]
    fn statuses_have_remedies_of_their_kind() {
        let code = |status| {
            let failure =
                Failure::Call(CallError::Status { call: "/init", status, retry_after: None, words: None });
            match failure.state() {
                ControlPlaneState::Down { code, reason, .. } => {
                    assert!(reason.contains(&status.to_string()), "{reason}");
                    (code, failure.is_refusal())
                }
                other => panic!("{other:?}"),
            }
        };
        for (status, expected) in [
            (401, ("control_plane_refused", true)),
            (403, ("control_plane_refused", true)),
            (302, ("control_plane_reply", false)),
            (404, ("control_plane_reply", false)),
            (429, ("control_plane_unreachable", false)),
            (500, ("control_plane_unreachable", false)),
            (503, ("control_plane_unreachable", false)),
        ] {
            assert_eq!(code(status), expected, "{status}");
        }
    }
}
