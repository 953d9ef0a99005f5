//! What the lab says while it works. Several scenarios run at a time, so each line names the one it belongs to.
use std::cell::Cell;
use std::fmt::Display;

thread_local! {
    static SCENARIO: Cell<Option<&'static str>> = const { Cell::new(None) };
}

/// From here on this thread speaks of a scenario, or of none.
pub(crate) fn speak_of(scenario: Option<&'static str>) {
    SCENARIO.set(scenario);
}

/// Says a line.
pub(crate) fn say(text: impl Display) {
    match SCENARIO.get() {
        Some(scenario) => eprintln!("lab: {scenario}: {text}"),
        None => eprintln!("lab: {text}"),
    }
}
