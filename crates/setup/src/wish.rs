//! What the owner asks for, as the command line says it. Kept in `wish.json` without any secret, so that the installation
//! can go on by itself after a reboot.

use std::path::PathBuf;

use qudata_host::pci::PciAddress;
use serde::{Deserialize, Serialize};

/// Which GPUs are to be rented out.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GpuWish {
    /// What `agent.toml` says, and where it says nothing, all but the host's own display.
    #[default]
    Unsaid,
    /// All but the host's own display, whatever `agent.toml` says.
    All,
    /// These.
    Only(Vec<PciAddress>),
}

/// What to do when a reboot is needed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RebootWay {
    /// Count down, then do it.
    #[default]
    Auto,
    /// Ask on the terminal; without one, as [`RebootWay::Never`].
    Ask,
    /// Say that it is needed.
    Never,
}

/// Options of an installation. No secret is among them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Wish {
    /// The package to install; none: it is installed already.
    pub package: Option<PathBuf>,
    /// Which GPUs.
    pub gpus: GpuWish,
    /// Reboots.
    pub reboot: RebootWay,
    /// The IOMMU is switched on also where the owner's own parameters switch it off.
    pub iommu_on: bool,
    /// Questions are answered with yes.
    pub yes: bool,
    /// What the base image is made from: a name, a URL or a file; none: the builder's default, unless there is an image.
    pub image: Option<String>,
    /// Options for the builder of the image, `key=value`.
    pub image_options: Vec<String>,
    /// No control plane and no tunnel.
    pub standalone: bool,
    /// Settings for `agent.toml`, as key and value.
    pub settings: Vec<(String, String)>,
    /// No VM is tried out.
    pub skip_selftest: bool,
    /// Go on when the control plane does not answer.
    pub offline: bool,
}
