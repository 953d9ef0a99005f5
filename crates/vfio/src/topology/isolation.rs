//! What the kernel says about keeping devices away from the host's memory. Called by `observe`.

use std::{
    fs::File,
    io::{self, BufRead, BufReader, Read},
    path::Path,
};

use super::{
    Isolation,
    read::{is_gone, read_small},
};

/// `/proc/interrupts` of the largest servers has some 20 MiB.
const MOST_INTERRUPTS: u64 = 256 << 20;

/// Whether forged interrupts are allowed, by either of the two ways that the kernel maps DMA for `vfio`.
const UNSAFE_INTERRUPTS: [&str; 2] = [
    "sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts",
    "sys/module/iommufd/parameters/allow_unsafe_interrupts",
];

/// Reads it. `Err` names the file that could not be read.
pub(super) fn observe(root: &Path) -> Result<Isolation, (String, io::Error)> {
    let mut isolation =
        Isolation { vfio_pci: root.join("sys/bus/pci/drivers/vfio-pci").exists(), ..Isolation::default() };
    let named = |file: &'static str| move |error| (format!("/{file}"), error);
    for file in UNSAFE_INTERRUPTS {
        match read_small(&root.join(file)) {
            Ok(text) => isolation.unsafe_interrupts |= matches!(text.as_str(), "Y" | "y" | "1"),
            // Not loaded: nobody has allowed anything.
            Err(error) if is_gone(&error) => {}
            Err(error) => return Err(named(file)(error)),
        }
    }
    let line = read_small(&root.join("proc/cmdline")).map_err(named("proc/cmdline"))?;
    isolation.acs_override = overrides_acs(&line);
    let interrupts = File::open(root.join("proc/interrupts")).map_err(named("proc/interrupts"))?;
    isolation.interrupt_remapping =
        remaps(BufReader::with_capacity(64 << 10, interrupts.take(MOST_INTERRUPTS)))
            .map_err(named("proc/interrupts"))?;
    Ok(isolation)
}

/// Whether `pcie_acs_override` is among the kernel's own parameters: what follows `--` is for init.
fn overrides_acs(line: &str) -> bool {
    line.split_ascii_whitespace()
        .take_while(|word| *word != "--")
        .any(|word| word == "pcie_acs_override" || word.starts_with("pcie_acs_override="))
}

/// Whether any interrupt comes through a chip that remaps: their names begin with `IR-`, on Intel and AMD.
fn remaps(interrupts: impl BufRead) -> io::Result<bool> {
    for line in interrupts.split(b'\n') {
        if line?.split(|byte| *byte == b' ').any(|word| word.starts_with(b"IR-")) {
            return Ok(true);
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_kernels_own_parameter_counts() {
        for (line, expected) in [
            ("ro pcie_acs_override=downstream,multifunction quiet", true),
            ("pcie_acs_override", true),
            ("ro quiet", false),
            ("xpcie_acs_override=downstream", false),
            ("pcie_acs_overrides=1", false),
            ("ro -- pcie_acs_override=downstream", false),
            ("", false),
        ] {
            assert_eq!(overrides_acs(line), expected, "{line}");
        }
    }

    #[test]
    fn chips_that_remap() {
        let with = b"  CPU0\n 0: 36 IR-IO-APIC 2-edge timer\n";
        let msix = b"  CPU0\n 130: 0 0 IR-PCI-MSIX-0000:01:00.0 0-edge nvidia\n";
        let without = b"  CPU0\n 0: 36 IO-APIC 2-edge AIR-IO\n \xff\n NMI: 0 Non-maskable interrupts\n";
        assert!(remaps(&with[..]).unwrap() && remaps(&msix[..]).unwrap());
        assert!(!remaps(&without[..]).unwrap() && !remaps(&b""[..]).unwrap());
    }
}
