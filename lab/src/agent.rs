//! The agent on the server: installed under systemd, spoken to through its own command line. Called by scenarios.
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use qudata_testkit::leakcheck::Snapshot;
use serde_json::Value;

use crate::machine::Machine;
use crate::remote::quoted;

/// An emulated processor needs seconds for what takes milliseconds elsewhere.
const QUICK: Duration = Duration::from_secs(60);
const START: Duration = Duration::from_secs(90);
/// Idle threads and closing connections end by themselves within this time.
const SETTLE: Duration = Duration::from_secs(45);
const IDLE_THREADS: usize = 16;

/// Settings of every agent of the lab; a scenario adds to them. The guest takes minutes to boot here.
const SETTINGS: &str = "accel = \"kvm\"\nfirmware = \"direct\"\nready_timeout = 900\ncpu_overcommit = 4\n";

/// Puts agent, units and the tenant's key in place. Starts nothing.
pub(crate) fn install(machine: &Machine) -> Result<()> {
    let script = "set -e
install -m 755 /lab/qudata-agent /usr/bin/qudata-agent
install -m 644 -t /usr/lib/systemd/system /lab/packaging/systemd/*
install -m 644 -t /usr/lib/sysusers.d /lab/packaging/sysusers.d/*
install -m 644 -t /usr/lib/tmpfiles.d /lab/packaging/tmpfiles.d/*
systemd-sysusers
systemd-tmpfiles --create /usr/lib/tmpfiles.d/qudata.conf
install -d -m 700 /root/.ssh
install -m 600 /lab/tenant /root/.ssh/id_ed25519
install -m 644 /lab/tenant.pub /root/.ssh/id_ed25519.pub
modprobe -a kvm_amd vfio-pci
printf 'kvm_amd\\nvfio-pci\\n' >/etc/modules-load.d/lab.conf
systemctl daemon-reload
systemctl enable --quiet qudata-agent.service";
    machine.remote.must(script, QUICK).context("installing the agent")?;
    Ok(())
}

/// Which guest the instances get.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Guest {
    /// The development image as it is, with cloud-init: what a renter gets.
    Full,
    /// The same disk and kernel with a process 1 of the lab: up in a quarter of the time.
    Quick,
}

/// What `start` is told.
#[derive(Debug, Clone)]
pub(crate) struct Setting {
    pub(crate) guest: Guest,
    /// Lines of the settings file.
    pub(crate) more: String,
}

impl Setting {
    /// Without GPUs.
    pub(crate) fn without_gpus(guest: Guest) -> Self {
        Self { guest, more: "standalone = true\ndebug = true\n".to_owned() }
    }

    /// With these GPUs for rent.
    pub(crate) fn with_gpus(guest: Guest, addresses: &[String]) -> Self {
        let list: Vec<String> = addresses.iter().map(|address| format!("{address:?}")).collect();
        Self { guest, more: format!("standalone = true\ngpu_pci_addrs = [{}]\n", list.join(", ")) }
    }
}

/// Starts the agent with these settings, or starts it again with them, and waits until it answers.
pub(crate) fn start(machine: &Machine, setting: &Setting) -> Result<()> {
    let image = match setting.guest {
        Guest::Full => "guest",
        Guest::Quick => "quick",
    };
    // Synced: scenarios that cut the power shall find what an owner wrote long ago.
    let text = format!("{SETTINGS}base_image = \"/lab/images/{image}.qcow2\"\n{}", setting.more);
    let script = format!(
        "printf %s {} >/etc/qudata/agent.toml && sync && systemctl reset-failed qudata-agent; systemctl restart qudata-agent",
        quoted(&text)
    );
    machine.remote.must(&script, START).context("starting the agent")?;
    wait_until_it_answers(machine)
}

/// Waits until the API is open: recovery is done then. Not by `status`, which fails while a problem is reported.
pub(crate) fn wait_until_it_answers(machine: &Machine) -> Result<()> {
    let script = "for i in $(seq 120); do qudata-agent instance list --json >/dev/null 2>/tmp/lab-status && exit 0; sleep 0.5; done; cat /tmp/lab-status >&2; exit 1";
    machine.remote.must(script, START + QUICK).context("waiting for the agent").map(drop)
}

/// Its process id.
pub(crate) fn pid(machine: &Machine) -> Result<u32> {
    let text = machine.remote.must("systemctl show --value --property MainPID qudata-agent", QUICK)?;
    match text.trim().parse() {
        Ok(pid) if pid > 0 => Ok(pid),
        _ => bail!("the agent does not run"),
    }
}

/// SIGKILL; systemd starts it again. Waits until the next one answers.
pub(crate) fn kill(machine: &Machine) -> Result<()> {
    let old = pid(machine)?;
    machine.remote.must(&format!("kill -9 {old}"), QUICK)?;
    wait_for_the_next(machine, old)
}

/// Waits until systemd has started another agent than `old`, and that one answers.
pub(crate) fn wait_for_the_next(machine: &Machine, old: u32) -> Result<()> {
    let until = Instant::now() + START;
    while pid(machine).ok().is_none_or(|new| new == old) {
        if Instant::now() > until {
            bail!("systemd did not start the agent again within {} s", START.as_secs());
        }
        std::thread::sleep(Duration::from_millis(500));
    }
    wait_until_it_answers(machine)
}

/// One command of the product, which must succeed; its answer as JSON.
pub(crate) fn command(machine: &Machine, words: &[&str], within: Duration) -> Result<Value> {
    let text = machine.remote.must(&line(words), within)?;
    // Some commands have nothing to say.
    if text.trim().is_empty() {
        return Ok(Value::Null);
    }
    serde_json::from_str(&text).with_context(|| format!("`{}` answered no JSON: {text}", words.join(" ")))
}

/// One command of the product, which must be refused; what it said.
pub(crate) fn refused(machine: &Machine, words: &[&str]) -> Result<String> {
    let output = machine.remote.run(&line(words), QUICK)?;
    if output.status.success() {
        bail!("`{}` was accepted: {}", words.join(" "), output.stdout.trim());
    }
    Ok(output.stderr.trim().to_owned())
}

fn line(words: &[&str]) -> String {
    let words: Vec<String> = words.iter().map(|word| quoted(word)).collect();
    format!("qudata-agent --json {}", words.join(" "))
}

/// What is on the server before a story, to be compared after it.
#[derive(Debug)]
pub(crate) struct Baseline(Snapshot);

impl Baseline {
    /// Looks at the server. The agent must run.
    pub(crate) fn take(machine: &Machine) -> Result<Self> {
        look(machine).map(Self)
    }

    /// Nothing was left behind; things that end by themselves get some time.
    pub(crate) fn assert_clean(&self, machine: &Machine) -> Result<()> {
        let until = Instant::now() + SETTLE;
        loop {
            let leaks = look(machine)?.leaks_since(&self.0, IDLE_THREADS);
            if leaks.is_empty() {
                return Ok(());
            }
            if Instant::now() > until {
                let lines: Vec<String> = leaks.iter().map(ToString::to_string).collect();
                bail!("left behind:\n  {}", lines.join("\n  "));
            }
            std::thread::sleep(Duration::from_secs(1));
        }
    }
}

fn look(machine: &Machine) -> Result<Snapshot> {
    let text = machine.remote.must(&format!("/lab/qudata-lab-probe {}", pid(machine)?), QUICK)?;
    let value = serde_json::from_str(&text).context("the probe answered no JSON")?;
    Snapshot::from_json(&value).context("the probe answered no snapshot")
}
