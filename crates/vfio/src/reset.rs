//! How a whole slot can be reset. Pure; `plan` refuses a GPU for which there is no way, `sanitize` goes the best one.

use std::fmt;

use qudata_host::pci::PciAddress;

use crate::{
    op::Op,
    topology::{Gpu, PciDevice, Topology},
};

/// A way to reset all functions of a slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Method {
    /// A function-level reset of each function: by the kernel's word, `flr` or `af_flr`.
    EachFunction(Vec<(PciAddress, String)>),
    /// The only function of the slot, by this method of the kernel.
    OnlyFunction(PciAddress, String),
    /// Everything below the bridge, which is this slot and nothing else.
    Bridge(PciAddress),
}

impl Method {
    /// The best way there is; none when there is none.
    ///
    /// A bus reset goes before a function-level one where the kernel offers it for the only function of a slot: VFIO has
    /// done the latter itself when the VM let go, and it leaves state of a GPU's own processors that a bus reset clears
    /// (dstack #1048). Power management reset comes last: a device may keep most of its state in it.
    pub fn choose(topology: &Topology, gpu: &Gpu) -> Option<Self> {
        let devices: Vec<&PciDevice> =
            gpu.functions.iter().map(|address| topology.devices.get(address)).collect::<Option<_>>()?;
        let function_level: Option<Vec<(PciAddress, String)>> = devices
            .iter()
            .map(|device| Some((device.address, method_in(device, &["flr", "af_flr"])?.to_owned())))
            .collect();
        let only = |words: &[&str]| match devices.as_slice() {
            [device] => Some(Self::OnlyFunction(device.address, method_in(device, words)?.to_owned())),
            _ => None,
        };
        let all = function_level.filter(|functions| !functions.is_empty()).map(Self::EachFunction);
        only(&["device_specific", "bus", "cxl_bus"])
            .or(all)
            .or_else(|| only(&["acpi"]))
            .or_else(|| own_bridge(topology, gpu).map(Self::Bridge))
            .or_else(|| only(&["pm"]))
    }

    /// The steps of it.
    pub(crate) fn ops(&self, gpu: &Gpu) -> Vec<Op> {
        let function = |address: &PciAddress, method: &String| Op::ResetFunction {
            address: *address,
            method: Some(method.clone()),
        };
        match self {
            Self::EachFunction(functions) => {
                functions.iter().map(|(a, method)| function(a, method)).collect()
            }
            Self::OnlyFunction(address, method) => vec![function(address, method)],
            Self::Bridge(bridge) => {
                vec![Op::ResetBelow { bridge: *bridge, functions: gpu.functions.iter().copied().collect() }]
            }
        }
    }
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::EachFunction(functions) if functions.len() > 1 => f.write_str("flr of each function"),
            Self::EachFunction(_) => f.write_str("flr"),
            Self::OnlyFunction(_, method) if method == "bus" => f.write_str("bus reset"),
            Self::OnlyFunction(_, method) => f.write_str(method),
            Self::Bridge(bridge) => write!(f, "bus reset by bridge {bridge}"),
        }
    }
}

/// The first of `words` that the kernel offers for the function.
fn method_in<'a>(device: &PciDevice, words: &[&'a str]) -> Option<&'a str> {
    words.iter().copied().find(|word| device.reset_methods.iter().any(|method| method == word))
}

/// The bridge right above the slot, when nothing but the slot is below it.
fn own_bridge(topology: &Topology, gpu: &Gpu) -> Option<PciAddress> {
    let bridge = *topology.devices.get(&gpu.address)?.upstream.last()?;
    let below = topology.devices.values().filter(|device| device.upstream.contains(&bridge));
    below.map(|device| device.address).all(|address| gpu.functions.contains(&address)).then_some(bridge)
}
