use jiff::Timestamp;

use super::*;
use crate::record::{BaseRecord, Options};

struct Images {
    _dir: tempfile::TempDir,
    store: Store,
}

impl Images {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::make(&dir.path().join("images")).unwrap();
        Self { _dir: dir, store }
    }

    /// Publishes an image whose disk has this content.
    fn publish(&self, content: &[u8]) -> ImageId {
        let folder = self.store.dir.join(format!("{WORK}x"));
        fs::create_dir(&folder).unwrap();
        let disk = folder.join(DISK);
        fs::write(&disk, content).unwrap();
        let digest = Digest::sha256_of(&disk, &AtomicU64::new(0)).unwrap();
        let record = record(&digest, content.len());
        self.store.publish(&folder, &record).unwrap();
        record.id
    }
}

fn record(digest: &Digest, size: usize) -> ImageRecord {
    ImageRecord {
        id: ImageId::of(digest),
        sha256: digest.hex().to_owned(),
        created_at: Timestamp::now(),
        size: u64::try_from(size).unwrap(),
        virtual_size: 1 << 30,
        base: BaseRecord {
            name: "debian-12".into(),
            from: "https://images.example/a.qcow2".into(),
            digest: "sha512:ab".into(),
            proof: "sha512 given by the owner".into(),
        },
        options: Options {
            customised: true,
            driver: "auto".into(),
            packages: vec!["htop".into()],
            jupyter: false,
            container_toolkit: false,
        },
        system: Some("Debian".into()),
        kernel: Some("6.1".into()),
        driver: None,
        packages: vec![("htop".into(), "3.2".into())],
    }
}

/// What an agent needs that has its instances there and nothing pinned.
fn claims(instances: &Path) -> Claims {
    Claims { instances: instances.to_owned(), base_image: instances.join("no-base.qcow2") }
}

/// Instances, each over the backing file that its disk names.
fn instances(backing: &[(&str, &Path)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (instance, backing) in backing {
        let name = backing.to_str().unwrap().as_bytes();
        let mut header = b"QFI\xfb\0\0\0\x03".to_vec();
        header.extend(104_u64.to_be_bytes());
        header.extend(u32::try_from(name.len()).unwrap().to_be_bytes());
        header.resize(104, 0);
        header.extend(name);
        fs::create_dir(dir.path().join(instance)).unwrap();
        fs::write(dir.path().join(instance).join("disk.qcow2"), header).unwrap();
    }
    dir
}

#[test]
fn the_newest_is_current_and_the_older_stays_where_it_is() {
    let images = Images::new();
    assert_eq!(images.store.current().unwrap(), None);
    let first = images.publish(b"one");
    let before = fs::canonicalize(images.store.dir.join(CURRENT)).unwrap();
    let second = images.publish(b"two");
    assert_eq!(images.store.current().unwrap(), Some(second.clone()));
    assert_eq!(before, images.store.disk(&first));
    assert_eq!(fs::read(&before).unwrap(), b"one");
    assert_eq!(fs::read(images.store.dir.join(CURRENT)).unwrap(), b"two");
    let listing = images.store.list().unwrap();
    let ids: Vec<_> = listing.images.iter().map(|record| record.id.clone()).collect();
    assert_eq!(ids, [second.clone(), first.clone()]);
    // The same again: nothing new, and what was current is current again.
    assert_eq!(images.publish(b"one"), first);
    assert_eq!(images.store.current().unwrap(), Some(first));
    images.store.sweep(None).unwrap();
    assert_eq!(images.store.list().unwrap().images.len(), 2);
}

#[test]
fn looking_makes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&dir.path().join("images")).unwrap();
    assert_eq!((store.list().unwrap(), store.current().unwrap()), (Listing::default(), None));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn what_is_current_or_used_is_not_removed() {
    let images = Images::new();
    let (old, older) = (images.publish(b"old"), images.publish(b"older"));
    let current = images.publish(b"current");
    let disk = images.store.disk(&old);
    let (used, none) = (instances(&[("a", &disk), ("b", &disk)]), instances(&[]));
    let refused = images.store.remove(&old, &claims(used.path())).unwrap_err();
    assert!(matches!(&refused, StoreError::InUse { instances, .. } if *instances == ["a", "b"]), "{refused}");
    assert!(matches!(images.store.remove(&current, &claims(none.path())), Err(StoreError::Current { .. })));
    // A name that leads to it counts as well.
    let via = instances(&[("c", &images.store.dir.join("x/..").join(old.to_string()).join(DISK))]);
    fs::create_dir(images.store.dir.join("x")).unwrap();
    assert!(matches!(images.store.remove(&old, &claims(via.path())), Err(StoreError::InUse { .. })));
    assert_eq!(images.store.prune(&claims(used.path())).unwrap(), std::slice::from_ref(&older));
    assert!(matches!(images.store.remove(&older, &claims(none.path())), Err(StoreError::NoSuchImage { .. })));
    images.store.remove(&old, &claims(none.path())).unwrap();
    let left: Vec<_> = images.store.list().unwrap().images.into_iter().map(|record| record.id).collect();
    assert_eq!(left, [current]);
}

