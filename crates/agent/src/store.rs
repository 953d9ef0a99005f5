//! What must survive the agent, in one redb file: instances with their leases, GPUs, and the schema version. A change
//! is committed (and on disk) before the effect it announces.
//!
//! Leases live inside the records and are indexed again at start, so that a record and what it holds cannot come apart.
//! A newer schema refuses to start. A damaged file is set aside, never overwritten.

use std::{
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use qudata_host::causes::chain;
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use uuid::Uuid;

use crate::{gpus::record::GpuRecord, instance::record::InstanceRecord};

/// Version of what is written here. Raise it with every change that an older agent would misread.
const SCHEMA: u64 = 1;
const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");
const INSTANCES: TableDefinition<'_, u128, &[u8]> = TableDefinition::new("instances");
const GPUS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("gpus");

/// The store could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenStoreError {
    /// Another agent has it open.
    #[error("another agent already uses {path}: stop it first, or give this one its own QUDATA_DATA_DIR")]
    InUse {
        /// The store.
        path: PathBuf,
    },
    /// Written by a newer agent.
    #[error(
        "{path} was written by a newer agent (schema {found}, this one knows {SCHEMA}): install that version again"
    )]
    Newer {
        /// The store.
        path: PathBuf,
        /// Its schema.
        found: u64,
    },
    /// It cannot be read or written for a reason that setting it aside would not cure.
    #[error("cannot open the store {path}")]
    Unusable {
        /// The store.
        path: PathBuf,
        /// Why.
        #[source]
        source: Box<redb::Error>,
    },
    /// It is damaged and could not be set aside.
    #[error("the store {path} is damaged and cannot be moved aside")]
    SetAside {
        /// The store.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// A commit or a read failed.
#[derive(Debug, thiserror::Error)]
#[error("the store could not {attempt}")]
pub struct StoreError {
    /// What was tried.
    pub attempt: &'static str,
    /// Why it failed.
    #[source]
    pub source: Box<dyn std::error::Error + Send + Sync>,
}

fn failed<E: Into<Box<dyn std::error::Error + Send + Sync>>>(
    attempt: &'static str,
) -> impl FnOnce(E) -> StoreError {
    move |source| StoreError { attempt, source: source.into() }
}

/// The open store; clones share it.
#[derive(Debug, Clone)]
pub struct Store {
    path: Arc<Path>,
    /// `None` after it failed and could not be opened again; the next commit tries that once more.
    database: Arc<Mutex<Option<Database>>>,
}

/// What opening found.
#[derive(Debug)]
pub struct Opened {
    /// The store.
    pub store: Store,
    /// All records, in no particular order.
    pub records: Vec<InstanceRecord>,
    /// What is known of GPUs.
    pub gpus: Vec<GpuRecord>,
    /// Where a damaged predecessor was put.
    pub set_aside: Option<PathBuf>,
}

impl Store {
    /// Opens or creates the store and reads every record.
    ///
    /// # Errors
    /// [`OpenStoreError`]; nothing was changed then.
    pub fn open(path: &Path) -> Result<Opened, OpenStoreError> {
        match Self::open_intact(path) {
            Ok(opened) => Ok(opened),
            Err(Trouble::Refused(error)) => Err(error),
            Err(Trouble::Damaged(damage)) => {
                let stamp = jiff::Timestamp::now().as_second();
                let aside = path.with_extension(format!("damaged-{stamp}"));
                tracing::error!(damage, aside = %aside.display(), "the store is damaged; setting it aside");
                std::fs::rename(path, &aside)
                    .map_err(|source| OpenStoreError::SetAside { path: path.to_owned(), source })?;
                let opened = Self::open_intact(path).map_err(|trouble| match trouble {
                    Trouble::Refused(error) => error,
                    Trouble::Damaged(text) => OpenStoreError::Unusable {
                        path: path.to_owned(),
                        source: Box::new(redb::Error::Corrupted(text)),
                    },
                })?;
                Ok(Opened { set_aside: Some(aside), ..opened })
            }
        }
    }

    fn open_intact(path: &Path) -> Result<Opened, Trouble> {
        let database = Database::create(path).map_err(|e| Trouble::of(path, e.into()))?;
        let _ = std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o600));
        let found = schema(&database).map_err(|e| Trouble::of(path, e))?;
        if found > SCHEMA {
            return Err(Trouble::Refused(OpenStoreError::Newer { path: path.to_owned(), found }));
        }
        let records = parsed(&read_all(&database, INSTANCES).map_err(|e| Trouble::of(path, e))?)?;
        let gpus = parsed(&read_all(&database, GPUS).map_err(|e| Trouble::of(path, e))?)?;
        let store = Self { path: path.into(), database: Arc::new(Mutex::new(Some(database))) };
        Ok(Opened { store, records, gpus, set_aside: None })
    }

    /// Writes a record; when this returns, it is on disk.
    ///
    /// # Errors
    /// When the disk is full or fails; the former record is kept.
    pub async fn put(&self, record: &InstanceRecord) -> Result<(), StoreError> {
        let key = record.id.as_u128();
        let bytes = serde_json::to_vec(record).map_err(failed("encode a record"))?;
        self.write(move |write| {
            write.open_table(INSTANCES)?.insert(key, bytes.as_slice())?;
            Ok(())
        })
        .await
    }

    /// Forgets a record.
    ///
    /// # Errors
    /// When the disk fails; the record is kept.
    pub async fn remove(&self, id: Uuid) -> Result<(), StoreError> {
        let key = id.as_u128();
        self.write(move |write| {
            write.open_table(INSTANCES)?.remove(key)?;
            Ok(())
        })
        .await
    }

    /// Writes what is known of a GPU; when this returns, it is on disk.
    ///
    /// # Errors
    /// When the disk is full or fails; what was known before is kept.
    pub async fn put_gpu(&self, record: &GpuRecord) -> Result<(), StoreError> {
        let key = record.address.to_string();
        let bytes = serde_json::to_vec(record).map_err(failed("encode a GPU"))?;
        self.write(move |write| {
            write.open_table(GPUS)?.insert(key.as_str(), bytes.as_slice())?;
            Ok(())
        })
        .await
    }

    async fn write<F>(&self, change: F) -> Result<(), StoreError>
    where
        F: Fn(&redb::WriteTransaction) -> Result<(), redb::Error> + Send + 'static,
    {
        let store = self.clone();
        // A commit ends with fsync, which can take long on a busy disk.
        let committed = tokio::task::spawn_blocking(move || {
            let mut database = store.database.lock().unwrap_or_else(PoisonError::into_inner);
            let failure = match database.as_ref().map(|database| commit(database, &change)) {
                Some(Ok(())) => return Ok(()),
                Some(Err(error)) => Some(error),
                None => None,
            };
            // After one failed write redb refuses everything until it is opened anew, also when there is room again. What
            // was committed is kept by that; the change is made once more, or was not made.
            tracing::warn!(failure = failure.map(|error| chain(&error)), "opening the store again");
            *database = None;
            commit(database.insert(Database::open(&store.path)?), &change)
        });
        committed.await.map_err(failed("run a commit"))?.map_err(failed("commit"))
    }
}

