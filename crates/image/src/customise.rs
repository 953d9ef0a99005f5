//! Changing an image by booting it once: what may be asked, the machine's files, and what counts as success. Called by
//! `build`.
//!
//! Success is: the script's last line came with this build's nonce, nothing followed it, the guest powered itself off, and
//! the disk passes qemu-img's check. An exit status alone proves nothing.

use std::{fs, path::Path, time::Duration};

use qudata_host::{capacity::HostCapacity, size::ByteSize};
use qudata_qemu::{
    disk::BaseImage,
    firmware::{self, Firmware},
    machine::Accel,
    probe::KvmProbe,
};

use crate::{
    boot::{Boot, Ended, boot},
    build::{Place, Start, make_disk, open_to_all},
    driver::{DriverPlan, DriverWish},
    error::BuildError,
    machine::{Machine, Pipes},
    memory::plan_memory,
    progress::Progress,
    report::Report,
    seed,
    space::{LITTLE, Room},
};

/// More helps nobody: a kernel module is compiled in parallel, packages are unpacked one by one.
const CPUS: u32 = 8;
/// Nothing at all from a machine for so long: it hangs. A slow one at least beats.
const SILENCE: Duration = Duration::from_secs(600);
const SILENCE_EMULATED: Duration = Duration::from_secs(1800);
/// Whatever it does, it does it no longer than this.
const LONGEST: Duration = Duration::from_secs(2 * 3600);
const LONGEST_EMULATED: Duration = Duration::from_secs(8 * 3600);

/// What is changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Customisation {
    /// NVIDIA driver.
    pub driver: DriverWish,
    /// Device ids of the NVIDIA GPUs that it must serve.
    pub gpus: Vec<u16>,
    /// Packages of the distribution.
    pub packages: Vec<String>,
    /// JupyterLab on port 8888.
    pub jupyter: bool,
    /// NVIDIA's container toolkit.
    pub container_toolkit: bool,
}

impl Default for Customisation {
    fn default() -> Self {
        Self {
            driver: DriverWish::Auto,
            gpus: Vec::new(),
            packages: Vec::new(),
            jupyter: false,
            container_toolkit: false,
        }
    }
}

/// Work inside the machine that did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum CustomiseError {
    /// A name that is no package.
    #[error("{name:?} is no name of a package: it has lower-case letters, digits, +, - and . only")]
    Package {
        /// What was given.
        name: String,
    },
    /// A step failed.
    #[error("the step {step} failed with status {status}; the last lines were:\n{}\nThe whole log is {log}", tail.join("\n"))]
    Step {
        /// Which.
        step: String,
        /// Exit status.
        status: String,
        /// The log's end.
        tail: Vec<String>,
        /// The log.
        log: String,
    },
    /// It ended before its end.
    #[error(
        "the machine {how} {}; the last lines were:\n{}\nThe whole log is {log}",
        step.as_ref().map_or_else(|| "before the first step: does the image have cloud-init?".to_owned(), |s| format!("in the step {s}")),
        tail.join("\n")
    )]
    Ended {
        /// What it did.
        how: String,
        /// The step that was begun last.
        step: Option<String>,
        /// The log's end.
        tail: Vec<String>,
        /// The log.
        log: String,
    },
}

/// The files of the build, and what the machine is made of.
#[derive(Debug)]
pub(crate) struct Work<'a> {
    pub(crate) place: &'a Place,
    /// The build's own folder.
    pub(crate) dir: &'a Path,
    pub(crate) source: &'a Path,
    pub(crate) image: BaseImage,
    /// Size that the new disk has.
    pub(crate) size: ByteSize,
    /// For firmware "direct".
    pub(crate) boot_files: Option<&'a Firmware>,
    pub(crate) nonce: &'a str,
}

/// A package's name, by Debian's policy; it goes into a shell script.
pub(crate) fn check_package(name: &str) -> Result<(), CustomiseError> {
    let good = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"+-.".contains(&b);
    let first = name.bytes().next().is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    if first && name.len() >= 2 && name.len() <= 100 && name.bytes().all(good) {
        return Ok(());
    }
    Err(CustomiseError::Package { name: name.chars().take(100).collect() })
}

