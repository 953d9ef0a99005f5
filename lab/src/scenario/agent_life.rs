//! The agent ends and comes back under a running VM. Called through the table.
use std::time::Duration;

use anyhow::{Result, ensure};

use crate::agent::{self, Baseline, Guest, Setting};
use crate::machine::Machine;
use crate::tenant::{Order, Tenant};
use crate::voice::say;

const QUICK: Duration = Duration::from_secs(60);

/// What must be the same afterwards.
#[derive(Debug, PartialEq)]
struct Life {
    qemu: u32,
    boot_id: String,
}

impl Life {
    fn of(tenant: &Tenant<'_>) -> Result<Self> {
        Ok(Self { qemu: tenant.qemu()?, boot_id: tenant.boot_id()? })
    }
}

/// Runs an instance, does something to the agent, and expects the instance to have noticed nothing.
fn survives(machine: &Machine, name: &str, mishap: impl FnOnce(&Machine) -> Result<()>) -> Result<()> {
    agent::start(machine, &Setting::without_gpus(Guest::Quick))?;
    let before = Baseline::take(machine)?;
    let tenant = Tenant::order(machine, &Order { name, ..Order::default() })?;
    let ready = tenant.wait_until_ready()?;
    say(format!("ready after {} s", ready.as_secs()));
    let (life, uptime) = (Life::of(&tenant)?, tenant.uptime()?);
    mishap(machine)?;
    tenant.wait_for("running", QUICK)?;
    let now = Life::of(&tenant)?;
    ensure!(now == life, "the instance was {life:?} and is {now:?}");
    ensure!(tenant.uptime()? > uptime, "the guest's uptime does not grow");
    tenant.delete()?;
    before.assert_clean(machine)
}

/// SIGKILL.
pub(super) fn killed(machine: &mut Machine) -> Result<()> {
    survives(machine, "killed", agent::kill)
}

/// A new binary and a restart, as a package upgrade does it.
pub(super) fn upgraded(machine: &mut Machine) -> Result<()> {
    survives(machine, "upgraded", |machine| {
        let old = agent::pid(machine)?;
        // Another file with another content under the same name; what follows an ELF image is not loaded.
        let script = "cp /usr/bin/qudata-agent /usr/bin/.new && echo newer >>/usr/bin/.new && \
                      mv /usr/bin/.new /usr/bin/qudata-agent && systemctl restart qudata-agent";
        machine.remote.must(script, QUICK)?;
        agent::wait_until_it_answers(machine)?;
        ensure!(agent::pid(machine)? != old, "the agent was not restarted");
        Ok(())
    })
}