fn commit(
    database: &Database,
    change: &dyn Fn(&redb::WriteTransaction) -> Result<(), redb::Error>,
) -> Result<(), redb::Error> {
    let transaction = database.begin_write()?;
    change(&transaction)?;
    transaction.commit()?;
    Ok(())
}

/// Reads the schema version, writing it into a new store.
fn schema(database: &Database) -> Result<u64, redb::Error> {
    let transaction = database.begin_write()?;
    let found = {
        let mut meta = transaction.open_table(META)?;
        transaction.open_table(INSTANCES)?;
        // Absent in stores of version 0.1.0, which knew no GPUs.
        transaction.open_table(GPUS)?;
        let found = meta.get("schema")?.map(|v| v.value());
        match found {
            Some(found) => found,
            None => {
                meta.insert("schema", SCHEMA)?;
                SCHEMA
            }
        }
    };
    transaction.commit()?;
    Ok(found)
}

fn read_all<K: redb::Key + 'static>(
    database: &Database,
    table: TableDefinition<'_, K, &'static [u8]>,
) -> Result<Vec<Vec<u8>>, redb::Error> {
    let transaction = database.begin_read()?;
    let table = transaction.open_table(table)?;
    let mut records = Vec::new();
    for row in table.iter()? {
        records.push(row?.1.value().to_vec());
    }
    Ok(records)
}

fn parsed<T: serde::de::DeserializeOwned>(rows: &[Vec<u8>]) -> Result<Vec<T>, Trouble> {
    let parsed = rows.iter().map(|bytes| serde_json::from_slice(bytes)).collect::<Result<_, _>>();
    parsed.map_err(|e| Trouble::Damaged(format!("a record is no record: {e}")))
}

enum Trouble {
    Refused(OpenStoreError),
    Damaged(String),
}

impl Trouble {
    fn of(path: &Path, error: redb::Error) -> Self {
        let path = path.to_owned();
        match error {
            redb::Error::DatabaseAlreadyOpen => Self::Refused(OpenStoreError::InUse { path }),
            redb::Error::Corrupted(text) => Self::Damaged(text),
            // What redb answers to a file that is none of its own, or of a format it cannot read.
            redb::Error::Io(e) if e.kind() == io::ErrorKind::InvalidData => Self::Damaged(e.to_string()),
            error @ (redb::Error::UpgradeRequired(_)
            | redb::Error::TableTypeMismatch { .. }
            | redb::Error::TypeDefinitionChanged { .. }) => Self::Damaged(error.to_string()),
            other => Self::Refused(OpenStoreError::Unusable { path, source: Box::new(other) }),
        }
    }
}

#[cfg(test)]
mod tests;
