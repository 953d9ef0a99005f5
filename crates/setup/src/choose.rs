//! Which GPUs are rented out. Pure; called by `plan`.
//!
//! The host's own display is left out unless it is named: the card of the firmware's console, the chip of the management
//! controller, graphics inside the processor.

use qudata_host::pci::PciAddress;
use qudata_vfio::topology::{Gpu, PciDevice};

use crate::{
    error::{Code, SetupError},
    observe::Observed,
    wish::{GpuWish, Wish},
};

/// Makers of the display chips of management controllers: ASPEED, Matrox.
const CONSOLES: [u16; 2] = [0x1a03, 0x102b];
/// Intel: its graphics on bus 0 are part of the processor.
const INTEL: u16 = 0x8086;
/// AMD as the maker of graphics, and of processors.
const ATI: u16 = 0x1002;
const AMD: u16 = 0x1022;

/// What was chosen.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Chosen {
    /// To be rented out.
    pub gpus: Vec<Gpu>,
    /// Not, and why.
    pub left_out: Vec<(PciAddress, String)>,
    /// The names for `agent.toml`; none: the agent finds the same by itself.
    pub named: Option<Vec<PciAddress>>,
}

/// Chooses.
///
/// # Errors
/// When nothing is left, or something that was named cannot be had.
pub fn choose(observed: &Observed, wish: &Wish) -> Result<Chosen, SetupError> {
    let named = observed.named_gpus(wish);
    let found = observed.topology.gpus(&named);
    let mut chosen = Chosen::default();
    if let Some(missing) = named.iter().find(|address| !observed.topology.devices.contains_key(address)) {
        let what = format!("there is no PCI device {missing}, which was named as a GPU");
        let remedy = format!("Name one of these: {}.", list(found.iter().map(|gpu| gpu.address)));
        return Err(SetupError::new(Code::NoGpu, what, remedy).next("qudata-agent install --plan --gpus all"));
    }
    let is_named = |gpu: &Gpu| named.iter().any(|address| gpu.functions.contains(address));
    for gpu in found {
        let device = observed.topology.devices.get(&gpu.address);
        let why = match device {
            _ if !named.is_empty() && !is_named(&gpu) => Some("not named".to_owned()),
            Some(device) if named.is_empty() => own_display(observed, &gpu, device).map(str::to_owned),
            _ => None,
        };
        match why.or_else(|| shared(observed, &gpu)) {
            Some(why) if is_named(&gpu) => return Err(group_shared(&gpu, &why)),
            Some(why) => chosen.left_out.push((gpu.address, why)),
            None => chosen.gpus.push(gpu),
        }
    }
    if chosen.gpus.is_empty() && !observed.settings.debug {
        return Err(nothing_left(&chosen.left_out));
    }
    chosen.named = names_for_agent(observed, wish, &chosen);
    Ok(chosen)
}

/// By itself the agent takes all display controllers but the firmware's console.
fn names_for_agent(observed: &Observed, wish: &Wish, chosen: &Chosen) -> Option<Vec<PciAddress>> {
    let addresses = || chosen.gpus.iter().map(|gpu| gpu.address).collect::<Vec<_>>();
    match &wish.gpus {
        GpuWish::Only(_) => Some(addresses()),
        GpuWish::Unsaid if !observed.settings.gpus.is_empty() => None,
        GpuWish::All | GpuWish::Unsaid => {
            let is_console = |address: &PciAddress| {
                observed.topology.devices.get(address).is_some_and(|device| device.boot_vga)
            };
            let differs = chosen.left_out.iter().any(|(address, _)| !is_console(address));
            let stale = !observed.settings.gpus.is_empty();
            (differs || stale).then(addresses)
        }
    }
}

fn own_display(observed: &Observed, gpu: &Gpu, device: &PciDevice) -> Option<&'static str> {
    if device.boot_vga {
        return Some("the host's own display");
    }
    if CONSOLES.contains(&device.vendor) {
        return Some("the display of the management controller");
    }
    // AMD's sit behind a bridge of their own, in a slot with functions of the processor: its security processor and USB.
    // A card has nothing of that vendor.
    let of_the_processor = || {
        let vendor =
            |function: &PciAddress| observed.topology.devices.get(function).map(|device| device.vendor);
        gpu.functions.iter().any(|function| vendor(function) == Some(AMD))
    };
    let inside = (device.vendor == INTEL && device.upstream.is_empty())
        || (device.vendor == ATI && of_the_processor());
    inside.then_some("graphics inside the processor")
}

/// What else is in its group; what is unknown before the IOMMU works is looked at after the reboot.
fn shared(observed: &Observed, gpu: &Gpu) -> Option<String> {
    let group = observed.topology.devices.get(&gpu.address)?.group?;
    let others = observed.topology.devices.values().filter(|other| {
        other.group == Some(group) && !other.is_bridge() && !gpu.functions.contains(&other.address)
    });
    let others: Vec<PciAddress> = others.map(|other| other.address).collect();
    (!others.is_empty()).then(|| format!("shares IOMMU group {group} with {}", list(others.into_iter())))
}

fn group_shared(gpu: &Gpu, why: &str) -> SetupError {
    SetupError::new(Code::GroupShared, format!("GPU {} {why}", gpu.address), SHARED_REMEDY)
        .next("qudata-agent doctor")
}

const SHARED_REMEDY: &str = "Switch ACS on in the firmware, or move the card to another slot; what shares a group can reach \
                             each other's memory.";

fn nothing_left(left_out: &[(PciAddress, String)]) -> SetupError {
    let reasons: Vec<String> = left_out.iter().map(|(address, why)| format!("{address}: {why}")).collect();
    if left_out.iter().any(|(_, why)| why.starts_with("shares")) {
        let what = format!("no GPU can be rented out ({})", reasons.join("; "));
        return SetupError::new(Code::GroupShared, what, SHARED_REMEDY).next("qudata-agent doctor");
    }
    if left_out.is_empty() {
        let remedy = "Is the card in its slot, does it have power, does `lspci` show it?";
        return SetupError::new(Code::NoGpu, "this host has no GPU", remedy).next("lspci -nn");
    }
    let what = format!("no GPU is left to rent out ({})", reasons.join("; "));
    let first = left_out.first().map(|(address, _)| address.to_string()).unwrap_or_default();
    let remedy =
        "A card that shows the host's own display is taken only when it is named; the display is lost then.";
    SetupError::new(Code::NoGpu, what, remedy).next(format!("qudata-agent install --gpus {first}"))
}

fn list(addresses: impl Iterator<Item = PciAddress>) -> String {
    let texts: Vec<String> = addresses.map(|address| address.to_string()).collect();
    if texts.is_empty() { "none".to_owned() } else { texts.join(", ") }
}
