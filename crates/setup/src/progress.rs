//! How far an installation has got: what is shown, the log, and the file that the next run reads. Called by `install` and
//! `uninstall`.

use std::{
    collections::BTreeSet,
    fmt::Write as _,
    fs::OpenOptions,
    io::Write as _,
    os::unix::fs::OpenOptionsExt,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};

use crate::{
    error::SetupError,
    outside::{Means, Tick},
    places,
};

/// A part of the installation. The names are for programs as well and stay.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// What is in the way.
    Preflight,
    /// The package.
    Package,
    /// Settings and key.
    Settings,
    /// Boot loader and udev.
    Boot,
    /// The base image.
    Image,
    /// The restart.
    Reboot,
    /// A VM with every GPU.
    Selftest,
    /// The agent's unit.
    Agent,
    /// Whether all of it works.
    Verify,
}

impl Step {
    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Preflight => "preflight",
            Self::Package => "package",
            Self::Settings => "settings",
            Self::Boot => "boot",
            Self::Image => "image",
            Self::Reboot => "reboot",
            Self::Selftest => "selftest",
            Self::Agent => "agent",
            Self::Verify => "verify",
        }
    }
}

/// How a step ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum End {
    /// It changed something.
    Done,
    /// Everything was so already.
    Already,
    /// It was left out, as asked.
    Skipped,
    /// It failed.
    Failed,
}

/// Something to show.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A step begins.
    Begins(&'static str),
    /// How far it is; true: enough further to be worth a line of its own.
    Tick(&'static str, Tick, bool),
    /// A step has ended, after so long.
    Ended(&'static str, End, Duration),
    /// A sentence about what was found or done.
    Note(String),
    /// Worth a look.
    Warning(String),
}

/// What was tried out, and worked.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tested {
    /// The package's version: another one is another test.
    pub version: String,
    /// Addresses of all GPUs that were for rent then: with another card in the host, an address may be another card's.
    pub chosen: BTreeSet<String>,
    /// Those of them that a VM had.
    pub gpus: BTreeSet<String>,
}

/// What is kept over a reboot.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Progress {
    /// How each step ended last.
    pub steps: Vec<(Step, End, String)>,
    /// The boot in which a reboot was found to be needed; the next one must have what it was for.
    pub reboot_wanted_in: Option<String>,
    /// What self-tests that passed were of; none: a new image was not tried yet.
    pub tested: Option<Tested>,
    /// Settings were written that a running agent has not read.
    pub restart_owed: bool,
    /// What the base image was built from, as asked.
    pub image: Option<String>,
}

/// Keeps and shows how far it is.
#[derive(Debug)]
pub struct Course<'a> {
    means: Means<'a>,
    /// What is kept.
    pub kept: Progress,
    /// Something was changed in this run.
    pub changed: bool,
}

impl<'a> Course<'a> {
    /// Goes on with what is kept. A file that cannot be read says nothing that cannot be found out again.
    ///
    /// # Errors
    /// When it cannot be looked at.
    pub fn open(means: Means<'a>) -> Result<Self, SetupError> {
        let kept = means.files.read(places::PROGRESS)?;
        let kept = kept.and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default();
        Ok(Self { means, kept, changed: false })
    }

    /// Does one step.
    ///
    /// # Errors
    /// What the step fails with.
    pub fn step(
        &mut self,
        step: Step,
        work: impl FnOnce(&mut Self) -> Result<End, SetupError>,
    ) -> Result<(), SetupError> {
        self.show(&Event::Begins(step.name()));
        let begun = Instant::now();
        let result = work(self);
        let end = *result.as_ref().unwrap_or(&End::Failed);
        self.changed |= end == End::Done && !matches!(step, Step::Preflight | Step::Verify);
        self.show(&Event::Ended(step.name(), end, begun.elapsed()));
        if end != End::Already || !self.kept.steps.iter().any(|(known, _, _)| *known == step) {
            self.kept.steps.retain(|(known, _, _)| *known != step);
            self.kept.steps.push((step, end, jiff::Timestamp::now().to_string()));
            let saved = self.save();
            return result.and(saved);
        }
        result.map(drop)
    }

    /// Puts it on disk.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn save(&self) -> Result<(), SetupError> {
        let bytes = serde_json::to_vec_pretty(&self.kept)
            .map_err(|e| SetupError::file("write", places::PROGRESS, e))?;
        self.means.files.write(places::PROGRESS, &bytes, self.means.files.mine(0o600))
    }

    /// Shows something and writes it down.
    pub fn show(&self, event: &Event) {
        self.means.person.tell(event);
        log(self.means, event);
    }

    /// Says something about what was found or done.
    pub fn note(&self, text: impl Into<String>) {
        self.show(&Event::Note(text.into()));
    }

    /// Says something that is worth a look.
    pub fn warn(&self, text: impl Into<String>) {
        self.show(&Event::Warning(text.into()));
    }
}

/// Writes an event to the log. A log that cannot be written stops nothing.
pub fn log(means: Means<'_>, event: &Event) {
    let line = match event {
        Event::Begins(step) => format!("{step}: begun"),
        Event::Tick(_, _, false) => return,
        Event::Tick(step, tick, true) => format!("{step}: {tick}"),
        Event::Ended(step, end, took) => {
            format!("{step}: {} after {:.1} s", word(*end), took.as_secs_f64())
        }
        Event::Note(text) => text.clone(),
        Event::Warning(text) => format!("warning: {text}"),
    };
    log_line(means, &line);
}

/// Writes a line to the log.
pub fn log_line(means: Means<'_>, line: &str) {
    let place = means.files.at(places::LOG);
    let Ok(mut file) = OpenOptions::new().create(true).append(true).mode(0o640).open(place) else { return };
    let mut text = String::new();
    // The time at the end: lines are looked for by how they begin.
    let _ = writeln!(text, "{line}  ({:.0})", jiff::Timestamp::now());
    let _ = file.write_all(text.as_bytes());
    // A power cut would leave zeroes in the place of lines that a person needs just then.
    let _ = means.files.settle(&file);
}

/// The word for how a step ended.
#[must_use]
pub fn word(end: End) -> &'static str {
    match end {
        End::Done => "done",
        End::Already => "nothing to do",
        End::Skipped => "left out",
        End::Failed => "failed",
    }
}
