//! What guests may reach, and who may reach them: one nftables table per agent. Owns the table's life; called by the
//! agent at start (`install`), around each machine (`admit`, `open`, `gate`, `withdraw`), by recovery (`observe`) and by its
//! guard (`observe`, [`Removals`]).
//!
//! ```text
//! output  passt's uid, port 53 of the guest's resolver ─▶ the host's resolver
//!         passt's uid ─▶ guest ─▶ answers, resolvers, allow-list: accept
//!                              ├▶ the host itself, networks it is attached to, private, shared, multicast, IPv6: refuse
//!                              ├▶ port 25: refuse
//!                              └▶ the internet: accept
//!         others ─▶ a management port: only root
//! input   a gated port ─▶ refuse
//! ```
//!
//! A port is gated while its guest cannot answer (booting, paused, rebooting): the passt of Debian 12 spins at 100 %
//! of a core while a connection waits. Every change is one transaction of `nft -f -`: all of it or nothing.

mod cidr;
mod policy;
mod removals;
mod resolver;
mod state;
mod surroundings;

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use qudata_host::command::{Tool, ToolError};

pub use self::cidr::{Cidr, ParseCidrError};
pub use self::removals::Removals;
pub use self::resolver::resolvers;
pub use self::state::EgressState;
pub use self::surroundings::Surroundings;

/// The first call after a start of the host loads the kernel's modules, and a busy host may be reloading its firewall: what
/// waits that long is no reason to give a tenant's machine up.
const DEADLINE: Duration = Duration::from_secs(60);

/// The name of a table: lower-case letters, digits and `_`, first a letter, at most 32 characters.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct TableName(String);

/// A text that is no table name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no table name: lower-case letters, digits and _, first a letter, at most 32 characters")]
pub struct ParseTableNameError(String);

impl FromStr for TableName {
    type Err = ParseTableNameError;

    fn from_str(text: &str) -> Result<Self, ParseTableNameError> {
        let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
        let fits = text.len() <= 32
            && text.starts_with(|c: char| c.is_ascii_lowercase())
            && text.chars().all(allowed);
        if fits {
            Ok(Self(text.to_owned()))
        } else {
            Err(ParseTableNameError(text.chars().take(40).collect()))
        }
    }
}

/// What the policy knows of one machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Admission {
    /// The uid its passt runs as. Root cannot be confined this way and is refused.
    pub uid: u32,
    /// Host ports of the renter.
    pub ports: Vec<u16>,
    /// Host port of the agent's own SSH.
    pub management: u16,
}

/// A change of the policy that did not happen.
#[derive(Debug, thiserror::Error)]
pub enum EgressError {
    /// nft did not do it; nothing has changed.
    #[error("cannot {attempt} in the nftables table {table}")]
    Nft {
        /// What was tried.
        attempt: &'static str,
        /// On which table.
        table: String,
        /// The cause.
        #[source]
        source: ToolError,
    },
    /// A machine's passt was to run as root.
    #[error("cannot confine uid 0: passt must run as a user of its own")]
    Root,
    /// nft answered something else than asked.
    #[error("cannot read what nft says of the table {table}")]
    Answer {
        /// The table.
        table: String,
        /// The cause.
        #[source]
        source: serde_json::Error,
    },
}

/// The policy of one agent.
#[derive(Debug, Clone)]
pub struct Egress {
    table: TableName,
    allow: Vec<Cidr>,
    nft: PathBuf,
}

impl Egress {
    /// The policy in `table`; guests may also reach `allow`, networks the owner opens to them.
    pub fn new(table: TableName, allow: Vec<Cidr>) -> Self {
        Self { table, allow, nft: PathBuf::from("nft") }
    }

    /// Name of its table.
    pub fn table(&self) -> &str {
        &self.table.0
    }

    /// Creates or refreshes the table. Machines admitted before stay admitted, and no packet passes between two rules.
    /// Guests ask the first of the resolvers and may ask the others by address.
    ///
    /// # Errors
    /// When nft is missing or refuses.
    pub async fn install(&self, around: &Surroundings) -> Result<(), EgressError> {
        self.apply("install the policy", policy::plan_install(&self.table, &self.allow, around)).await
    }

