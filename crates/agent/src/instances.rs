//! All instances of this host: a table of handles. Cloned into every HTTP call; reads are snapshots and never wait.

mod admission;
mod devices;
mod host;
mod outward;

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
};

use jiff::Timestamp;
use qudata_api::{Command, ErrorCode, InstanceView, Problem, StatusOf, Teardown};
use tokio::sync::watch;
use uuid::Uuid;

use crate::{
    instance::{
        events::EventFeed,
        handle::Handle,
        record::InstanceRecord,
        spec::parse_key,
        task::{self, Beginning},
    },
    outside::Outside,
    refusal::Refusal,
    site::Site,
};

/// Handle of the whole; clones share it.
#[derive(Debug, Clone)]
pub struct Instances {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    site: Arc<Site>,
    /// By creation, so that the oldest comes first.
    table: Mutex<BTreeMap<(Timestamp, Uuid), Handle>>,
    /// One admission at a time: what is free is decided and taken before the next one looks. No wait for QEMU, a guest
    /// or the network happens under it, one commit does.
    admission: tokio::sync::Mutex<()>,
    started_at: Timestamp,
    port: u16,
    problems: Mutex<Vec<Problem>>,
    /// Set once by the daemon where there are a tunnel and a control plane.
    outside: OnceLock<Outside>,
}

impl Instances {
    /// An empty table. `port` is the API's own.
    pub fn new(site: Arc<Site>, port: u16) -> Self {
        let (table, admission, problems) =
            (Mutex::default(), tokio::sync::Mutex::default(), Mutex::default());
        Self {
            inner: Arc::new(Inner {
                site,
                table,
                admission,
                started_at: Timestamp::now(),
                port,
                problems,
                outside: OnceLock::new(),
            }),
        }
    }

    /// Shows these problems of the host from now on.
    pub fn report(&self, problems: Vec<Problem>) {
        self.problems().extend(problems);
    }

    /// Shows how the connections to the outside are doing from now on.
    pub fn watch_outside(&self, outside: Outside) {
        // Told once, by the daemon.
        let _ = self.inner.outside.set(outside);
    }

    /// Told whenever an instance changes or is gone.
    pub fn changes(&self) -> watch::Receiver<()> {
        self.inner.site.changes.subscribe()
    }

    /// Takes in an instance of an earlier agent.
    pub fn adopt(&self, record: InstanceRecord, beginning: Beginning) {
        let key = (record.created_at, record.id);
        let handle = task::spawn(self.inner.site.clone(), record, beginning);
        self.table().insert(key, handle);
    }

    /// All instances, oldest first.
    pub fn list(&self) -> Vec<InstanceView> {
        self.handles().iter().map(|handle| self.show(handle)).collect()
    }

    /// One instance.
    pub fn get(&self, id: Uuid) -> Option<InstanceView> {
        self.find(id).ok().map(|handle| self.show(&handle))
    }

    /// The only instance.
    ///
    /// # Errors
    /// 404 when there is none, 409 when there are several: which one is meant is never guessed.
    pub fn sole(&self) -> Result<Uuid, Refusal> {
        match self.handles().as_slice() {
            [] => Err(Refusal::no_such_instance()),
            [one] => Ok(one.id()),
            several => {
                let sentence = format!("there are {} instances; name one by its id", several.len());
                Err(Refusal::new(ErrorCode::AmbiguousInstance, sentence))
            }
        }
    }

    /// Start, stop, restart.
    ///
    /// # Errors
    /// Why not.
    pub async fn command(&self, id: Uuid, command: Command) -> Result<StatusOf, Refusal> {
        self.find(id)?.command(command).await
    }

    /// Deletes an instance with its disk, at any moment of its life.
    ///
    /// # Errors
    /// 404 when there is none with this id: an id is never used again, so a late DELETE cannot hit another instance.
    pub async fn delete(&self, id: Uuid) -> Result<Teardown, Refusal> {
        self.find(id)?.delete().await
    }

    /// Lets a key log in.
    ///
    /// # Errors
    /// Why not.
    pub async fn add_key(&self, id: Uuid, key: &str) -> Result<(), Refusal> {
        let handle = self.find(id)?;
        handle.add_key(parse_key("ssh_pubkey", key)?).await
    }

    /// No longer lets a key log in.
    ///
    /// # Errors
    /// Why not.
    pub async fn remove_key(&self, id: Uuid, key: &str) -> Result<(), Refusal> {
        let handle = self.find(id)?;
        handle.remove_key(parse_key("ssh_pubkey", key)?).await
    }

    /// The bounded serial log.
    ///
    /// # Errors
    /// When there is no such instance or the log cannot be read.
    pub async fn console(&self, id: Uuid) -> Result<Vec<u8>, Refusal> {
        self.find(id)?.console().await
    }

    /// History and what comes.
    ///
    /// # Errors
    /// When there is no such instance.
    pub fn events(&self, id: Uuid) -> Result<EventFeed, Refusal> {
        Ok(self.find(id)?.events())
    }

    fn find(&self, id: Uuid) -> Result<Handle, Refusal> {
        let found = self.handles().into_iter().find(|handle| handle.id() == id);
        found.ok_or_else(Refusal::no_such_instance)
    }

    /// The living handles, oldest first; those of deleted instances are dropped on the way.
    fn handles(&self) -> Vec<Handle> {
        let mut table = self.table();
        table.retain(|_, handle| !handle.is_gone());
        table.values().cloned().collect()
    }

    fn problems(&self) -> MutexGuard<'_, Vec<Problem>> {
        self.inner.problems.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn table(&self) -> MutexGuard<'_, BTreeMap<(Timestamp, Uuid), Handle>> {
        self.inner.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
