//! GPUs as the product shows them and as the server's kernel does. Called by the GPU scenarios.
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::agent;
use crate::machine::Machine;

const QUICK: Duration = Duration::from_secs(60);

/// The product's view of one GPU.
pub(crate) fn view(machine: &Machine, address: &str) -> Result<Value> {
    let list = agent::command(machine, &["gpu", "list"], QUICK)?;
    let is = |gpu: &&Value| gpu.get("address").and_then(Value::as_str) == Some(address);
    let found = list.as_array().and_then(|gpus| gpus.iter().find(is)).cloned();
    found.with_context(|| format!("`gpu list` does not know {address}: {list}"))
}

/// Its state, such as `free`.
pub(crate) fn state(machine: &Machine, address: &str) -> Result<String> {
    let view = view(machine, address)?;
    Ok(view.get("state").and_then(Value::as_str).unwrap_or_default().to_owned())
}

/// Waits for a state.
pub(crate) fn wait_for(machine: &Machine, address: &str, wanted: &str, within: Duration) -> Result<()> {
    let until = Instant::now() + within;
    loop {
        let now = state(machine, address)?;
        if now == wanted {
            return Ok(());
        }
        if Instant::now() > until {
            bail!("{address} is {now} and not {wanted}: {}", view(machine, address)?);
        }
        std::thread::sleep(Duration::from_secs(1));
    }
}

/// The driver of each function, as the kernel's links say; `none` without one.
pub(crate) fn drivers(machine: &Machine, addresses: &[String]) -> Result<Vec<String>> {
    let script = format!(
        "for a in {}; do d=/sys/bus/pci/devices/$a/driver; [ -e $d ] && basename $(readlink $d) || echo none; done",
        addresses.join(" ")
    );
    Ok(machine.remote.must(&script, QUICK)?.lines().map(str::to_owned).collect())
}

/// Every function is driven by vfio-pci.
pub(crate) fn ensure_bound(machine: &Machine, addresses: &[String]) -> Result<()> {
    let drivers = drivers(machine, addresses)?;
    ensure!(
        drivers.iter().all(|driver| driver == "vfio-pci"),
        "{} is driven by {}",
        addresses.join(", "),
        drivers.join(", ")
    );
    Ok(())
}

/// The only address of a slot.
pub(crate) fn only(machine: &Machine, slot: &str) -> Result<String> {
    match machine.addresses(slot)?.as_slice() {
        [address] => Ok(address.clone()),
        several => bail!("slot {slot:?} has {several:?}"),
    }
}
