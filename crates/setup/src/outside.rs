//! What an installation needs from elsewhere: the agent's API, the builder of images, the person at the terminal. Owns the
//! seams; the CLI stands behind them, tests put fakes there.

use std::fmt;

use qudata_host::pci::PciAddress;
use secrecy::SecretString;

use crate::{error::SetupError, progress::Event, wish::Wish};

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

    /// Tries a VM with each of these GPUs, or one without; one line for each thing that was seen.
    ///
    /// # Errors
    /// With a sentence.
    fn selftest(&self, gpus: &[PciAddress]) -> Result<Vec<String>, String>;

    /// Builds a base image; its id.
    ///
    /// # Errors
    /// With the builder's code.
    fn build_image(&self, wish: &Wish, tick: &mut dyn FnMut(Tick)) -> Result<String, PartFailure>;

    /// Whether the service at `url` takes the key.
    fn ask_about_key(&self, url: &str, key: &SecretString) -> KeyVerdict;
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
    /// The instances, as the agent tells; when it does not run, those whose folders are there.
    ///
    /// # Errors
    /// When the folders cannot be listed.
    pub fn tenants(&self, data_dir: &str) -> Result<Vec<Tenant>, SetupError> {
        if let Some(tenants) = self.outside.tenants() {
            return Ok(tenants);
        }
        let names = self.files.names(&format!("{data_dir}/instances"))?;
        // A folder that teardown has taken away is none any more.
        let ids = names.into_iter().filter(|name| !name.contains('.'));
        Ok(ids.map(|id| Tenant { name: "the agent does not run".into(), id, gpus: Vec::new() }).collect())
    }
}