    /// Confines a machine and gates its ports. Before its passt starts.
    ///
    /// # Errors
    /// When nft refuses, or the machine's passt is to run as root.
    pub async fn admit(&self, machine: &Admission) -> Result<(), EgressError> {
        if machine.uid == 0 {
            return Err(EgressError::Root);
        }
        self.apply("admit a machine", policy::plan_admit(&self.table, machine)).await
    }

    /// Lets connections through to `ports`: the guest answers now.
    ///
    /// # Errors
    /// When nft refuses.
    pub async fn open(&self, ports: &[u16]) -> Result<(), EgressError> {
        self.apply("open ports", policy::plan_open(&self.table, ports)).await
    }

    /// Refuses new connections to `ports`: the guest cannot answer. Existing ones stay.
    ///
    /// # Errors
    /// When nft refuses.
    pub async fn gate(&self, ports: &[u16]) -> Result<(), EgressError> {
        self.apply("gate ports", policy::plan_gate(&self.table, ports)).await
    }

    /// Forgets a machine. After its passt has ended. A table that is gone has forgotten it.
    ///
    /// # Errors
    /// When nft refuses.
    pub async fn withdraw(&self, machine: &Admission) -> Result<(), EgressError> {
        let withdrawn = self.apply("withdraw a machine", policy::plan_withdraw(&self.table, machine)).await;
        if withdrawn.is_err() && self.observe().await.is_ok_and(|state| !state.installed) {
            return Ok(());
        }
        withdrawn
    }

    /// Reads what is in force, also when somebody else flushed or changed it.
    ///
    /// # Errors
    /// When nft is missing or answers something else.
    pub async fn observe(&self) -> Result<EgressState, EgressError> {
        // Asking for a table that is not there is an error like any other, so its existence is asked first.
        let tables = self.query(&["list", "tables", "inet"]).await?;
        if !state::has_table(&tables, &self.table.0) {
            return Ok(EgressState::default());
        }
        let listing = self.query(&["list", "table", "inet", &self.table.0]).await?;
        Ok(state::parse(&listing, policy::RULES))
    }

    /// Removes the table; nothing is confined or gated any more. Absence is success.
    ///
    /// # Errors
    /// When nft refuses.
    pub async fn remove_table(&self) -> Result<(), EgressError> {
        self.apply("remove the policy", policy::plan_remove(&self.table)).await
    }

    async fn apply(&self, attempt: &'static str, script: String) -> Result<(), EgressError> {
        if script.is_empty() {
            return Ok(());
        }
        let tool = Tool::new(&self.nft).args(["-f", "-"]).deadline(DEADLINE);
        let run = tool.stdin(script.into_bytes()).run().await;
        run.map(drop).map_err(|source| self.failed(attempt, source))
    }

    async fn query(&self, words: &[&str]) -> Result<serde_json::Value, EgressError> {
        // Numeric: names of users and services would come back as words.
        let tool =
            Tool::new(&self.nft).args(["--json", "--numeric"]).args(words.iter().copied()).deadline(DEADLINE);
        let out = tool.run().await.map_err(|source| self.failed("look", source))?;
        serde_json::from_slice(&out.stdout)
            .map_err(|source| EgressError::Answer { table: self.table.0.clone(), source })
    }

    fn failed(&self, attempt: &'static str, source: ToolError) -> EgressError {
        EgressError::Nft { attempt, table: self.table.0.clone(), source }
    }
}

impl EgressState {
    /// True when `machine` is confined and its management port is private.
    pub fn confines(&self, machine: &Admission) -> bool {
        self.intact && self.guests.contains(&machine.uid) && self.management.contains(&machine.management)
    }

    /// Those of `ports` that are gated.
    pub fn gated_among(&self, ports: &[u16]) -> BTreeSet<u16> {
        ports.iter().copied().filter(|port| self.gated.contains(port)).collect()
    }
}

#[cfg(test)]
mod tests;
