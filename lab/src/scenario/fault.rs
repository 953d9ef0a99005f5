//! GPUs that misbehave. Called through the table.
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::agent::{self, Baseline, Guest, Setting};
use crate::gpu;
use crate::machine::Machine;
use crate::shape::slot;
use crate::tenant::{Order, Tenant};

const QUICK: Duration = Duration::from_secs(60);
/// The agent's deadline for one batch of writes, with room.
const GIVEN_UP: Duration = Duration::from_secs(180);
const SANITIZED: Duration = Duration::from_secs(120);

/// Asks the API many times in a row; the slowest but one in a hundred, in milliseconds.
const PATIENCE: &str = "for i in $(seq 200); do curl -s -o /dev/null -w '%{time_total}\\n' \
     --unix-socket /run/qudata/agent.sock http://agent/gpus; done | sort -n | tail -2 | head -1 | awk '{print int($1*1000)}'";

fn p99_ms(machine: &Machine) -> Result<u64> {
    let text = machine.remote.must(PATIENCE, Duration::from_secs(180))?;
    text.trim().parse().with_context(|| format!("the API's patience is {text:?}"))
}

/// No thread of the agent waits in the kernel where nothing ends it.
fn ensure_no_stuck_thread(machine: &Machine) -> Result<()> {
    let pid = agent::pid(machine)?;
    let script = format!(
        "for i in $(seq 50); do for t in /proc/{pid}/task/*/stat; do \
         sed 's/.*) //' $t | grep -q ^D && cat ${{t%stat}}comm ${{t%stat}}wchan; done; sleep 0.02; done; true"
    );
    let said = machine.remote.must(&script, QUICK)?;
    // One sample may meet a short write to disk; a wedged thread is in all of them.
    ensure!(said.lines().count() < 40, "threads of the agent are stuck in the kernel: {said}");
    Ok(())
}

/// A driver that does not let go: the GPU is quarantined, everything else goes on.
pub(super) fn hung_unbind(machine: &mut Machine) -> Result<()> {
    let (wedged, healthy) = (gpu::only(machine, slot::A)?, gpu::only(machine, slot::B)?);
    let addresses = [wedged.clone(), healthy.clone()];
    agent::start(machine, &Setting::with_gpus(Guest::Quick, &addresses))?;
    let before = Baseline::take(machine)?;
    let p99 = p99_ms(machine)?;
    // Loading it may hang as well, so nobody waits for it.
    machine.remote.must("systemd-run --quiet modprobe radeon; sleep 10", QUICK)?;
    let order = Order { name: "wedged", gpu_addrs: std::slice::from_ref(&wedged), ..Order::default() };
    // Either the order is refused at once, because the card is seen to be stuck, or the instance fails.
    let accepted = Tenant::order(machine, &order).is_ok();
    gpu::wait_for(machine, &wedged, "quarantined", GIVEN_UP)?;
    let view = gpu::view(machine, &wedged)?;
    ensure!(view.get("why").is_some() && view.get("since").is_some(), "the quarantine has no reason: {view}");
    ensure_no_stuck_thread(machine)?;
    let now = p99_ms(machine)?;
    ensure!(now <= 2 * p99 + 50, "the API's p99 was {p99} ms and is {now} ms beside a wedged GPU");
    let tenant = Tenant::order(machine, &Order { name: "healthy", gpus: Some(1), ..Order::default() })?;
    tenant.wait_until_ready()?;
    tenant.delete()?;
    gpu::wait_for(machine, &healthy, "free", SANITIZED)?;
    // Only a restart ends what is stuck in the kernel.
    machine.reset_hard()?;
    agent::wait_until_it_answers(machine)?;
    // Its instance keeps it until DELETE.
    let proven = if accepted { "leased" } else { "free" };
    gpu::wait_for(machine, &wedged, proven, SANITIZED)
        .context("a restart and a passed check end a quarantine")?;
    if accepted {
        Tenant::known(machine, "wedged").delete()?;
        gpu::wait_for(machine, &wedged, "free", SANITIZED)?;
    }
    // Neither had a driver of the host, so they stay on vfio-pci until the next restart.
    machine.reset_hard()?;
    let machine = &*machine;
    agent::wait_until_it_answers(machine)?;
    before.assert_clean(machine)
}

/// The card falls off the bus under a tenant: it is not given to anybody until somebody has looked.
pub(super) fn off_the_bus(machine: &mut Machine) -> Result<()> {
    let addresses = [gpu::only(machine, slot::A)?, gpu::only(machine, slot::B)?];
    agent::start(machine, &Setting::with_gpus(Guest::Quick, &addresses))?;
    let before = Baseline::take(machine)?;
    let [lost, other] = &addresses;
    let order = Order { name: "unlucky", gpu_addrs: std::slice::from_ref(lost), ..Order::default() };
    let tenant = Tenant::order(machine, &order)?;
    tenant.wait_until_ready()?;
    // A bridge without a secondary bus answers for nobody: reads give ones, as after a fatal fault.
    let port = machine.shape.port_of(slot::A).context("there is no slot a")?;
    machine.remote.must(&format!("setpci -s {port} SECONDARY_BUS=0"), QUICK)?;
    tenant.delete()?;
    gpu::wait_for(machine, lost, "quarantined", SANITIZED)?;
    let said = Tenant::refused(machine, &Order { name: "next", ..order.clone() })?;
    ensure!(said.contains("quarantine"), "a lost GPU was refused with {said:?}");
    let next = Tenant::order(machine, &Order { name: "next", gpus: Some(1), ..Order::default() })?;
    let given = next.view()?;
    ensure!(given.to_string().contains(other.as_str()), "the next tenant was given {given}");
    next.delete()?;
    let said = agent::refused(machine, &["gpu", "release", lost, "--yes"])?;
    ensure!(said.contains("reboot"), "an operator was not told to reboot the host: {said}");
    machine.reset_hard()?;
    let machine = &*machine;
    agent::wait_until_it_answers(machine)?;
    gpu::wait_for(machine, lost, "free", SANITIZED)
        .context("a restart and a passed check end a quarantine")?;
    before.assert_clean(machine)
}
