//! Which NVIDIA driver an image gets, by what was asked and by the GPUs that are there. Pure; called by `customise`.

use std::{fmt, str::FromStr};

/// First device id of the Turing generation: what is older has no firmware for the open kernel modules. By the PCI ID
/// Repository, where the ids of a generation follow each other (Volta ends at 1dff), and NVIDIA's list of GPUs that the
/// open modules support.
const TURING: u16 = 0x1e00;
/// First device id of the Blackwell generation, which only the open kernel modules drive (Ada ends at 28ff). Same sources.
const BLACKWELL: u16 = 0x2900;
/// First driver branch that knows Blackwell.
const BLACKWELL_BRANCH: u32 = 570;

/// Last driver branch for GPUs older than Turing: NVIDIA's release notes of it name Maxwell, Pascal and Volta as supported for
/// the last time.
const OLD_BRANCH: u32 = 580;

/// Kernel modules of the driver.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Modules {
    /// With published source; for Turing and newer.
    Open,
    /// Without; for everything older than Blackwell.
    Proprietary,
}

impl Modules {
    /// The word for it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Proprietary => "proprietary",
        }
    }
}

/// What was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DriverWish {
    /// By the GPUs: the distribution's driver when there is an NVIDIA GPU, none when there is not.
    Auto,
    /// No driver.
    None,
    /// The distribution's newest.
    Distro(Option<Modules>),
    /// A branch such as `570`, or the beginning of a version.
    Version(Option<Modules>, String),
}

/// A text that names no driver.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{text:?} is no driver: write auto, none, distro, or a version such as 570 or 570.133, and open: or proprietary: before \
     it to choose the kernel modules"
)]
pub struct ParseDriverError {
    /// What was given, cut to 60 characters.
    pub text: String,
}

impl FromStr for DriverWish {
    type Err = ParseDriverError;

    fn from_str(text: &str) -> Result<Self, ParseDriverError> {
        let refuse = || ParseDriverError { text: text.chars().take(60).collect() };
        let (modules, rest) = match text.split_once(':') {
            Some(("open", rest)) => (Some(Modules::Open), rest),
            Some(("proprietary", rest)) => (Some(Modules::Proprietary), rest),
            Some(_) => return Err(refuse()),
            None => (None, text),
        };
        match (rest, modules) {
            ("auto", None) => Ok(Self::Auto),
            ("none", None) => Ok(Self::None),
            ("distro", modules) => Ok(Self::Distro(modules)),
            (version, modules) if is_version(version) => Ok(Self::Version(modules, version.to_owned())),
            _ => Err(refuse()),
        }
    }
}

/// Numbers with dots between them. It goes into a shell script: nothing else may pass.
fn is_version(text: &str) -> bool {
    text.len() <= 20
        && text.split('.').all(|part| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit()))
}

impl fmt::Display for DriverWish {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let prefix = |modules: &Option<Modules>| modules.map_or(String::new(), |m| format!("{}:", m.name()));
        match self {
            Self::Auto => f.write_str("auto"),
            Self::None => f.write_str("none"),
            Self::Distro(modules) => write!(f, "{}distro", prefix(modules)),
            Self::Version(modules, version) => write!(f, "{}{version}", prefix(modules)),
        }
    }
}

/// The driver, as far as it is decided outside of the image: which versions there are is known inside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DriverPlan {
    /// `distro`, or the beginning of a version.
    pub(crate) version: String,
    /// None: open from the branch on that supports all GPUs since Turing, proprietary before.
    pub(crate) modules: Option<Modules>,
    /// Oldest branch that will do; 0 for any.
    pub(crate) least: u32,
    /// Newest branch that will do; none for any.
    pub(crate) most: Option<u32>,
}

/// A driver that cannot serve the GPUs that are there.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlanDriverError {
    /// No driver serves them all.
    #[error(
        "no driver serves both {old} (proprietary kernel modules only) and {new} (open ones only): say which with --driver \
         open:distro or proprietary:distro, and rent out only what it serves"
    )]
    Mixed {
        /// A GPU older than Turing.
        old: String,
        /// A GPU of Blackwell or newer.
        new: String,
    },
    /// The modules that were asked for do not drive a GPU.
    #[error("the {modules} kernel modules do not drive the GPU {gpu}: leave them out of --driver")]
    Modules {
        /// What was asked for.
        modules: &'static str,
        /// The GPU.
        gpu: String,
    },
    /// The branch does not know a GPU.
    #[error(
        "the driver {version} does not know the GPU {gpu}: at least {BLACKWELL_BRANCH} does, write --driver {BLACKWELL_BRANCH}"
    )]
    TooOld {
        /// What was asked for.
        version: String,
        /// The GPU.
        gpu: String,
    },
    /// The branch knows a GPU no longer.
    #[error(
        "the driver {version} does not serve the GPU {gpu} any more, which is older than Turing: {OLD_BRANCH} is the last \
         branch that does, write --driver {OLD_BRANCH}"
    )]
    TooNew {
        /// What was asked for.
        version: String,
        /// The GPU.
        gpu: String,
    },
}

