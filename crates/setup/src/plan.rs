//! What has to be changed on this host, or why it cannot be. Pure: from [`Observed`] and [`Wish`] alone. Called by `install`
//! before anything is touched, and again where an earlier step has changed what there is to see.

mod boot;
mod fitness;

pub(crate) use self::fitness::off_in_firmware;

use std::collections::BTreeSet;

use qudata_host::pci::PciAddress;

use crate::{
    choose::{self, Chosen},
    error::{Code, SetupError},
    observe::Observed,
    places,
    progress::{Step, Tested},
    settings_file,
    wish::Wish,
};

/// One change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// The package is installed with what it needs.
    Package {
        /// From this file; none: what an earlier apt began is finished.
        file: Option<String>,
        /// To this version.
        version: String,
    },
    /// A file is written.
    File(FileChange),
    /// The boot loader's configuration is made anew, with these kernel parameters.
    Regenerate {
        /// Its name.
        loader: &'static str,
        /// The parameters.
        params: Vec<String>,
    },
    /// A base image is built.
    Image {
        /// From this; none: the builder's default.
        from: Option<String>,
    },
    /// The host is restarted.
    Reboot {
        /// Why.
        why: String,
    },
    /// A VM is tried out with each of these GPUs.
    Selftest {
        /// They.
        gpus: Vec<PciAddress>,
    },
    /// The agent starts with the host.
    Enable,
}

/// A file that is written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileChange {
    /// Which.
    pub path: &'static str,
    /// What is in it; of a secret nothing.
    pub text: String,
    /// What is in it now.
    pub before: Option<String>,
    /// Permission bits.
    pub mode: u32,
    /// Belongs to group qudata.
    pub group: bool,
    /// It holds the key.
    pub secret: bool,
}

/// What is to be done.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// The GPUs.
    pub chosen: Chosen,
    /// What changes, in order, by step.
    pub changes: Vec<(Step, Change)>,
    /// The kernel parameters that the boot loader must pass.
    pub params: Vec<String>,
    /// GPUs that no VM has tried out yet and that are rented out now.
    pub later: Vec<PciAddress>,
    /// Worth knowing.
    pub notes: Vec<String>,
}

impl Plan {
    /// The changes of one step.
    pub fn of(&self, step: Step) -> impl Iterator<Item = &Change> {
        self.changes.iter().filter(move |(of, _)| *of == step).map(|(_, change)| change)
    }

    /// Why the host has to be restarted, if it has to.
    #[must_use]
    pub fn reboot(&self) -> Option<&str> {
        self.of(Step::Reboot).find_map(|change| match change {
            Change::Reboot { why } => Some(why.as_str()),
            _ => None,
        })
    }
}

/// Decides. `tested`: what self-tests that passed were of; `image`: what the base image was built from.
///
/// # Errors
/// When the host cannot be what is wished: with the reason and the remedy. Nothing was changed.
pub fn plan(
    observed: &Observed,
    wish: &Wish,
    (tested, image): (Option<&Tested>, Option<&str>),
) -> Result<Plan, SetupError> {
    let builds = !observed.settings.image_there || wish.image.is_some() && wish.image.as_deref() != image;
    fitness::check(observed, wish, builds)?;
    let mut plan = Plan { chosen: choose::choose(observed, wish)?, ..Plan::default() };
    package(observed, wish, &mut plan)?;
    settings(observed, &mut plan)?;
    key(observed, &mut plan)?;
    boot::plan(observed, wish, &mut plan)?;
    if builds {
        plan.changes.push((Step::Image, Change::Image { from: wish.image.clone() }));
    }
    if !wish.skip_selftest {
        selftest(observed, &mut plan, tested.filter(|_| !builds));
    }
    if !observed.enabled {
        plan.changes.push((Step::Agent, Change::Enable));
    }
    plan.changes.sort_by_key(|(step, _)| *step);
    Ok(plan)
}

/// What self-tests were of that still count; nothing yet where the version or the cards are others.
#[must_use]
pub fn still_tested(observed: &Observed, plan: &Plan, tested: Option<&Tested>) -> Option<Tested> {
    let now = to_be_tested(observed, plan);
    tested.filter(|tested| (&tested.version, &tested.chosen) == (&now.version, &now.chosen)).cloned()
}

