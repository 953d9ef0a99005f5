//! The installation, step by step. Owns the order of the steps, the lock, and what is kept for the run after a reboot.
//! Called by the CLI's `install`.
//!
//! Every step looks first and does what is missing, so that a run that was cut off anywhere is finished by the next one,
//! and a run on a finished host changes nothing.

mod leftovers;
mod reboot;
mod running;

use rustix::fs::{FlockOperation, flock};
use secrecy::{ExposeSecret, SecretString};

use crate::{
    error::{Code, SetupError},
    ledger::Ledger,
    observe::{self, Observed},
    outside::Means,
    places,
    plan::{self, Plan},
    progress::{self, Course, Event, Step},
    text,
    wish::Wish,
};

/// What an installation came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The host rents its GPUs out; whether this run changed anything.
    Ready {
        /// It did.
        changed: bool,
    },
    /// The host is being restarted; it goes on by itself.
    Rebooting,
}

/// What the CLI was asked.
#[derive(Debug)]
pub struct Job<'a> {
    /// The options; none with `--continue`: those that are kept.
    pub wish: Option<Wish>,
    /// The API key.
    pub key: Option<&'a SecretString>,
    /// Root runs this.
    pub root: bool,
}

/// What would be done, and what was seen. Changes nothing, writes nothing.
///
/// # Errors
/// When the host cannot be what is wished.
pub fn look(means: Means<'_>, job: &Job<'_>) -> Result<(Observed, Plan), SetupError> {
    let wish = match &job.wish {
        Some(wish) => wish.clone(),
        None => kept_wish(means)?,
    };
    let kept = Course::open(means)?.kept;
    let observed = observe::observe(means, &wish, job.key.map(|key| key.expose_secret()))?;
    let plan = plan::plan(&observed, &wish, (kept.tested.as_ref(), kept.image.as_deref()))?;
    Ok((observed, plan))
}

/// Installs.
///
/// # Errors
/// With what is in the way; what was done so far is in the list, and the same command goes on.
pub fn install(means: Means<'_>, job: &Job<'_>) -> Result<Outcome, SetupError> {
    if !job.root {
        return Err(not_root("install"));
    }
    // Before the first thing is written: what cannot be done leaves nothing behind, and options that are refused are not
    // those that the host goes on with after a restart.
    if let Some(wish) = &job.wish {
        let (observed, _) = look(means, job)?;
        running::check_key(means, &observed, wish.offline, running::key(means, job)?.as_ref())?;
    }
    let _lock = lock(means)?;
    let result = locked(means, job);
    if let Err(error) = &result {
        let next = text::next_command(error, means.files);
        let text = format!("failed: {error}{}. {} Next: {next}", error.causes(), error.remedy);
        progress::log_line(means, &text);
    }
    result
}

pub(crate) fn not_root(command: &str) -> SetupError {
    let what = "only root may change this host";
    SetupError::new(Code::NotRoot, what, "Run it as root.").next(format!("sudo qudata-agent {command}"))
}

fn locked(means: Means<'_>, job: &Job<'_>) -> Result<Outcome, SetupError> {
    let wish = match &job.wish {
        Some(wish) => wish.clone(),
        None => kept_wish(means)?,
    };
    keep_wish(means, &wish)?;
    let mut ledger = Ledger::open(means.files)?;
    // A removal that did not come to its end noted what the settings said; from now on they say it again.
    if ledger.manifest.noted.take().is_some() {
        ledger.save()?;
    }
    keep_before(means)?;
    let mut course = Course::open(means)?;
    progress::log_line(means, &format!("install {}: begins", env!("CARGO_PKG_VERSION")));
    let mut run = running::Run { means, job, wish: &wish, ledger: &mut ledger };
    course.step(Step::Preflight, |course| run.preflight(course))?;
    course.step(Step::Package, |course| run.package(course))?;
    // What an earlier removal kept; the package has it again.
    means.files.remove(places::PROGRAM)?;
    course.step(Step::Settings, |course| run.settings(course))?;
    course.step(Step::Boot, |course| run.boot(course))?;
    course.step(Step::Image, |course| run.image(course))?;
    let mut rebooting = false;
    course.step(Step::Reboot, |course| {
        let (end, going) = run.reboot(course)?;
        rebooting = going;
        Ok(end)
    })?;
    if rebooting {
        return Ok(Outcome::Rebooting);
    }
    course.step(Step::Selftest, |course| run.selftest(course))?;
    course.step(Step::Agent, |course| run.agent(course))?;
    course.step(Step::Verify, |course| run.verify(course))?;
    run.forget_continuation(&mut course)?;
    let changed = course.changed;
    course.show(&Event::Note(if changed { READY.into() } else { UNCHANGED.into() }));
    Ok(Outcome::Ready { changed })
}

