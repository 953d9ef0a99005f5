//! The host as it is before anything is decided. Owns reading it; changes nothing. Called by `install`, again before each
//! step that depends on what an earlier one did.

mod host;

use std::{collections::BTreeMap, path::Path};

use qudata_agent_core::control_plane::ServiceUrl;
use qudata_host::{pci::PciAddress, size::ByteSize};
use qudata_vfio::{names::PciIds, topology::Topology};

pub(crate) use self::host::group;
pub use self::host::{Distribution, Maker};
use crate::{
    boot::{self, Loader},
    cmdline,
    error::{Code, SetupError},
    hands::order,
    outside::{Means, Tenant},
    packages, places, settings_file,
    wish::{GpuWish, Wish},
};

/// Everything that decisions are made from.
#[derive(Debug, Clone)]
pub struct Observed {
    /// Distribution.
    pub distribution: Distribution,
    /// systemd runs the host.
    pub systemd: bool,
    /// Who made the processor.
    pub maker: Maker,
    /// The processor can run guests, and the firmware lets it.
    pub virtualization: bool,
    /// There is `/dev/kvm`.
    pub kvm: bool,
    /// Release of the running kernel.
    pub kernel: String,
    /// It can have vfio-pci.
    pub vfio: bool,
    /// What it was told.
    pub running: Vec<String>,
    /// The firmware's IOMMU; see `host::firmware`.
    pub firmware: Option<Option<Maker>>,
    /// Names this boot.
    pub boot_id: String,
    /// Boot loader.
    pub loader: Loader,
    /// PCI devices.
    pub topology: Topology,
    /// Names of display controllers.
    pub names: BTreeMap<PciAddress, String>,
    /// RAM.
    pub memory: ByteSize,
    /// Free space where the data will be.
    pub disk_free: ByteSize,
    /// Packages.
    pub package: packages::Versions,
    /// What `agent.toml` is and would be.
    pub settings: SettingsLook,
    /// Texts of the files that are written whole, by path; absent ones are not in it.
    pub texts: BTreeMap<&'static str, String>,
    /// The key.
    pub key: KeyLook,
    /// The instances.
    pub tenants: Vec<Tenant>,
    /// The agent's unit starts with the host.
    pub enabled: bool,
    /// The agent runs.
    pub active: bool,
}

/// `agent.toml` as it is and as it would be, GPUs apart.
#[derive(Debug, Clone, Default)]
pub struct SettingsLook {
    /// The file, if there is one.
    pub file: Option<String>,
    /// The template, if the package is there.
    pub template: Option<String>,
    /// The values that the owner asks for, on the command line or by what is installed.
    pub values: Vec<(String, String)>,
    /// GPUs that are named already.
    pub gpus: Vec<PciAddress>,
    /// It works without a GPU.
    pub debug: bool,
    /// There is no control plane.
    pub standalone: bool,
    /// Emulation instead of KVM.
    pub emulated: bool,
    /// The control plane where there is one.
    pub service_url: ServiceUrl,
    /// Where the data is.
    pub data_dir: String,
    /// The base image.
    pub base_image: String,
    /// It is there.
    pub image_there: bool,
    /// Size of the file that the image is to be made from, if it is a file.
    pub image_source: Option<ByteSize>,
}

/// The API key.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct KeyLook {
    /// One was given now.
    pub given: bool,
    /// One is on the host.
    pub there: bool,
    /// The one on the host is the one that was given.
    pub same: bool,
    /// The host was registered before, and needs none.
    pub registered: bool,
}

/// Files that are compared whole.
const TEXTS: [&str; 4] =
    [places::UDEV_RULE, places::KEY_DROP_IN, places::CONTINUE_FILE, places::GRUB_DROP_IN];

/// Looks at everything. `key` is compared and never kept.
///
/// # Errors
/// When something is there and cannot be read, or the settings are refused.
pub fn observe(means: Means<'_>, wish: &Wish, key: Option<&str>) -> Result<Observed, SetupError> {
    let files = means.files;
    let kernel = files.text("/proc/sys/kernel/osrelease")?.unwrap_or_default().trim().to_owned();
    let (maker, virtualization) = host::processor(files)?;
    let topology = qudata_vfio::topology::observe(files.root()).map_err(|error| {
        SetupError::new(Code::HostFault, "the PCI devices cannot be read", "Are /sys and /proc mounted?")
            .because(error)
    })?;
    let settings = settings(means, wish)?;
    let (memory, disk_free) = capacity(means, &settings.data_dir)?;
    let mut texts = BTreeMap::new();
    for path in TEXTS {
        if let Some(text) = files.text(path)? {
            texts.insert(path, text);
        }
    }
    Ok(Observed {
        distribution: Distribution::observe(files)?,
        systemd: files.exists("/run/systemd/system"),
        maker,
        virtualization,
        kvm: files.exists("/dev/kvm"),
        vfio: topology.isolation.vfio_pci || host::has_module(files, &kernel, "vfio-pci")?,
        kernel,
        running: cmdline::words(&files.text("/proc/cmdline")?.unwrap_or_default()),
        firmware: host::firmware(files)?,
        boot_id: boot_id(means)?,
        loader: boot::observe(files)?,
        names: names(files.root(), &topology),
        topology,
        memory,
        disk_free,
        package: packages::observe(means, wish)?,
        texts,
        key: look_at_key(means, &settings.data_dir, key)?,
        tenants: means.tenants(&settings.data_dir)?,
        enabled: unit_is(means, "is-enabled"),
        active: unit_is(means, "is-active"),
        settings,
    })
}

