//! How much of anything a caller may take. Owns the numbers; tests shorten them.

use std::time::Duration;

/// Bounds on callers.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Connections at once, for each of the two listeners: a flood through the tunnel must not lock the host's owner out.
    pub connections: usize,
    /// Bytes of a request's head.
    pub head_bytes: usize,
    /// Header lines of a request.
    pub head_lines: usize,
    /// Time for a request's head; also how long a connection may idle between requests.
    pub head_deadline: Duration,
    /// Bytes of a request's body.
    pub body_bytes: usize,
    /// Time for a request's body.
    pub body_deadline: Duration,
    /// How long a caller that is still sending is listened to after its answer, so that the answer arrives.
    pub farewell: Duration,
    /// How long calls under way may take when the agent ends.
    pub shutdown: Duration,
    /// Silence on an event stream after which a comment is sent.
    pub event_silence: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 64,
            head_bytes: 16 << 10,
            head_lines: 100,
            head_deadline: Duration::from_secs(5),
            body_bytes: 64 << 10,
            body_deadline: Duration::from_secs(10),
            farewell: Duration::from_secs(2),
            shutdown: Duration::from_secs(5),
            event_silence: Duration::from_secs(15),
        }
    }
}
