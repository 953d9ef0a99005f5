//! What the original does on the host to start a VM, done again here step by step: the reference for the agent's own
//! work. Three runs of qemu-img one after the other, a copy of the UEFI variables, QEMU, and then a sleep of half a
//! second before each look at QMP. Called by `post_to_exec` and `get_under_create`.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use qudata_testkit::tool;
use tempfile::TempDir;

/// Its pause before each look whether QMP answers.
pub(crate) const QMP_PAUSE: Duration = Duration::from_millis(500);
/// For one program that should take milliseconds.
const DEADLINE: Duration = Duration::from_secs(30);
const VARIABLES: &str = "/usr/share/OVMF/OVMF_VARS_4M.fd";

/// How long one start took.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Start {
    /// From the order to the exec of QEMU.
    pub(crate) to_exec: Duration,
    /// From there to the first answer over QMP.
    pub(crate) to_qmp: Duration,
}

/// A QEMU that ends with this value.
#[derive(Debug)]
pub(crate) struct Qemu(Child);

impl Qemu {
    /// Starts it; `log` gets what it prints.
    pub(crate) fn start(command: &mut Command, log: &Path) -> Result<Self> {
        let log = fs::File::create(log).with_context(|| format!("creating {}", log.display()))?;
        let command = command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        Ok(Self(command.spawn().context("starting QEMU")?))
    }

    /// An error when it has ended.
    pub(crate) fn check(&mut self) -> Result<()> {
        match self.0.try_wait()? {
            Some(status) => bail!("QEMU ended with {status}"),
            None => Ok(()),
        }
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A place of its own for one reference VM, on the same disk as the agent's.
pub(crate) fn place() -> Result<TempDir> {
    tempfile::Builder::new().prefix("qudata-bench-").tempdir_in("/var/tmp").context("making a directory")
}

/// Starts one VM from `base` as the original does, and ends it again.
pub(crate) fn start_vm(base: &Path) -> Result<Start> {
    let place = place()?;
    let path = |name: &str| place.path().join(name);
    let (overlay, socket) = (path("disk.qcow2"), path("qmp.sock"));
    let start = Instant::now();
    make_overlay(base, &overlay, "1G")?;
    fs::copy(VARIABLES, path("vars.fd")).with_context(|| format!("copying {VARIABLES}"))?;
    let mut qemu = Qemu::start(&mut command(&overlay, &socket), &path("log"))?;
    let to_exec = start.elapsed();
    let exec = Instant::now();
    loop {
        thread::sleep(QMP_PAUSE);
        qemu.check()?;
        if greeted(&socket).is_ok() {
            return Ok(Start { to_exec, to_qmp: exec.elapsed() });
        }
        if exec.elapsed() > DEADLINE {
            bail!("QMP did not answer within {DEADLINE:?}");
        }
    }
}

/// Its three runs of qemu-img.
pub(crate) fn make_overlay(base: &Path, overlay: &Path, size: &str) -> Result<()> {
    let image = |arguments: &[&str]| {
        let mut command = Command::new("qemu-img");
        command.args(arguments);
        command
    };
    run(image(&["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"]).arg(base).arg(overlay))?;
    run(image(&["info", "--output=json"]).arg(overlay))?;
    run(image(&["resize", "-q"]).arg(overlay).arg(size))
}

/// Runs a program that must succeed.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    // Without the harness's reader threads and its polling: the time of this call is measured.
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("starting {command:?}"))?;
    if !output.status.success() {
        bail!("{command:?} ended with {}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

fn command(overlay: &Path, socket: &Path) -> Command {
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args(["-machine", "q35,accel=tcg", "-m", "256", "-nodefaults", "-display", "none", "-S"])
        .arg("-drive")
        .arg(format!("file={},if=virtio,format=qcow2,cache=none", overlay.display()))
        .arg("-qmp")
        .arg(format!("unix:{},server=on,wait=off", socket.display()));
    qemu
}

/// Says hello over QMP and waits for the answer.
fn greeted(socket: &Path) -> Result<()> {
    let stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(DEADLINE))?;
    let mut reader = BufReader::new(&stream);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    (&stream).write_all(b"{\"execute\":\"qmp_capabilities\"}\n")?;
    reader.read_line(&mut line)?;
    Ok(())
}

/// A key pair in a directory of its own, with which this process logs in to its guests.
#[derive(Debug)]
pub(crate) struct Keys {
    _place: TempDir,
    pub(crate) file: PathBuf,
    pub(crate) public: String,
}

impl Keys {
    pub(crate) fn make() -> Result<Self> {
        let place = place()?;
        let pair = qudata_testkit::ssh::KeyPair::make(place.path(), "bench");
        Ok(Self { _place: place, file: pair.file, public: pair.public })
    }

    /// The system's ssh client with the options the original gives it.
    pub(crate) fn ssh(&self, port: u16, remote: &str) -> Command {
        let mut ssh = Command::new("ssh");
        for option in [
            "BatchMode=yes",
            "ConnectTimeout=5",
            "StrictHostKeyChecking=no",
            "UserKnownHostsFile=/dev/null",
            "IdentitiesOnly=yes",
            "LogLevel=ERROR",
        ] {
            ssh.args(["-o", option]);
        }
        ssh.args(["-F", "none", "-p", &port.to_string(), "-i"])
            .arg(&self.file)
            .args(["root@127.0.0.1", remote]);
        ssh
    }

    /// Whether one run of ssh succeeds within `deadline`.
    pub(crate) fn logs_in(&self, port: u16, deadline: Duration) -> bool {
        tool::run(&mut self.ssh(port, "true"), deadline).is_ok_and(|output| output.status.success())
    }
}
