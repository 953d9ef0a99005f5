//! Giving frpc its routes, one of two ways, so that those that stay are not touched. Called by `rounds`.
//!
//! ```text
//! Store  frpc ≥ 0.68   POST, DELETE /api/store/proxies       one call a route
//! File   before        write aside → frpc verify → rename → /api/reload; frpc leaves alone what has not changed
//! ```
//! What frpc has is known from its answers. After a call whose outcome is unknown it is asked (store), or made to read
//! its file again (file).

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
    time::Duration,
};

use futures_util::future::join_all;
use qudata_host::{
    command::{Tool, ToolError},
    durable::{self, DurableError},
};
use tokio::time::Instant;

use crate::{
    admin::{Admin, AdminError},
    config::{Config, ConfigError},
    definition::{Defined, Definitions, StoreProxy},
    plan::{Changes, Wanted},
    route::{ProxyName, Route},
};

/// frpc reads a small file.
const VERIFY_DEADLINE: Duration = Duration::from_secs(10);
/// A configuration with a thousand routes has 200 KiB.
const CONFIG_MAX: u64 = 4 << 20;
/// How long a route that frpc itself does not take is left alone.
const REJECTED_FOR: Duration = Duration::from_secs(30);

/// Routes could not be given to frpc.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PublishError {
    #[error(transparent)]
    Admin(#[from] AdminError),
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error("the configuration of frpc cannot be written")]
    Write(#[source] DurableError),
    #[error("the configuration of frpc cannot be read")]
    Read(#[source] io::Error),
    #[error("frpc does not take its configuration")]
    Verify(#[source] ToolError),
}

impl PublishError {
    /// A stable word and what to do.
    pub(crate) fn advice(&self) -> (&'static str, &'static str) {
        match self {
            Self::Admin(AdminError::Refused { .. }) => (
                "frpc_admin",
                "see what frpc says: most often its directory has no room or other rights; it is tried again",
            ),
            Self::Admin(_) => {
                ("frpc_admin", "nothing: it is tried again, and frpc is restarted should it last")
            }
            Self::Config(_) => ("tunnel_settings", "correct the agent's settings and restart it"),
            Self::Write(_) | Self::Read(_) => {
                ("tunnel_files", "make room or correct the rights, as the message says")
            }
            Self::Verify(_) => ("frpc_unusable", "install frpc 0.68 or newer, which the agent uses best"),
        }
    }
}

/// frpc's configuration file and who reads it.
#[derive(Debug, Clone)]
pub(crate) struct ConfigFile {
    pub(crate) frpc: PathBuf,
    pub(crate) path: PathBuf,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

impl ConfigFile {
    /// Replaces `path`, a file only frpc's user and root can read.
    pub(crate) fn write_private(&self, path: &Path, text: &str) -> Result<(), DurableError> {
        durable::publish(path, text.as_bytes(), 0o600)?;
        durable::give_to(path, self.uid, self.gid)
    }

    /// Replaces the configuration, after frpc has said that it takes the new one.
    pub(crate) async fn replace(&self, text: &str) -> Result<(), PublishError> {
        self.verify(text).await?;
        self.write_private(&self.path, text).map_err(PublishError::Write)
    }

    async fn verify(&self, text: &str) -> Result<(), PublishError> {
        // The same ending, by which frpc knows the format.
        let candidate = self.path.with_extension("candidate.toml");
        self.write_private(&candidate, text).map_err(PublishError::Write)?;
        // It prints what is wrong to its standard output, and errors of tools tell what is on the other one. Nice, so that
        // it does not hold up what the other frpc carries.
        let verdict = Tool::new("/bin/sh")
            .args(["-c", r#"exec nice "$0" verify -c "$1" >&2"#])
            .arg(&self.frpc)
            .arg(&candidate)
            .deadline(VERIFY_DEADLINE)
            .run()
            .await;
        durable::remove_file(&candidate).map_err(PublishError::Write)?;
        verdict.map(drop).map_err(PublishError::Verify)
    }

    /// `None` when there is none, or one that this version did not write.
    pub(crate) fn read(&self) -> io::Result<Option<Config>> {
        let mut text = String::new();
        match File::open(&self.path) {
            Ok(file) => file.take(CONFIG_MAX).read_to_string(&mut text)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        Ok(toml::from_str(&text).ok())
    }
}

/// A route that frpc itself did not take.
#[derive(Debug, Clone)]
struct Rejected {
    route: Route,
    words: String,
    at: Instant,
}

/// The routes of one frpc.
pub(crate) struct Publication {
    file: ConfigFile,
    config: Config,
    /// None: unknown.
    known: Option<Definitions>,
    rejected: BTreeMap<ProxyName, Rejected>,
}

impl Publication {
    /// Of a frpc that was just started, without routes.
    pub(crate) fn empty(file: ConfigFile, config: Config) -> Self {
        Self { file, config, known: Some(Definitions::new()), rejected: BTreeMap::new() }
    }

    /// Of a frpc that runs already.
    pub(crate) fn unknown(file: ConfigFile, config: Config) -> Self {
        Self { file, config, known: None, rejected: BTreeMap::new() }
    }

    /// What frpc has.
    pub(crate) async fn observe(&mut self, admin: &Admin) -> Result<Definitions, PublishError> {
        if let Some(known) = &self.known {
            return Ok(known.clone());
        }
        let known = if self.config.abilities().store {
            let mut known = Definitions::new();
            for stored in admin.stored().await? {
                match stored.read() {
                    Some(defined) => drop(known.insert(defined.route.name.clone(), defined)),
                    // Nobody but the agent has the password, so this is a format of another version of it.
                    None => self.drop_foreign(admin, stored.name()).await?,
                }
            }
            known
        } else {
            let found = self.file.read().map_err(PublishError::Read)?;
            let known = found.map(|config| config.routes()).unwrap_or_default();
            self.load(admin, &known).await?;
            known
        };
        self.known = Some(known.clone());
        Ok(known)
    }

    /// Makes frpc run what it has, and asks it anew what that is. Routes that run as they should are left alone.
    pub(crate) async fn reconcile(&mut self, admin: &Admin) -> Result<(), PublishError> {
        self.known = None;
        // Without a store asking is making it read its file again.
        if self.config.abilities().store { Ok(admin.reload().await?) } else { Ok(()) }
    }

    async fn drop_foreign(&self, admin: &Admin, name: &str) -> Result<(), PublishError> {
        match ProxyName::try_from(name) {
            Ok(name) => Ok(admin.remove(&name).await?),
            Err(error) => {
                tracing::warn!(%error, "frpc's store holds a route that cannot be removed");
                Ok(())
            }
        }
    }

    /// Makes the changes. One that cannot be made does not hold up the others; the first error is returned.
    pub(crate) async fn apply(&mut self, admin: &Admin, changes: &Changes) -> Result<(), PublishError> {
        let Some(known) = self.known.take() else { return Ok(()) };
        if self.config.abilities().store {
            self.apply_to_store(admin, known, changes).await
        } else {
            self.apply_to_file(admin, &known, changes).await
        }
    }

    async fn apply_to_store(
        &mut self,
        admin: &Admin,
        mut known: Definitions,
        changes: &Changes,
    ) -> Result<(), PublishError> {
        let mut unclear = Vec::new();
        for (name, removed) in
            join_all(changes.remove.iter().map(async |name| (name, admin.remove(name).await))).await
        {
            match removed {
                Ok(()) => drop(known.remove(name)),
                Err(error) => unclear.push(error),
            }
        }
        // What is still there cannot be added.
        let add = changes.add.iter().filter(|defined| !known.contains_key(&defined.route.name));
        let added =
            join_all(add.map(async |defined| (defined, admin.add(&StoreProxy::of(defined)).await))).await;
        for (defined, added) in added {
            match added {
                Ok(()) => drop(known.insert(defined.route.name.clone(), defined.clone())),
                Err(AdminError::Refused { status: 400, words, .. }) => self.reject(defined, words),
                Err(error) => unclear.push(error),
            }
        }
        match unclear.into_iter().next() {
            None => {
                self.known = Some(known);
                Ok(())
            }
            Some(error) => Err(error.into()),
        }
    }

    async fn apply_to_file(
        &mut self,
        admin: &Admin,
        known: &Definitions,
        changes: &Changes,
    ) -> Result<(), PublishError> {
        let mut after = changes.applied_to(known);
        match self.load(admin, &after).await {
            Err(PublishError::Verify(ToolError::Failed { .. })) => {
                after = self.without_the_unfit(known, changes).await?;
                self.load(admin, &after).await?;
            }
            other => other?,
        }
        self.known = Some(after);
        Ok(())
    }

    /// Makes frpc have exactly these routes.
    async fn load(&self, admin: &Admin, routes: &Definitions) -> Result<(), PublishError> {
        self.file.replace(&self.config.render(routes)?).await?;
        Ok(admin.reload().await?)
    }

    /// One by one, because frpc refuses a file as a whole.
    async fn without_the_unfit(
        &mut self,
        known: &Definitions,
        changes: &Changes,
    ) -> Result<Definitions, PublishError> {
        let mut after = Changes { remove: changes.remove.clone(), add: Vec::new() }.applied_to(known);
        for defined in &changes.add {
            let mut with = after.clone();
            with.insert(defined.route.name.clone(), defined.clone());
            match self.file.verify(&self.config.render(&with)?).await {
                Ok(()) => after = with,
                Err(PublishError::Verify(ToolError::Failed { stderr, .. })) => self.reject(defined, stderr),
                Err(error) => return Err(error),
            }
        }
        Ok(after)
    }

    fn reject(&mut self, defined: &Defined, words: String) {
        let rejected = Rejected { route: defined.route.clone(), words, at: Instant::now() };
        self.rejected.insert(rejected.route.name.clone(), rejected);
    }

    /// Forgets what frpc did not take if it has changed, is not wanted any more, or may be tried again.
    pub(crate) fn reconsider(&mut self, wanted: &Wanted) {
        self.rejected.retain(|name, rejected| {
            wanted.get(name) == Some(&rejected.route) && rejected.at.elapsed() < REJECTED_FOR
        });
    }

    /// Why frpc itself does not take the route, if it does not.
    pub(crate) fn rejection(&self, name: &ProxyName) -> Option<&str> {
        self.rejected.get(name).map(|rejected| rejected.words.as_str())
    }
}

#[cfg(test)]
mod tests;
