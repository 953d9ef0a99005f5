//! The GPUs as the control plane sorts them: a model, how many, how much memory. Pure; part of `facts`.

use std::collections::BTreeMap;

use qudata_host::pci::PciAddress;
use qudata_vfio::topology::{Gpu, PciDevice, Topology};

/// A model's name is cut to so many characters.
const NAME: usize = 64;
/// Smaller regions are windows into the memory, not the memory.
const WHOLE_MEMORY: u64 = 4 << 30;
/// Makers, as lists of PCI names write them before a model.
const MAKERS: [&str; 7] = [
    "NVIDIA Corporation",
    "Advanced Micro Devices, Inc. [AMD/ATI]",
    "Intel Corporation",
    "NVIDIA",
    "AMD",
    "ATI",
    "Intel",
];

/// GiB of models whose name does not say it and whose memory cannot be mapped whole: the makers' data sheets, for models
/// that exist in one size only.
const MEMORY: [(&str, u16); 28] = [
    ("A10", 24),
    ("A10G", 24),
    ("A16", 16),
    ("A2", 16),
    ("A40", 48),
    ("L4", 24),
    ("L40", 48),
    ("L40S", 48),
    ("RTX 5000 Ada Generation", 32),
    ("RTX 6000 Ada Generation", 48),
    ("RTX A4000", 16),
    ("RTX A4500", 20),
    ("RTX A5000", 24),
    ("RTX A6000", 48),
    ("Tesla P4", 8),
    ("Tesla P40", 24),
    ("Tesla T4", 16),
    ("GeForce RTX 2080 Ti", 11),
    ("GeForce RTX 3070", 8),
    ("GeForce RTX 3080 Ti", 12),
    ("GeForce RTX 3090", 24),
    ("GeForce RTX 3090 Ti", 24),
    ("GeForce RTX 4080", 16),
    ("GeForce RTX 4080 SUPER", 16),
    ("GeForce RTX 4090", 24),
    ("GeForce RTX 4070 Ti", 12),
    ("GeForce RTX 5080", 16),
    ("GeForce RTX 5090", 32),
];

/// What the control plane is told of the GPUs.
#[derive(Debug, Default, Clone, PartialEq)]
pub(super) struct GpuFacts {
    /// Model without maker and spaces; empty without GPUs.
    pub(super) name: String,
    pub(super) amount: u32,
    /// GiB of one; 0 where it cannot be told.
    pub(super) vram: f64,
}

/// The GPUs that may be rented: those configured, otherwise all but the one with the host's console. The contract knows one
/// model a host, so of several it is the most frequent one.
pub(super) fn plan_gpus(
    topology: &Topology,
    configured: &[PciAddress],
    name: &dyn Fn(u16, u16) -> Option<String>,
) -> GpuFacts {
    let device = |gpu: &Gpu| topology.devices.get(&gpu.address);
    let offered = |gpu: &Gpu| match configured {
        [] => device(gpu).is_some_and(|device| !device.boot_vga),
        _ => gpu.functions.iter().any(|function| configured.contains(function)),
    };
    let mut models: BTreeMap<(u16, u16), Vec<&PciDevice>> = BTreeMap::new();
    let gpus = topology.gpus(configured);
    for device in gpus.iter().filter(|gpu| offered(gpu)).filter_map(device) {
        models.entry((device.vendor, device.device)).or_default().push(device);
    }
    let Some(((vendor, id), devices)) = models.iter().rev().max_by_key(|(_, devices)| devices.len()) else {
        return GpuFacts::default();
    };
    if models.len() > 1 {
        tracing::warn!(models = models.len(), "the control plane is told of the most frequent model only");
    }
    let listed = name(*vendor, *id).unwrap_or_default();
    let model = model(&listed);
    let name = match one_word(model) {
        word if word.is_empty() => format!("{vendor:04x}:{id:04x}"),
        word => word,
    };
    // Not what guests report: a tenant would decide what this host is offered as.
    let vram = size_in(model).or_else(|| listed_size(model)).or_else(|| largest_region(devices));
    if vram.is_none() {
        tracing::warn!(gpu = name, "the size of the GPU's memory cannot be told from outside");
    }
    let amount = u32::try_from(devices.len()).unwrap_or(u32::MAX);
    GpuFacts { name, amount, vram: vram.unwrap_or_default() }
}

/// `Tesla T4` of `NVIDIA Corporation TU104GL [Tesla T4]`: what stands in brackets at the end, otherwise all behind the maker.
fn model(listed: &str) -> &str {
    let listed = listed.trim();
    let bracketed = listed.strip_suffix(']').and_then(|rest| rest.rsplit_once('[')).map(|(_, inside)| inside);
    let mut text = bracketed.unwrap_or(listed).trim();
    for maker in MAKERS {
        // Not `AMDGPU`: a whole word.
        if let Some(rest) = text.strip_prefix(maker).filter(|rest| rest.starts_with(char::is_whitespace)) {
            text = rest.trim();
        }
    }
    text
}

/// `TeslaT4` of `Tesla T4`.
fn one_word(model: &str) -> String {
    model.chars().filter(char::is_ascii_graphic).take(NAME).collect()
}

