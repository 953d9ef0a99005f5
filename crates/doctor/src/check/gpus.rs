//! `gpu.*` and `qemu.large_bars`: can each GPU be lent, and taken back clean?
//!
//! What may be lent is decided where GPUs are lent, by `vfio::plan` and `qemu::mmio`; this asks them, and tells all their
//! reasons where they tell the first.

mod refusals;

use qudata_agent_core::settings::FirmwareKind;
use qudata_host::size::ByteSize;
use qudata_qemu::{
    firmware::Firmware,
    mmio::{MmioPlan, plan_mmio},
    passthrough::{MemoryBar, PassthroughFunction, PassthroughSlot, warn_of_slow_bars},
};
use qudata_vfio::{
    holders::Holder,
    nvidia,
    plan::VFIO_PCI,
    reset::Method,
    topology::{Gpu, PciDevice},
};

use self::refusals::{Lent, refusals};
use super::{fail, pass, unseen, warn};
use crate::{
    Finding,
    observed::{GpuLook, GpuState, Observed, Pci, Unseen, is_display},
};

const PRESENT: &str = "gpu.present";
const DISPLAY: &str = "gpu.display";
const POWER: &str = "gpu.power";
const GROUP: &str = "gpu.group";
const DRIVER: &str = "gpu.driver";
const HOLDERS: &str = "gpu.holders";
const RESET: &str = "gpu.reset";
const BARS: &str = "gpu.bars";
const LINK: &str = "gpu.link";
const LARGE: &str = "qemu.large_bars";
/// Checks of each GPU.
const EACH: [&str; 7] = [POWER, GROUP, DRIVER, HOLDERS, RESET, BARS, LINK];

/// Without GPUs that are to be rented, the checks of each have nothing to say.
pub(super) fn check(seen: &Observed) -> Vec<Finding> {
    let pci = match &seen.pci {
        Ok(pci) => pci,
        Err(why) => {
            let all = [PRESENT, DISPLAY, LARGE].into_iter().chain(EACH);
            return all.map(|id| unseen(id, why)).collect();
        }
    };
    let candidates: Vec<&GpuLook> = seen.candidates(pci).collect();
    let mut findings = present(seen, pci, &candidates);
    findings.extend(display(seen, pci));
    findings.push(large_bars(seen, pci, &candidates));
    for look in &candidates {
        let address = look.gpu.address;
        findings.extend(one(seen, pci, look).into_iter().map(|finding| finding.on(address)));
    }
    findings
}

fn present(seen: &Observed, pci: &Pci, candidates: &[&GpuLook]) -> Vec<Finding> {
    let mut findings: Vec<Finding> = Vec::new();
    let configured = &seen.settings.gpu_pci_addrs;
    let absent = configured.iter().filter(|address| pci.topology.gpu(**address).is_none());
    findings.extend(absent.map(|address| {
        let remedy = "take it out of gpu_pci_addrs, or reseat the card; `lspci -D` lists what is there";
        fail(PRESENT, "configured, and no such device", remedy).on(address)
    }));
    if !candidates.is_empty() {
        let names: Vec<&str> = candidates.iter().map(|look| look.name.as_str()).collect();
        let same = names.iter().all(|name| Some(name) == names.first());
        let names =
            if same { names.first().copied().unwrap_or_default().to_owned() } else { names.join(", ") };
        findings.push(pass(PRESENT, format!("{} to be rented: {names}", count(candidates.len()))));
    } else if configured.is_empty() {
        findings.push(nothing_to_rent(seen, pci));
    }
    findings
}

fn nothing_to_rent(seen: &Observed, pci: &Pci) -> Finding {
    if seen.settings.debug {
        return warn(
            PRESENT,
            "no GPU; QUDATA_DEBUG=true runs without",
            "take it away on a host that rents GPUs out",
        );
    }
    match pci.gpus.first() {
        None => fail(
            PRESENT,
            "there is no GPU",
            "reseat the card and its power cables; `lspci -D` lists what is there",
        ),
        Some(look) => fail(
            PRESENT,
            format!("the only GPU, {} ({}), has the firmware's console", look.gpu.address, look.name),
            format!(
                "move the console to another card in the firmware setup, or accept that it goes dark: set \
                 gpu_pci_addrs = [\"{}\"]",
                look.gpu.address
            ),
        ),
    }
}

