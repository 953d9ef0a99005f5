//! Judges what was seen. Pure: the same `Observed` always gives the same findings. Called by [`crate::examine`].
//!
//! A check whose ground is missing (no QEMU to try KVM with) warns that it was not made; the check that is about the
//! ground fails. So every failure is a cause and has its remedy.

mod gpus;
mod image;
mod iommu;
mod outside;
mod processor;
mod resources;
mod software;
mod system;

#[cfg(test)]
pub(crate) mod made_up;
#[cfg(test)]
mod tests;

use crate::{
    Finding, SettingsRead, Verdict, explain,
    observed::{Observed, Unseen},
};

/// All findings, in the order of [`explain::ALL`].
pub(crate) fn check(seen: &Observed) -> Vec<Finding> {
    let mut findings = vec![settings(seen)];
    findings.extend(processor::check(seen));
    findings.extend(iommu::check(seen));
    findings.extend(gpus::check(seen));
    findings.extend(system::check(seen));
    findings.extend(resources::check(seen));
    findings.extend(software::check(seen));
    findings.push(image::check(seen));
    findings.extend(outside::check(seen));
    let place = |id: &str| explain::ALL.iter().position(|check| check.id == id);
    findings.sort_by_key(|finding| place(finding.id));
    findings
}

fn settings(seen: &Observed) -> Finding {
    const ID: &str = "settings";
    match &seen.settings_read {
        SettingsRead::Understood => pass(ID, "the settings are understood"),
        SettingsRead::Unreadable(why) => {
            unseen(ID, &Unseen::Denied(format!("{why}; defaults are assumed below")))
        }
        SettingsRead::Refused(why) => fail(
            ID,
            format!("the agent would not start; defaults are assumed below: {why}"),
            "correct it; `qudata-agent settings` lists what is allowed",
        ),
    }
}

fn finding(id: &'static str, verdict: Verdict, line: impl Into<String>) -> Finding {
    Finding { id, subject: None, verdict, line: line.into(), remedy: None }
}

fn pass(id: &'static str, line: impl Into<String>) -> Finding {
    finding(id, Verdict::Pass, line)
}

fn warn(id: &'static str, line: impl Into<String>, remedy: impl Into<String>) -> Finding {
    Finding { remedy: Some(remedy.into()), ..finding(id, Verdict::Warn, line) }
}

fn fail(id: &'static str, line: impl Into<String>, remedy: impl Into<String>) -> Finding {
    Finding { remedy: Some(remedy.into()), ..finding(id, Verdict::Fail, line) }
}

/// What could not be looked at.
pub(crate) fn unseen(id: &'static str, why: &Unseen) -> Finding {
    let line = format!("not looked at: {why}");
    match why {
        Unseen::Denied(_) => warn(id, line, "run it as root: `sudo qudata-agent doctor`"),
        Unseen::Late(_) => warn(id, line, "look again; if it stays so, something hangs: see `dmesg`"),
        // Another finding tells of it.
        Unseen::Needs(_) => finding(id, Verdict::Warn, line),
        Unseen::Failed(_) => warn(id, line, "do what the message says and look again"),
    }
}

impl Finding {
    fn on(self, subject: impl ToString) -> Self {
        Self { subject: Some(subject.to_string()), ..self }
    }
}
