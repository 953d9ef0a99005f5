//! The PCI bus and what each GPU's own files say, each GPU on a thread of its own: the files of one may hang.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io::{self, Read},
    path::Path,
};

use qudata_host::{causes::chain, size::ByteSize};
use qudata_vfio::{
    holders::{Holder, OpenNodes},
    names::PciIds,
    topology::{self, Gpu, Topology},
};

use tokio::time::timeout;

use super::{Look, text};
use crate::observed::{GpuLook, GpuState, Pci, Seen, Unseen};

/// `IORESOURCE_MEM` in the third column of `resource`.
const MEMORY: u64 = 0x200;
/// How much of the time the walk over all open files may take.
const NODES_SHARE: f64 = 0.6;
/// Rows of `resource` that are BARs.
const BARS: u8 = 6;

pub(super) async fn observe(look: &Look) -> Seen<Pci> {
    let nodes = look.read(|look| Ok(OpenNodes::observe(&look.root)));
    let own = look.read(|look| Ok(own(&look.under(&look.settings.vm_run_dir).join("vms"))));
    let topology =
        look.read(|look| topology::observe(&look.root).map_err(|error| Unseen::Failed(chain(&error))));
    // A server with very many open files: the GPUs' own files must still have their turn.
    let patience = look.scope.patience.mul_f64(NODES_SHARE);
    let nodes = async { timeout(patience, nodes).await.unwrap_or(Err(Unseen::Late(patience))) };
    let (topology, nodes, own) = tokio::join!(topology, nodes, own);
    let topology = topology?;
    let ids = PciIds::load(&look.root);
    let begun: Vec<_> = topology
        .gpus(&look.settings.gpu_pci_addrs)
        .into_iter()
        .map(|gpu| {
            let device = topology.devices.get(&gpu.address);
            let name = device.map(|device| ids.name_or_ids(device.vendor, device.device)).unwrap_or_default();
            let (seen, topology, nodes) = (gpu.clone(), topology.clone(), nodes.clone());
            (gpu, name, look.read(move |look| state(&look.root, &seen, &topology, &nodes)))
        })
        .collect();
    let mut gpus = Vec::new();
    for (gpu, name, state) in begun {
        gpus.push(GpuLook { gpu, name, state: state.await });
    }
    Ok(Pci { topology, gpus, own: own.unwrap_or_default() })
}

fn state(root: &Path, gpu: &Gpu, topology: &Topology, nodes: &Seen<OpenNodes>) -> Seen<GpuState> {
    let holders = match nodes {
        Ok(nodes) => nodes.holders_of(gpu, topology, &BTreeMap::new()),
        Err(why) => vec![Holder::Unseen { why: format!("the open files of all processes: {why}") }],
    };
    let mut state = GpuState { holders, ..GpuState::default() };
    for address in gpu.functions.iter().copied().filter(|address| topology.devices.contains_key(address)) {
        let dir = root.join("sys/bus/pci/devices").join(address.to_string());
        let dead = is_dead(&dir.join("config"));
        let dead =
            dead.map_err(|error| Unseen::Failed(format!("cannot read config of {address}: {error}")))?;
        state.dead.extend(dead.then_some(address));
        state
            .unplaced
            .extend(unplaced(&text(&dir.join("resource"))?).map(|(bar, size)| (address, bar, size)));
    }
    Ok(state)
}

/// A device that fell off the bus answers every read with ones; its other files go on as if it were there.
fn is_dead(config: &Path) -> io::Result<bool> {
    let mut ids = [0; 4];
    File::open(config)?.read_exact(&mut ids)?;
    Ok(ids == [0xff; 4])
}

/// BARs without an address: the kernel shows them from 0 on.
fn unplaced(resource: &str) -> impl Iterator<Item = (u8, ByteSize)> {
    (0..BARS).zip(resource.lines()).filter_map(|(bar, line)| {
        let mut words = line.split(' ').map(|word| u64::from_str_radix(word.trim_start_matches("0x"), 16));
        let (start, end, flags) = (words.next()?.ok()?, words.next()?.ok()?, words.next()?.ok()?);
        let lost = start == 0 && end != 0 && flags & MEMORY != 0;
        lost.then(|| (bar, ByteSize::from_bytes(end.saturating_add(1))))
    })
}

/// The processes of the agent's VMs, from what their launcher wrote down: `<vms>/<instance>/<incarnation>/`.
fn own(vms: &Path) -> BTreeSet<u32> {
    let below = |dir: &Path| {
        let entries = fs::read_dir(dir).into_iter().flatten().filter_map(Result::ok);
        entries.map(|entry| entry.path()).collect::<Vec<_>>()
    };
    let pid = |dir: &Path| {
        let bytes = fs::read(dir.join("qemu.process.json")).ok()?;
        let identity: serde_json::Value = serde_json::from_slice(&bytes).ok()?;
        u32::try_from(identity.get("pid")?.as_u64()?).ok()
    };
    below(vms).iter().flat_map(|instance| below(instance)).filter_map(|dir| pid(&dir)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_without_an_address() {
        let resource = "0x0000000000000000 0x000000000fffffff 0x000000002014220c\n\
                        0x0000000000000000 0x0000000000000000 0x0000000000000000\n\
                        0x00000000fe000000 0x00000000fe0fffff 0x0000000000040200\n\
                        0x0000000000000000 0x000000000000007f 0x0000000000000101\n";
        // Ports have no memory and are not looked at.
        assert_eq!(unplaced(resource).collect::<Vec<_>>(), [(0, ByteSize::from_mib(256))]);
        assert_eq!(unplaced("").count() + unplaced("rubbish\n").count(), 0);
    }

    #[test]
    fn the_agents_own_processes() {
        let dir = tempfile::tempdir().unwrap();
        assert!(own(dir.path()).is_empty() && own(&dir.path().join("none")).is_empty());
        let vm = dir.path().join("019b7f3a/2");
        fs::create_dir_all(&vm).unwrap();
        fs::write(vm.join("qemu.process.json"), r#"{"pid":4711,"start_ticks":1}"#).unwrap();
        fs::create_dir_all(dir.path().join("019b7f3b/1")).unwrap();
        fs::write(dir.path().join("019b7f3b/1/qemu.process.json"), "cut o").unwrap();
        assert_eq!(own(dir.path()), [4711].into());
    }

    #[test]
    fn a_device_off_the_bus_reads_ones() {
        let dir = tempfile::tempdir().unwrap();
        let config = dir.path().join("config");
        fs::write(&config, [0xff; 64]).unwrap();
        assert!(is_dead(&config).unwrap());
        fs::write(&config, [0xde, 0x10, 0x30, 0x23]).unwrap();
        assert!(!is_dead(&config).unwrap());
        fs::write(&config, [0xff]).unwrap();
        assert!(is_dead(&config).is_err());
    }
}