const READY: &str =
    "This host is ready. `qudata-agent status` shows it, `qudata-agent uninstall` takes everything back.";
const UNCHANGED: &str = "Nothing had to be changed: this host is set up.";

/// Held for as long as the file is open.
pub(crate) fn lock(means: Means<'_>) -> Result<std::fs::File, SetupError> {
    let files = means.files;
    // The agent's unit gives these folders their modes again.
    for (dir, mode) in [("/var/lib/qudata", 0o711), (places::STATE, 0o700), ("/var/log/qudata", 0o750)] {
        files.make_dir(dir, mode)?;
    }
    let place = files.at(places::LOCK);
    let open = std::fs::OpenOptions::new().create(true).truncate(false).write(true).open(place);
    let file = open.map_err(|e| SetupError::file("open", places::LOCK, e))?;
    hold(&file).map_err(|cause| {
        let what = "another installation or removal runs on this host";
        let remedy = format!("Wait until it is done; {} shows how far it is.", places::LOG);
        SetupError::new(Code::Busy, what, remedy)
            .next(format!("tail -f {}", places::LOG))
            .because(std::io::Error::from(cause))
    })?;
    Ok(file)
}

/// A run that was ended a moment ago may still have it.
fn hold(file: &std::fs::File) -> Result<(), rustix::io::Errno> {
    let mut tries = 20;
    loop {
        match flock(file, FlockOperation::NonBlockingLockExclusive) {
            Err(rustix::io::Errno::WOULDBLOCK) if tries > 0 => tries -= 1,
            other => return other,
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
}

fn kept_wish(means: Means<'_>) -> Result<Wish, SetupError> {
    let nothing = || {
        let what = "there is no installation to go on with";
        SetupError::new(Code::NoPackage, what, "Begin one; it goes on by itself where it was cut off.")
    };
    let bytes = means.files.read(places::WISH)?.ok_or_else(nothing)?;
    serde_json::from_slice(&bytes).map_err(|cause| nothing().because(cause))
}

fn keep_wish(means: Means<'_>, wish: &Wish) -> Result<(), SetupError> {
    // The file of the package is gone after a reboot, and the package is installed by then.
    let kept = Wish { package: None, ..wish.clone() };
    let bytes = serde_json::to_vec_pretty(&kept).map_err(|e| SetupError::file("write", places::WISH, e))?;
    if means.files.read(places::WISH)?.as_deref() == Some(bytes.as_slice()) {
        return Ok(());
    }
    means.files.write(places::WISH, &bytes, means.files.mine(0o600))
}

/// What the host was like before the first change, for people and for comparing.
fn keep_before(means: Means<'_>) -> Result<(), SetupError> {
    if means.files.exists(places::BEFORE) {
        return Ok(());
    }
    let files = means.files;
    let before = serde_json::json!({
        "at": jiff::Timestamp::now().to_string(),
        "kernel_command_line": files.text("/proc/cmdline")?.unwrap_or_default().trim(),
        "packages": crate::packages::list(means)?,
        "etc_qudata": files.exists("/etc/qudata"),
    });
    let bytes =
        serde_json::to_vec_pretty(&before).map_err(|e| SetupError::file("write", places::BEFORE, e))?;
    files.write(places::BEFORE, &bytes, files.mine(0o600))
}
