//! Whether KVM on this host really runs guest code. Owns the QEMU run that executes a tiny guest (`rom`);
//! called once at start by the agent, and by its doctor.
//!
//! `/dev/kvm` may exist, open and create machines, and still never execute a guest. So a guest is executed: through
//! real, protected and long mode with paging, a loop through memory, `cpuid` and one exception.

mod rom;

use std::{
    fs::OpenOptions,
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use qudata_host::command::{Tool, ToolError};

use crate::machine::Accel;

/// A working probe takes a tenth of a second, also under emulation. On a busy emulated server it took more than 5 s, and
/// an agent that gives up there does not start.
const DEADLINE: Duration = Duration::from_secs(30);
/// The processor model that machines get, without nested virtualisation (see `argv`).
const KVM_CPU: &str = "host,-vmx,-svm";
const SETTING: &str = "QUDATA_ACCEL=tcg runs without KVM (slow, for tests)";

/// The verdict.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KvmProbe {
    /// Guest instructions were executed and gave the right results.
    Usable,
    /// There is no `/dev/kvm`.
    NoDevice,
    /// This user may not open `/dev/kvm`.
    NotPermitted,
    /// The device is there and guests do not run.
    Broken {
        /// What was seen, as a sentence.
        reason: String,
        /// The end of what QEMU printed; may be empty.
        output: String,
    },
}

/// The probe itself could not be made; nothing is known about KVM.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// The ROM could not be written.
    #[error("cannot write the probe's ROM to {}", path.display())]
    Rom {
        /// Where to.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// QEMU could not be started or its output not read.
    #[error("cannot run the KVM probe")]
    Run(#[source] ToolError),
}

impl KvmProbe {
    /// Tries `/dev/kvm` with this QEMU, on the processor model that machines get. The ROM is written into `scratch`, a
    /// directory of the caller, and removed again.
    ///
    /// # Errors
    /// [`ProbeError`] when no verdict could be reached.
    pub async fn run(qemu: &Path, scratch: &Path) -> Result<Self, ProbeError> {
        match OpenOptions::new().read(true).write(true).open("/dev/kvm") {
            Ok(_) => run_guest(qemu, scratch, Accel::Kvm).await,
            Err(error) => Ok(match error.kind() {
                io::ErrorKind::NotFound => Self::NoDevice,
                io::ErrorKind::PermissionDenied => Self::NotPermitted,
                // ENXIO, ENODEV: a node without a driver behind it.
                _ => Self::Broken {
                    reason: format!("/dev/kvm cannot be opened: {error}"),
                    output: String::new(),
                },
            }),
        }
    }

    /// Whether machines can be run.
    #[must_use]
    pub fn is_usable(&self) -> bool {
        *self == Self::Usable
    }
}

impl std::fmt::Display for KvmProbe {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Usable => f.write_str("KVM runs guests"),
            Self::NoDevice => write!(
                f,
                "there is no /dev/kvm: turn on virtualisation in the firmware and load kvm_intel or kvm_amd; {SETTING}"
            ),
            Self::NotPermitted => write!(
                f,
                "this user may not open /dev/kvm: run as root or add the user to the group that owns it; {SETTING}"
            ),
            Self::Broken { reason, output } if output.is_empty() => {
                write!(f, "/dev/kvm is there but does not run guests: {reason}; {SETTING}")
            }
            Self::Broken { reason, output } => {
                write!(f, "/dev/kvm is there but does not run guests: {reason} ({output}); {SETTING}")
            }
        }
    }
}

async fn run_guest(qemu: &Path, scratch: &Path, accel: Accel) -> Result<KvmProbe, ProbeError> {
    let path = scratch.join(format!("kvm-probe-{}.rom", std::process::id()));
    let written = qudata_host::durable::replace(&path, &rom::image(), 0o600);
    written.map_err(|error| ProbeError::Rom { path: error.path, source: error.source })?;
    let result = probe_run(qemu, &path, accel).run().await;
    let _ = qudata_host::durable::remove_file(&path);
    judge(result.map(drop))
}

fn probe_run(qemu: &Path, rom: &Path, accel: Accel) -> Tool {
    let (name, cpu) = match accel {
        Accel::Kvm => ("kvm", KVM_CPU),
        Accel::Tcg => ("tcg", "max"),
    };
    Tool::new(qemu)
        .args(["-M", "q35", "-accel", name, "-cpu", cpu, "-m", "16"])
        // A processor that faults three times over is reset; without this it would try again until the deadline.
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
        .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=4"])
        .arg("-bios")
        .arg(rom)
        .deadline(DEADLINE)
}

