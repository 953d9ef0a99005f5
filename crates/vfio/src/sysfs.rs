//! Does single steps on a real kernel, through the files of sysfs. Owns their paths and quirks; called by `door`, in a
//! child process in production, because any of these writes may block for ever.

use std::{
    fmt,
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use qudata_host::pci::PciAddress;

use crate::{
    bus_reset,
    config::{Config, FULL, HEADER},
    holders::nvidia_minor,
    op::{BridgeReset, Kernel, Op, Reply},
};

/// ESRCH: what procfs answers about a process that has just ended.
const NO_SUCH_PROCESS: i32 = 3;

/// Where writes end up. The real one is the file system; a fake one reacts as a kernel would.
pub trait Writes: Send + Sync + fmt::Debug {
    /// Writes `bytes` with one call, at `offset`.
    ///
    /// # Errors
    /// What the kernel answers.
    fn write_at(&self, file: &Path, offset: u64, bytes: &[u8]) -> io::Result<()>;
}

/// Writes to files that exist.
#[derive(Debug)]
struct Files;

impl Writes for Files {
    fn write_at(&self, file: &Path, offset: u64, bytes: &[u8]) -> io::Result<()> {
        // Neither created nor truncated: sysfs knows neither, and a file that is not there is an answer.
        let mut open = OpenOptions::new().write(true).open(file)?;
        let written = if offset == 0 { open.write(bytes)? } else { open.write_at(bytes, offset)? };
        if written == bytes.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }
}

/// The kernel whose sysfs and procfs are below `root`.
#[derive(Debug, Clone)]
pub struct SysfsKernel {
    root: PathBuf,
    writes: Arc<dyn Writes>,
}

impl SysfsKernel {
    /// `root` is `/` but in tests.
    pub fn new(root: PathBuf) -> Self {
        Self::with(root, Arc::new(Files))
    }

    /// Reads below `root`, writes through `writes`.
    pub fn with(root: PathBuf, writes: Arc<dyn Writes>) -> Self {
        Self { root, writes }
    }

    fn device(&self, address: PciAddress, file: &str) -> PathBuf {
        self.root.join("sys/bus/pci/devices").join(address.to_string()).join(file)
    }

    fn write(&self, file: &Path, text: &str) -> io::Result<()> {
        self.writes.write_at(file, 0, text.as_bytes()).map_err(|error| of_file(error, file))
    }

    /// The driver, by the link that never hangs.
    fn driver(&self, address: PciAddress) -> io::Result<Option<String>> {
        let link = self.device(address, "driver");
        match fs::read_link(&link) {
            Ok(target) => Ok(target.file_name().map(|name| name.to_string_lossy().into_owned())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                // No link is no driver; no directory is no device.
                fs::metadata(self.device(address, "")).map(|_| None)
            }
            Err(error) => Err(of_file(error, &link)),
        }
    }

    fn driver_file(&self, driver: &str, file: &str) -> io::Result<PathBuf> {
        if driver.is_empty() || driver.contains('/') || driver.starts_with('.') {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{driver:?} is no name of a driver"),
            ));
        }
        let dir = self.root.join("sys/bus/pci/drivers").join(driver);
        if !dir.is_dir() {
            return Err(io::Error::new(
                io::ErrorKind::NotFound,
                format!("the driver {driver} is not loaded: run `modprobe {driver}`"),
            ));
        }
        Ok(dir.join(file))
    }

    fn unbind(&self, address: PciAddress, driver: &str) -> io::Result<Reply> {
        let has_it = || Ok::<_, io::Error>(self.driver(address)?.as_deref() == Some(driver));
        if !has_it()? {
            return Ok(Reply::Done);
        }
        match self.write(&self.driver_file(driver, "unbind")?, &address.to_string()) {
            // Somebody else did it in between.
            Err(error) if has_it()? => Err(error),
            _ => Ok(Reply::Done),
        }
    }

    fn bind(&self, address: PciAddress, driver: &str) -> io::Result<Reply> {
        let has_it = || Ok::<_, io::Error>(self.driver(address)?.as_deref() == Some(driver));
        if has_it()? {
            return Ok(Reply::Done);
        }
        // `bind` and not `drivers_probe`: it names the driver and tells why it failed, where the probe reports success.
        match self.write(&self.driver_file(driver, "bind")?, &address.to_string()) {
            Err(error) if !has_it()? => Err(error),
            _ => Ok(Reply::Done),
        }
    }

    /// Processes with one of the function's VFIO nodes open.
    fn held_by(&self, address: PciAddress) -> io::Result<Vec<u32>> {
        let nodes = self.vfio_nodes(address)?;
        let mut pids = Vec::new();
        for entry in fs::read_dir(self.root.join("proc"))? {
            let entry = entry?;
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
                continue;
            };
            if has_open(&entry.path().join("fd"), &nodes).or_else(gone)? {
                pids.push(pid);
            }
        }
        pids.sort_unstable();
        Ok(pids)
    }

    /// `/dev/vfio/<group>` and, for users of iommufd, `/dev/vfio/devices/vfio<N>`.
    fn vfio_nodes(&self, address: PciAddress) -> io::Result<Vec<PathBuf>> {
        let mut nodes = Vec::new();
        match fs::read_link(self.device(address, "iommu_group")) {
            Ok(link) => nodes.extend(link.file_name().map(|group| Path::new("/dev/vfio").join(group))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        if let Ok(entries) = fs::read_dir(self.device(address, "vfio-dev")) {
            for entry in entries {
                nodes.push(Path::new("/dev/vfio/devices").join(entry?.file_name()));
            }
        }
        Ok(nodes)
    }

    /// Configuration space from its beginning, at most `length` bytes.
    pub(crate) fn read_config(&self, address: PciAddress, length: u16) -> io::Result<Vec<u8>> {
        let file = self.device(address, "config");
        let mut bytes = Vec::new();
        File::open(&file)
            .and_then(|config| config.take(length.min(FULL).into()).read_to_end(&mut bytes))
            .map_err(|error| of_file(error, &file))?;
        Ok(bytes)
    }

    pub(crate) fn write_config(&self, address: PciAddress, at: usize, bytes: &[u8]) -> io::Result<()> {
        let file = self.device(address, "config");
        let at = u64::try_from(at).map_err(io::Error::other)?;
        self.writes.write_at(&file, at, bytes).map_err(|error| of_file(error, &file))
    }

    fn reset(&self, address: PciAddress, method: Option<&str>) -> io::Result<Reply> {
        let choice = self.device(address, "reset_method");
        let before = match method {
            Some(_) => fs::read_to_string(&choice).map_err(|error| of_file(error, &choice))?,
            None => String::new(),
        };
        let wanted = method.filter(|wanted| before.split_whitespace().next() != Some(wanted));
        if let Some(wanted) = wanted {
            self.write(&choice, wanted)?;
        }
        let reset = self.write(&self.device(address, "reset"), "1");
        if wanted.is_some() {
            // Also after a failure: the choice is the owner's, ours was for once.
            let restored = self.write(&choice, before.trim());
            reset.and(restored)?;
        } else {
            reset?;
        }
        Ok(Reply::Done)
    }

    fn reset_below(&self, bridge: PciAddress, functions: &[PciAddress]) -> io::Result<Reply> {
        let file = self.device(bridge, "reset_subordinate");
        if file.exists() && self.write(&file, "1").is_ok() {
            return Ok(Reply::Reset(BridgeReset::Kernel));
        }
        // The kernel gives up on bridges that do not report their link; whether it worked is seen in what is below.
        bus_reset::reset(self, bridge, functions)?;
        Ok(Reply::Reset(BridgeReset::Register))
    }
}

impl Kernel for SysfsKernel {
    fn apply(&self, op: &Op) -> io::Result<Reply> {
        match op {
            Op::Override { address, driver } => {
                // A newline alone clears it; an empty write never reaches the kernel.
                let text = driver.as_deref().unwrap_or("\n");
                self.write(&self.device(*address, "driver_override"), text).map(|()| Reply::Done)
            }
            Op::Unbind { address, driver } => self.unbind(*address, driver),
            Op::Bind { address, driver } => self.bind(*address, driver),
            Op::ExpectDriver { address, .. } => self.driver(*address).map(Reply::Driver),
            Op::ExpectAlive { address, .. } => {
                let bytes = self.read_config(*address, HEADER.try_into().unwrap_or(FULL))?;
                let (vendor, device) = Config(&bytes).ids();
                Ok(Reply::Ids(vendor, device))
            }
            Op::ExpectUnheld { address } => self.held_by(*address).map(Reply::HeldBy),
            Op::ReadConfig { address, length } => self.read_config(*address, *length).map(Reply::Config),
            Op::NvidiaMinor { address } => nvidia_minor(&self.root, *address).map(Reply::Minor),
            Op::ResetFunction { address, method } => self.reset(*address, method.as_deref()),
            Op::ResetBelow { bridge, functions } => self.reset_below(*bridge, functions),
        }
    }
}

fn has_open(descriptors: &Path, nodes: &[PathBuf]) -> io::Result<bool> {
    for entry in fs::read_dir(descriptors)? {
        match fs::read_link(entry?.path()) {
            Ok(target) if nodes.contains(&target) => return Ok(true),
            Ok(_) => {}
            // Closed while we looked; anything else is doubt, and doubt is not "nobody".
            Err(error) => {
                gone(error)?;
            }
        }
    }
    Ok(false)
}

/// A process or descriptor that ended while it was looked at holds nothing.
fn gone(error: io::Error) -> io::Result<bool> {
    let ended = error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(NO_SUCH_PROCESS);
    if ended { Ok(false) } else { Err(error) }
}

/// Adds the file to an error and keeps its kind and number for whoever asks.
fn of_file(error: io::Error, file: &Path) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", file.display()))
}
