//! The server loses power, or its owner restarts it. Called through the table.
use std::time::Duration;

use anyhow::{Result, bail, ensure};

use crate::agent::{self, Baseline, Guest, Setting};
use crate::machine::Machine;
use crate::shape::slot;
use crate::tenant::{Order, Tenant};

const QUICK: Duration = Duration::from_secs(60);
const SETTLED: Duration = Duration::from_secs(120);
/// Shutting down included, of the guest as well.
const REBOOT: Duration = Duration::from_secs(300);

/// Writes a file the guest must keep, and tells its hash.
const WRITE: &str = "head -c 8000000 /dev/urandom >/root/kept && sync && sha256sum </root/kept";

/// Leaves a service that tells of an orderly shutdown, and a file that nothing has told the kernel to write yet; tells
/// its hash.
const BEFORE: &str = "systemd-run --quiet --unit=orderly -p RemainAfterExit=yes -p 'ExecStop=/bin/touch /root/orderly' true \
                      && head -c 8000000 /dev/urandom >/root/unwritten && sha256sum </root/unwritten";
/// An agent that lives on while the host goes down: it sees its VMs end.
const SLOW_AGENT: &str = "mkdir -p /run/systemd/system/qudata-agent.service.d && cd /run/systemd/system/qudata-agent.service.d \
                          && printf '[Service]\\nExecStop=/bin/sleep 60\\nTimeoutStopSec=120\\n' >slow.conf && systemctl daemon-reload";

/// The agent without GPUs, or with the one of slot a; how many an order asks for.
fn start(machine: &Machine, gpus: Option<u32>) -> Result<()> {
    let setting = match gpus {
        None => Setting::without_gpus(Guest::Quick),
        Some(_) => Setting::with_gpus(Guest::Quick, &machine.addresses(slot::A)?),
    };
    agent::start(machine, &setting)
}

/// Without GPUs.
pub(super) fn while_running(machine: &mut Machine) -> Result<()> {
    running(machine, None)
}

/// With a GPU.
pub(super) fn while_running_with_gpu(machine: &mut Machine) -> Result<()> {
    running(machine, Some(1))
}

/// Without GPUs.
pub(super) fn while_creating(machine: &mut Machine) -> Result<()> {
    creating(machine, None)
}

/// With a GPU.
pub(super) fn while_creating_with_gpu(machine: &mut Machine) -> Result<()> {
    creating(machine, Some(1))
}

/// Without GPUs.
pub(super) fn while_deleting(machine: &mut Machine) -> Result<()> {
    deleting(machine, None)
}

/// With a GPU.
pub(super) fn while_deleting_with_gpu(machine: &mut Machine) -> Result<()> {
    deleting(machine, Some(1))
}

/// The guest's disk survives, whatever state the instance is in afterwards; it can be started and deleted.
fn running(machine: &mut Machine, gpus: Option<u32>) -> Result<()> {
    start(machine, gpus)?;
    let before = Baseline::take(machine)?;
    let tenant = Tenant::order(machine, &Order { name: "power", gpus, ..Order::default() })?;
    tenant.wait_until_ready()?;
    let (boot, hash) = (tenant.boot_id()?, tenant.inside(WRITE)?);
    machine.reset_hard()?;
    let machine = &*machine;
    agent::wait_until_it_answers(machine)?;
    let tenant = Tenant::known(machine, "power");
    let state = tenant.state()?;
    match state.as_str() {
        // The owner's policy may bring instances back by itself.
        "stopped" => drop(agent::command(machine, &["instance", "start", "power"], QUICK)?),
        "provisioning" | "booting" | "running" => {}
        other => bail!("after the reset the instance is {other}: {}", tenant.view()?),
    }
    tenant.wait_until_ready()?;
    ensure!(tenant.boot_id()? != boot, "the guest claims to have survived the reset");
    let now = tenant.inside("sha256sum </root/kept")?;
    ensure!(now == hash, "the guest's file had {hash} and has {now}");
    tenant.delete()?;
    before.assert_clean(machine)
}

/// The owner restarts the server: the guest is shut down in good order, and comes back by itself with its GPU.
pub(super) fn restarted_by_its_owner(machine: &mut Machine) -> Result<()> {
    // A guest whose own process 1 hears the power button.
    agent::start(machine, &Setting::with_gpus(Guest::Full, &machine.addresses(slot::A)?))?;
    machine.remote.must(SLOW_AGENT, QUICK)?;
    let before = Baseline::take(machine)?;
    let tenant = Tenant::order(machine, &Order { name: "patient", gpus: Some(1), ..Order::default() })?;
    tenant.wait_until_ready()?;
    let server = machine.boot_id()?;
    let tenant = Tenant::known(machine, "patient");
    let (boot, hash) = (tenant.boot_id()?, tenant.inside(BEFORE)?);
    // The answer may never come.
    let _ = machine.remote.run("systemctl reboot", QUICK);
    machine.await_reboot(&server, REBOOT)?;
    let machine = &*machine;
    agent::wait_until_it_answers(machine)?;
    let tenant = Tenant::known(machine, "patient");
    // Without being asked: that the VM ended is not taken for the tenant's or a fault's doing.
    tenant.wait_until_ready()?;
    ensure!(tenant.boot_id()? != boot, "the guest claims to have survived the restart");
    let now = tenant.inside("ls /root/orderly && sha256sum </root/unwritten")?;
    ensure!(now.ends_with(&hash), "the guest was cut off: its file had {hash} and has {now}");
    tenant.delete()?;
    before.assert_clean(machine)
}

/// Half an instance: it comes up, or says that it failed; it can be deleted.
fn creating(machine: &mut Machine, gpus: Option<u32>) -> Result<()> {
    start(machine, gpus)?;
    let before = Baseline::take(machine)?;
    drop(Tenant::order(machine, &Order { name: "half", gpus, ..Order::default() })?);
    machine.reset_hard()?;
    let machine = &*machine;
    agent::wait_until_it_answers(machine)?;
    let tenant = Tenant::known(machine, "half");
    let state = tenant.state()?;
    ensure!(
        ["provisioning", "booting", "running", "stopped", "failed"].contains(&state.as_str()),
        "after the reset the instance is {state}"
    );
    if state != "stopped" && state != "failed" {
        tenant.wait_until_ready()?;
    }
    tenant.delete()?;
    before.assert_clean(machine)
}

/// A deletion that was asked for happens, without being asked for again.
fn deleting(machine: &mut Machine, gpus: Option<u32>) -> Result<()> {
    start(machine, gpus)?;
    let before = Baseline::take(machine)?;
    let tenant = Tenant::order(machine, &Order { name: "leaving", gpus, ..Order::default() })?;
    tenant.wait_until_ready()?;
    // Detached: the server goes down while the command waits.
    let script = "systemd-run --quiet --collect qudata-agent instance delete leaving --yes; sleep 1";
    machine.remote.must(script, QUICK)?;
    machine.reset_hard()?;
    let machine = &*machine;
    agent::wait_until_it_answers(machine)?;
    let until = std::time::Instant::now() + SETTLED;
    while machine.remote.run("qudata-agent instance show leaving --json", QUICK)?.status.success() {
        ensure!(
            std::time::Instant::now() < until,
            "the deletion was forgotten: {}",
            Tenant::known(machine, "leaving").view()?
        );
        std::thread::sleep(Duration::from_secs(2));
    }
    before.assert_clean(machine)
}