/// 80 of `A100 PCIe 80GB`.
fn size_in(model: &str) -> Option<f64> {
    let words = model.split(|c: char| !c.is_ascii_alphanumeric());
    let sizes = words.filter_map(|word| word.strip_suffix("GB")?.parse::<u16>().ok());
    sizes.filter(|gib| (1..=4096).contains(gib)).map(f64::from).next()
}

fn listed_size(model: &str) -> Option<f64> {
    MEMORY.iter().find(|(name, _)| *name == model).map(|(_, gib)| f64::from(*gib))
}

/// GPUs whose whole memory can be mapped show it as one region, of the next power of two.
fn largest_region(devices: &[&PciDevice]) -> Option<f64> {
    let regions = devices.iter().flat_map(|device| &device.bars).filter(|bar| bar.prefetchable);
    let largest = regions.map(|bar| bar.size).max().filter(|size| *size >= WHOLE_MEMORY)?;
    u32::try_from(largest >> 30).ok().map(f64::from)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use qudata_vfio::topology::Bar;

    use super::*;

    #[test]
    fn models_are_written_without_maker_and_spaces() {
        for (listed, expected) in [
            ("NVIDIA Corporation TU104GL [Tesla T4]", "TeslaT4"),
            ("NVIDIA Corporation GA100 [A100 PCIe 80GB]", "A100PCIe80GB"),
            ("NVIDIA Corporation GH100 [H100 SXM5 80GB]", "H100SXM580GB"),
            ("NVIDIA Corporation GA102 [GeForce RTX 3090]", "GeForceRTX3090"),
            (
                "Advanced Micro Devices, Inc. [AMD/ATI] Navi 21 [Radeon RX 6800/6800 XT / 6900 XT]",
                "RadeonRX6800/6800XT/6900XT",
            ),
            ("Advanced Micro Devices, Inc. [AMD/ATI] Device", "Device"),
            ("Intel Corporation DG2 [Arc A770]", "ArcA770"),
            ("NVIDIA Corporation 2331", "2331"),
            ("NVIDIA Corporation X [NVIDIA T4]", "T4"),
            ("Q [\u{1b}[2J\u{e9}T4]", "2JT4"),
            ("[]", ""),
        ] {
            assert_eq!(one_word(model(listed)), expected, "{listed}");
        }
    }

    #[test]
    fn memory_in_names() {
        for (name, gib) in [
            ("A100 PCIe 80GB", Some(80.0)),
            ("H100 SXM5 80GB", Some(80.0)),
            ("A100-SXM4-40GB", Some(40.0)),
            ("Tesla T4", None),
            ("GB200", None),
            ("0GB", None),
            ("99999GB", None),
        ] {
            assert_eq!(size_in(name), gib, "{name}");
        }
    }

    fn device(address: &str, id: u16, bar: u64, boot_vga: bool) -> PciDevice {
        PciDevice {
            address: address.parse().unwrap(),
            class: 0x03_0200,
            vendor: 0x10de,
            device: id,
            driver: None,
            group: None,
            numa_node: None,
            link: None,
            bars: vec![
                Bar { index: 0, size: 16 << 20, is_64bit: false, prefetchable: false },
                Bar { index: 1, size: bar, is_64bit: true, prefetchable: true },
            ],
            reset_methods: Vec::new(),
            upstream: Vec::new(),
            boot_vga,
            physical: None,
        }
    }

    fn plan(devices: &[PciDevice], configured: &[&str]) -> GpuFacts {
        let devices = devices.iter().map(|device| (device.address, device.clone())).collect();
        let topology = Topology { devices, ..Topology::default() };
        let configured: Vec<PciAddress> = configured.iter().map(|address| address.parse().unwrap()).collect();
        plan_gpus(&topology, &configured, &|_, id| match id {
            0x20b5 => Some("NVIDIA Corporation GA100 [A100 PCIe 80GB]".into()),
            0x1eb8 => Some("NVIDIA Corporation TU104GL [Tesla T4]".into()),
            _ => None,
        })
    }

    #[test]
    fn the_most_frequent_model_is_told() {
        let devices = [
            device("01:00.0", 0x1eb8, 256 << 20, true),
            device("02:00.0", 0x1eb8, 256 << 20, false),
            device("03:00.0", 0x20b5, 128 << 30, false),
            device("04:00.0", 0x20b5, 128 << 30, false),
            device("05:00.0", 0x9999, 32 << 30, false),
        ];
        assert_eq!(plan(&devices, &[]), GpuFacts { name: "A100PCIe80GB".into(), amount: 2, vram: 80.0 });
        assert_eq!(plan(&devices, &["01:00.0"]), GpuFacts { name: "TeslaT4".into(), amount: 1, vram: 16.0 });
        assert_eq!(
            plan(&devices, &["05:00.0"]),
            GpuFacts { name: "10de:9999".into(), amount: 1, vram: 32.0 }
        );
        assert_eq!(plan(&devices, &["09:00.0"]), GpuFacts::default());
        assert_eq!(plan(&devices[..1], &[]), GpuFacts::default(), "the host's console is not rented");
    }

    proptest! {
        #[test]
        fn any_name_is_one_word(name in "\\PC{0,150}") {
            let word = one_word(model(&name));
            prop_assert!(word.len() <= NAME && word.bytes().all(|byte| byte.is_ascii_graphic()));
            prop_assert!(size_in(model(&name)).is_none_or(|gib| (1.0..=4096.0).contains(&gib)));
        }
    }
}
