//! What was seen of the host, as plain values: filled in by `observe`, judged by `check`, made up by tests.

use std::{collections::BTreeSet, path::PathBuf, time::Duration};

use qudata_agent_core::{
    control_plane::Answer,
    probe::KvmProbe,
    settings::{LauncherKind, Settings},
};
use qudata_host::{capacity::HostCapacity, pci::PciAddress, size::ByteSize};
use qudata_qemu::{mmio::AddressWidth, qmp::VersionNumber, version::KernelVersion};
use qudata_vfio::{
    holders::Holder,
    plan::VFIO_PCI,
    topology::{Gpu, Topology},
};

use crate::SettingsRead;

/// What was looked for, or why it could not be seen.
pub(crate) type Seen<T> = Result<T, Unseen>;

/// Something could not be looked at.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Unseen {
    /// It did not answer.
    #[error("no answer within {}.{} s", .0.as_secs(), .0.subsec_millis() / 100)]
    Late(Duration),
    /// This user may not see it.
    #[error("{0}: this user may not")]
    Denied(String),
    /// It needs something that is not there; another check tells of that.
    #[error("{0}")]
    Needs(&'static str),
    /// It was looked at and could not be understood.
    #[error("{0}")]
    Failed(String),
}

/// Everything.
#[derive(Debug)]
pub(crate) struct Observed {
    pub(crate) settings: Settings,
    pub(crate) settings_read: SettingsRead,
    pub(crate) is_root: bool,
    pub(crate) processor: Seen<Processor>,
    pub(crate) kvm: KvmNode,
    pub(crate) guest_code: Seen<KvmProbe>,
    pub(crate) pci: Seen<Pci>,
    /// What the firmware tells the kernel of.
    pub(crate) firmware_iommu: Seen<Option<Iommu>>,
    pub(crate) kernel: Kernel,
    pub(crate) programs: Programs,
    pub(crate) files: Files,
    pub(crate) capacity: Seen<HostCapacity>,
    pub(crate) hugepages: Seen<Hugepages>,
    /// `RLIMIT_MEMLOCK` of this process; none: without limit.
    pub(crate) memlock: Option<ByteSize>,
    pub(crate) cgroup: Seen<Cgroup>,
    pub(crate) systemd: Systemd,
    pub(crate) nss: Seen<Nss>,
    pub(crate) outside: Outside,
    pub(crate) agent: AgentLook,
}

/// What `/proc/cpuinfo` says.
#[derive(Debug, Clone)]
pub(crate) struct Processor {
    pub(crate) intel: bool,
    /// `vmx` or `svm`, where it shows one.
    pub(crate) virtualization: Option<&'static str>,
    /// The host is itself a virtual machine.
    pub(crate) in_a_vm: bool,
    pub(crate) threads: usize,
    pub(crate) width: Option<AddressWidth>,
}

/// `/dev/kvm`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum KvmNode {
    Open,
    Absent,
    Denied,
    Broken(String),
    Unseen(Unseen),
}

/// Kinds of IOMMUs. Not told by the processor: a virtual machine may have either with either.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Iommu {
    Intel,
    Amd,
}

/// The PCI bus.
#[derive(Debug, Clone)]
pub(crate) struct Pci {
    pub(crate) topology: Topology,
    /// All GPUs, also those that are not to be rented.
    pub(crate) gpus: Vec<GpuLook>,
    /// Processes of the agent's own VMs.
    pub(crate) own: BTreeSet<u32>,
}

/// One GPU.
#[derive(Debug, Clone)]
pub(crate) struct GpuLook {
    pub(crate) gpu: Gpu,
    /// Maker and model.
    pub(crate) name: String,
    pub(crate) state: Seen<GpuState>,
}

/// What has to be read from the device's own files, which may hang.
#[derive(Debug, Clone, Default)]
pub(crate) struct GpuState {
    pub(crate) holders: Vec<Holder>,
    /// Functions whose configuration space reads all ones.
    pub(crate) dead: Vec<PciAddress>,
    /// Memory BARs that the firmware gave no address, with their sizes.
    pub(crate) unplaced: Vec<(PciAddress, u8, ByteSize)>,
}

/// The kernel.
#[derive(Debug, Clone)]
pub(crate) struct Kernel {
    pub(crate) version: Seen<KernelVersion>,
    /// What `uname -r` prints.
    pub(crate) release: String,
    /// `vfio-pci` is there to be loaded; only asked where it is not loaded.
    pub(crate) has_vfio_pci: Seen<bool>,
    /// `none`, `integrity` or `confidentiality`.
    pub(crate) lockdown: Seen<String>,
    pub(crate) secure_boot: Seen<bool>,
}

/// A program that is needed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Program {
    /// It runs; its first line.
    Runs(String),
    Missing,
    Fails(String),
    /// It did not answer in time, which on a busy host is no fault of it.
    Unseen(Unseen),
}

/// The programs.
#[derive(Debug, Clone)]
pub(crate) struct Programs {
    pub(crate) qemu: Program,
    pub(crate) qemu_version: Option<VersionNumber>,
    pub(crate) qemu_img: Program,
    pub(crate) passt: Program,
    pub(crate) nft: Program,
    /// Whether the kernel answers nftables; only root may ask.
    pub(crate) nft_works: Seen<()>,
    pub(crate) frpc: Program,
}

