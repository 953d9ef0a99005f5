//! Fills in a [`Topology`] from sysfs. Called by the agent at start, by its beat and before it acts on a GPU.
//!
//! Reads only attributes that the kernel answers without the device's lock, so a device whose driver is stuck in an
//! unbind or a reset is seen like any other: never `driver_override`, `uevent`, `reset` or `power_state`.
//!
//! A device may vanish at any moment (hot unplug, a virtual function that is switched off). What has vanished is left
//! out. What is still there and cannot be understood is an error: a group that misses a member would look isolated.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use qudata_host::pci::PciAddress;

use super::{
    PciDevice, Topology, isolation, parse,
    read::{is_gone, link_name, read_small},
};

/// The group that vfio makes up for a device without an IOMMU, when somebody has switched that on.
const NO_IOMMU: &str = "vfio-noiommu";

/// The host's PCI devices could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ObserveError {
    /// A directory or file of the host as a whole.
    #[error(
        "cannot read {path}, which lists the host's PCI devices or their isolation: is it mounted and readable?"
    )]
    Host {
        /// Which one.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A file of a device that is there.
    #[error("cannot read {file} of PCI device {address}")]
    Device {
        /// The device.
        address: PciAddress,
        /// The file in its directory.
        file: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A file of a device holds something that no kernel writes.
    #[error("{file} of PCI device {address} is {content:?}, which is not a form this version knows")]
    Content {
        /// The device.
        address: PciAddress,
        /// The file in its directory.
        file: &'static str,
        /// What it holds, cut to 80 characters.
        content: String,
    },
}

/// Reads all PCI functions and what the kernel says about isolation. `root` is `/` but in tests. A host without PCI has
/// no devices.
///
/// # Errors
/// When sysfs or procfs is not there, or a device is there and cannot be read or understood.
pub fn observe(root: &Path) -> Result<Topology, ObserveError> {
    let mut devices = BTreeMap::new();
    for address in addresses(root)? {
        let files = Files { dir: root.join("sys/bus/pci/devices").join(address.to_string()), address };
        if let Some(device) = device_or_gone(&files)? {
            devices.insert(address, device);
        }
    }
    let isolation = isolation::observe(root)
        .map_err(|(path, source)| ObserveError::Host { path: path.into(), source })?;
    Ok(Topology { devices, isolation })
}

fn addresses(root: &Path) -> Result<Vec<PciAddress>, ObserveError> {
    let dir = Path::new("/sys/bus/pci/devices");
    let failed = |source| ObserveError::Host { path: dir.into(), source };
    let here = root.join("sys/bus/pci/devices");
    let entries = match fs::read_dir(&here) {
        Ok(entries) => entries,
        Err(error) if is_gone(&error) && root.join("sys/bus").is_dir() => return Ok(Vec::new()),
        Err(error) => return Err(failed(error)),
    };
    let mut addresses = Vec::new();
    for entry in entries {
        let name = entry.map_err(failed)?.file_name();
        let address = name.to_str().and_then(|name| name.parse().ok());
        addresses.push(address.ok_or_else(|| {
            failed(io::Error::new(io::ErrorKind::InvalidData, format!("{name:?} is not a PCI address")))
        })?);
    }
    Ok(addresses)
}

/// The directory of one device.
struct Files {
    dir: PathBuf,
    address: PciAddress,
}

impl Files {
    fn failed(&self, file: &'static str) -> impl FnOnce(io::Error) -> ObserveError {
        let address = self.address;
        move |source| ObserveError::Device { address, file, source }
    }

    /// Content of a file that every device has, understood by `parse`.
    fn must<T>(&self, file: &'static str, parse: impl Fn(&str) -> Option<T>) -> Result<T, ObserveError> {
        let text = read_small(&self.dir.join(file)).map_err(self.failed(file))?;
        parse(&text).ok_or_else(|| {
            let content = text.chars().take(80).collect();
            ObserveError::Content { address: self.address, file, content }
        })
    }

    /// Content of a file that not every device or kernel has, and where not having it is an answer.
    fn may(&self, file: &'static str) -> Result<Option<String>, ObserveError> {
        match read_small(&self.dir.join(file)) {
            Ok(text) => Ok(Some(text)),
            Err(error) if is_gone(&error) => Ok(None),
            Err(error) => Err(self.failed(file)(error)),
        }
    }

    /// The name behind a link that not every device has.
    fn link(&self, file: &'static str) -> Result<Option<String>, ObserveError> {
        match link_name(&self.dir.join(file)) {
            Ok(name) => Ok(Some(name)),
            Err(error) if is_gone(&error) => Ok(None),
            Err(error) => Err(self.failed(file)(error)),
        }
    }
}

/// The device, or nothing when it vanished. The kernel takes the files of a device away one by one: a missing file is an
/// error only when the device is still there a while later.
fn device_or_gone(files: &Files) -> Result<Option<PciDevice>, ObserveError> {
    // A second in all: hundreds of times what the kernel needs.
    let mut patience = 200;
    loop {
        let error = match device(files) {
            Ok(device) => return Ok(Some(device)),
            Err(_) if !files.dir.exists() => return Ok(None),
            Err(error) => error,
        };
        let leaving = matches!(&error, ObserveError::Device { source, .. } if is_gone(source));
        if !leaving || patience == 0 {
            return Err(error);
        }
        patience -= 1;
        thread::sleep(Duration::from_millis(5));
    }
}

fn device(files: &Files) -> Result<PciDevice, ObserveError> {
    let number = |most: u64| move |text: &str| parse::hex(text).filter(|number| *number <= most);
    let id = |text: &str| parse::hex(text).and_then(|id| u16::try_from(id).ok());
    let class = files.must("class", number(0xff_ffff))?;
    let target = files.dir.read_link().map_err(files.failed("."))?;
    Ok(PciDevice {
        address: files.address,
        class: u32::try_from(class).unwrap_or_default(),
        vendor: files.must("vendor", id)?,
        device: files.must("device", id)?,
        driver: files.link("driver")?,
        group: group(files)?,
        numa_node: files.may("numa_node")?.as_deref().and_then(parse::numa_node),
        link: link(files),
        bars: files.must("resource", parse::bars)?,
        reset_methods: parse::reset_methods(&files.may("reset_method")?.unwrap_or_default()),
        upstream: parse::upstream(&target, files.address),
        boot_vga: files.may("boot_vga")?.as_deref() == Some("1"),
        physical: files.link("physfn")?.and_then(|name| name.parse().ok()),
    })
}

/// The group, unless it is one that vfio made up: such a one isolates nothing.
fn group(files: &Files) -> Result<Option<u32>, ObserveError> {
    let Some(name) = files.link("iommu_group")? else { return Ok(None) };
    if files.may("iommu_group/name")?.as_deref() == Some(NO_IOMMU) {
        return Ok(None);
    }
    let content =
        |_| ObserveError::Content { address: files.address, file: "iommu_group", content: name.clone() };
    name.parse().map(Some).map_err(content)
}

/// A device that has fallen off the bus answers these with errors. That it has no link then is what a check of its
/// health wants to know, and no reason to see nothing of it.
fn link(files: &Files) -> Option<super::Link> {
    let text = |file| read_small(&files.dir.join(file)).unwrap_or_default();
    parse::link(
        &text("current_link_speed"),
        &text("current_link_width"),
        &text("max_link_speed"),
        &text("max_link_width"),
    )
}
