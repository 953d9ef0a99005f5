//! The main job without GPUs, with the guest a renter gets. Called through the table.
use anyhow::{Result, ensure};

use crate::agent::{self, Baseline, Guest, Setting};
use crate::machine::Machine;
use crate::tenant::{Order, Tenant};
use crate::voice::say;

pub(super) fn run(machine: &mut Machine) -> Result<()> {
    let machine = &*machine;
    agent::start(machine, &Setting::without_gpus(Guest::Full))?;
    let before = Baseline::take(machine)?;
    let tenant = Tenant::order(machine, &Order { name: "plain", ..Order::default() })?;
    let ready = tenant.wait_until_ready()?;
    let said = tenant.inside("systemd-detect-virt; cloud-init status")?;
    ensure!(said.contains("kvm"), "the guest does not run under KVM: {said}");
    let gone = tenant.delete()?;
    say(format!("ready after {} s, deleted after {} ms", ready.as_secs(), gone.as_millis()));
    before.assert_clean(machine)
}
