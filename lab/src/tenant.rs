//! One instance on the server, ordered and used as a renter would. Called by scenarios.
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::agent;
use crate::machine::Machine;
use crate::remote::quoted;

/// A guest boots in half a minute to two minutes here, the full one on a busy machine in four.
const READY: Duration = Duration::from_secs(600);
const CREATE: Duration = Duration::from_secs(60);
const DELETE: Duration = Duration::from_secs(180);
const QUICK: Duration = Duration::from_secs(60);
/// What a script inside may take: a login alone takes seconds there, and a script may wait for what never answers.
const INSIDE: Duration = Duration::from_secs(240);
const LOOK: Duration = Duration::from_secs(2);

/// What is ordered beside the size, which is the same for all: as small as the guest runs in.
#[derive(Debug, Clone, Default)]
pub(crate) struct Order<'a> {
    pub(crate) name: &'a str,
    pub(crate) gpus: Option<u32>,
    pub(crate) gpu_addrs: &'a [String],
    pub(crate) tunnel_token: Option<&'a str>,
}

/// An instance of the server.
#[derive(Debug)]
pub(crate) struct Tenant<'a> {
    machine: &'a Machine,
    pub(crate) name: String,
}

impl<'a> Tenant<'a> {
    /// Orders it and does not wait for it.
    pub(crate) fn order(machine: &'a Machine, order: &Order<'_>) -> Result<Self> {
        let words = words(order);
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        agent::command(machine, &words, CREATE).with_context(|| format!("ordering {}", order.name))?;
        Ok(Self { machine, name: order.name.to_owned() })
    }

    /// An instance that is known by its name alone, as after a reset of the server.
    pub(crate) fn known(machine: &'a Machine, name: &str) -> Self {
        Self { machine, name: name.to_owned() }
    }

    /// Orders it, expects a refusal, returns what was said.
    pub(crate) fn refused(machine: &Machine, order: &Order<'_>) -> Result<String> {
        let words = words(order);
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        agent::refused(machine, &words)
    }

    /// As the API shows it now.
    pub(crate) fn view(&self) -> Result<Value> {
        agent::command(self.machine, &["instance", "show", &self.name], QUICK)
    }

    /// Its precise state.
    pub(crate) fn state(&self) -> Result<String> {
        let view = self.view()?;
        Ok(view.get("state").and_then(Value::as_str).unwrap_or_default().to_owned())
    }

    /// Waits until it runs and somebody was able to log in; how long that took.
    pub(crate) fn wait_until_ready(&self) -> Result<Duration> {
        let started = Instant::now();
        self.wait_for("running", READY)?;
        Ok(started.elapsed())
    }

    /// Waits for a state; a failed instance ends the wait with its reason and the end of its console.
    pub(crate) fn wait_for(&self, wanted: &str, within: Duration) -> Result<()> {
        let until = Instant::now() + within;
        loop {
            let view = self.view()?;
            let state = view.get("state").and_then(Value::as_str).unwrap_or_default();
            if state == wanted {
                return Ok(());
            }
            if state == "failed" || Instant::now() > until {
                let console = self.machine.remote.run(&self.line("console", &["--tail", "1500"]), QUICK);
                let console = console.map(|output| output.stdout).unwrap_or_default();
                bail!("{} is {state} and not {wanted}: {view}\nits console ends:\n{console}", self.name);
            }
            std::thread::sleep(LOOK);
        }
    }

    /// A command inside the guest, by the product's own ssh; its output.
    pub(crate) fn inside(&self, script: &str) -> Result<String> {
        let line = format!("qudata-agent instance ssh {} -- {}", quoted(&self.name), quoted(script));
        self.machine.remote.must(&line, INSIDE).with_context(|| format!("inside {}", self.name))
    }

    /// Seconds since the guest's kernel started.
    pub(crate) fn uptime(&self) -> Result<f64> {
        let text = self.inside("cat /proc/uptime")?;
        let first = text.split_whitespace().next().unwrap_or_default();
        first.parse().with_context(|| format!("/proc/uptime says {text:?}"))
    }

    /// Boot id of the guest's kernel: another one means that it was restarted.
    pub(crate) fn boot_id(&self) -> Result<String> {
        Ok(self.inside("cat /proc/sys/kernel/random/boot_id")?.trim().to_owned())
    }

    /// Classes of the PCI devices the guest sees, such as `0x038000`.
    pub(crate) fn pci_classes(&self) -> Result<Vec<String>> {
        let text = self.inside("cat /sys/bus/pci/devices/*/class")?;
        Ok(text.split_whitespace().map(str::to_owned).collect())
    }

    /// Process id of its QEMU.
    pub(crate) fn qemu(&self) -> Result<u32> {
        let view = self.view()?;
        let id = view.get("id").and_then(Value::as_str).context("the instance has no id")?;
        let script = format!("pgrep -f -- {}", quoted(&format!("^/usr/bin/qemu-system-x86_64 .*{id}")));
        let text = self.machine.remote.must(&script, QUICK)?;
        text.trim().parse().with_context(|| format!("QEMU of {} is not one process: {text:?}", self.name))
    }

    /// Deletes it and waits until nobody knows it; how long that took.
    pub(crate) fn delete(self) -> Result<Duration> {
        let started = Instant::now();
        agent::command(self.machine, &["instance", "delete", &self.name, "--yes"], DELETE)
            .with_context(|| format!("deleting {}", self.name))?;
        let taken = started.elapsed();
        let said = agent::refused(self.machine, &["instance", "show", &self.name])?;
        if !said.contains(&self.name) {
            bail!("after DELETE, showing {} was refused with {said:?}", self.name);
        }
        Ok(taken)
    }

    /// Deletes it, unless a deletion that was accepted before is finished meanwhile.
    pub(crate) fn delete_if_there(self) -> Result<()> {
        let line = format!("qudata-agent instance delete {} --yes", quoted(&self.name));
        let said = self.machine.remote.run(&line, DELETE)?;
        ensure!(
            said.status.success() || said.stderr.contains("there is no "),
            "deleting {}: {}",
            self.name,
            said.stderr.trim()
        );
        Ok(())
    }

    fn line(&self, verb: &str, more: &[&str]) -> String {
        format!("qudata-agent instance {verb} {} {}", quoted(&self.name), more.join(" "))
    }
}

fn words(order: &Order<'_>) -> Vec<String> {
    let mut words: Vec<String> = ["instance", "create", "--no-wait", "--cpus", "1", "--memory", "512M"]
        .into_iter()
        .chain(["--storage", "4", "--port", "22", "--name", order.name])
        .map(str::to_owned)
        .collect();
    if let Some(count) = order.gpus {
        words.extend(["--gpus".to_owned(), count.to_string()]);
    }
    if let Some(token) = order.tunnel_token {
        words.extend(["--tunnel-token".to_owned(), token.to_owned()]);
    }
    for address in order.gpu_addrs {
        words.extend(["--gpu".to_owned(), address.clone()]);
    }
    words
}
