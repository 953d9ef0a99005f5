//! An error as people read it: with its causes, which `Display` leaves out. For logs, and where an error becomes a text.

use std::error::Error;

/// An error and all its causes in one line, the nearest first: `what: because: because`.
#[must_use]
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("the door is shut")]
    struct Shut(#[source] Locked);

    #[derive(Debug, thiserror::Error)]
    #[error("it is locked")]
    struct Locked(#[source] std::fmt::Error);

    #[test]
    fn every_cause_is_told_once() {
        let error = Shut(Locked(std::fmt::Error));
        assert_eq!(chain(&error), format!("the door is shut: it is locked: {}", std::fmt::Error));
        assert_eq!(chain(&Locked(std::fmt::Error)), format!("it is locked: {}", std::fmt::Error));
    }
}
