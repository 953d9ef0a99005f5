//! What a caller is told when a call is refused or fails. Owns the pair of stable code and sentence; `http/error.rs`
//! alone turns the code into a status.

use std::fmt;

use qudata_api::ErrorCode;

/// A call that was not carried out: a stable code and one sentence that names what is wrong and what to do. It holds no
/// host path and no secret; the full chain of causes goes to the log where the refusal is made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// Stable code.
    pub code: ErrorCode,
    /// One sentence for a person.
    pub sentence: String,
}

impl Refusal {
    /// A refusal.
    pub fn new(code: ErrorCode, sentence: impl Into<String>) -> Self {
        Self { code, sentence: sentence.into() }
    }

    /// A field whose value is not allowed.
    pub fn field(field: &str, value: impl fmt::Display, allowed: impl fmt::Display) -> Self {
        // Values come from outside: what is echoed is bounded and printable.
        let shown: String = value.to_string().chars().take(60).flat_map(char::escape_debug).collect();
        Self::new(ErrorCode::InvalidField, format!("{field}: \"{shown}\" is not allowed; {allowed}"))
    }

    /// There is no instance with this id.
    pub fn no_such_instance() -> Self {
        Self::new(
            ErrorCode::NoSuchInstance,
            "there is no such instance; GET /instances lists those that exist",
        )
    }

    /// The agent cannot take the call right now.
    pub fn busy(what: &str) -> Self {
        Self::new(ErrorCode::Busy, format!("{what}; try again in a moment"))
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.sentence)
    }
}

impl std::error::Error for Refusal {}
