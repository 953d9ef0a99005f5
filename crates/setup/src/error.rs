//! How an installation or its removal fails: a stable code, what is wrong, what to do, and the next command. Used by every
//! part of this crate; printed by the CLI.

use std::{error::Error, fmt};

use qudata_host::causes::chain;

/// A word for programs and for searching; never changes its meaning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code {
    /// There is no GPU to rent out, or none of those named.
    NoGpu,
    /// The firmware hides the IOMMU.
    IommuOffInFirmware,
    /// The kernel does not use the IOMMU.
    IommuOff,
    /// Devices could forge interrupts.
    NoInterruptRemapping,
    /// A GPU shares its IOMMU group.
    GroupShared,
    /// nouveau still has a GPU after the reboot.
    NouveauBound,
    /// KVM does not work here.
    NoKvm,
    /// The kernel comes without vfio-pci.
    NoVfio,
    /// Too little disk.
    DiskTooSmall,
    /// Too little memory.
    MemoryTooSmall,
    /// A distribution that nobody has tried.
    UnsupportedDistribution,
    /// Not run by root.
    NotRoot,
    /// No API key, or one that the service refuses.
    BadKey,
    /// The service does not answer.
    ControlPlaneUnreachable,
    /// A setting is not allowed.
    BadSettings,
    /// The package is not installed and none was given, or it cannot be read.
    NoPackage,
    /// apt cannot reach its mirrors.
    MirrorDown,
    /// apt or dpkg failed.
    PackageFailed,
    /// No boot loader that is known.
    BootloaderUnknown,
    /// The boot loader was not changed as it should.
    BootloaderFailed,
    /// The host has to be restarted, and that is for its owner to do.
    RebootNeeded,
    /// The base image could not be built; the builder's own code is shown where it has one.
    Image(&'static str),
    /// A VM could not be tried out.
    SelftestFailed,
    /// The agent does not run as it should.
    AgentFailed,
    /// Another installation or removal runs.
    Busy,
    /// The list of changes cannot be read.
    ManifestDamaged,
    /// Instances are in the way.
    InstancesExist,
    /// A file of the host could not be read or changed.
    HostFault,
    /// Somebody was asked and did not agree.
    Declined,
}

impl Code {
    /// The word.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NoGpu => "no_gpu",
            Self::IommuOffInFirmware => "iommu_off_in_firmware",
            Self::IommuOff => "iommu_off",
            Self::NoInterruptRemapping => "no_interrupt_remapping",
            Self::GroupShared => "group_shared",
            Self::NouveauBound => "nouveau_bound",
            Self::NoKvm => "no_kvm",
            Self::NoVfio => "no_vfio",
            Self::DiskTooSmall => "disk_too_small",
            Self::MemoryTooSmall => "memory_too_small",
            Self::UnsupportedDistribution => "unsupported_distribution",
            Self::NotRoot => "not_root",
            Self::BadKey => "bad_key",
            Self::ControlPlaneUnreachable => "control_plane_unreachable",
            Self::BadSettings => "bad_settings",
            Self::NoPackage => "no_package",
            Self::MirrorDown => "mirror_down",
            Self::PackageFailed => "package_failed",
            Self::BootloaderUnknown => "bootloader_unknown",
            Self::BootloaderFailed => "bootloader_failed",
            Self::RebootNeeded => "reboot_needed",
            Self::Image(code) => code,
            Self::SelftestFailed => "selftest_failed",
            Self::AgentFailed => "agent_failed",
            Self::Busy => "busy",
            Self::ManifestDamaged => "manifest_damaged",
            Self::InstancesExist => "instances_exist",
            Self::HostFault => "host_fault",
            Self::Declined => "declined",
        }
    }
}

/// The cause of a failure, of whatever kind.
pub type Cause = Box<dyn Error + Send + Sync>;

/// An installation or removal did not get to its end. What was done so far is in the manifest; the next command goes on.
#[derive(Debug)]
pub struct SetupError {
    /// What kind of failure.
    pub code: Code,
    /// What is wrong, where.
    pub what: String,
    /// What to do about it.
    pub remedy: String,
    /// The exact next command.
    pub next: String,
    /// Why.
    pub cause: Option<Cause>,
}

/// What to run again when nothing else is said.
pub const AGAIN: &str = "qudata-agent install";
/// The same for a removal.
pub const UNINSTALL: &str = "qudata-agent uninstall";

impl SetupError {
    /// A failure with what to do about it; the next command is [`AGAIN`] until [`SetupError::next`] says otherwise.
    pub fn new(code: Code, what: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { code, what: what.into(), remedy: remedy.into(), next: AGAIN.into(), cause: None }
    }

    /// A file of the host stands in the way.
    pub fn file(attempt: &str, path: &str, cause: impl Into<Cause>) -> Self {
        let what = format!("cannot {attempt} {path}");
        let remedy = "Look at what the message says: a full or read-only file system, mostly.";
        Self::new(Code::HostFault, what, remedy).because(cause)
    }

    /// Another next command.
    #[must_use]
    pub fn next(mut self, next: impl Into<String>) -> Self {
        self.next = next.into();
        self
    }

    /// With its cause.
    #[must_use]
    pub fn because(mut self, cause: impl Into<Cause>) -> Self {
        self.cause = Some(cause.into());
        self
    }

    /// The causes, one after the other, each after `: `.
    #[must_use]
    pub fn causes(&self) -> String {
        self.cause.as_deref().map(|cause| format!(": {}", chain(cause))).unwrap_or_default()
    }
}

impl fmt::Display for SetupError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{}] {}", self.code.as_str(), self.what)
    }
}

impl Error for SetupError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.cause.as_ref().map(|cause| -> &(dyn Error + 'static) { cause.as_ref() })
    }
}
