//! What was measured, as a table for people and a line of JSON for machines. Called by main.

use comfy_table::{ContentArrangement, Table, presets::UTF8_FULL_CONDENSED};
use serde_json::{Value, json};

use crate::machine;

/// What a figure counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unit {
    Millis,
    Mebibytes,
    Megabytes,
    Count,
    PerSecond,
}

impl Unit {
    fn name(self) -> &'static str {
        match self {
            Self::Millis => "ms",
            Self::Mebibytes => "MiB",
            Self::Megabytes => "MB",
            Self::Count => "",
            Self::PerSecond => "/s",
        }
    }

    fn show(self, value: f64) -> String {
        let decimals = match self {
            Self::Count | Self::PerSecond => 0,
            Self::Millis | Self::Mebibytes | Self::Megabytes if value.abs() < 100.0 => 1,
            Self::Millis | Self::Mebibytes | Self::Megabytes => 0,
        };
        format!("{value:.decimals$} {}", self.name()).trim_end().to_owned()
    }
}

/// One figure and what it is compared with.
#[derive(Debug, Clone)]
pub(crate) struct Row {
    benchmark: &'static str,
    figure: String,
    unit: Unit,
    ours: f64,
    goal: Option<f64>,
    reference: Option<(f64, String)>,
    note: String,
}

impl Row {
    /// A figure by itself.
    pub(crate) fn new(benchmark: &'static str, figure: &str, unit: Unit, ours: f64) -> Self {
        let (figure, note) = (figure.to_owned(), String::new());
        Self { benchmark, figure, unit, ours, goal: None, reference: None, note }
    }

    /// It should be this much at most.
    pub(crate) fn at_most(mut self, goal: f64) -> Self {
        self.goal = Some(goal);
        self
    }

    /// What it is compared with: a value of the same unit, and whose it is.
    pub(crate) fn beside(mut self, value: f64, what: impl Into<String>) -> Self {
        self.reference = Some((value, what.into()));
        self
    }

    /// What else one should know, printed below the table.
    pub(crate) fn note(mut self, note: impl Into<String>) -> Self {
        self.note = note.into();
        self
    }

    fn ratio(&self) -> Option<f64> {
        let (reference, _) = self.reference.as_ref()?;
        (*reference > 0.0).then(|| self.ours / reference)
    }

    fn verdict(&self) -> Option<&'static str> {
        self.goal.map(|goal| if self.ours <= goal { "met" } else { "missed" })
    }

    fn cells(&self) -> [String; 7] {
        let dash = || "–".to_owned();
        let reference = self.reference.as_ref();
        [
            self.benchmark.to_owned(),
            self.figure.clone(),
            self.unit.show(self.ours),
            reference.map_or_else(dash, |(value, what)| format!("{}: {what}", self.unit.show(*value))),
            self.ratio().map_or_else(dash, |ratio| format!("{ratio:.3}")),
            self.goal.map_or_else(dash, |goal| format!("≤ {}", self.unit.show(goal))),
            self.verdict().map_or_else(dash, str::to_owned),
        ]
    }

    fn json(&self) -> Value {
        json!({
            "benchmark": self.benchmark,
            "figure": self.figure,
            "unit": self.unit.name(),
            "ours": rounded(self.ours),
            "reference": self.reference.as_ref().map(|(value, _)| rounded(*value)),
            "reference_is": self.reference.as_ref().map(|(_, what)| what),
            "ratio": self.ratio().map(rounded),
            "goal": self.goal,
            "verdict": self.verdict(),
            "note": Some(&self.note).filter(|note| !note.is_empty()),
        })
    }
}

/// Microseconds are the last digit that means anything.
fn rounded(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

/// All figures of a run.
#[derive(Debug)]
pub(crate) struct Report {
    machine: machine::Machine,
    quick: bool,
    rows: Vec<Row>,
    failures: Vec<(String, String)>,
}

impl Report {
    pub(crate) fn new(quick: bool) -> Self {
        Self { machine: machine::Machine::observe(), quick, rows: Vec::new(), failures: Vec::new() }
    }

    pub(crate) fn add(&mut self, rows: Vec<Row>) {
        self.rows.extend(rows);
    }

    /// A benchmark that gave no figures, and why.
    pub(crate) fn fail(&mut self, benchmark: &str, why: &str) {
        eprintln!("bench: {benchmark}: {why}");
        self.failures.push((benchmark.to_owned(), why.to_owned()));
    }

    pub(crate) fn is_complete(&self) -> bool {
        self.failures.is_empty()
    }

    pub(crate) fn table(&self) -> String {
        let mut table = Table::new();
        table
            .load_style(UTF8_FULL_CONDENSED)
            .set_content_arrangement(ContentArrangement::Dynamic)
            .set_header(["benchmark", "figure", "ours", "reference", "ratio", "goal", "verdict"]);
        if !table.is_tty() {
            table.set_width(140);
        }
        for row in &self.rows {
            table.add_row(row.cells());
        }
        let mut lines = vec![table.to_string()];
        for row in self.rows.iter().filter(|row| !row.note.is_empty()) {
            lines.push(format!("{}, {}: {}", row.benchmark, row.figure, row.note));
        }
        for (benchmark, why) in &self.failures {
            lines.push(format!("{benchmark} was not measured: {why}"));
        }
        if self.quick {
            lines.push("--quick: few rounds; the figures decide nothing".to_owned());
        }
        lines.push(self.machine.line());
        lines.join("\n")
    }

    pub(crate) fn json(&self) -> String {
        let failed: Vec<Value> = self
            .failures
            .iter()
            .map(|(benchmark, why)| json!({ "benchmark": benchmark, "why": why }))
            .collect();
        let rows: Vec<Value> = self.rows.iter().map(Row::json).collect();
        json!({ "machine": self.machine.json(), "quick": self.quick, "rows": rows, "failed": failed })
            .to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cells(row: &Row) -> String {
        row.cells().join(" | ")
    }

    #[test]
    fn a_row_says_value_reference_ratio_goal_and_verdict() {
        let row = Row::new("ready_lag", "p50", Unit::Millis, 120.0)
            .at_most(150.0)
            .beside(2400.0, "the original's way");
        assert_eq!(
            cells(&row),
            "ready_lag | p50 | 120 ms | 2400 ms: the original's way | 0.050 | ≤ 150 ms | met"
        );
        assert!(cells(&row.clone().at_most(119.9)).ends_with("missed"));
    }

    #[test]
    fn what_is_not_there_is_a_dash_and_never_a_ratio_by_zero() {
        assert_eq!(
            cells(&Row::new("footprint", "threads", Unit::Count, 5.0)),
            "footprint | threads | 5 | – | – | – | –"
        );
        let row = Row::new("a", "b", Unit::Mebibytes, 1.0).beside(0.0, "none");
        assert_eq!(cells(&row), "a | b | 1.0 MiB | 0.0 MiB: none | – | – | –");
        assert_eq!(row.json().get("ratio"), Some(&Value::Null));
    }

    #[test]
    fn a_failed_benchmark_is_in_table_and_json() {
        let mut report = Report::new(true);
        report.fail("disk", "no space");
        assert!(!report.is_complete());
        assert!(report.table().contains("disk was not measured: no space"));
        let json: Value = serde_json::from_str(&report.json()).unwrap();
        assert_eq!(json.pointer("/failed/0/benchmark").and_then(Value::as_str), Some("disk"));
        assert_eq!(report.json().lines().count(), 1);
    }
}
