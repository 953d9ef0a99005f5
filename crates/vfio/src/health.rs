//! Is this GPU still what it was? A baseline taken while it was well, compared with what its configuration space says
//! now. Called after every reset and, cheaply, while a tenant has the GPU.
//!
//! Only the `config` file is asked: for a device that fell off the bus every other file, and even a reset through VFIO,
//! goes on as if it were there.

use std::{collections::BTreeMap, time::Duration};

use qudata_host::pci::PciAddress;
use serde::{Deserialize, Serialize};

use crate::{
    config::{BASIC, Config},
    door::{Door, DoorError},
    op::{Op, configs},
    topology::{Bar, Gpu, Link, PciDevice, Topology},
};

/// A few hundred bytes per function.
const CHECK_DEADLINE: Duration = Duration::from_secs(5);

/// What a GPU was when it was well.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Baseline {
    /// By function.
    pub functions: BTreeMap<PciAddress, FunctionBaseline>,
}

/// What one function was.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FunctionBaseline {
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Its link.
    pub link: Option<Link>,
    /// Its memory BARs.
    pub bars: Vec<Bar>,
}

/// A GPU is not what it was.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unhealthy {
    /// Nothing answers.
    #[error(
        "{address} has fallen off the bus: its configuration space reads ff; a power cycle of the host may bring it back"
    )]
    OffTheBus {
        /// The function.
        address: PciAddress,
    },
    /// Something else answers.
    #[error("{address} answers as {}, and was {}", ids(*found), ids(*was))]
    OtherDevice {
        /// The function.
        address: PciAddress,
        /// Vendor and device id now.
        found: (u16, u16),
        /// Vendor and device id in the baseline.
        was: (u16, u16),
    },
    /// The link is worse.
    #[error("the link of {address} is {found}, and was {was}; reseat the card or its riser")]
    Link {
        /// The function.
        address: PciAddress,
        /// Now.
        found: String,
        /// In the baseline.
        was: String,
    },
    /// A memory region is lost.
    #[error("{address} has lost BAR {index}: {what}; reboot the host")]
    Bar {
        /// The function.
        address: PciAddress,
        /// Which.
        index: u8,
        /// What is wrong with it.
        what: &'static str,
    },
}

fn ids((vendor, device): (u16, u16)) -> String {
    format!("{vendor:04x}:{device:04x}")
}

/// A check gave no verdict, or a bad one.
#[derive(Debug, thiserror::Error)]
pub enum HealthError {
    /// Its configuration space could not be read.
    #[error("the GPU could not be checked")]
    Door(#[source] Box<DoorError>),
    /// It is not what it was.
    #[error("the GPU is not healthy")]
    Unhealthy(#[source] Unhealthy),
}

impl Baseline {
    /// The GPU as it is now.
    pub fn of(topology: &Topology, gpu: &Gpu) -> Self {
        let devices = gpu.functions.iter().filter_map(|address| topology.devices.get(address));
        Self { functions: devices.map(|device| (device.address, FunctionBaseline::of(device))).collect() }
    }

    /// The steps that read what [`Self::check`] wants.
    pub(crate) fn ops(&self) -> Vec<Op> {
        self.functions.keys().map(|address| Op::ReadConfig { address: *address, length: BASIC }).collect()
    }

    /// Compares with configuration space read just now, by function. A function that was not read is not healthy.
    ///
    /// # Errors
    /// The first difference that matters.
    pub fn check(&self, live: &BTreeMap<PciAddress, Vec<u8>>) -> Result<(), Unhealthy> {
        self.functions.iter().try_for_each(|(address, was)| {
            let bytes = live.get(address).map(Vec::as_slice).unwrap_or_default();
            was.check(*address, &Config(bytes))
        })
    }
}

impl FunctionBaseline {
    fn of(device: &PciDevice) -> Self {
        let PciDevice { vendor, device: id, link, bars, .. } = device;
        Self { vendor: *vendor, device: *id, link: *link, bars: bars.clone() }
    }

    fn check(&self, address: PciAddress, live: &Config<'_>) -> Result<(), Unhealthy> {
        if live.is_dead() {
            return Err(Unhealthy::OffTheBus { address });
        }
        let (found, was) = (live.ids(), (self.vendor, self.device));
        if found != was {
            return Err(Unhealthy::OtherDevice { address, found, was });
        }
        if let Some(was) = self.link.filter(is_plausible) {
            check_link(address, live.link(), was)?;
        }
        self.bars.iter().try_for_each(|bar| check_bar(address, live, bar))
    }
}

/// Before a fix of late 2025 the kernel tells ones for the link of a card that is asleep: a width of 63, and links have no
/// more than 32 lanes. Such a baseline says nothing of the link.
fn is_plausible(link: &Link) -> bool {
    link.width <= 32 && link.max_width <= 32
}

/// An idle link runs slower than it can, so what it can is compared; its width does not change by itself.
fn check_link(address: PciAddress, found: Option<Link>, was: Link) -> Result<(), Unhealthy> {
    let known = |now: u32, before: u32| before == 0 || now == before;
    let good = found.is_some_and(|found| {
        found.width >= was.width
            && known(found.max_width.into(), was.max_width.into())
            && known(found.max_speed, was.max_speed)
    });
    if good {
        return Ok(());
    }
    let words =
        |link: Link| format!("x{} of x{}, at most {} MT/s", link.width, link.max_width, link.max_speed);
    let found = found.map_or_else(|| "gone".to_owned(), words);
    Err(Unhealthy::Link { address, found, was: words(was) })
}

fn check_bar(address: PciAddress, live: &Config<'_>, was: &Bar) -> Result<(), Unhealthy> {
    let index = was.index;
    let lost = |what| Err(Unhealthy::Bar { address, index, what });
    match live.bar(index) {
        None => lost("it cannot be read"),
        Some(bar) if !bar.memory || bar.is_64bit != was.is_64bit => lost("it is of another kind"),
        Some(bar) if bar.address == 0 => lost("it has no address"),
        Some(_) => Ok(()),
    }
}

/// Reads and compares. Disturbs nobody: also for a GPU that a VM has.
///
/// # Errors
/// [`HealthError`].
pub async fn check(door: &Door, baseline: &Baseline) -> Result<(), HealthError> {
    let ops = baseline.ops();
    let replies = door.run(&ops, CHECK_DEADLINE).await.map_err(|error| HealthError::Door(Box::new(error)))?;
    baseline.check(&configs(&ops, replies)).map_err(HealthError::Unhealthy)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_link_of_a_card_that_was_asleep_is_not_asked_for_again() {
        let mut config = [0; 64];
        config[..4].copy_from_slice(&[0xde, 0x10, 0xb5, 0x20]);
        let was = |width| FunctionBaseline {
            vendor: 0x10de,
            device: 0x20b5,
            link: Some(Link { width, max_width: width, speed: 16_000, max_speed: 16_000 }),
            bars: Vec::new(),
        };
        let address = "0000:01:00.0".parse().unwrap();
        assert_eq!(was(63).check(address, &Config(&config)), Ok(()));
        assert!(matches!(was(16).check(address, &Config(&config)), Err(Unhealthy::Link { .. })));
    }
}
