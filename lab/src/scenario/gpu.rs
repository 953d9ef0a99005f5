//! GPUs given to guests and taken back. Called through the table.
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::agent::{self, Baseline, Guest, Setting};
use crate::gpu;
use crate::machine::Machine;
use crate::shape::slot;
use crate::tenant::{Order, Tenant};
use crate::voice::say;

const QUICK: Duration = Duration::from_secs(60);
/// Reset and check after a guest; an emulated machine is slow.
const SANITIZED: Duration = Duration::from_secs(120);

/// Class of a display controller, and of a VGA one, as sysfs shows them.
const DISPLAY: &str = "0x038000";
const VGA: &str = "0x030000";
const AUDIO: &str = "0x040300";

fn count(classes: &[String], wanted: &str) -> usize {
    classes.iter().filter(|class| class.as_str() == wanted).count()
}

/// Starts the agent with these slots for rent; their functions, slot by slot.
pub(super) fn rent(machine: &Machine, slots: &[&str]) -> Result<Vec<Vec<String>>> {
    let functions: Vec<Vec<String>> =
        slots.iter().map(|slot| machine.addresses(slot)).collect::<Result<_>>()?;
    let first: Vec<String> = functions.iter().filter_map(|slot| slot.first().cloned()).collect();
    agent::start(machine, &Setting::with_gpus(Guest::Quick, &first))?;
    Ok(functions)
}

/// After a tenancy: free, with the drivers it had.
pub(super) fn ensure_returned(machine: &Machine, functions: &[String], drivers: &[String]) -> Result<()> {
    let address = functions.first().context("a slot is empty")?;
    gpu::wait_for(machine, address, "free", SANITIZED)?;
    let now = gpu::drivers(machine, functions)?;
    ensure!(now == drivers, "{functions:?} had the drivers {drivers:?} and has {now:?}");
    Ok(())
}

/// One instance, one slot; the guest sees these classes.
fn one_slot(machine: &Machine, name: &str, slot: &str, classes: &[&str]) -> Result<()> {
    let functions = rent(machine, &[slot])?.concat();
    let before = Baseline::take(machine)?;
    let drivers = gpu::drivers(machine, &functions)?;
    let tenant = Tenant::order(machine, &Order { name, gpus: Some(1), ..Order::default() })?;
    tenant.wait_until_ready()?;
    let seen = tenant.pci_classes()?;
    for class in classes {
        ensure!(
            count(&seen, class) == 1,
            "the guest sees the classes {seen:?}, {class} should be there once"
        );
    }
    gpu::ensure_bound(machine, &functions)?;
    let state = gpu::state(machine, functions.first().context("the slot is empty")?)?;
    ensure!(state == "in_use", "a GPU in a running guest is {state}");
    let begun = Instant::now();
    let deleted = tenant.delete()?.as_millis();
    ensure_returned(machine, &functions, &drivers)?;
    say(format!("deleted after {deleted} ms, its GPU free after {} ms", begun.elapsed().as_millis()));
    before.assert_clean(machine)
}

/// Create, see it, delete, the host's driver is back.
pub(super) fn one(machine: &mut Machine) -> Result<()> {
    one_slot(machine, "one", slot::A, &[DISPLAY])
}

/// All functions of the slot travel together.
pub(super) fn two_functions(machine: &mut Machine) -> Result<()> {
    one_slot(machine, "pair", slot::TWO_FUNCTIONS, &[VGA, AUDIO])
}

/// Two instances with a GPU each.
pub(super) fn two_tenants(machine: &mut Machine) -> Result<()> {
    let machine = &*machine;
    let slots = rent(machine, &[slot::A, slot::B])?;
    let before = Baseline::take(machine)?;
    let drivers = gpu::drivers(machine, &slots.concat())?;
    let order = |name| Tenant::order(machine, &Order { name, gpus: Some(1), ..Order::default() });
    let (left, right) = (order("left")?, order("right")?);
    let said = Tenant::refused(machine, &Order { name: "third", gpus: Some(1), ..Order::default() })?;
    ensure!(said.contains("GPU"), "a third GPU was refused with {said:?}");
    for tenant in [&left, &right] {
        tenant.wait_until_ready()?;
        let seen = tenant.pci_classes()?;
        ensure!(count(&seen, DISPLAY) == 1, "{} sees the classes {seen:?}", tenant.name);
    }
    let gpus = |tenant: &Tenant<'_>| Ok::<_, anyhow::Error>(tenant.view()?.get("gpus").cloned());
    ensure!(gpus(&left)? != gpus(&right)?, "both instances have the GPU {:?}", gpus(&left)?);
    gpu::ensure_bound(machine, &slots.concat())?;
    left.delete()?;
    right.delete()?;
    for (functions, driver) in slots.iter().zip(&drivers) {
        ensure_returned(machine, functions, std::slice::from_ref(driver))?;
    }
    before.assert_clean(machine)
}

/// One instance with both.
pub(super) fn both(machine: &mut Machine) -> Result<()> {
    let machine = &*machine;
    let slots = rent(machine, &[slot::A, slot::B])?;
    let before = Baseline::take(machine)?;
    let drivers = gpu::drivers(machine, &slots.concat())?;
    let tenant = Tenant::order(machine, &Order { name: "both", gpus: Some(2), ..Order::default() })?;
    tenant.wait_until_ready()?;
    let seen = tenant.pci_classes()?;
    ensure!(count(&seen, DISPLAY) == 2, "the guest sees the classes {seen:?}");
    tenant.delete()?;
    for (functions, driver) in slots.iter().zip(&drivers) {
        ensure_returned(machine, functions, std::slice::from_ref(driver))?;
    }
    before.assert_clean(machine)
}