fn judge(result: Result<(), ToolError>) -> Result<KvmProbe, ProbeError> {
    let broken = |reason: String, output: String| Ok(KvmProbe::Broken { reason, output });
    match result {
        Err(ToolError::Failed { code: Some(rom::EXIT_USABLE), .. }) => Ok(KvmProbe::Usable),
        Err(ToolError::Failed { code: Some(rom::EXIT_MISCALCULATED), stderr, .. }) => {
            broken("the guest ran and calculated wrongly".to_owned(), stderr)
        }
        Err(ToolError::Failed { status, stderr, .. }) => broken(format!("QEMU ended with {status}"), stderr),
        Err(ToolError::TimedOut { after, .. }) => {
            broken(format!("the guest did not get anywhere within {after:?}"), String::new())
        }
        Ok(()) => broken("the guest's processor was reset instead of answering".to_owned(), String::new()),
        Err(error @ (ToolError::Start { .. } | ToolError::Output { .. })) => Err(ProbeError::Run(error)),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    const QEMU: &str = "/usr/bin/qemu-system-x86_64";

    fn failed(code: i32, stderr: &str) -> Result<(), ToolError> {
        Err(ToolError::Failed {
            command: "qemu".to_owned(),
            status: format!("exit status: {code}"),
            code: Some(code),
            stderr: stderr.to_owned(),
        })
    }

    #[tokio::test]
    async fn the_rom_runs_to_its_end_where_guests_run() {
        let dir = tempfile::tempdir().unwrap();
        let probe = run_guest(Path::new(QEMU), dir.path(), Accel::Tcg).await.unwrap();
        assert_eq!(probe, KvmProbe::Usable);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "the ROM is taken away again");
    }

    #[tokio::test]
    async fn a_guest_that_goes_nowhere_or_dies_is_broken() {
        let dir = tempfile::tempdir().unwrap();
        let rom = dir.path().join("halts.rom");
        std::fs::write(&rom, vec![0xf4; 64 << 10]).unwrap();
        let run =
            probe_run(Path::new(QEMU), &rom, Accel::Tcg).deadline(Duration::from_millis(300)).run().await;
        let probe = judge(run.map(drop)).unwrap();
        assert!(matches!(&probe, KvmProbe::Broken { reason, .. } if reason.contains("300ms")), "{probe:?}");

        // ud2 without any interrupt table: the processor gives up at once.
        std::fs::write(
            &rom,
            [0x0f, 0x01, 0x1e, 0x00, 0x80, 0x0f, 0x0b].repeat((64 << 10) / 7 + 1).get(..64 << 10).unwrap(),
        )
        .unwrap();
        let probe = judge(probe_run(Path::new(QEMU), &rom, Accel::Tcg).run().await.map(drop)).unwrap();
        assert!(matches!(&probe, KvmProbe::Broken { reason, .. } if reason.contains("reset")), "{probe:?}");
    }

    // Every machine that runs this has another /dev/kvm, so only what must hold on all of them is asserted.
    #[tokio::test]
    async fn this_hosts_kvm_is_decided_in_time() {
        let dir = tempfile::tempdir().unwrap();
        let started = Instant::now();
        let probe = KvmProbe::run(Path::new(QEMU), dir.path()).await.unwrap();
        println!("{:?}: {probe}", started.elapsed());
        assert!(started.elapsed() < DEADLINE + Duration::from_secs(2));
        match &probe {
            KvmProbe::Broken { reason, .. } => assert!(!reason.is_empty()),
            KvmProbe::Usable | KvmProbe::NoDevice | KvmProbe::NotPermitted => {}
        }
        assert_eq!(probe.is_usable(), !probe.to_string().contains("QUDATA_ACCEL=tcg"), "{probe}");
    }

    #[test]
    fn verdicts() {
        assert_eq!(judge(failed(rom::EXIT_USABLE, "warning: …")).unwrap(), KvmProbe::Usable);
        let table = [
            (failed(rom::EXIT_MISCALCULATED, ""), "calculated wrongly"),
            (failed(1, "failed to initialize kvm: Permission denied"), "Permission denied"),
            (Ok(()), "reset"),
        ];
        for (result, expected) in table {
            let probe = judge(result).unwrap();
            assert!(matches!(probe, KvmProbe::Broken { .. }));
            assert!(probe.to_string().contains(expected), "{probe}");
        }
        let missing = ToolError::Start { program: "qemu".to_owned(), source: io::ErrorKind::NotFound.into() };
        assert!(matches!(judge(Err(missing)), Err(ProbeError::Run(_))), "no QEMU says nothing about KVM");
    }

    #[test]
    fn machines_run_on_the_processor_that_was_probed() {
        let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/qemu-uefi-kvm.args");
        let line = std::fs::read_to_string(golden).unwrap();
        assert!(line.contains(&format!("-cpu {KVM_CPU}\n")), "{line}");
    }
}