pub(super) fn count(gpus: usize) -> String {
    if gpus == 1 { "1 GPU".to_owned() } else { format!("{gpus} GPUs") }
}

fn display(seen: &Observed, pci: &Pci) -> Vec<Finding> {
    let on_display: Vec<Finding> = pci
        .gpus
        .iter()
        .filter(|look| is_display(pci, &look.gpu))
        .map(|look| {
            let named = seen.is_named(&look.gpu);
            let finding = if named {
                warn(
                    DISPLAY,
                    "the firmware's console is on it and it is configured: the console goes dark while it is rented",
                    "keep another way in (SSH, BMC); or move the console to another card in the firmware setup",
                )
            } else {
                pass(DISPLAY, format!("the console's card ({}) is left to the host", look.name))
            };
            finding.on(look.gpu.address)
        })
        .collect();
    if on_display.is_empty() { vec![pass(DISPLAY, "no GPU has the host's console")] } else { on_display }
}

/// A GPU whose own files were read.
struct Card<'a> {
    seen: &'a Observed,
    pci: &'a Pci,
    look: &'a GpuLook,
    state: &'a GpuState,
    lent: Option<Lent>,
}

fn one(seen: &Observed, pci: &Pci, look: &GpuLook) -> Vec<Finding> {
    let state = match &look.state {
        Ok(state) => state,
        Err(why) => return EACH.map(|id| unseen(id, why)).into(),
    };
    let card = Card { seen, pci, look, state, lent: lent(seen, pci, look, state) };
    let mut findings = vec![power(state), bars(seen, pci, look, state), link(pci, &look.gpu)];
    let refused = refusals(seen, pci, &look.gpu, state, card.lent.is_some());
    for id in [GROUP, DRIVER, HOLDERS, RESET] {
        if !refused.iter().any(|finding| finding.id == id) {
            findings.push(card.in_order(id));
        }
    }
    findings.extend(refused);
    findings
}

/// Whether an instance has the GPU: by the agent's word, or without it because one of its VMs holds the GPU.
fn lent(seen: &Observed, pci: &Pci, look: &GpuLook, state: &GpuState) -> Option<Lent> {
    let word =
        seen.agents_word(&look.gpu).filter(|word| !matches!(word.state.as_str(), "free" | "quarantined"));
    if let Some(word) = word {
        let whose = word.instance.as_ref().map_or_else(String::new, |id| format!(" by instance {id}"));
        return Some(Lent(format!("{}{whose}", word.state.replace('_', " "))));
    }
    let ours = |holder: &&Holder| match holder {
        Holder::Process(process) => {
            let unit = process.unit.as_deref().is_some_and(|unit| unit.starts_with("qudata-vm-"));
            unit || pci.own.contains(&process.pid)
        }
        Holder::Framebuffer { .. }
        | Holder::Console { .. }
        | Holder::Module { .. }
        | Holder::Unseen { .. } => false,
    };
    state.holders.iter().find(ours).map(|holder| Lent(format!("in use by an instance: {holder}")))
}

impl Card<'_> {
    /// What there is to say where nothing is refused.
    fn in_order(&self, id: &'static str) -> Finding {
        let device = self.pci.topology.devices.get(&self.look.gpu.address);
        match id {
            GROUP => group(device, &self.look.gpu),
            DRIVER => driver(self.seen, self.pci, device),
            HOLDERS => holders(self.seen, self.state, self.lent.as_ref()),
            _ => reset(self.seen, self.pci, &self.look.gpu),
        }
    }
}

fn group(device: Option<&PciDevice>, gpu: &Gpu) -> Finding {
    let Some(group) = device.and_then(|device| device.group) else {
        return unseen(GROUP, &Unseen::Needs("the IOMMU is off"));
    };
    match gpu.functions.len() {
        1 => pass(GROUP, format!("alone in IOMMU group {group}")),
        functions => pass(GROUP, format!("its {functions} functions are alone in IOMMU group {group}")),
    }
}