/// Refuses an order for the GPU of a slot, and touches nothing of it.
fn refused(machine: &Machine, slot: &str, words: &[&str]) -> Result<()> {
    let functions = rent(machine, &[slot])?.concat();
    let before = Baseline::take(machine)?;
    let drivers = gpu::drivers(machine, &functions)?;
    let gpu_addrs = functions.get(..1).context("the slot is empty")?;
    let said = Tenant::refused(machine, &Order { name: "refused", gpu_addrs, ..Order::default() })?;
    for word in words {
        ensure!(said.contains(word), "the refusal does not say {word:?}: {said}");
    }
    let now = gpu::drivers(machine, &functions)?;
    ensure!(now == drivers, "{functions:?} had the drivers {drivers:?} and has {now:?}");
    before.assert_clean(machine)
}

/// A foreign device in the group.
pub(super) fn foreign_device(machine: &mut Machine) -> Result<()> {
    let foreign = machine.addresses(slot::SHARED)?.get(1).cloned().context("there is no foreign device")?;
    refused(machine, slot::SHARED, &["group", &foreign])
}

/// No interrupt remapping.
pub(super) fn no_remapping(machine: &mut Machine) -> Result<()> {
    refused(machine, slot::A, &["interrupt remapping"])
}

/// QEMU dies; the GPU does not stay dirty.
pub(super) fn qemu_killed(machine: &mut Machine) -> Result<()> {
    let machine = &*machine;
    let functions = rent(machine, &[slot::A])?.concat();
    let before = Baseline::take(machine)?;
    let drivers = gpu::drivers(machine, &functions)?;
    let tenant = Tenant::order(machine, &Order { name: "dying", gpus: Some(1), ..Order::default() })?;
    tenant.wait_until_ready()?;
    machine.remote.must(&format!("kill -9 {}", tenant.qemu()?), QUICK)?;
    tenant.wait_for("failed", SANITIZED)?;
    let reason = tenant.view()?.to_string();
    ensure!(reason.contains("QEMU ended by itself"), "the reason is not told: {reason}");
    // Cleaned and back with the host's driver; the lease stays with the instance until DELETE.
    gpu::wait_for(machine, functions.first().context("the slot is empty")?, "leased", SANITIZED)?;
    let now = gpu::drivers(machine, &functions)?;
    ensure!(now == drivers, "{functions:?} had the drivers {drivers:?} and has {now:?}");
    tenant.delete()?;
    ensure_returned(machine, &functions, &drivers)?;
    before.assert_clean(machine)
}

/// SIGKILL of the agent at many moments of create and delete: adopted or undone, and nothing is left.
pub(super) fn agent_killed(machine: &mut Machine) -> Result<()> {
    /// Moments in milliseconds after the order: they spread over a bring-up and a teardown of some seconds.
    const MOMENTS: [u64; 10] = [0, 200, 500, 800, 1200, 1700, 2300, 3000, 4000, 6000];
    let machine = &*machine;
    let functions = rent(machine, &[slot::A])?.concat();
    let before = Baseline::take(machine)?;
    let drivers = gpu::drivers(machine, &functions)?;
    for moment in MOMENTS {
        let seconds = Duration::from_millis(moment).as_secs_f64();
        let order = Order { name: "struck", gpus: Some(1), ..Order::default() };
        let tenant = Tenant::order(machine, &order)?;
        machine.remote.must(&format!("sleep {seconds}; true"), QUICK)?;
        agent::kill(machine).with_context(|| format!("{moment} ms into create"))?;
        let boot = tenant.qemu().ok();
        let delete = format!("qudata-agent instance delete struck --yes >/dev/null 2>&1 & sleep {seconds}");
        machine.remote.must(&delete, QUICK)?;
        agent::kill(machine).with_context(|| format!("{moment} ms into delete"))?;
        say(format!("{moment} ms: VM {boot:?}"));
        tenant.delete_if_there()?;
        ensure_returned(machine, &functions, &drivers)
            .with_context(|| format!("after a kill {moment} ms into create and delete"))?;
    }
    before.assert_clean(machine)
}

/// Many tenancies, one after the other; the guest is not waited for.
pub(super) fn cycles(machine: &mut Machine) -> Result<()> {
    const CYCLES: u32 = 100;
    let machine = &*machine;
    let functions = rent(machine, &[slot::A])?.concat();
    let before = Baseline::take(machine)?;
    let drivers = gpu::drivers(machine, &functions)?;
    for cycle in 1..=CYCLES {
        let order = Order { name: "cycle", gpus: Some(1), ..Order::default() };
        let tenant = Tenant::order(machine, &order).with_context(|| format!("cycle {cycle}"))?;
        tenant.wait_for("booting", SANITIZED).with_context(|| format!("cycle {cycle}"))?;
        tenant.delete().with_context(|| format!("cycle {cycle}"))?;
        ensure_returned(machine, &functions, &drivers).with_context(|| format!("cycle {cycle}"))?;
    }
    before.assert_clean(machine)
}