/// What names this boot.
///
/// # Errors
/// When it cannot be read.
pub fn boot_id(means: Means<'_>) -> Result<String, SetupError> {
    Ok(means.files.text("/proc/sys/kernel/random/boot_id")?.unwrap_or_default().trim().to_owned())
}

/// Whether the agent's unit is enabled or active. A systemctl that cannot be run says no.
pub(crate) fn unit_is(means: Means<'_>, question: &str) -> bool {
    let order = order("systemctl").args(["--quiet", question, places::AGENT_UNIT]);
    means.hands.run(&order, &mut |_| {}).is_ok_and(|answer| answer.ok())
}

fn names(root: &Path, topology: &Topology) -> BTreeMap<PciAddress, String> {
    let ids = PciIds::load(root);
    let displays = topology.devices.values().filter(|device| device.is_display());
    let named = displays.map(|device| {
        let plain = || format!("device {:04x}:{:04x}", device.vendor, device.device);
        (device.address, ids.name(device.vendor, device.device).unwrap_or_else(plain))
    });
    named.collect()
}

fn settings(means: Means<'_>, wish: &Wish) -> Result<SettingsLook, SetupError> {
    let files = means.files;
    let (file, template) = (files.text(places::SETTINGS)?, files.text(places::TEMPLATE)?);
    let base = file.as_deref().or(template.as_deref());
    let mut values = Vec::new();
    // The package has it where it belongs to no administrator; the agent looks where the original had it.
    let set = |key: &str| base.is_some_and(|text| settings_file::is_set(text, key));
    if !set("frpc_binary") && files.exists(places::FRPC) && !files.exists(places::FRPC_DEFAULT) {
        values.push(("frpc_binary".to_owned(), places::FRPC.to_owned()));
    }
    if wish.standalone {
        values.push(("standalone".to_owned(), "true".to_owned()));
    }
    values.extend(wish.settings.iter().cloned());
    let text = settings_file::with_values(base, &values)?;
    let checked = settings_file::check(&text)?;
    let base_image = checked.base_image.display().to_string();
    let source = wish.image.as_deref().filter(|image| image.starts_with('/'));
    let size = source.and_then(|path| std::fs::metadata(files.at(path)).ok()).map(|found| found.len());
    Ok(SettingsLook {
        values,
        gpus: checked.gpu_pci_addrs.clone(),
        debug: checked.debug,
        standalone: checked.standalone,
        emulated: settings_file::text_of(&text, "accel").as_deref() == Some("tcg"),
        service_url: checked.service_url,
        data_dir: checked.data_dir.display().to_string(),
        // Where it leads counts: a link to an image that is gone is none.
        image_there: files.at(&base_image).exists(),
        base_image,
        image_source: size.map(ByteSize::from_bytes),
        file,
        template,
    })
}

fn capacity(means: Means<'_>, data_dir: &str) -> Result<(ByteSize, ByteSize), SetupError> {
    let files = means.files;
    let text = files.text("/proc/meminfo")?.unwrap_or_default();
    let total = text.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let kib = total.and_then(|rest| rest.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
    let mut dir = files.at(data_dir);
    while !dir.exists() && dir.pop() {}
    let fs = rustix::fs::statvfs(&dir)
        .map_err(|e| SetupError::file("look at the file system of", data_dir, std::io::Error::from(e)))?;
    let free = ByteSize::from_bytes(fs.f_bavail.saturating_mul(fs.f_frsize));
    Ok((ByteSize::from_bytes(kib.unwrap_or(0).saturating_mul(1024)), free))
}

fn look_at_key(means: Means<'_>, data_dir: &str, key: Option<&str>) -> Result<KeyLook, SetupError> {
    let found = means.files.text(places::API_KEY)?;
    let named = |key: &str| -> Result<bool, SetupError> {
        Ok(means.files.text(places::SETTINGS)?.is_some_and(|text| settings_file::is_set(&text, key)))
    };
    let own = named("api_key")? || named("api_key_file")?;
    let kept = |name: &str| means.files.exists(&format!("{data_dir}/{name}"));
    Ok(KeyLook {
        given: key.is_some(),
        there: found.is_some() || own,
        same: key.is_some() && found.as_deref().map(str::trim) == key,
        registered: kept("agent_id") && kept("agent_secret"),
    })
}

impl Observed {
    /// The GPUs that the agent is told by name: the wish, or what is set already.
    #[must_use]
    pub fn named_gpus(&self, wish: &Wish) -> Vec<PciAddress> {
        match &wish.gpus {
            GpuWish::Unsaid => self.settings.gpus.clone(),
            GpuWish::All => Vec::new(),
            GpuWish::Only(addresses) => addresses.clone(),
        }
    }

    /// Whether any device has an IOMMU group: the kernel uses an IOMMU.
    #[must_use]
    pub fn iommu_works(&self) -> bool {
        self.topology.devices.values().any(|device| device.group.is_some())
    }
}