fn driver(seen: &Observed, pci: &Pci, device: Option<&PciDevice>) -> Finding {
    let is_loaded =
        pci.topology.isolation.vfio_pci || device.is_some_and(|d| d.driver.as_deref() == Some(VFIO_PCI));
    let loaded = match &seen.kernel.has_vfio_pci {
        _ if is_loaded => "",
        Ok(true) => "; vfio-pci is there and will be loaded",
        Ok(false) => {
            return fail(
                DRIVER,
                format!("the kernel {} has no module vfio-pci", seen.kernel.release),
                "install the kernel's full module package (Ubuntu: linux-modules-extra), or another kernel",
            );
        }
        Err(why) => return unseen(DRIVER, why),
    };
    match device.and_then(|device| device.driver.as_deref()) {
        Some(VFIO_PCI) => pass(DRIVER, "vfio-pci has it"),
        Some(driver) => pass(DRIVER, format!("{driver} has it and gets it back after an instance{loaded}")),
        None => pass(DRIVER, format!("no driver has it{loaded}")),
    }
}

fn holders(seen: &Observed, state: &GpuState, lent: Option<&Lent>) -> Finding {
    if let Some(Lent(how)) = lent {
        return pass(HOLDERS, how.clone());
    }
    if let Some(Holder::Unseen { why }) = state.holders.iter().find(|h| matches!(h, Holder::Unseen { .. })) {
        let why = if seen.is_root { Unseen::Failed(why.clone()) } else { Unseen::Denied(why.clone()) };
        return unseen(HOLDERS, &why);
    }
    let yielding: Vec<String> =
        state.holders.iter().filter(|h| nvidia::yields(h)).map(ToString::to_string).collect();
    match yielding.as_slice() {
        [] => pass(HOLDERS, "nobody uses it"),
        list => pass(HOLDERS, format!("{}: stopped while an instance has it", list.join(", "))),
    }
}

fn reset(seen: &Observed, pci: &Pci, gpu: &Gpu) -> Finding {
    match Method::choose(&pci.topology, gpu) {
        None => unseen(RESET, &Unseen::Failed("no way to reset it is known".to_owned())),
        Some(Method::Bridge(bridge)) => match seen.kernel.lockdown.as_deref() {
            Ok("none") => pass(RESET, format!("by {}", Method::Bridge(bridge))),
            Ok(lockdown) => fail(
                RESET,
                format!(
                    "it can be reset only through bridge {bridge}, and the kernel's lockdown ({lockdown}) forbids that"
                ),
                "turn Secure Boot off in the firmware setup, or boot with lockdown=none where the kernel allows it",
            ),
            Err(why) => unseen(RESET, why),
        },
        Some(Method::OnlyFunction(_, method)) if method == "pm" => warn(
            RESET,
            "only by switching its power state (pm): a card may keep what a tenant left in its memory",
            "put it into a slot with a port of its own; `qudata-agent gpu topo` shows who shares one",
        ),
        Some(method) => pass(RESET, format!("by {method}")),
    }
}

fn power(state: &GpuState) -> Finding {
    match state.dead.first() {
        None => pass(POWER, "it answers"),
        Some(function) => fail(
            POWER,
            format!("{function} has fallen off the bus: its configuration space reads ff"),
            "switch the host off and on (a reboot is often not enough); if it comes again, check power cables and riser",
        ),
    }
}

fn link(pci: &Pci, gpu: &Gpu) -> Finding {
    let link = pci.topology.devices.get(&gpu.address).and_then(|device| device.link);
    match link {
        None => pass(LINK, "no PCI Express link to look at"),
        Some(link) if link.width < link.max_width => warn(
            LINK,
            format!("{} of {} lanes are in use: the card works, slower", link.width, link.max_width),
            "reseat the card or its riser; a slot with fewer lanes, or lanes that slots share, stay as they are",
        ),
        Some(link) => {
            // An idle card lowers its speed; the width is what stays.
            pass(LINK, format!("{} lanes, up to {} GT/s", link.width, link.max_speed / 1000))
        }
    }
}

