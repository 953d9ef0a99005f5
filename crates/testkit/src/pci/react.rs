//! Makes the fake host answer writes as a kernel does: links move, overrides decide, a driver hangs, a device falls off
//! its bus. Called by tests of whatever writes to PCI devices.
//!
//! Facts measured on Linux 6.1 and copied here: a probe reports success when nothing matched; unbinding `vfio-pci` from a
//! device that a process holds blocks, and with it every later write to the device's override and reset; a device off the
//! bus reads as ones, takes a reset without complaint, and keeps its ids in `vendor`.
//!
//! A write to a file that no device has fails the test when the kernel is dropped.

#[cfg(test)]
mod tests;

use std::{
    collections::BTreeMap,
    fs, io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    thread,
};

use super::FakeHost;

const EBUSY: i32 = 16;
const ENODEV: i32 = 19;
const EINVAL: i32 = 22;
const ENOTTY: i32 = 25;

/// What a device does wrong. One device may do several things.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// Its host driver never lets go: a write to `unbind` blocks.
    HangsOnUnbind,
    /// A reset blocks.
    HangsOnReset,
    /// Bind and probe report success and nothing happens.
    BindLies,
    /// Binding it to this driver fails with this error number.
    BindFails(String, i32),
    /// Whatever it is bound to, this driver has it in the end.
    WrongDriverWins(String),
    /// A reset fails (ENOTTY, as for a link that does not come back).
    ResetFails,
    /// It is gone after a reset, which reports success.
    DiesOnReset,
    /// It is gone once its driver has let go.
    DiesOnUnbind,
    /// A reset succeeds and its BARs are lost.
    LosesBarsOnReset,
}

/// A write that arrived, whatever became of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    /// The file, below the root.
    pub file: PathBuf,
    /// The text; numbers in hexadecimal where it was to configuration space.
    pub text: String,
}

/// A fake host with a kernel in it.
#[derive(Debug)]
pub struct FakeKernel {
    host: FakeHost,
    state: Mutex<State>,
    freed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    faults: Vec<(String, Fault)>,
    writes: Vec<Written>,
    strays: Vec<String>,
    /// Devices of which a write hangs, or did.
    stuck: Vec<String>,
    /// Configuration space as it was built, to be put back by resets that the kernel does.
    built: BTreeMap<String, Vec<u8>>,
}

/// A file of sysfs, taken apart.
enum Place<'a> {
    Device { address: &'a str, file: &'a str },
    Driver { driver: &'a str, file: &'a str },
    Probe,
}

impl FakeKernel {
    /// Starts to react.
    #[must_use]
    pub fn new(host: FakeHost) -> Self {
        let built = host.devices.keys().filter_map(|address| {
            Some((address.clone(), fs::read(host.device_dir(address).join("config")).ok()?))
        });
        let state = State { built: built.collect(), ..State::default() };
        Self { host, state: Mutex::new(state), freed: Condvar::new() }
    }

    /// The tree.
    #[must_use]
    pub fn host(&self) -> &FakeHost {
        &self.host
    }

    /// Makes a device faulty from now on.
    pub fn fault(&self, address: &str, fault: Fault) {
        self.state().faults.push((address.to_owned(), fault));
    }

    /// Makes a device well again; what hangs goes on.
    pub fn repair(&self, address: &str) {
        let mut state = self.state();
        state.faults.retain(|(of, _)| of != address);
        state.stuck.retain(|of| of != address);
        self.freed.notify_all();
    }

    /// All writes so far.
    #[must_use]
    pub fn writes(&self) -> Vec<Written> {
        self.state().writes.clone()
    }

    /// Writes so far that named this device, by their file or their text.
    #[must_use]
    pub fn writes_to(&self, address: &str) -> Vec<Written> {
        let about = |written: &Written| {
            written.text == address || written.file.components().any(|part| part.as_os_str() == address)
        };
        self.writes().into_iter().filter(about).collect()
    }

    /// Forgets the writes so far.
    pub fn forget_writes(&self) {
        self.state().writes.clear();
    }

    /// Takes a device off the bus: its configuration space reads as ones from now on, and nothing else changes.
    ///
    /// # Errors
    /// When the tree cannot be changed.
    pub fn fall_off_the_bus(&self, address: &str) -> io::Result<()> {
        let config = self.host.device_dir(address).join("config");
        let length = fs::read(&config)?.len();
        fs::write(config, vec![0xff; length])
    }

    /// The text of `driver_override`; none = cleared.
    #[must_use]
    pub fn override_of(&self, address: &str) -> Option<String> {
        let text = fs::read_to_string(self.host.device_dir(address).join("driver_override")).ok()?;
        Some(text.trim().to_owned()).filter(|text| text != "(null)")
    }

