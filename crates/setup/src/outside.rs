//! What an installation needs from elsewhere: the agent's API, the builder of images, the person at the terminal. Owns the
//! seams; the CLI stands behind them, tests put fakes there.

use std::fmt;

use qudata_agent_core::control_plane::ServiceUrl;
use qudata_host::pci::PciAddress;
use secrecy::SecretString;

use crate::{error::SetupError, progress::Event, wish::Wish};

/// Where units of VMs that run have their folders: with cgroups of version 2, and with those of version 1.
const VM_UNITS: [&str; 3] = [
    "/sys/fs/cgroup/qudata.slice",
    "/sys/fs/cgroup/systemd/qudata.slice",
    "/sys/fs/cgroup/unified/qudata.slice",
];

/// An instance on this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tenant {
    /// Its id.
    pub id: String,
    /// Its name, or a word about it.
    pub name: String,
    /// Its GPUs.
    pub gpus: Vec<PciAddress>,
}

/// What the service says to a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeyVerdict {
    /// It lets it in.
    Accepted,
    /// It does not, with this status.
    Refused(u16),
    /// It does not answer, and why.
    Unreachable(String),
    /// There is nothing to ask with yet.
    CannotAsk,
}

/// How far something long has got.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tick {
    /// What it is doing.
    pub what: String,
    /// Of it, per cent; none where nobody knows.
    pub percent: Option<u8>,
}

impl fmt::Display for Tick {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.percent {
            Some(percent) => write!(f, "{percent:>3} %  {}", self.what),
            None => f.write_str(&self.what),
        }
    }
}

/// What a self-test that passed came to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tried {
    /// One line for each thing that was seen.
    pub seen: Vec<String>,
    /// The GPUs that were really tried: one that somebody rented meanwhile is not.
    pub gpus: Vec<PciAddress>,
}

/// A part that was called did not do its work.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PartFailure {
    /// Its own stable code.
    pub code: &'static str,
    /// What is wrong and what to do.
    pub text: String,
}

/// The agent's API and the builder of images.
pub trait Outside: fmt::Debug {
    /// The instances, as the agent tells; none when it does not answer.
    fn tenants(&self) -> Option<Vec<Tenant>>;

    /// Deletes an instance with its disk.
    ///
    /// # Errors
    /// With a sentence.
    fn delete(&self, id: &str) -> Result<(), String>;

    /// Whether the agent answers and works, waiting for it a while; what it has to say.
    ///
    /// # Errors
    /// With a sentence.
    fn agent_works(&self, registered: bool) -> Result<Vec<String>, String>;

    /// Tries a VM with each of these GPUs, or one without.
    ///
    /// # Errors
    /// With a sentence.
    fn selftest(&self, gpus: &[PciAddress]) -> Result<Tried, String>;

    /// Builds a base image; its id.
    ///
    /// # Errors
    /// With the builder's code.
    fn build_image(&self, wish: &Wish, tick: &mut dyn FnMut(Tick)) -> Result<String, PartFailure>;

    /// Whether the service at `url` takes the key.
    fn ask_about_key(&self, url: &ServiceUrl, key: &SecretString) -> KeyVerdict;
}

/// The person at the terminal, if there is one.
pub trait Person: fmt::Debug {
    /// Shows something.
    fn tell(&self, event: &Event);

    /// Asks on the terminal, which is not standard input; none where there is none.
    fn ask(&self, question: &str) -> Option<bool>;

    /// Counts down; false when the person stopped it.
    fn count_down(&self, seconds: u32, what: &str) -> bool;
}

/// Everything that an installation or removal works with.
#[derive(Debug, Clone, Copy)]
pub struct Means<'a> {
    /// The host's files.
    pub files: &'a crate::files::Files,
    /// The host's commands.
    pub hands: &'a dyn crate::hands::Hands,
    /// The agent and the builder.
    pub outside: &'a dyn Outside,
    /// Who looks on.
    pub person: &'a dyn Person,
}

impl Means<'_> {
    /// The instances: what the agent tells, and besides every folder and every running VM. An agent whose records are damaged
    /// answers that it has none.
    ///
    /// # Errors
    /// When the folders or units cannot be listed.
    pub fn tenants(&self, data_dir: &str) -> Result<Vec<Tenant>, SetupError> {
        let told = self.outside.tenants();
        let name = if told.is_some() { "the agent does not know it" } else { "the agent does not run" };
        let mut tenants = told.unwrap_or_default();
        let folders = self.files.names(&format!("{data_dir}/instances"))?;
        // A folder that teardown has taken away is none any more.
        let folders = folders.into_iter().filter(|name| !name.contains('.'));
        let mut units = Vec::new();
        for dir in VM_UNITS {
            units.extend(self.files.names(dir)?);
        }
        let units = units.iter().filter_map(|unit| {
            let rest = unit.strip_prefix("qudata-vm-")?.strip_suffix("-qemu.service")?;
            rest.rsplit_once('-').map(|(id, _)| id.to_owned())
        });
        for id in folders.chain(units) {
            if !tenants.iter().any(|tenant| tenant.id == id) {
                tenants.push(Tenant { id, name: name.into(), gpus: Vec::new() });
            }
        }
        Ok(tenants)
    }
}
