//! A GPU server that is not there: a temporary directory with the part of sysfs and procfs that PCI passthrough reads
//! and writes. Called by the tests of `qudata-vfio`; `react` makes writes do what the kernel does.
//!
//! Directories are where the kernel has them and links are links, so code under test walks the same shape:
//!
//! ```text
//! sys/devices/pci0000:00/0000:00:01.0/0000:01:00.0/   one directory per function, inside its bridge's
//!     driver ─▶ bus/pci/drivers/nvidia        iommu_group ─▶ kernel/iommu_groups/7
//! sys/bus/pci/devices/0000:01:00.0 ─▶ that directory
//! sys/bus/pci/drivers/nvidia/0000:01:00.0 ─▶ that directory
//! sys/kernel/iommu_groups/7/devices/0000:01:00.0 ─▶ that directory
//! ```
//!
//! The tree is the state: nothing is remembered beside it but the descriptions that it was built from.

mod device;
mod holders;
pub mod react;
#[cfg(test)]
mod tests;

use std::{
    collections::BTreeMap,
    fs, io,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use tempfile::TempDir;

pub use self::{
    device::{Device, FakeBar, FakeLink},
    holders::FakeProcess,
};

/// The directory with the tree in it; gone when this is dropped.
#[derive(Debug)]
pub struct FakeHost {
    dir: TempDir,
    /// What was added, by address. Says what a device was built as, not what became of it.
    devices: BTreeMap<String, Device>,
}

/// Two chips as a kernel with interrupt remapping lists them.
const REMAPPED: &str = "            CPU0       CPU1\n   0:         36          0  IR-IO-APIC    2-edge      timer\n \
                        24:          0          0  DMAR-MSI    0-edge      dmar0\n NMI:          0          0   \
                        Non-maskable interrupts\n";

/// The same without.
const PLAIN: &str = "            CPU0       CPU1\n   0:         36          0  IO-APIC    2-edge      timer\n NMI:          \
                     0          0   Non-maskable interrupts\n";

impl FakeHost {
    /// A host without devices: interrupts remapped, `vfio-pci` loaded, nothing overridden.
    ///
    /// # Errors
    /// When the directory cannot be made.
    pub fn new() -> io::Result<Self> {
        let host =
            Self { dir: tempfile::Builder::new().prefix("fake-host-").tempdir()?, devices: BTreeMap::new() };
        for dir in [
            "sys/bus/pci/devices",
            "sys/bus/pci/drivers",
            "sys/kernel/iommu_groups",
            "sys/module",
            "dev/vfio",
        ] {
            fs::create_dir_all(host.path(dir))?;
        }
        host.file("sys/bus/pci/drivers_probe", "")?;
        host.file("proc/cmdline", "BOOT_IMAGE=/vmlinuz root=/dev/sda1 ro intel_iommu=on iommu=pt\n")?;
        host.file("proc/sys/kernel/osrelease", "6.12.0-fake\n")?;
        host.file("sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts", "N\n")?;
        host.set_interrupt_remapping(true)?;
        host.add_driver("vfio-pci")?;
        Ok(host)
    }

    /// A host with `devices`. Bridges come before what is below them.
    ///
    /// # Errors
    /// When the tree cannot be made, or a device names a bridge that was not added.
    pub fn with(devices: impl IntoIterator<Item = Device>) -> io::Result<Self> {
        let mut host = Self::new()?;
        for device in devices {
            host.add(device)?;
        }
        Ok(host)
    }

    /// The root: what `/` is in production.
    #[must_use]
    pub fn root(&self) -> &Path {
        self.dir.path()
    }

    /// A path under the root; one that is there already stays.
    #[must_use]
    pub fn path(&self, relative: impl AsRef<Path>) -> PathBuf {
        let path = relative.as_ref();
        if path.starts_with(self.root()) {
            return path.to_owned();
        }
        self.root().join(path.strip_prefix("/").unwrap_or(path))
    }

    /// Writes a file, making its directory: for whatever has no method of its own.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn file(&self, relative: impl AsRef<Path>, content: impl AsRef<[u8]>) -> io::Result<()> {
        let path = self.path(relative);
        make_parent(&path)?;
        fs::write(path, content)
    }

    /// Makes a link to `target`, both relative to the root.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn link(&self, relative: impl AsRef<Path>, target: impl AsRef<Path>) -> io::Result<()> {
        let path = self.path(relative);
        make_parent(&path)?;
        symlink(self.path(target), path)
    }

    /// What was added as `address`.
    #[must_use]
    pub fn device(&self, address: &str) -> Option<&Device> {
        self.devices.get(address)
    }

    /// The real directory of a device: `sys/devices/pci…/…`.
    #[must_use]
    pub fn device_dir(&self, address: &str) -> PathBuf {
        let mut chain = vec![address];
        let mut top = address;
        while let Some(parent) = self.devices.get(top).and_then(|device| device.parent.as_deref()) {
            chain.push(parent);
            top = parent;
        }
        let root_bus = top.rsplit_once(':').map_or(top, |(bus, _)| bus);
        let mut dir = self.path(format!("sys/devices/pci{root_bus}"));
        dir.extend(chain.into_iter().rev());
        dir
    }

    /// Adds a device with its files and links.
    ///
    /// # Errors
    /// When the tree cannot be made, or its bridge was not added.
    pub fn add(&mut self, device: Device) -> io::Result<()> {
        if let Some(parent) = device.parent.as_ref().filter(|parent| !self.devices.contains_key(*parent)) {
            return Err(io::Error::other(format!("add the bridge {parent} before {}", device.address)));
        }
        let address = device.address.clone();
        self.devices.insert(address.clone(), device);
        let (Some(device), dir) = (self.devices.get(&address), self.device_dir(&address)) else {
            return Ok(());
        };
        fs::create_dir_all(&dir)?;
        for (name, content) in device.files() {
            fs::write(dir.join(name), content)?;
        }
        symlink(self.path("sys/bus/pci"), dir.join("subsystem"))?;
        symlink(&dir, self.path("sys/bus/pci/devices").join(&address))?;
        if let Some(physical) = &device.physical_function {
            symlink(self.device_dir(physical), dir.join("physfn"))?;
        }
        if let Some(group) = device.group {
            let group = self.path(format!("sys/kernel/iommu_groups/{group}"));
            fs::create_dir_all(group.join("devices"))?;
            fs::write(group.join("type"), "DMA\n")?;
            symlink(&dir, group.join("devices").join(&address))?;
            symlink(&group, dir.join("iommu_group"))?;
        }
        for driver in device.native_drivers.iter().chain(&device.driver) {
            self.add_driver(driver)?;
        }
        self.move_to_driver(&address, device.driver.as_deref())
    }

    /// Loads a driver: its directory under `bus/pci/drivers` and its module. Loaded already = nothing to do.
    ///
    /// # Errors
    /// When the tree cannot be made.
    pub fn add_driver(&self, name: &str) -> io::Result<()> {
        let dir = self.path("sys/bus/pci/drivers").join(name);
        if dir.exists() {
            return Ok(());
        }
        // Modules have underscores where their drivers have dashes.
        let module = self.path("sys/module").join(name.replace('-', "_"));
        fs::create_dir_all(module.join("drivers"))?;
        fs::write(module.join("refcnt"), "0\n")?;
        symlink(&dir, module.join("drivers").join(format!("pci:{name}")))?;
        fs::create_dir_all(&dir)?;
        symlink(&module, dir.join("module"))?;
        for file in ["bind", "unbind", "new_id", "remove_id"] {
            fs::write(dir.join(file), "")?;
        }
        Ok(())
    }

    /// Unloads a driver that holds nothing.
    ///
    /// # Errors
    /// When it is not there.
    pub fn remove_driver(&self, name: &str) -> io::Result<()> {
        fs::remove_dir_all(self.path("sys/module").join(name.replace('-', "_")))?;
        fs::remove_dir_all(self.path("sys/bus/pci/drivers").join(name))
    }

    /// The driver a device is bound to, by its link.
    #[must_use]
    pub fn driver_of(&self, address: &str) -> Option<String> {
        let link = fs::read_link(self.device_dir(address).join("driver")).ok()?;
        Some(link.file_name()?.to_string_lossy().into_owned())
    }

    /// Moves the links of a device to a loaded driver, or to none.
    ///
    /// # Errors
    /// When the driver is not loaded or the tree cannot be changed.
    pub fn move_to_driver(&self, address: &str, driver: Option<&str>) -> io::Result<()> {
        let dir = self.device_dir(address);
        if let Some(old) = self.driver_of(address) {
            fs::remove_file(dir.join("driver"))?;
            fs::remove_file(self.path("sys/bus/pci/drivers").join(old).join(address))?;
        }
        let Some(driver) = driver else { return Ok(()) };
        let driver = self.path("sys/bus/pci/drivers").join(driver);
        symlink(&dir, driver.join(address))?;
        symlink(&driver, dir.join("driver"))
    }

    /// Takes a device away as hot-unplug does: its directory first, so that a reader finds links to nothing.
    ///
    /// # Errors
    /// When it is not there.
    pub fn unplug(&self, address: &str) -> io::Result<()> {
        let links = [
            Some(self.path("sys/bus/pci/devices").join(address)),
            self.driver_of(address).map(|driver| self.path("sys/bus/pci/drivers").join(driver).join(address)),
            self.devices
                .get(address)
                .and_then(|device| device.group)
                .map(|group| self.path(format!("sys/kernel/iommu_groups/{group}/devices")).join(address)),
        ];
        fs::remove_dir_all(self.device_dir(address))?;
        links.into_iter().flatten().try_for_each(fs::remove_file)
    }

    /// Makes the files that hang for a device whose driver is stuck hang for this one.
    ///
    /// # Errors
    /// When the tree cannot be changed.
    pub fn wedge(&self, address: &str) -> io::Result<()> {
        let dir = self.device_dir(address);
        ["driver_override", "uevent", "reset", "remove", "power_state"]
            .map(|file| self.hang(dir.join(file)))
            .into_iter()
            .collect()
    }

    /// Makes a file hang whoever opens it, to read or to write: it becomes a pipe without another end.
    ///
    /// # Errors
    /// When the tree cannot be changed.
    pub fn hang(&self, relative: impl AsRef<Path>) -> io::Result<()> {
        let path = self.path(relative);
        if path.exists() {
            fs::remove_file(&path)?;
        }
        make_parent(&path)?;
        Ok(rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, 0o600.into(), 0)?)
    }

    /// Turns interrupt remapping on or off, as `/proc/interrupts` shows it.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn set_interrupt_remapping(&self, on: bool) -> io::Result<()> {
        self.file("proc/interrupts", if on { REMAPPED } else { PLAIN })
    }
}

fn make_parent(path: &Path) -> io::Result<()> {
    path.parent().map_or(Ok(()), fs::create_dir_all)
}