#[test]
fn an_instance_without_a_disk_keeps_every_image() {
    let images = Images::new();
    let (old, _current) = (images.publish(b"old"), images.publish(b"current"));
    let admitted = instances(&[]);
    let id = uuid::Uuid::from_u128(7).to_string();
    fs::create_dir(admitted.path().join(&id)).unwrap();
    for refused in [
        images.store.remove(&old, &claims(admitted.path())).unwrap_err(),
        images.store.prune(&claims(admitted.path())).unwrap_err(),
    ] {
        assert!(matches!(&refused, StoreError::Undecided { instances, .. } if *instances == [id.clone()]));
        assert!(refused.to_string().contains(&id), "{refused}");
    }
    assert_eq!(images.store.list().unwrap().images.len(), 2);
    fs::remove_dir(admitted.path().join(&id)).unwrap();
    assert_eq!(images.store.prune(&claims(admitted.path())).unwrap(), [old]);
}

#[test]
fn a_pinned_image_is_not_removed() {
    let images = Images::new();
    let (pinned, old, _current) = (images.publish(b"pinned"), images.publish(b"old"), images.publish(b"new"));
    let none = instances(&[]);
    let link = images.store.dir.join("by-hand");
    symlink(images.store.disk(&pinned), &link).unwrap();
    for base_image in [images.store.disk(&pinned), images.store.dir.join("./x/..").join(&link), link.clone()]
    {
        fs::create_dir_all(images.store.dir.join("x")).unwrap();
        let claims = Claims { base_image, ..claims(none.path()) };
        assert_eq!(images.store.pinned(&claims.base_image).unwrap().as_ref(), Some(&pinned));
        let refused = images.store.remove(&pinned, &claims).unwrap_err();
        assert!(matches!(refused, StoreError::Pinned { .. }), "{refused}");
        assert_eq!(refused.code(), "image_current");
    }
    let claims = Claims { base_image: link, ..claims(none.path()) };
    assert_eq!(images.store.prune(&claims).unwrap(), [old]);
    assert_eq!(images.store.list().unwrap().images.len(), 2);
    for elsewhere in ["/etc/passwd", "/none", images.store.dir.to_str().unwrap()] {
        assert_eq!(images.store.pinned(Path::new(elsewhere)).unwrap(), None, "{elsewhere}");
    }
}

#[test]
fn the_disks_of_other_agents_keep_their_images_and_unknown_ones_keep_all() {
    let images = Images::new();
    let (old, older) = (images.publish(b"old"), images.publish(b"older"));
    images.publish(b"current");
    let (own, other) = (instances(&[]), instances(&[("a", &images.store.disk(&old))]));
    let notes = images.store.dir.join(".users");
    fs::create_dir(&notes).unwrap();
    let note = notes.join("other");
    fs::write(&note, format!("{}\n", other.path().display())).unwrap();
    let claims = claims(own.path());
    assert!(matches!(images.store.remove(&old, &claims), Err(StoreError::InUse { .. })));
    let uses = images.store.uses(&claims).unwrap();
    assert_eq!(images.store.users(&old, &uses), ["a"]);
    // Its disk is not mounted.
    let away = other.path().with_extension("away");
    fs::rename(other.path(), &away).unwrap();
    for refused in [
        images.store.remove(&older, &claims).unwrap_err(),
        images.store.prune(&claims).unwrap_err(),
        images.store.uses(&claims).unwrap_err(),
    ] {
        assert_eq!(refused.code(), "uses_unknown");
        assert!(chain(&refused).contains(note.to_str().unwrap()), "{}", chain(&refused));
    }
    fs::rename(&away, other.path()).unwrap();
    assert_eq!(images.store.prune(&claims).unwrap(), [older]);
    images.store.sweep(None).unwrap();
    assert!(note.is_file() && images.store.list().unwrap().damaged.is_empty());
    // That agent is no more.
    fs::remove_file(&note).unwrap();
    images.store.remove(&old, &claims).unwrap();
}

#[test]
fn a_builder_at_work_keeps_others_away() {
    let images = Images::new();
    let (old, _current) = (images.publish(b"old"), images.publish(b"current"));
    let none = instances(&[]);
    let lock = Lock::take(&images.store.dir).unwrap();
    assert!(matches!(
        images.store.remove(&old, &claims(none.path())),
        Err(StoreError::Lock(LockError::Busy { .. }))
    ));
    drop(lock);
    images.store.remove(&old, &claims(none.path())).unwrap();
}

