//! What keeps this host from renting its GPUs out, or will: checks with stable ids, one line each, and what to do. Observes
//! and judges; changes nothing. Called by the CLI's `doctor` and by the installation.
//!
//! ```text
//! observe (reads, all at once, each with a deadline) ─▶ Observed ─▶ check (pure) ─▶ Report
//! ```
//! Works before anything is installed, beside a running agent, and without root: what cannot be looked at is a warning
//! that says so, never a pass, and no failure either.
//!
//! A look may leave a thread in the kernel, and then its process does not end. Whoever somebody waits for has it made by
//! another process, through [`examine_apart`].

mod apart;
mod check;
pub mod explain;
mod observe;
mod observed;

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use qudata_agent_core::settings::Settings;
use serde::{Deserialize, Serialize, Serializer, ser::SerializeStruct};

pub use self::apart::examine_apart;

/// How long all checks together look at the host by default; judging takes no time.
pub const PATIENCE: Duration = Duration::from_millis(2500);

/// What one check came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// As it should be.
    Pass,
    /// GPUs can be rented, and something is worth a look; or it could not be looked at.
    Warn,
    /// This keeps GPUs, or one of them, from being rented.
    Fail,
}

/// One check of one thing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// The check; one of [`explain::ALL`], never changes.
    pub id: &'static str,
    /// What was checked, where there are several: the address of a GPU. Of a failed `iommu.enabled`: who has it off,
    /// `firmware` or `kernel`; none where that could not be seen.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub subject: Option<String>,
    /// What it came to.
    pub verdict: Verdict,
    /// What was seen, one sentence without a full stop.
    pub line: String,
    /// What to do next; always for a failure.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
}

/// All checks of one look at the host, in the order of [`explain::ALL`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// What was found: at least one for each check.
    pub findings: Vec<Finding>,
    /// How long it took.
    pub took: Duration,
}

/// Where and how long to look.
#[derive(Debug, Clone)]
pub struct Scope {
    /// The root of the host's files; `/` but in tests.
    pub root: PathBuf,
    /// For everything together. What has not answered by then is told as such.
    pub patience: Duration,
    /// The agent's socket, where it is not the one in [`Settings::vm_run_dir`].
    pub socket: Option<PathBuf>,
    /// How the settings came to be.
    pub settings: SettingsRead,
}

/// How the owner's settings were read.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum SettingsRead {
    /// They are what the agent would use.
    #[default]
    Understood,
    /// The agent would refuse them, for these reasons; defaults are looked at in their place.
    Refused(String),
    /// This user may not read them, for this reason; defaults are looked at in their place.
    Unreadable(String),
}

impl Default for Scope {
    fn default() -> Self {
        Self { root: "/".into(), patience: PATIENCE, socket: None, settings: SettingsRead::Understood }
    }
}

/// Makes all checks of the host that `settings` are for. Never fails: what cannot be looked at is a finding. Always comes
/// back; whether this process can end afterwards is another matter, see [`examine_apart`].
pub async fn examine(settings: &Settings, scope: &Scope) -> Report {
    let begun = Instant::now();
    let observed = observe::observe(settings, scope).await;
    Report { findings: check::check(&observed), took: begun.elapsed() }
}

impl Report {
    /// The worst of all.
    #[must_use]
    pub fn verdict(&self) -> Verdict {
        self.findings.iter().map(|finding| finding.verdict).max().unwrap_or(Verdict::Pass)
    }

    /// How many findings came to `verdict`.
    #[must_use]
    pub fn count(&self, verdict: Verdict) -> usize {
        self.findings.iter().filter(|finding| finding.verdict == verdict).count()
    }

    /// What to deal with first: the first failure, since later checks lean on earlier ones; without any the first
    /// warning that has a remedy.
    #[must_use]
    pub fn next(&self) -> Option<&Finding> {
        let first = |verdict| {
            self.findings.iter().find(move |finding| finding.verdict == verdict && finding.remedy.is_some())
        };
        first(Verdict::Fail).or_else(|| first(Verdict::Warn))
    }

    /// All findings of one check.
    pub fn of(&self, id: &str) -> impl Iterator<Item = &Finding> {
        self.findings.iter().filter(move |finding| finding.id == id)
    }
}

impl Serialize for Report {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut report = serializer.serialize_struct("Report", 7)?;
        report.serialize_field("verdict", &self.verdict())?;
        report.serialize_field("pass", &self.count(Verdict::Pass))?;
        report.serialize_field("warn", &self.count(Verdict::Warn))?;
        report.serialize_field("fail", &self.count(Verdict::Fail))?;
        report.serialize_field("next", &self.next().and_then(|finding| finding.remedy.as_deref()))?;
        report.serialize_field("took_ms", &self.took.as_millis())?;
        report.serialize_field("findings", &self.findings)?;
        report.end()
    }
}
