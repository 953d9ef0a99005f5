//! One running server: QEMU with a fresh disk over the image, in emulation, and the way in. Called by `run`.
//!
//! ```text
//! Machine::boot ──▶ running ── reset_hard ──▶ running ── … ── end
//!                                (same disk)
//! ```
use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use qudata_testkit::tool;

use crate::remote::Remote;
use crate::shape::{Boot, L1};

/// A busy machine with two processors boots the server in half a minute to a minute.
const BOOT: Duration = Duration::from_secs(300);
const QUICK: Duration = Duration::from_secs(30);
/// A server whose sshd says nothing for so long does not run.
const SILENCE: Duration = Duration::from_secs(90);
/// UEFI of a fresh server, as Debian's package `ovmf` has it.
const FIRMWARE: &str = "/usr/share/OVMF/OVMF_CODE_4M.fd";
const VARIABLES: &str = "/usr/share/OVMF/OVMF_VARS_4M.fd";
/// What the server writes to its serial console.
const CONSOLE: &str = "console.log";

/// A thread for each processor of the server, which has one where it can. With several, QEMU (7.2 and 10.0) now and then
/// delivers an interrupt to the server's kernel in the instruction after `vmrun`, where the global interrupt flag forbids it
/// and the segment base is still the guest's: the kernel faults until its stack is full, or just stops. Two guests that
/// boot in a loop bring that about in one to four minutes. With one thread for several processors that does not happen,
/// but each change of the processor may inject a guest's last interrupt once more, and the guest hangs.
const ACCELERATOR: &str = "tcg,thread=multi";

/// Where the parts of a server lie.
#[derive(Debug)]
pub(crate) struct Parts {
    /// A directory of its own.
    pub(crate) dir: PathBuf,
    /// Disk image of the lab's server, with `.vmlinuz` and `.initrd` beside it.
    pub(crate) image: PathBuf,
    /// Disk image of a fresh server, where scenarios need one.
    pub(crate) fresh: Option<PathBuf>,
    /// The disk with what the run brings.
    pub(crate) kit: PathBuf,
    /// Whether the server outlives the lab.
    pub(crate) keep: bool,
}

/// A server that runs.
#[derive(Debug)]
pub(crate) struct Machine {
    pub(crate) shape: L1,
    pub(crate) remote: Remote,
    /// From the start of QEMU to the first login.
    pub(crate) boot: Duration,
    qemu: Child,
    dir: PathBuf,
}

impl Machine {
    /// Starts a server of this shape with a fresh disk and waits until somebody can log in.
    pub(crate) fn boot(shape: &L1, parts: &Parts) -> Result<Self> {
        let started = Instant::now();
        overlay(shape, parts)?;
        let port = free_port()?;
        let log = std::fs::File::create(parts.dir.join("qemu.log")).context("cannot create QEMU's log")?;
        // What an earlier server said last is not this one's word.
        let _ = std::fs::remove_file(parts.dir.join(CONSOLE));
        let qemu = qemu(shape, parts, port)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("cannot start qemu-system-x86_64")?;
        let remote = Remote::new(&parts.dir, port);
        let mut machine =
            Self { shape: shape.clone(), remote, boot: Duration::ZERO, qemu, dir: parts.dir.clone() };
        if let Err(error) = machine.connect() {
            // Its disk is the next one's.
            machine.end()?;
            return Err(error);
        }
        machine.boot = started.elapsed();
        Ok(machine)
    }

    /// Whether its kernel has died, or does nothing any more: what then failed says nothing.
    pub(crate) fn is_dead(&self) -> bool {
        panic_line(&self.dir).is_some() || !self.remote.is_greeted(SILENCE)
    }

    fn connect(&mut self) -> Result<()> {
        let (qemu, dir) = (&mut self.qemu, &self.dir);
        self.remote.connect(BOOT, || match qemu.try_wait()? {
            None => match panic_line(dir) {
                None => Ok(()),
                Some(line) => bail!("the server does not boot: {line}"),
            },
            Some(status) => {
                let log = std::fs::read_to_string(dir.join("qemu.log")).unwrap_or_default();
                bail!("QEMU of the server ended with {status}: {}", log.trim())
            }
        })
    }

    /// Resets the server as a power failure would: nothing is written, nobody is asked. Waits until it is back.
    pub(crate) fn reset_hard(&mut self) -> Result<()> {
        let before = self.boot_id()?;
        // The answer never comes.
        let _ = self
            .remote
            .run("echo 1 >/proc/sys/kernel/sysrq; echo b >/proc/sysrq-trigger", Duration::from_secs(5));
        self.connect()?;
        if self.boot_id()? == before {
            bail!("the server was told to reset and runs on");
        }
        Ok(())
    }

    /// Waits until the server has restarted by itself: its boot id is another than `before`.
    pub(crate) fn await_reboot(&mut self, before: &str, within: Duration) -> Result<()> {
        let until = Instant::now() + within;
        loop {
            // A connection of before the restart answers no more; a new one is made.
            if let Ok(now) = self.boot_id()
                && now != before
            {
                return Ok(());
            }
            if Instant::now() > until {
                bail!("the server did not restart by itself within {} s", within.as_secs());
            }
            std::thread::sleep(Duration::from_secs(1));
            if self.boot_id().is_err() {
                self.connect()?;
            }
        }
    }