#[test]
fn changes_are_found() {
    let images = Images::new();
    let mut bytes = vec![0; 1 << 20];
    let id = images.publish(&bytes);
    assert_eq!(images.store.verify(&id).unwrap().id, id);
    let disk = images.store.disk(&id);
    bytes[1000] = 1;
    fs::set_permissions(&disk, fs::Permissions::from_mode(0o644)).unwrap();
    fs::write(&disk, &bytes).unwrap();
    assert!(matches!(images.store.verify(&id), Err(StoreError::Changed { .. })));
    assert_eq!(images.store.list().unwrap().images.len(), 1, "a list does not read disks");
    fs::write(&disk, b"short").unwrap();
    let listing = images.store.list().unwrap();
    assert!(listing.images.is_empty() && listing.damaged[0].reason.contains("of 5 bytes"), "{listing:?}");
}

#[test]
fn building_the_same_again_heals_a_damaged_image() {
    let images = Images::new();
    let id = images.publish(b"one");
    let disk = images.store.disk(&id);
    fs::write(&disk, b"0ne").unwrap();
    assert!(images.store.verify(&id).is_err());
    images.store.sweep(None).unwrap();
    assert_eq!(images.publish(b"one"), id);
    images.store.verify(&id).unwrap();
}

#[test]
fn a_damaged_manifest_is_told_and_nothing_is_guessed() {
    let images = Images::new();
    let (id, other) = (images.publish(b"one"), images.publish(b"two"));
    let manifest = images.store.dir.join(id.to_string()).join(MANIFEST);
    let text = fs::read_to_string(&manifest).unwrap();
    fs::set_permissions(&manifest, fs::Permissions::from_mode(0o644)).unwrap();
    for bad in [text.replace(&id.to_string(), &other.to_string()), text[..text.len() / 2].to_owned()] {
        fs::write(&manifest, bad).unwrap();
        assert!(matches!(images.store.record(&id), Err(StoreError::Manifest { .. })));
        assert_eq!(images.store.list().unwrap().damaged[0].id, id);
    }
}

#[test]
fn a_file_of_the_owners_is_never_replaced_by_the_link() {
    let images = Images::new();
    let hand = images.store.dir.join(CURRENT);
    fs::write(&hand, b"put here by hand").unwrap();
    assert!(matches!(images.store.check_link(), Err(StoreError::InTheWay { .. })));
    assert_eq!(images.store.current().unwrap(), None);
    assert_eq!(fs::read(&hand).unwrap(), b"put here by hand");
}

#[test]
fn a_link_of_the_owners_is_never_replaced_either() {
    let images = Images::new();
    let id = images.publish(b"one");
    images.store.check_link().unwrap();
    let link = images.store.dir.join(CURRENT);
    let ours = format!("{id}/{DISK}");
    let whole = images.store.disk(&id);
    for target in
        ["/srv/own.qcow2", "own.qcow2", whole.to_str().unwrap(), &format!("./{ours}"), &format!("{ours}/")]
    {
        fs::remove_file(&link).unwrap();
        symlink(target, &link).unwrap();
        assert!(matches!(images.store.check_link(), Err(StoreError::InTheWay { .. })), "{target}");
    }
    let record = images.store.record(&id).unwrap();
    let folder = images.store.dir.join(format!("{WORK}x"));
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join(DISK), b"one").unwrap();
    assert!(matches!(images.store.publish(&folder, &record), Err(StoreError::InTheWay { .. })));
    assert_eq!(fs::read_link(&link).unwrap(), Path::new(&format!("{ours}/")));
}

#[test]
fn leftovers_are_swept_and_nothing_else() {
    let images = Images::new();
    let id = images.publish(b"one");
    let dir = &images.store.dir;
    fs::create_dir_all(dir.join(".work-1/final")).unwrap();
    fs::write(dir.join(".work-1/final/disk.qcow2"), "half").unwrap();
    symlink("x", dir.join(".work-link")).unwrap();
    fs::create_dir_all(dir.join(FETCHED)).unwrap();
    for name in ["a.part", "b.part", "a.head"] {
        fs::write(dir.join(FETCHED).join(name), "x").unwrap();
    }
    fs::write(dir.join("owners-notes"), "x").unwrap();
    images.store.sweep(Some("a.part")).unwrap();
    let names = |path: &Path| {
        let mut names: Vec<_> =
            fs::read_dir(path).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    };
    assert_eq!(names(dir), [FETCHED, &id.to_string(), "owners-notes", CURRENT].map(str::to_owned));
    assert_eq!(names(&dir.join(FETCHED)), ["a.part"]);
}
