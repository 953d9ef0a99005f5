//! The server itself: whether it is what the other scenarios think. Called through the table.
use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::machine::Machine;
use crate::shape::slot;

const QUICK: Duration = Duration::from_secs(30);

/// Groups, drivers, KVM and service manager.
pub(super) fn groups(machine: &mut Machine) -> Result<()> {
    for (name, functions, in_group) in
        [(slot::A, 1, 1), (slot::B, 1, 1), (slot::TWO_FUNCTIONS, 2, 2), (slot::SHARED, 2, 3)]
    {
        let addresses = machine.addresses(name)?;
        ensure!(addresses.len() == functions, "slot {name:?} has {addresses:?}, {functions} were plugged in");
        let mut groups = BTreeSet::new();
        for address in &addresses {
            groups.insert(link(machine, address, "iommu_group")?);
        }
        let [group] = groups.iter().collect::<Vec<_>>()[..] else {
            anyhow::bail!("slot {name:?} is spread over the groups {groups:?}");
        };
        let members = machine.remote.must(&format!("ls /sys/kernel/iommu_groups/{group}/devices"), QUICK)?;
        // A bridge without isolation belongs to the group as well.
        ensure!(members.lines().count() == in_group, "group {group} of slot {name:?} has {members}");
    }
    let gpu = machine.addresses(slot::A)?;
    let gpu = gpu.first().context("slot a is empty")?;
    let driver = link(machine, gpu, "driver")?;
    ensure!(driver == "bochs-drm", "{gpu} is driven by {driver}, not by a display driver");
    machine
        .remote
        .must("test -c /dev/kvm && test -c /dev/vfio/vfio && test -d /run/systemd/system", QUICK)?;
    let state = machine.remote.run("systemctl is-system-running --wait", Duration::from_secs(120))?;
    let failed = machine.remote.must("systemctl list-units --failed --no-legend --plain", QUICK)?;
    ensure!(failed.trim().is_empty(), "the server is {}: {failed}", state.stdout.trim());
    Ok(())
}

/// Each GPU on its node.
pub(super) fn nodes(machine: &mut Machine) -> Result<()> {
    for (name, node) in [(slot::A, "0"), (slot::B, "1")] {
        let addresses = machine.addresses(name)?;
        let address = addresses.first().context("the slot is empty")?;
        let path = format!("/sys/bus/pci/devices/{address}/numa_node");
        let said = machine.remote.must(&format!("cat {path}"), QUICK)?;
        ensure!(said.trim() == node, "{path} says {}, the GPU was plugged into node {node}", said.trim());
    }
    let nodes = machine.remote.must("ls -d /sys/devices/system/node/node*", QUICK)?;
    ensure!(nodes.lines().count() == 2, "the server has the nodes {nodes}");
    Ok(())
}

/// The last word of a link of a device.
fn link(machine: &Machine, address: &str, name: &str) -> Result<String> {
    let path = format!("/sys/bus/pci/devices/{address}/{name}");
    Ok(machine.remote.must(&format!("basename $(readlink {path})"), QUICK)?.trim().to_owned())
}
