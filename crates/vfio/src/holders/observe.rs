//! Looks for holders: one walk over the open files of all processes, and for each GPU what its directory in sysfs says
//! belongs to it.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Component, Path, PathBuf},
};

use qudata_host::pci::PciAddress;

use super::{
    Holder, HoldingProcess,
    node::{Node, tidy, unit},
};
use crate::topology::{
    Gpu, PciDevice, Topology,
    read::{is_gone, link_name},
};

/// So many open files are looked at. A busy server has some hundred thousand.
const MOST_FILES: usize = 4_000_000;

/// Who holds `gpu`, in a stable order. `root` is `/` but in tests. Where several GPUs are asked about, walk over the
/// processes once: [`OpenNodes::observe`].
#[must_use]
pub fn observe_holders(root: &Path, gpu: &Gpu, topology: &Topology) -> Vec<Holder> {
    OpenNodes::observe(root).holders_of(gpu, topology, &BTreeMap::new())
}

/// The N of `/dev/nvidiaN` of a GPU that the NVIDIA driver has, asked from that driver; none where it has no such GPU.
/// The answer holds until the driver of any NVIDIA GPU changes.
///
/// **May block for ever**: the driver takes its locks and wakes the GPU to answer. Only for a child process.
///
/// # Errors
/// When the driver answers with an error.
pub fn nvidia_minor(root: &Path, address: PciAddress) -> io::Result<Option<u32>> {
    match fs::read(root.join(format!("proc/driver/nvidia/gpus/{address}/information"))) {
        Ok(bytes) => Ok(minor(&String::from_utf8_lossy(&bytes))),
        Err(error) if is_gone(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

fn minor(information: &str) -> Option<u32> {
    information.lines().find_map(|line| line.strip_prefix("Device Minor:")?.trim().parse().ok())
}

/// Everything that any process has open and that may be a GPU's.
#[derive(Debug, Clone)]
pub struct OpenNodes {
    root: PathBuf,
    processes: Vec<Process>,
    /// Why not all processes could be looked at.
    unseen: Option<String>,
}

#[derive(Debug, Clone)]
struct Process {
    pid: u32,
    name: String,
    unit: Option<String>,
    nodes: BTreeSet<Node>,
}

impl OpenNodes {
    /// Walks over the open files of all processes. Whoever ends meanwhile holds nothing.
    #[must_use]
    pub fn observe(root: &Path) -> Self {
        let mut nodes = Self { root: root.to_owned(), processes: Vec::new(), unseen: None };
        let mut budget = MOST_FILES;
        match pids(root) {
            Ok(pids) => pids.into_iter().for_each(|pid| nodes.add(pid, &mut budget)),
            Err(error) => nodes.unseen = Some(format!("cannot list /proc: {error}")),
        }
        nodes
    }

    fn add(&mut self, pid: u32, budget: &mut usize) {
        match nodes_of(&self.root, pid, budget) {
            Ok(nodes) if nodes.is_empty() => {}
            Ok(nodes) => {
                let text = |file: &str| {
                    let bytes = fs::read(self.root.join(format!("proc/{pid}/{file}"))).unwrap_or_default();
                    String::from_utf8_lossy(&bytes).into_owned()
                };
                let (name, unit) = (tidy(&text("comm")), unit(&text("cgroup")));
                self.processes.push(Process { pid, name, unit, nodes });
            }
            Err(error) if is_gone(&error) => {}
            Err(error) => {
                self.unseen.get_or_insert_with(|| format!("cannot look at process {pid}: {error}"));
            }
        }
    }

    /// Who holds `gpu`, in a stable order. `minors` are the answers of [`nvidia_minor`], as far as they are known.
    #[must_use]
    pub fn holders_of(
        &self,
        gpu: &Gpu,
        topology: &Topology,
        minors: &BTreeMap<PciAddress, u32>,
    ) -> Vec<Holder> {
        let mut holders: BTreeSet<Holder> = BTreeSet::new();
        for device in gpu.functions.iter().filter_map(|address| topology.devices.get(address)) {
            let own = Own::observe(&self.root, device);
            holders.extend(self.processes.iter().flat_map(|process| {
                process.nodes.iter().filter_map(|node| {
                    let certain = match node {
                        Node::Nvidia(minor) => is_minor(device, *minor, topology, minors)?,
                        Node::VfioUnnamed => process.may_be(device)?,
                        node => own.nodes.contains(&nameless(node)).then_some(true)?,
                    };
                    Some(Holder::Process(process.holding(node, certain)))
                })
            }));
            holders.extend(own.holders);
        }
        holders.extend(self.unseen.clone().map(|why| Holder::Unseen { why }));
        holders.into_iter().collect()
    }
}

impl Process {
    fn holding(&self, node: &Node, certain: bool) -> HoldingProcess {
        let Self { pid, name, unit, .. } = self;
        HoldingProcess { pid: *pid, name: name.clone(), unit: unit.clone(), node: node.path(), certain }
    }

    /// A device opened through VFIO has no name of its own. Mostly its group is open beside it and tells; who was handed
    /// the device alone may hold any that `vfio-pci` has.
    fn may_be(&self, device: &PciDevice) -> Option<bool> {
        let named = |node: &Node| matches!(node, Node::VfioGroup(_) | Node::VfioDevice(_));
        (device.driver.as_deref() == Some("vfio-pci") && !self.nodes.iter().any(named)).then_some(false)
    }
}

/// Whether `/dev/nvidiaN` is this device: yes, perhaps, or not.
fn is_minor(
    device: &PciDevice,
    minor: u32,
    topology: &Topology,
    minors: &BTreeMap<PciAddress, u32>,
) -> Option<bool> {
    let by_nvidia = |device: &PciDevice| device.driver.as_deref() == Some("nvidia") && device.is_display();
    if !by_nvidia(device) {
        return None;
    }
    if let Some(own) = minors.get(&device.address) {
        return (*own == minor).then_some(true);
    }
    let others =
        topology.devices.values().filter(|other| by_nvidia(other) && other.address != device.address);
    let unknown = others.clone().filter(|other| !minors.contains_key(&other.address)).count();
    let is_anothers = others.into_iter().any(|other| minors.get(&other.address) == Some(&minor));
    (!is_anothers).then_some(unknown == 0)
}

/// A node as sysfs announces it: of a sound card only the card.
fn nameless(node: &Node) -> Node {
    match node {
        Node::Sound(card, _) => Node::Sound(*card, String::new()),
        node => node.clone(),
    }
}

/// What belongs to one function.
#[derive(Default)]
struct Own {
    nodes: BTreeSet<Node>,
    holders: BTreeSet<Holder>,
}

impl Own {
    fn observe(root: &Path, device: &PciDevice) -> Self {
        let dir = root.join("sys/bus/pci/devices").join(device.address.to_string());
        let mut own = Self::default();
        own.nodes.extend(device.group.map(Node::VfioGroup));
        own.nodes.extend(names(&dir.join("vfio-dev")).into_iter().map(Node::VfioDevice));
        own.nodes.extend(names(&dir.join("drm")).into_iter().map(Node::Dri));
        own.nodes.extend(names(&dir.join("sound")).iter().filter_map(|name| {
            name.strip_prefix("card")?.parse().ok().map(|card| Node::Sound(card, String::new()))
        }));
        for name in framebuffers(root, device) {
            own.nodes.extend(name.strip_prefix("fb").and_then(|n| n.parse().ok()).map(Node::Framebuffer));
            own.holders.insert(Holder::Framebuffer { name });
        }
        if !own.holders.is_empty() {
            own.holders.extend(consoles(root).into_iter().map(|name| Holder::Console { name }));
        }
        if let Ok(module) = link_name(&dir.join("driver/module")) {
            own.holders.extend(with_users(root, module).into_iter().map(|name| Holder::Module { name }));
        }
        own
    }
}

/// The names in a directory; none where it is not there.
fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().filter_map(Result::ok);
    entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
}

/// Framebuffers on a device: those of its driver, and on the one with the firmware's console the firmware's, which
/// belongs to no PCI device.
fn framebuffers(root: &Path, device: &PciDevice) -> Vec<String> {
    let class = root.join("sys/class/graphics");
    let address = device.address.to_string();
    let is_own = |name: &String| {
        let Ok(target) = class.join(name).read_link() else { return false };
        let has =
            |part: &str| target.components().any(|c| matches!(c, Component::Normal(name) if name == part));
        has(&address) || (device.boot_vga && has("platform"))
    };
    names(&class).into_iter().filter(|name| name.starts_with("fb")).filter(is_own).collect()
}

/// VT consoles that draw on a framebuffer. Whether one is in use right now takes the console lock to know.
fn consoles(root: &Path) -> Vec<String> {
    let class = root.join("sys/class/vtconsole");
    let draws = |name: &String| {
        let text = crate::topology::read::read_small(&class.join(name).join("name"));
        text.is_ok_and(|text| text.contains("frame buffer"))
    };
    names(&class).into_iter().filter(draws).collect()
}

/// A module, the modules that use it, those that use these.
fn with_users(root: &Path, module: String) -> BTreeSet<String> {
    let mut all = BTreeSet::new();
    let mut next = vec![module];
    while let Some(module) = next.pop() {
        if all.insert(module.clone()) {
            next.extend(names(&root.join("sys/module").join(module).join("holders")));
        }
    }
    all
}

fn pids(root: &Path) -> io::Result<Vec<u32>> {
    let mut pids = Vec::new();
    for entry in fs::read_dir(root.join("proc"))? {
        pids.extend(entry?.file_name().to_str().and_then(|name| name.parse::<u32>().ok()));
    }
    pids.sort_unstable();
    Ok(pids)
}

fn nodes_of(root: &Path, pid: u32, budget: &mut usize) -> io::Result<BTreeSet<Node>> {
    let mut nodes = BTreeSet::new();
    for entry in fs::read_dir(root.join(format!("proc/{pid}/fd")))? {
        *budget =
            budget.checked_sub(1).ok_or_else(|| io::Error::other("too many files are open on this host"))?;
        match fs::read_link(entry?.path()) {
            Ok(target) => nodes.extend(target.to_str().and_then(Node::parse)),
            Err(error) if is_gone(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(nodes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_minor_in_what_the_driver_says() {
        let text = "Model: \t\t NVIDIA A100-PCIE-40GB\nBus Location: \t 0000:65:00.0\nDevice Minor: \t 3\nGPU Excluded:\t No\n";
        assert_eq!(minor(text), Some(3));
        for text in ["", "Device Minor: \t x\n", "Model: Device Minor: 3\n"] {
            assert_eq!(minor(text), None, "{text}");
        }
    }
}