    /// A write of the code under test, below the root of the host.
    ///
    /// # Errors
    /// What the kernel would answer. Blocks where the kernel would.
    pub fn write_at(&self, file: &Path, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let file = file.strip_prefix(self.host.root()).unwrap_or(file).to_owned();
        let is_config = file.ends_with("config");
        let text = if is_config {
            format!("{offset:02x}={}", bytes.iter().map(|b| format!("{b:02x}")).collect::<String>())
        } else {
            String::from_utf8_lossy(bytes).trim_end_matches('\n').to_owned()
        };
        self.state().writes.push(Written { file: file.clone(), text: text.clone() });
        let name = file.to_string_lossy().into_owned();
        let known = place(&name).filter(|_| self.host.path(&file).exists());
        match known {
            Some(Place::Probe) => self.probe(&text),
            Some(Place::Driver { driver, file: "bind" }) => self.bind(driver, &text),
            Some(Place::Driver { driver, file: "unbind" }) => self.unbind(driver, &text),
            Some(Place::Device { address, file: "config" }) => self.poke(address, offset, bytes),
            Some(Place::Device { address, file }) => self.device_write(address, file, &text),
            Some(Place::Driver { .. }) | None => self.stray(&name),
        }
    }

    fn device_write(&self, address: &str, file: &str, text: &str) -> io::Result<()> {
        let path = self.host.device_dir(address).join(file);
        match file {
            "driver_override" => {
                self.wait_while_stuck(address);
                fs::write(path, if text.is_empty() { "(null)\n".to_owned() } else { format!("{text}\n") })
            }
            "reset_method" => {
                let built = self.host.device(address).map(|device| device.reset_methods.clone());
                let offered = built.unwrap_or_default();
                let known = |word: &str| offered.split(' ').any(|offer| offer == word);
                // A bus reset of one function would hit its neighbours.
                let alone = self.below(&self.parent(address)).len() <= 1;
                if !text.split(' ').all(|word| known(word) && (word != "bus" || alone || text.contains(' ')))
                {
                    return Err(io::Error::from_raw_os_error(EINVAL));
                }
                fs::write(path, format!("{text}\n"))
            }
            "reset" => {
                self.wait_while_stuck(address);
                self.reset(address, true)
            }
            "reset_subordinate" => {
                self.below(address).iter().try_for_each(|address| self.reset(address, true))
            }
            _ => self.stray(&format!("{address}/{file}")),
        }
    }

    fn bind(&self, driver: &str, address: &str) -> io::Result<()> {
        let Some(device) = self.host.device(address) else {
            return Err(io::Error::from_raw_os_error(ENODEV));
        };
        for fault in self.faults_of(address) {
            match fault {
                Fault::BindLies => return Ok(()),
                Fault::BindFails(to, number) if to == driver => {
                    return Err(io::Error::from_raw_os_error(number));
                }
                Fault::WrongDriverWins(other) => return self.host.move_to_driver(address, Some(&other)),
                _ => {}
            }
        }
        if self.host.driver_of(address).is_some() {
            return Err(io::Error::from_raw_os_error(EBUSY));
        }
        let matches = match self.override_of(address) {
            Some(only) => only == driver,
            None => device.native_drivers.iter().any(|native| native == driver),
        };
        if !matches {
            return Err(io::Error::from_raw_os_error(ENODEV));
        }
        if driver == "vfio-pci" && device.group.is_none() {
            return Err(io::Error::from_raw_os_error(EINVAL));
        }
        self.host.move_to_driver(address, Some(driver))
    }

    /// Reports success whatever happens.
    fn probe(&self, address: &str) -> io::Result<()> {
        let Some(device) = self.host.device(address) else {
            return Err(io::Error::from_raw_os_error(ENODEV));
        };
        if self.host.driver_of(address).is_some() {
            return Ok(());
        }
        let wanted: Vec<String> =
            self.override_of(address).map_or_else(|| device.native_drivers.clone(), |only| vec![only]);
        let loaded = |driver: &&String| self.host.path("sys/bus/pci/drivers").join(driver).exists();
        if let Some(driver) = wanted.iter().find(loaded) {
            let _ = self.bind(driver, address);
        }
        Ok(())
    }

    fn unbind(&self, driver: &str, address: &str) -> io::Result<()> {
        if self.host.driver_of(address).as_deref() != Some(driver) {
            return Err(io::Error::from_raw_os_error(ENODEV));
        }
        if self.has(address, &Fault::HangsOnUnbind) {
            self.hang(address);
        }
        if driver == "vfio-pci" {
            // As in the kernel: not until the last holder has closed it.
            while self.is_held(address) {
                thread::sleep(std::time::Duration::from_millis(5));
            }
        }
        self.host.move_to_driver(address, None)?;
        if self.has(address, &Fault::DiesOnUnbind) {
            self.fall_off_the_bus(address)?;
        }
        Ok(())
    }