fn bars(seen: &Observed, pci: &Pci, look: &GpuLook, state: &GpuState) -> Finding {
    if let Some((function, index, size)) = state.unplaced.first() {
        return fail(
            BARS,
            format!("BAR {index} ({size}) of {function} has no address: the firmware found no room for it"),
            "turn on \"Above 4G Decoding\" in the firmware setup (and \"Resizable BAR\" off if that is not enough)",
        );
    }
    let slot = match slot(seen, pci, &look.gpu) {
        Ok(slot) => slot,
        Err(why) => return unseen(BARS, &Unseen::Failed(why)),
    };
    let total: u64 = slot.functions().iter().flat_map(|f| &f.bars).map(|bar| bar.size.bytes()).sum();
    match fit(seen, &[slot]) {
        Err(Fit::Unknown(why)) => unseen(BARS, &Unseen::Failed(why)),
        Err(Fit::Refused(why)) => {
            fail(BARS, why, "use a processor with more physical address bits, or give instances less RAM")
        }
        Ok(plan) => {
            let bits =
                plan.map_or_else(String::new, |plan| format!(" with {} address bits", plan.address_bits()));
            pass(BARS, format!("{} of BARs fit a guest{bits}", rounded(total)))
        }
    }
}

enum Fit {
    Unknown(String),
    Refused(String),
}

/// Whether a guest of the default size has room for these.
fn fit(seen: &Observed, slots: &[PassthroughSlot]) -> Result<Option<MmioPlan>, Fit> {
    let width = seen.processor.as_ref().map_err(|why| Fit::Unknown(why.to_string()))?.width;
    let width =
        width.ok_or_else(|| Fit::Unknown("/proc/cpuinfo does not tell the address bits".to_owned()))?;
    let firmware = match seen.settings.firmware {
        FirmwareKind::Uefi => Firmware::Uefi { code: Default::default(), vars: Default::default() },
        // Both place BARs by SeaBIOS.
        FirmwareKind::Bios | FirmwareKind::Direct => Firmware::Bios,
    };
    plan_mmio(slots, seen.settings.vm_memory, width, &firmware)
        .map_err(|error| Fit::Refused(error.to_string()))
}

fn slot(seen: &Observed, pci: &Pci, gpu: &Gpu) -> Result<PassthroughSlot, String> {
    let functions = gpu.functions.iter().filter_map(|address| pci.topology.devices.get(address));
    let function = |device: &PciDevice| {
        let bar = |bar: &qudata_vfio::topology::Bar| MemoryBar {
            size: ByteSize::from_bytes(bar.size),
            is_64bit: bar.is_64bit,
            prefetchable: bar.prefetchable,
        };
        PassthroughFunction { address: device.address, bars: device.bars.iter().map(bar).collect() }
    };
    PassthroughSlot::new(functions.map(function).collect(), seen.settings.gpu_no_mmap)
        .map_err(|error| error.to_string())
}

/// `128G`, not `128.03125G`.
fn rounded(bytes: u64) -> ByteSize {
    let size = ByteSize::from_bytes(bytes);
    if size.gib() > 0 { ByteSize::from_gib(size.gib()) } else { size }
}

fn large_bars(seen: &Observed, pci: &Pci, candidates: &[&GpuLook]) -> Finding {
    let Some(qemu) = seen.programs.qemu_version else {
        return unseen(LARGE, &Unseen::Needs("the version of QEMU is not known"));
    };
    let kernel = match &seen.kernel.version {
        Ok(kernel) => *kernel,
        Err(why) => return unseen(LARGE, why),
    };
    let slots: Vec<PassthroughSlot> =
        candidates.iter().filter_map(|look| slot(seen, pci, &look.gpu).ok()).collect();
    match warn_of_slow_bars(&slots, kernel, qemu) {
        None => pass(LARGE, "no GPU's memory is mapped slowly"),
        Some(slow) => warn(
            LARGE,
            format!(
                "{} mapped page by page by Linux {kernel} with QEMU {qemu}: an instance with all of them starts about {} s later",
                count(slow.gpus.len()),
                slow.seconds
            ),
            "update to Linux 6.12 and QEMU 9.2 or newer; or set gpu_no_mmap = true (slower, no direct transfers between GPUs)",
        ),
    }
}