    /// Which boot this is.
    pub(crate) fn boot_id(&self) -> Result<String> {
        self.remote.must("cat /proc/sys/kernel/random/boot_id", QUICK)
    }

    /// PCI addresses of the devices in a slot, bridges left out, in order.
    pub(crate) fn addresses(&self, slot: &str) -> Result<Vec<String>> {
        let port = self.shape.port_of(slot).with_context(|| format!("this server has no slot {slot:?}"))?;
        let script = format!(
            "for d in /sys/bus/pci/devices/{port}/*:*:*.* /sys/bus/pci/devices/{port}/*:*:*.*/*:*:*.*; do \
             [ -e $d/class ] || continue; case $(cat $d/class) in 0x0604*) ;; *) basename $d ;; esac; done | sort"
        );
        let found: Vec<String> = self.remote.must(&script, QUICK)?.lines().map(str::to_owned).collect();
        if found.is_empty() {
            bail!("the server sees nothing in slot {slot:?} (root port {port})");
        }
        Ok(found)
    }

    /// Ends it.
    pub(crate) fn end(mut self) -> Result<()> {
        self.remote.disconnect();
        self.qemu.kill().context("cannot end QEMU")?;
        self.qemu.wait().context("cannot wait for QEMU")?;
        Ok(())
    }

    /// Its process.
    pub(crate) fn pid(&self) -> u32 {
        self.qemu.id()
    }
}

/// The last words of a kernel that died.
fn panic_line(dir: &Path) -> Option<String> {
    let console = std::fs::read(dir.join(CONSOLE)).ok()?;
    let console = String::from_utf8_lossy(&console);
    console.lines().find(|line| line.contains("Kernel panic")).map(str::to_owned)
}

fn overlay(shape: &L1, parts: &Parts) -> Result<()> {
    let mut create = Command::new("qemu-img");
    create.args(["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"]);
    match shape.boot {
        Boot::Direct => create.arg(&parts.image),
        Boot::Fresh => {
            // Where the firmware remembers what it boots.
            std::fs::copy(VARIABLES, parts.dir.join("vars.fd"))
                .with_context(|| format!("cannot copy {VARIABLES}"))?;
            create.arg(parts.fresh.as_ref().context("there is no image of a fresh server")?)
        }
    };
    create.arg(parts.dir.join("disk.qcow2"));
    let done = tool::run(&mut create, QUICK).context("cannot run qemu-img")?;
    if !done.status.success() {
        bail!("qemu-img failed: {}", done.stderr.trim());
    }
    Ok(())
}

/// A port that was free a moment ago; QEMU says so when it is no longer.
fn free_port() -> Result<u16> {
    let listener = TcpListener::bind("127.0.0.1:0").context("no free TCP port")?;
    Ok(listener.local_addr()?.port())
}

fn qemu(shape: &L1, parts: &Parts, port: u16) -> Command {
    let text = |path: &Path| path.display().to_string();
    let mut command = if parts.keep {
        // Ctrl-C is for the lab.
        let mut qemu = Command::new("qemu-system-x86_64");
        qemu.process_group(0);
        qemu
    } else {
        // No server outlives a lab that was killed.
        let mut setpriv = Command::new("setpriv");
        setpriv.args(["--pdeathsig", "KILL", "--", "qemu-system-x86_64"]);
        setpriv
    };
    command.args(["-accel", ACCELERATOR]).args(shape.arguments());
    match shape.boot {
        Boot::Direct => {
            command.args(["-kernel", &text(&parts.image.with_extension("vmlinuz"))]);
            command.args(["-initrd", &text(&parts.image.with_extension("initrd"))]);
            command.args(["-append", &shape.command_line()]);
        }
        Boot::Fresh => {
            command.args(["-drive", &format!("if=pflash,unit=0,format=raw,readonly=on,file={FIRMWARE}")]);
            let vars = text(&parts.dir.join("vars.fd"));
            command.args(["-drive", &format!("if=pflash,unit=1,format=raw,file={vars}")]);
        }
    }
    // The disk is thrown away; QEMU outlives a reset of the server, so nothing the server has written is lost.
    command.args([
        "-drive",
        &format!("file={},format=qcow2,if=none,id=disk,cache=unsafe", text(&parts.dir.join("disk.qcow2"))),
    ]);
    // A kernel that is handed over has that place already.
    let first = if shape.boot == Boot::Fresh { ",bootindex=0" } else { "" };
    command.args(["-device", &format!("virtio-blk-pci,bus=pcie.0,drive=disk{first}")]);
    command.args(["-drive", &format!("file={},format=raw,if=none,id=kit,read-only=on", text(&parts.kit))]);
    command.args(["-device", "virtio-blk-pci,bus=pcie.0,drive=kit"]);
    command.args(["-netdev", &format!("user,id=net,hostfwd=tcp:127.0.0.1:{port}-:22")]);
    command.args(["-device", "virtio-net-pci,bus=pcie.0,netdev=net", "-device", "virtio-rng-pci,bus=pcie.0"]);
    command.args(["-vga", "none", "-display", "none", "-monitor", "none"]);
    command.args(["-serial", &format!("file:{}", text(&parts.dir.join(CONSOLE)))]);
    command
}
