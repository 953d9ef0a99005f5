//! What QEMU reports unasked: the raw event and a typed view of the ones the agent acts on. Called by
//! [`super::client`] and by the task that owns an instance.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Deserialize;
use serde_json::Value;

/// One event, in the order QEMU sent it.
#[derive(Debug, Clone, PartialEq)]
pub struct QmpEvent {
    /// QEMU's name of it, such as `SHUTDOWN`.
    pub name: String,
    /// Its fields; `Null` when it has none.
    pub data: Value,
    /// When QEMU says it happened; when it arrived, if QEMU does not say.
    pub at: SystemTime,
}

/// The events the agent acts on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The machine is powered off and QEMU is about to end.
    Shutdown {
        /// The guest asked for it (power-off from inside).
        guest: bool,
        /// QEMU's word for the cause, such as `guest-shutdown` or `host-signal`.
        reason: String,
    },
    /// Somebody pressed the power button.
    Powerdown,
    /// The machine was reset and boots again.
    Reset {
        /// The guest asked for it (reboot from inside).
        guest: bool,
        /// QEMU's word for the cause.
        reason: String,
    },
    /// The processors stand still.
    Stop,
    /// The processors run.
    Resume,
    /// The guest's kernel reported that it crashed.
    GuestPanicked {
        /// What QEMU does about it, such as `pause` or `run`.
        action: String,
    },
    /// A disk request failed on the host's side.
    BlockIoError(BlockIoError),
    /// Anything else, known by [`QmpEvent::name`].
    Other,
}

/// A failed disk request.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct BlockIoError {
    /// The drive, as named on the command line; may be empty.
    pub device: String,
    /// The block node, as named on the command line; may be empty.
    pub node_name: String,
    /// `read` or `write`.
    pub operation: String,
    /// What QEMU does about it: `stop`, `report` or `ignore`.
    pub action: String,
    /// The host's file system is full.
    pub nospace: bool,
    /// The operating system's words, for people.
    pub reason: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Cause {
    guest: bool,
    reason: String,
    action: String,
}

impl QmpEvent {
    pub(super) fn new(name: String, data: Option<Value>, timestamp: Option<&Value>) -> Self {
        let at = timestamp.and_then(parse_timestamp).unwrap_or_else(SystemTime::now);
        Self { name, data: data.unwrap_or_default(), at }
    }

    /// The typed view. Missing or odd fields become empty ones: an event says that something happened, and that must
    /// not be lost because a detail is unfamiliar.
    #[must_use]
    pub fn event(&self) -> Event {
        let cause = || serde_json::from_value::<Cause>(self.data.clone()).unwrap_or_default();
        match self.name.as_str() {
            "SHUTDOWN" => {
                let Cause { guest, reason, .. } = cause();
                Event::Shutdown { guest, reason }
            }
            "RESET" => {
                let Cause { guest, reason, .. } = cause();
                Event::Reset { guest, reason }
            }
            "POWERDOWN" => Event::Powerdown,
            "STOP" => Event::Stop,
            "RESUME" => Event::Resume,
            "GUEST_PANICKED" => Event::GuestPanicked { action: cause().action },
            "BLOCK_IO_ERROR" => {
                Event::BlockIoError(serde_json::from_value(self.data.clone()).unwrap_or_default())
            }
            _ => Event::Other,
        }
    }
}

fn parse_timestamp(timestamp: &Value) -> Option<SystemTime> {
    // QEMU sends -1 when it could not read the clock; that is not a `u64` and falls through.
    let seconds = timestamp.get("seconds")?.as_u64()?;
    let micros = timestamp.get("microseconds")?.as_u64()?;
    UNIX_EPOCH.checked_add(Duration::from_secs(seconds))?.checked_add(Duration::from_micros(micros))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn event(name: &str, data: Value) -> Event {
        QmpEvent::new(name.to_owned(), Some(data), None).event()
    }

    #[test]
    fn typed_views() {
        let off = Event::Shutdown { guest: true, reason: "guest-shutdown".to_owned() };
        assert_eq!(event("SHUTDOWN", json!({"guest": true, "reason": "guest-shutdown", "new": []})), off);
        let reset = Event::Reset { guest: false, reason: String::new() };
        assert_eq!(event("RESET", json!({"guest": false})), reset, "QEMU 4 had no reason");
        assert_eq!(event("POWERDOWN", Value::Null), Event::Powerdown);
        assert_eq!(event("STOP", Value::Null), Event::Stop);
        assert_eq!(event("RESUME", json!({})), Event::Resume);
        let panicked = Event::GuestPanicked { action: "pause".to_owned() };
        assert_eq!(
            event("GUEST_PANICKED", json!({"action": "pause", "info": {"type": "hyper-v"}})),
            panicked
        );
        assert_eq!(event("NIC_RX_FILTER_CHANGED", json!({"name": "n0"})), Event::Other);
        let full = json!({"device": "", "node-name": "disk", "operation": "write", "action": "stop",
            "nospace": true, "reason": "No space left on device"});
        let Event::BlockIoError(error) = event("BLOCK_IO_ERROR", full) else { panic!("other event") };
        assert_eq!((error.node_name.as_str(), error.nospace), ("disk", true));
    }

    #[test]
    fn odd_fields_do_not_lose_the_event() {
        let off = Event::Shutdown { guest: false, reason: String::new() };
        assert_eq!(event("SHUTDOWN", json!("what")), off);
        assert_eq!(event("SHUTDOWN", json!({"guest": "yes"})), off);
        assert_eq!(event("BLOCK_IO_ERROR", json!(7)), Event::BlockIoError(BlockIoError::default()));
    }

    #[test]
    fn qemus_clock_counts_when_it_has_one() {
        let stamp = json!({"seconds": 1_700_000_000, "microseconds": 250_000});
        let event = QmpEvent::new("STOP".to_owned(), None, Some(&stamp));
        assert_eq!(event.at.duration_since(UNIX_EPOCH).unwrap(), Duration::from_millis(1_700_000_000_250));
        for odd in [
            json!({"seconds": -1, "microseconds": -1}),
            json!(u64::MAX),
            json!({"seconds": u64::MAX, "microseconds": 0}),
        ] {
            let event = QmpEvent::new("STOP".to_owned(), None, Some(&odd));
            assert!(event.at.elapsed().unwrap() < Duration::from_secs(5), "{odd}");
        }
    }
}