    fn reset(&self, address: &str, kernel_restores: bool) -> io::Result<()> {
        if self.has(address, &Fault::HangsOnReset) {
            self.hang(address);
        }
        if self.has(address, &Fault::ResetFails) {
            return Err(io::Error::from_raw_os_error(ENOTTY));
        }
        let path = self.host.device_dir(address).join("config");
        if is_gone(&path)? {
            return Ok(());
        }
        if self.has(address, &Fault::DiesOnReset) {
            return self.fall_off_the_bus(address);
        }
        let mut config = self.state().built.get(address).cloned().unwrap_or_default();
        if !kernel_restores || self.has(address, &Fault::LosesBarsOnReset) {
            for at in (0x10..0x28).chain(0x04..0x06).chain(0x3c..0x3d) {
                // What a device remembers of its registers: their kind, not their value.
                let kind = if matches!(at, 0x10 | 0x14 | 0x18 | 0x1c | 0x20 | 0x24) { 0x0f } else { 0 };
                if let Some(byte) = config.get_mut(at) {
                    *byte &= kind;
                }
            }
        }
        fs::write(path, config)
    }

    /// A write to configuration space.
    fn poke(&self, address: &str, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let path = self.host.device_dir(address).join("config");
        if is_gone(&path)? {
            return Ok(());
        }
        let is_bridge = self.host.device(address).is_some_and(|device| device.secondary_bus.is_some());
        let was_held = fs::read(&path)?.get(0x3e).is_some_and(|low| low & 0x40 != 0);
        fs::OpenOptions::new().write(true).open(&path)?.write_all_at(bytes, offset)?;
        let is_held = fs::read(&path)?.get(0x3e).is_some_and(|low| low & 0x40 != 0);
        if is_bridge && was_held && !is_held {
            return self.below(address).iter().try_for_each(|below| {
                // The register write itself always succeeds; a reset that fails shows in the device.
                match self.reset(below, false) {
                    Err(_) => self.fall_off_the_bus(below),
                    done => done,
                }
            });
        }
        Ok(())
    }

    /// A process of the fake host has the device's group open.
    fn is_held(&self, address: &str) -> bool {
        let Some(group) = self.host.device(address).and_then(|device| device.group) else { return false };
        let node = PathBuf::from(format!("/dev/vfio/{group}"));
        let processes = fs::read_dir(self.host.path("proc")).into_iter().flatten().flatten();
        let descriptors = processes.filter_map(|process| fs::read_dir(process.path().join("fd")).ok());
        descriptors.flatten().flatten().any(|fd| fs::read_link(fd.path()).is_ok_and(|to| to == node))
    }

    fn parent(&self, address: &str) -> String {
        self.host.device(address).and_then(|device| device.parent.clone()).unwrap_or_default()
    }

    /// The devices right below a bridge.
    fn below(&self, bridge: &str) -> Vec<String> {
        let children = self.host.devices.values().filter(|device| device.parent.as_deref() == Some(bridge));
        children.map(|device| device.address.clone()).collect()
    }

    fn faults_of(&self, address: &str) -> Vec<Fault> {
        let state = self.state();
        state.faults.iter().filter(|(of, _)| of == address).map(|(_, fault)| fault.clone()).collect()
    }

    fn has(&self, address: &str, fault: &Fault) -> bool {
        self.faults_of(address).contains(fault)
    }

    /// Blocks until the device is repaired.
    fn hang(&self, address: &str) {
        self.state().stuck.push(address.to_owned());
        self.wait_while_stuck(address);
    }

    fn wait_while_stuck(&self, address: &str) {
        let mut state = self.state();
        while state.stuck.iter().any(|of| of == address) {
            state = self.freed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn stray(&self, file: &str) -> io::Result<()> {
        self.state().strays.push(file.to_owned());
        Err(io::Error::new(io::ErrorKind::NotFound, format!("no kernel has {file}")))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for FakeKernel {
    fn drop(&mut self) {
        let strays = std::mem::take(&mut self.state().strays);
        if !thread::panicking() {
            assert!(strays.is_empty(), "written to files that no kernel has: {strays:?}");
        }
    }
}

fn is_gone(config: &Path) -> io::Result<bool> {
    Ok(fs::read(config)?.starts_with(&[0xff, 0xff]))
}

fn place(file: &str) -> Option<Place<'_>> {
    let rest = file.strip_prefix("sys/bus/pci/")?;
    if rest == "drivers_probe" {
        return Some(Place::Probe);
    }
    let (kind, rest) = rest.split_once('/')?;
    let (name, file) = rest.split_once('/')?;
    match kind {
        "devices" => Some(Place::Device { address: name, file }),
        "drivers" => Some(Place::Driver { driver: name, file }),
        _ => None,
    }
}
