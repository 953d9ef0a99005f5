//! What the kernel takes to pin a guest's RAM for its GPU: by the agent's memory plan on huge pages, and as the original
//! does it, on small pages nobody has touched. Both in the same run; the ratio is the result. Called through the table.
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::agent::{self, Baseline};
use crate::gpu;
use crate::machine::Machine;
use crate::scenario::gpu::{ensure_returned, rent};
use crate::shape::slot;
use crate::tenant::{Order, Tenant};
use crate::voice::say;

const QUICK: Duration = Duration::from_secs(60);
const START: Duration = Duration::from_secs(180);
/// Pages of 2 MiB for a tenant of the lab, with some to spare.
const PAGES: u32 = 300;
/// What the product promises.
const MOST: f64 = 0.05;

/// The kernel times each call to its VFIO container itself: ftrace's function_graph tracer.
const TRACE_ON: &str = "cd /sys/kernel/tracing && echo 0 >tracing_on && echo nop >current_tracer && \
     echo vfio_iommu_type1_ioctl >set_ftrace_filter && echo function_graph >current_tracer && echo >trace && echo 1 >tracing_on";
/// What each call took, in microseconds, one a line.
const TRACE_OFF: &str = "cd /sys/kernel/tracing && echo 0 >tracing_on && \
     grep -o '[0-9.]* us .*vfio_iommu_type1_ioctl' trace | cut -d' ' -f1; echo nop >current_tracer; echo >set_ftrace_filter";

/// Time of each call to the VFIO container, in milliseconds.
fn traced(machine: &Machine) -> Result<Vec<f64>> {
    let said = machine.remote.must(TRACE_OFF, QUICK)?;
    let calls: Result<Vec<f64>, _> =
        said.split_whitespace().map(|micros| micros.parse::<f64>().map(|micros| micros / 1000.0)).collect();
    let calls = calls.with_context(|| format!("the trace says {said:?}"))?;
    ensure!(calls.len() > 2, "the trace has {} calls", calls.len());
    Ok(calls)
}

/// Ours beside theirs.
pub(super) fn run(machine: &mut Machine) -> Result<()> {
    let machine = &*machine;
    let functions = rent(machine, &[slot::A])?.concat();
    let before = Baseline::take(machine)?;
    let drivers = gpu::drivers(machine, &functions)?;
    machine.remote.must(&format!("echo {PAGES} >/proc/sys/vm/nr_hugepages"), QUICK)?;
    machine.remote.must(TRACE_ON, QUICK)?;
    let tenant = Tenant::order(machine, &Order { name: "pinned", gpus: Some(1), ..Order::default() })?;
    tenant.wait_for("booting", START)?;
    let ours = traced(machine)?;
    let line = machine.remote.must(&format!("tr '\\0' ' ' </proc/{}/cmdline", tenant.qemu()?), QUICK)?;
    ensure!(line.contains("hugetlb"), "the tenant's RAM is not in huge pages: {line}");
    tenant.delete()?;
    ensure_returned(machine, &functions, &drivers)?;
    machine.remote.must("echo 0 >/proc/sys/vm/nr_hugepages", QUICK)?;
    let theirs = cold(machine, functions.first().context("the slot is empty")?)?;
    // Ours runs its guest, whose firmware moves the GPU's memory about: the calls before that are those of both.
    let before_the_guest: f64 = ours.iter().take(theirs.len()).sum();
    let (theirs, calls) = (theirs.iter().sum::<f64>(), theirs.len());
    let ratio = before_the_guest / theirs;
    say(format!(
        "pinning 512 MiB, {calls} calls: ours {before_the_guest:.1} ms, cold pages of 4 KiB {theirs:.1} ms: {ratio:.4}"
    ));
    ensure!(ratio <= MOST, "pinning took {ratio:.3} of what cold pages take, {MOST} is promised");
    before.assert_clean(machine)
}

/// The same size on small pages that nobody has touched, by a QEMU without a memory plan.
fn cold(machine: &Machine, address: &str) -> Result<Vec<f64>> {
    let device = format!("/sys/bus/pci/devices/{address}");
    let thp = "/sys/kernel/mm/transparent_hugepage/enabled";
    let script = format!(
        "set -e; systemctl stop qudata-agent; echo never >{thp}
echo vfio-pci >{device}/driver_override; echo {address} >{device}/driver/unbind; echo {address} >/sys/bus/pci/drivers_probe
{{ {TRACE_ON}; }}
qemu-system-x86_64 -M q35,accel=kvm -cpu host -m 512M -nodefaults -display none -S -daemonize -pidfile /run/lab-cold.pid \
  -device pcie-root-port,id=below,chassis=1 -device vfio-pci,host={address},bus=below"
    );
    machine.remote.must(&script, START).context("a QEMU on cold pages")?;
    let found = traced(machine)?;
    let script = format!(
        "set -e; pid=$(cat /run/lab-cold.pid); kill $pid; while [ -e /proc/$pid ]; do sleep 0.1; done; rm -f /run/lab-cold.pid
echo >{device}/driver_override; echo {address} >{device}/driver/unbind; echo {address} >/sys/bus/pci/drivers_probe
echo madvise >{thp}; systemctl start qudata-agent"
    );
    machine.remote.must(&script, START).context("ending the QEMU on cold pages")?;
    agent::wait_until_it_answers(machine)?;
    Ok(found)
}