/// Files of the settings.
#[derive(Debug, Clone)]
pub(crate) struct Files {
    pub(crate) ovmf_code: Seen<bool>,
    pub(crate) ovmf_vars: Seen<bool>,
    pub(crate) image: Result<ImageLook, ImageFault>,
    /// The agent was registered before, or a key for it is kept.
    pub(crate) has_key: Seen<bool>,
}

/// A base image that root can use. Each instance's QEMU opens it as a user of its own, who is neither its owner nor in
/// its group.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct ImageLook {
    /// What it is, as a phrase.
    pub(crate) what: String,
    /// Of the image and its boot files, those that others may not read.
    pub(crate) unreadable: Vec<PathBuf>,
    /// Of the folders above it, those that others may not pass.
    pub(crate) closed: Vec<PathBuf>,
}

/// Why the base image cannot be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ImageFault {
    Missing,
    Unusable(String),
    Unseen(Unseen),
}

/// Reserved pages.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Hugepages {
    pub(crate) reserved: ByteSize,
    pub(crate) free: ByteSize,
}

/// How the kernel groups processes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Cgroup {
    /// Version 2, with these controllers.
    V2(Vec<String>),
    V1,
    Absent,
}

/// systemd.
#[derive(Debug, Clone)]
pub(crate) enum Systemd {
    NotBooted,
    Booted(SystemdLook),
    Unseen(Unseen),
}

/// A systemd that runs the host.
#[derive(Debug, Clone)]
pub(crate) struct SystemdLook {
    pub(crate) version: Seen<u32>,
    /// `+SECCOMP -APPARMOR …`
    pub(crate) features: String,
    /// Whether it can run VMs.
    pub(crate) launches: Seen<()>,
    /// What it knows of the agent's unit.
    pub(crate) unit: Seen<Unit>,
}

/// A unit, in systemd's words.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Unit {
    pub(crate) load: String,
    pub(crate) active: String,
    pub(crate) result: String,
}

/// The name service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Nss {
    pub(crate) library: bool,
    pub(crate) consulted: bool,
}

/// The world.
#[derive(Debug, Clone)]
pub(crate) struct Outside {
    pub(crate) synchronized: Seen<bool>,
    /// Servers that guests can use.
    pub(crate) resolvers: Seen<Vec<String>>,
    /// Names that are needed, and whether they are found.
    pub(crate) names: Vec<(String, Seen<()>)>,
    /// What the control plane said; none without one.
    pub(crate) control_plane: Option<Seen<Answer>>,
    /// Whether the tunnel server takes connections; none without a tunnel.
    pub(crate) frps: Option<Seen<()>>,
}

/// The agent.
#[derive(Debug, Clone)]
pub(crate) enum AgentLook {
    NoSocket,
    NobodyListens,
    Unseen(Unseen),
    Answers(AgentView),
}

/// What the agent says of itself.
#[derive(Debug, Clone, Default)]
pub(crate) struct AgentView {
    pub(crate) version: String,
    pub(crate) instances: usize,
    /// What is wrong, and what to do.
    pub(crate) problems: Vec<(String, String)>,
    pub(crate) gpus: Vec<AgentGpu>,
    /// `up`, `down` or `starting`; none without one.
    pub(crate) control_plane: Option<String>,
    pub(crate) tunnel: Option<String>,
}

/// One GPU in the agent's words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct AgentGpu {
    pub(crate) address: PciAddress,
    /// `free`, `in_use`, …
    pub(crate) state: String,
    pub(crate) instance: Option<String>,
    pub(crate) why: Option<String>,
}

impl Observed {
    /// Whether VMs are units of systemd here.
    pub(crate) fn has_units(&self) -> Seen<bool> {
        match &self.systemd {
            _ if self.settings.launcher == LauncherKind::Detached => Ok(false),
            Systemd::NotBooted => Ok(false),
            Systemd::Booted(_) => Ok(true),
            Systemd::Unseen(why) => Err(why.clone()),
        }
    }

    /// Whether the owner wants this GPU rented: one that he named, or any where he named none.
    pub(crate) fn is_named(&self, gpu: &Gpu) -> bool {
        gpu.functions.iter().any(|function| self.settings.gpu_pci_addrs.contains(function))
    }

    /// GPUs that are to be rented.
    pub(crate) fn candidates<'a>(&'a self, pci: &'a Pci) -> impl Iterator<Item = &'a GpuLook> {
        pci.gpus.iter().filter(|look| self.is_candidate(pci, &look.gpu))
    }

    fn is_candidate(&self, pci: &Pci, gpu: &Gpu) -> bool {
        if self.settings.gpu_pci_addrs.is_empty() { !is_display(pci, gpu) } else { self.is_named(gpu) }
    }

    /// What the agent says of a GPU.
    pub(crate) fn agents_word(&self, gpu: &Gpu) -> Option<&AgentGpu> {
        match &self.agent {
            AgentLook::Answers(view) => view.gpus.iter().find(|known| gpu.functions.contains(&known.address)),
            AgentLook::NoSocket | AgentLook::NobodyListens | AgentLook::Unseen(_) => None,
        }
    }
}

/// Whether the firmware's console is on it and the host uses it.
pub(crate) fn is_display(pci: &Pci, gpu: &Gpu) -> bool {
    let devices = gpu.functions.iter().filter_map(|address| pci.topology.devices.get(address));
    devices.into_iter().any(|device| device.boot_vga && device.driver.as_deref() != Some(VFIO_PCI))
}