/// What a self-test is of, before any GPU was tried.
#[must_use]
pub fn to_be_tested(observed: &Observed, plan: &Plan) -> Tested {
    let package = &observed.package;
    let version = package.offered.clone().or_else(|| package.installed.clone()).unwrap_or_default();
    let chosen = plan.chosen.gpus.iter().map(|gpu| gpu.address.to_string()).collect();
    Tested { version, chosen, gpus: BTreeSet::new() }
}

/// Every GPU is tried once, and a host without one with a VM that has none.
fn selftest(observed: &Observed, plan: &mut Plan, tested: Option<&Tested>) {
    let tested = still_tested(observed, plan, tested);
    let tried = |gpu: &PciAddress| tested.as_ref().is_some_and(|t| t.gpus.contains(&gpu.to_string()));
    let rented = |gpu: &PciAddress| observed.tenants.iter().any(|tenant| tenant.gpus.contains(gpu));
    let gpus = plan.chosen.gpus.iter().map(|gpu| gpu.address);
    let (later, now): (Vec<_>, Vec<_>) = gpus.filter(|gpu| !tried(gpu)).partition(rented);
    plan.later = later;
    if !now.is_empty() || plan.chosen.gpus.is_empty() && tested.is_none() {
        plan.changes.push((Step::Selftest, Change::Selftest { gpus: now }));
    }
}

fn package(observed: &Observed, wish: &Wish, plan: &mut Plan) -> Result<(), SetupError> {
    let package = &observed.package;
    let file = wish.package.as_ref().map(|path| path.display().to_string());
    if package.wants_install() {
        let version = package.offered.clone().unwrap_or_else(|| "what an earlier apt began".to_owned());
        plan.changes.push((Step::Package, Change::Package { file, version }));
    } else if package.installed.is_none() {
        let what = format!("the package {} is not installed, and none was given", places::PACKAGE);
        let remedy = "Give the file of the release, or use install.sh, which fetches it.";
        return Err(SetupError::new(Code::NoPackage, what, remedy)
            .next("qudata-agent install --package ./qudata-agent_VERSION_amd64.deb"));
    }
    Ok(())
}

/// `agent.toml` as it is to be.
///
/// # Errors
/// When a value is refused.
fn settings(observed: &Observed, plan: &mut Plan) -> Result<(), SetupError> {
    let look = &observed.settings;
    let mut values = look.values.clone();
    if let Some(named) = &plan.chosen.named {
        let texts: Vec<String> = named.iter().map(ToString::to_string).collect();
        values.retain(|(key, _)| key != "gpu_pci_addrs");
        values.push(("gpu_pci_addrs".to_owned(), texts.join(",")));
    }
    let text = settings_file::with_values(look.file.as_deref().or(look.template.as_deref()), &values)?;
    settings_file::check(&text)?;
    if look.file.as_deref() != Some(text.as_str()) {
        plan.changes.push(file(Step::Settings, places::SETTINGS, text, look.file.clone(), 0o640));
    }
    Ok(())
}

fn key(observed: &Observed, plan: &mut Plan) -> Result<(), SetupError> {
    let key = observed.key;
    if observed.settings.standalone {
        return Ok(());
    }
    if !key.given && !key.there && !key.registered {
        let what = "no API key was given, and this host was never registered";
        let remedy = "Take the key from your account, and give it in the environment or in a file, never as an argument; \
                      or install without a control plane: --standalone.";
        return Err(
            SetupError::new(Code::BadKey, what, remedy).next("qudata-agent install --api-key-file FILE")
        );
    }
    if key.given && !key.same {
        let before = key.there.then(|| "(not shown)".to_owned());
        let mut change = file(Step::Settings, places::API_KEY, String::new(), before, 0o600);
        if let (_, Change::File(change)) = &mut change {
            (change.secret, change.group) = (true, false);
        }
        plan.changes.push(change);
    }
    let drop_in = observed.texts.get(places::KEY_DROP_IN);
    if (key.given || drop_in.is_some()) && drop_in.map(String::as_str) != Some(places::KEY_TEXT) {
        let text = places::KEY_TEXT.to_owned();
        plan.changes.push(file(Step::Settings, places::KEY_DROP_IN, text, drop_in.cloned(), 0o644));
    }
    Ok(())
}

/// A file of root, but `agent.toml`, which members of the group may read.
fn file(step: Step, path: &'static str, text: String, before: Option<String>, mode: u32) -> (Step, Change) {
    let group = path == places::SETTINGS;
    (step, Change::File(FileChange { path, text, before, mode, group, secret: false }))
}
