//! Reset of everything below a bridge by the bridge's control register, for kernels without `reset_subordinate`. Called
//! by `sysfs`, in the child.
//!
//! ```text
//! read what is below ─▶ assert ─▶ release ─▶ wait until all answer again ─▶ write it back ─▶ read again: the same?
//! ```
//! A reset makes a function forget its BARs and controls, and the kernel does not know that it happened: so the registers
//! that it restores after a reset of its own are written back here. Not all of them: a write to the VPD address register,
//! for example, can store into the device's EEPROM.

use std::{
    io, thread,
    time::{Duration, Instant},
};

use qudata_host::pci::PciAddress;

use crate::{
    config::{BAR_0, BRIDGE_CONTROL, CAP_EXPRESS, COMMAND, Config, FULL, HEADER, SECONDARY_BUS_RESET},
    sysfs::SysfsKernel,
};

/// The minimum is 1 ms (PCI Express Base 5.0 §7.5.1.3.13); the kernel gives 2.
const ASSERTED: Duration = Duration::from_millis(2);
/// Before this a device need not answer (§6.6.1).
const SETTLED: Duration = Duration::from_millis(100);
/// Cards answer within a second or two. Leaves room in the deadline of a reset for the kernel's own try before this one.
const ANSWERS_WITHIN: Duration = Duration::from_secs(25);
const PAUSE: Duration = Duration::from_millis(20);

/// Configuration space of one function before the reset.
struct Saved {
    address: PciAddress,
    config: Vec<u8>,
}

/// Resets what is below `bridge`, which must be `functions` and nothing else.
///
/// # Errors
/// When a function does not answer before or after, or does not keep what is written back.
pub(crate) fn reset(kernel: &SysfsKernel, bridge: PciAddress, functions: &[PciAddress]) -> io::Result<()> {
    let save = |address: &PciAddress| {
        let config = kernel.read_config(*address, FULL)?;
        if Config(&config).is_dead() {
            return Err(io::Error::other(format!("{address} does not answer, so nothing could be restored")));
        }
        Ok(Saved { address: *address, config })
    };
    let saved = functions.iter().map(save).collect::<io::Result<Vec<_>>>()?;
    let control = Config(&kernel.read_config(bridge, HEADER.try_into().unwrap_or(FULL))?)
        .u16(BRIDGE_CONTROL)
        .filter(|control| *control != u16::MAX)
        .ok_or_else(|| io::Error::other(format!("the bridge {bridge} does not answer")))?
        & !SECONDARY_BUS_RESET;
    kernel.write_config(bridge, BRIDGE_CONTROL, &(control | SECONDARY_BUS_RESET).to_le_bytes())?;
    thread::sleep(ASSERTED);
    kernel.write_config(bridge, BRIDGE_CONTROL, &control.to_le_bytes())?;
    thread::sleep(SETTLED);
    let end = Instant::now() + ANSWERS_WITHIN;
    saved.iter().try_for_each(|function| await_answer(kernel, function, end))?;
    saved.iter().try_for_each(|function| restore(kernel, function))
}

fn await_answer(kernel: &SysfsKernel, function: &Saved, end: Instant) -> io::Result<()> {
    let wanted = Config(&function.config).ids();
    loop {
        // A device that is not ready answers with a vendor of 0001 or ffff.
        let now = kernel.read_config(function.address, HEADER.try_into().unwrap_or(FULL))?;
        if Config(&now).ids() == wanted {
            return Ok(());
        }
        if Instant::now() >= end {
            return Err(io::Error::new(
                io::ErrorKind::TimedOut,
                format!("{} does not answer since its reset", function.address),
            ));
        }
        thread::sleep(PAUSE);
    }
}

fn restore(kernel: &SysfsKernel, function: &Saved) -> io::Result<()> {
    let before = Config(&function.config);
    let registers = registers(&before);
    for (at, length) in &registers {
        if let Some(bytes) = function.config.get(*at..at + length) {
            kernel.write_config(function.address, *at, bytes)?;
        }
    }
    let now = kernel.read_config(function.address, FULL)?;
    let lost = registers.iter().find(|(at, length)| {
        // What the device itself changes is not asked for: a link control register retrains and clears its own bits.
        *at < HEADER && now.get(*at..at + length) != function.config.get(*at..at + length)
    });
    match lost {
        None => Ok(()),
        Some((at, _)) => Err(io::Error::other(format!(
            "{} did not keep register {at:#04x} that was written back after its reset",
            function.address
        ))),
    }
}

/// What is written back, in this order: offset and length. Sizes before places, permission to use them last.
fn registers(config: &Config<'_>) -> Vec<(usize, usize)> {
    let mut registers = Vec::new();
    if let Some(at) = config.capability(CAP_EXPRESS) {
        // Device Control, Link Control, Device Control 2, Link Control 2.
        registers.extend([(at + 0x08, 2), (at + 0x10, 2), (at + 0x28, 2), (at + 0x30, 2)]);
    }
    let mut extended = |id: u16, parts: &[(usize, usize)]| {
        if let Some(at) = config.extended(id) {
            registers.extend(parts.iter().map(|(offset, length)| (at + offset, *length)));
        }
    };
    // Advanced Error Reporting: masks, severity, control.
    extended(0x01, &[(0x08, 4), (0x0c, 4), (0x14, 4), (0x18, 4)]);
    // Access Control Services: what keeps peers apart.
    extended(0x0d, &[(0x06, 2)]);
    // Address Translation Services, PASID: as the IOMMU driver set them.
    extended(0x0f, &[(0x06, 2)]);
    extended(0x1b, &[(0x06, 2)]);
    // Latency Tolerance Reporting.
    extended(0x18, &[(0x04, 4)]);
    if let Some(at) = config.extended(0x15) {
        // Resizable BARs: one control register per BAR; their number is in the first.
        let count = config.u32(at + 8).map_or(0, |control| (control >> 5) & 0b111);
        registers.extend((0..count).filter_map(|n| Some((at + 8 + 8 * usize::try_from(n).ok()?, 4))));
    }
    // Cache line size and latency timer, BARs, ROM, interrupt line.
    registers.push((0x0c, 2));
    registers.extend((0..6).map(|bar| (BAR_0 + 4 * bar, 4)));
    registers.extend([(0x30, 4), (0x3c, 1), (COMMAND, 2)]);
    registers
}