/// Boots the image with the script and returns what it reported. The changed disk is `<dir>/work.qcow2`.
pub(crate) async fn customise(
    work: &Work<'_>,
    wish: &Customisation,
    driver: Option<&DriverPlan>,
    progress: &mut dyn FnMut(Progress),
) -> Result<Report, BuildError> {
    let place = work.place;
    let disk = work.dir.join("work.qcow2");
    make_disk(place, &disk, work.source, (work.image, work.size)).await?;
    let seed = work.dir.join("seed.iso");
    let script = seed::script(wish, driver, work.nonce);
    let image = seed::image(&script, work.nonce).map_err(BuildError::other("making the seed"))?;
    fs::write(&seed, image).map_err(BuildError::file("write", &seed))?;
    open_to_all(&seed)?;
    let firmware = choose_firmware(work)?;
    let accel = choose_accel(place, work.dir).await?;
    let emulated = accel == Accel::Tcg;
    progress(Progress::Booting { emulated });
    let host = HostCapacity::observe(work.dir).map_err(BuildError::other("reading the host's capacity"))?;
    let pipes = Pipes {
        console: work.dir.join("console.pipe"),
        log: work.dir.join("log.pipe"),
        report: work.dir.join("report.pipe"),
    };
    let machine = Machine {
        accel,
        firmware: &firmware,
        cpus: host.cpus.clamp(1, CPUS),
        // Once more: fetching takes minutes, in which others may have taken it.
        memory: plan_memory(host.memory_available, place.reserve_memory)?,
        disk: &disk,
        seed: &seed,
        pipes: &pipes,
    };
    let run = Boot {
        machine: &machine,
        place,
        silence: if emulated { SILENCE_EMULATED } else { SILENCE },
        longest: if emulated { LONGEST_EMULATED } else { LONGEST },
    };
    let steps = seed::steps(wish, driver);
    let ended = boot(&run, &mut |step| {
        let number = steps.iter().position(|s| *s == step).map_or(1, |at| at + 1);
        progress(Progress::Step { name: step.to_owned(), number, of: steps.len() });
    })
    .await
    .map_err(BuildError::Boot)?;
    match judge(&ended, work.nonce, &place.log) {
        Ok(()) => Ok(ended.report),
        // A full disk shows as anything inside; the cause is what has to be told.
        Err(error) => match Room::observe(place) {
            Ok(room) if room.is_used_up() => {
                Err(BuildError::NoRoom { needed: LITTLE, room, dir: place.image_dir.clone() })
            }
            _ => Err(BuildError::Customise(error)),
        },
    }
}

fn choose_firmware(work: &Work<'_>) -> Result<Firmware, BuildError> {
    match (&work.place.start, work.boot_files) {
        (Start::Uefi { code, vars: template }, _) => {
            let vars = work.dir.join("vars.fd");
            firmware::create_variables(template, &vars, work.place.owner())
                .map_err(BuildError::other("making the UEFI variables"))?;
            Ok(Firmware::Uefi { code: code.clone(), vars })
        }
        // Without them the build does not get here.
        (Start::Direct, Some(files)) => Ok(files.clone()),
        (Start::Direct, None) | (Start::Bios, _) => Ok(Firmware::Bios),
    }
}

async fn choose_accel(place: &Place, scratch: &Path) -> Result<Accel, BuildError> {
    if place.accel == Accel::Tcg {
        return Ok(Accel::Tcg);
    }
    let probe = KvmProbe::run(&place.qemu, scratch).await.map_err(BuildError::other("probing KVM"))?;
    Ok(if probe.is_usable() { Accel::Kvm } else { Accel::Tcg })
}

/// Whether the run proves that everything was done.
fn judge(ended: &Ended, nonce: &str, log: &Path) -> Result<(), CustomiseError> {
    let log = log.display().to_string();
    let report = &ended.report;
    if let Some((step, status)) = &report.failed {
        return Err(CustomiseError::Step {
            step: step.clone(),
            status: status.clone(),
            tail: ended.tail.clone(),
            log,
        });
    }
    let how = match (&ended.ill, report.done.as_deref()) {
        (Some(ill), _) => ill.clone(),
        (None, Some(said)) if said == nonce && !report.after_done => return Ok(()),
        (None, Some(_)) => {
            "was not switched off after its end, or is not the one that was started".to_owned()
        }
        (None, None) => "was switched off".to_owned(),
    };
    Err(CustomiseError::Ended { how, step: report.step.clone(), tail: ended.tail.clone(), log })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ended(said: &str, ill: Option<&str>) -> Ended {
        let mut report = Report::default();
        report.add(said.as_bytes());
        Ended { report, ill: ill.map(str::to_owned), tail: vec!["E: no such package".to_owned()] }
    }

    #[test]
    fn only_the_whole_story_is_success() {
        let judged = |said: &str, ill| judge(&ended(said, ill), "abc", Path::new("/log"));
        assert!(judged("step packages\ndone abc\n", None).is_ok());
        assert!(judged("step packages\ndone abc\nalive\n", None).is_ok());
        for (said, ill, expected) in [
            ("step packages\n", None, "switched off in the step packages"),
            ("", None, "before the first step"),
            ("done abd\n", None, "not the one that was started"),
            ("done abc\nstep packages\n", None, "not switched off after its end"),
            ("done abc\n", Some("was killed by signal 9"), "signal 9"),
            ("step driver\nfailed driver 100\n", None, "the step driver failed with status 100"),
            ("done abc", None, "switched off"),
        ] {
            let text = judged(said, ill).unwrap_err().to_string();
            assert!(text.contains(expected) && text.contains("E: no such package"), "{said:?}: {text}");
        }
    }

    #[test]
    fn packages_are_names_and_nothing_else() {
        for name in ["htop", "g++", "libc6.1-dev", "7zip"] {
            assert!(check_package(name).is_ok(), "{name}");
        }
        for name in ["", "a", "-y", "a b", "a;reboot", "a'", "A1", "a$(id)", "a/b", "a=1"] {
            assert!(check_package(name).is_err(), "{name}");
        }
    }
}
