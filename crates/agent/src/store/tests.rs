//! The store under what happens to files: reopened, opened twice, newer, damaged.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use qudata_host::size::ByteSize;
use qudata_testkit::agent::SmallDisk;

use super::*;
use crate::instance::record::{InstanceSpec, Leases, Phase, Sealed};

pub(crate) fn record(slot: u32) -> InstanceRecord {
    InstanceRecord {
        id: Uuid::now_v7(),
        created_at: Timestamp::now(),
        spec: InstanceSpec {
            name: format!("instance-{slot}"),
            cpus: 2,
            memory: ByteSize::from_gib(4),
            storage: ByteSize::from_gib(50),
            ports: BTreeSet::from([22]),
            ssh_keys: Vec::new(),
            tunnel_token: Some(Sealed::new("token-canary")),
        },
        leases: Leases {
            slot,
            ports: BTreeMap::from([(22, 10_000)]),
            public: BTreeMap::new(),
            management_port: 30_000,
            gpus: Vec::new(),
        },
        host_key: String::new(),
        user_data: None,
        done: BTreeSet::new(),
        phase: Phase::Failed { reason: "because".into() },
        since: Timestamp::now(),
        ready_at: None,
        incarnation: 1,
        boot_id: "boot".into(),
        base: None,
    }
}

fn open(path: &Path) -> Opened {
    Store::open(path).unwrap()
}

#[tokio::test]
async fn records_survive_reopening() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("agent.redb");
    let (kept, removed) = (record(0), record(1));
    let opened = open(&path);
    assert!(opened.records.is_empty() && opened.set_aside.is_none());
    opened.store.put(&removed).await.unwrap();
    opened.store.put(&InstanceRecord { phase: Phase::Starting, ..kept.clone() }).await.unwrap();
    opened.store.put(&kept).await.unwrap();
    opened.store.remove(removed.id).await.unwrap();
    opened.store.remove(removed.id).await.unwrap();
    drop(opened);
    assert_eq!(open(&path).records, [kept]);
    let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&path).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600);
}

#[tokio::test]
async fn a_store_whose_disk_was_full_takes_what_comes_when_there_is_room_again() {
    let dir = tempfile::tempdir().unwrap();
    let mount = dir.path().join("mount");
    let disk = SmallDisk::mount(&dir.path().join("image"), &mount, 16 << 20);
    let path = mount.join("agent.redb");
    let store = open(&path).store;
    let kept = record(0);
    store.put(&kept).await.unwrap();
    disk.fill();
    // The file has some room of its own; this is more.
    let huge = |slot: u32| {
        let mut record = record(slot);
        record.spec.name = "x".repeat(1 << 20);
        record
    };
    let mut failed = false;
    for slot in 1..20 {
        failed |= store.put(&huge(slot)).await.is_err();
    }
    assert!(failed, "the disk was never full");
    disk.relieve();
    let later = record(30);
    store.put(&later).await.unwrap();
    store.remove(later.id).await.unwrap();
    store.put(&later).await.unwrap();
    drop(store);
    let records = open(&path).records;
    assert!(records.contains(&kept) && records.contains(&later));
}

#[tokio::test]
async fn a_second_agent_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("agent.redb");
    let first = open(&path);
    let error = Store::open(&path).unwrap_err();
    assert!(matches!(error, OpenStoreError::InUse { .. }), "{error}");
    drop(first);
}

#[test]
fn a_newer_schema_refuses_and_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("agent.redb");
    drop(open(&path));
    let database = Database::create(&path).unwrap();
    let transaction = database.begin_write().unwrap();
    transaction.open_table(META).unwrap().insert("schema", SCHEMA + 1).unwrap();
    transaction.commit().unwrap();
    drop(database);
    for _ in 0..2 {
        let error = Store::open(&path).unwrap_err();
        assert!(matches!(error, OpenStoreError::Newer { found, .. } if found == SCHEMA + 1), "{error}");
    }
}

#[test]
fn a_damaged_store_is_set_aside_whole() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("agent.redb");
    std::fs::write(&path, vec![0xa5; 8192]).unwrap();
    let opened = open(&path);
    assert!(opened.records.is_empty());
    assert_eq!(std::fs::read(opened.set_aside.unwrap()).unwrap(), vec![0xa5; 8192]);
}

#[test]
fn a_record_that_is_none_counts_as_damage() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("agent.redb");
    drop(open(&path));
    let database = Database::create(&path).unwrap();
    let transaction = database.begin_write().unwrap();
    transaction.open_table(INSTANCES).unwrap().insert(7, b"{}".as_slice()).unwrap();
    transaction.commit().unwrap();
    drop(database);
    assert!(open(&path).set_aside.is_some());
}

#[test]
fn a_record_never_prints_its_secrets() {
    assert!(!format!("{:?}", record(0)).contains("canary"));
}