/// Decides for the NVIDIA device ids `gpus`; none: no driver.
pub(crate) fn plan_driver(wish: &DriverWish, gpus: &[u16]) -> Result<Option<DriverPlan>, PlanDriverError> {
    let (modules, version) = match wish {
        DriverWish::None => return Ok(None),
        DriverWish::Auto if gpus.is_empty() => return Ok(None),
        DriverWish::Auto => (None, "distro"),
        DriverWish::Distro(modules) => (*modules, "distro"),
        DriverWish::Version(modules, version) => (*modules, version.as_str()),
    };
    let name = |id: u16| format!("10de:{id:04x}");
    let old = gpus.iter().copied().find(|id| *id < TURING);
    let new = gpus.iter().copied().find(|id| *id >= BLACKWELL);
    let modules = match (modules, old, new) {
        (None, Some(old), Some(new)) => {
            return Err(PlanDriverError::Mixed { old: name(old), new: name(new) });
        }
        // Said: the owner may keep one of two generations for himself.
        (Some(said), Some(_), Some(_)) => Some(said),
        (Some(Modules::Open), Some(gpu), None) | (Some(Modules::Proprietary), None, Some(gpu)) => {
            let modules = modules.map_or("", Modules::name);
            return Err(PlanDriverError::Modules { modules, gpu: name(gpu) });
        }
        (None, Some(_), None) => Some(Modules::Proprietary),
        (None, None, Some(_)) => Some(Modules::Open),
        (said, _, _) => said,
    };
    let least = if new.is_some() && modules == Some(Modules::Open) { BLACKWELL_BRANCH } else { 0 };
    // Where both generations are there, the modules say which of them is served.
    let most = (old.is_some() && modules == Some(Modules::Proprietary)).then_some(OLD_BRANCH);
    let branch = version.split('.').next().and_then(|branch| branch.parse::<u32>().ok());
    match (branch, old, new) {
        (Some(branch), _, Some(gpu)) if branch < least => {
            Err(PlanDriverError::TooOld { version: version.to_owned(), gpu: name(gpu) })
        }
        (Some(branch), Some(gpu), _) if most.is_some_and(|most| branch > most) => {
            Err(PlanDriverError::TooNew { version: version.to_owned(), gpu: name(gpu) })
        }
        _ => Ok(Some(DriverPlan { version: version.to_owned(), modules, least, most })),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const V100: u16 = 0x1db6;
    const T4: u16 = 0x1eb8;
    const H100: u16 = 0x2330;
    const RTX4090: u16 = 0x2684;
    const B200: u16 = 0x2901;
    const RTX5090: u16 = 0x2b85;

    #[test]
    fn words() {
        for text in ["auto", "none", "distro", "open:distro", "570", "proprietary:535.247.01"] {
            assert_eq!(text.parse::<DriverWish>().unwrap().to_string(), text);
        }
        for text in
            ["", "latest", "open:", "open:none", "auto:570", "570.", "570;reboot", "570 1", "open:auto"]
        {
            assert!(text.parse::<DriverWish>().is_err(), "{text}");
        }
    }

    #[test]
    fn kernel_modules_follow_the_generation() {
        use Modules::*;
        type Expected = Option<(Option<Modules>, u32, Option<u32>)>;
        let table: [(&str, &[u16], Expected); 12] = [
            ("auto", &[], None),
            ("none", &[H100], None),
            ("auto", &[H100, RTX4090, T4], Some((None, 0, None))),
            ("auto", &[V100], Some((Some(Proprietary), 0, Some(580)))),
            ("auto", &[V100, H100], Some((Some(Proprietary), 0, Some(580)))),
            ("auto", &[B200, H100], Some((Some(Open), 570, None))),
            ("580", &[RTX5090], Some((Some(Open), 570, None))),
            ("580.95", &[V100], Some((Some(Proprietary), 0, Some(580)))),
            ("590", &[T4], Some((None, 0, None))),
            ("distro", &[], Some((None, 0, None))),
            ("proprietary:distro", &[V100, B200], Some((Some(Proprietary), 0, Some(580)))),
            ("open:590", &[V100, B200], Some((Some(Open), 570, None))),
        ];
        for (wish, gpus, expected) in table {
            let plan = plan_driver(&wish.parse().unwrap(), gpus).unwrap();
            let plan = plan.map(|plan| (plan.modules, plan.least, plan.most));
            assert_eq!(plan, expected, "{wish} {gpus:x?}");
        }
    }

    #[test]
    fn what_no_driver_serves_is_refused() {
        let refused = |wish: &str, gpus: &[u16]| plan_driver(&wish.parse().unwrap(), gpus).unwrap_err();
        assert!(matches!(refused("auto", &[V100, B200]), PlanDriverError::Mixed { .. }));
        assert!(matches!(refused("open:distro", &[V100]), PlanDriverError::Modules { .. }));
        assert!(matches!(refused("proprietary:distro", &[RTX5090]), PlanDriverError::Modules { .. }));
        assert!(matches!(refused("535", &[B200]), PlanDriverError::TooOld { .. }));
        for wish in ["590", "proprietary:581.10"] {
            let error = refused(wish, &[V100, H100]);
            assert!(matches!(error, PlanDriverError::TooNew { .. }), "{wish}");
            assert!(error.to_string().contains("--driver 580"), "{error}");
        }
    }
}
