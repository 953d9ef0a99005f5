//! From a wish to a published image. Owns the order of the work and that nothing half-done is ever seen; called by the CLI
//! and by the installation.
//!
//! ```text
//! plan → lock → sweep → is there room? → obtain and prove → look at the header → customise in a machine → pack → check →
//! publish
//! ```

use std::{
    fs, io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::atomic::AtomicU64,
};

use jiff::Timestamp;
use qudata_host::{capacity::HostCapacity, durable, size::ByteSize};
use qudata_qemu::{
    disk::{self, BaseImage, Owner, inspect_base},
    firmware::{self, BootFilesError, Firmware},
    machine::Accel,
};

use crate::{
    customise::{Customisation, Work, check_package, customise},
    digest::Digest,
    driver::{DriverPlan, plan_driver},
    error::BuildError,
    lock::Lock,
    memory::plan_memory,
    obtain::{Folders, Obtained, obtain, part_name},
    pack::{DISK, inspect_packed, pack},
    progress::Progress,
    record::{BaseRecord, DriverRecord, ImageId, ImageRecord, Options},
    report::Report,
    source::{Location, SourcePlan, SourceWish, plan_source},
    space::{Room, plan_need},
    store::{FETCHED, Store, WORK},
};

/// Room for a driver, its tools and a renter's first packages.
const CUSTOMISED_GIB: u64 = 10;

/// What is built.
#[derive(Debug, Clone)]
pub struct BuildWish {
    /// From what.
    pub source: SourceWish,
    /// What is changed; none: it is published as it came.
    pub customise: Option<Customisation>,
    /// GiB of the disk; none: 10 when it is customised, else what the source has. Never less than the source needs.
    pub size: Option<u64>,
    /// Where and with what.
    pub place: Place,
}

/// The host's side of a build.
#[derive(Debug, Clone)]
pub struct Place {
    /// Folder of the images.
    pub image_dir: PathBuf,
    /// QEMU.
    pub qemu: PathBuf,
    /// Makes disks.
    pub qemu_img: PathBuf,
    /// How the machine starts.
    pub start: Start,
    /// KVM is used only where it was seen to run guests.
    pub accel: Accel,
    /// Whom QEMU runs as; none: as this program, which is for users other than root.
    pub user: Option<Owner>,
    /// Log of what the machine printed.
    pub log: PathBuf,
    /// Folder of the instances' folders: what their disks may still grow by is not there for a build.
    pub instances: PathBuf,
    /// Memory that is never given away.
    pub reserve_memory: ByteSize,
    /// Disk space that is never given away.
    pub reserve_disk: ByteSize,
}

/// How the machine that customises an image starts: as the instances of this host do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Start {
    /// OVMF.
    Uefi {
        /// The firmware.
        code: PathBuf,
        /// Template of its variables.
        vars: PathBuf,
    },
    /// SeaBIOS.
    Bios,
    /// The kernel beside the source, which is a file of this host then.
    Direct,
}

impl Place {
    /// Whom the machine's files belong to.
    pub(crate) fn owner(&self) -> Owner {
        self.user.unwrap_or_else(myself)
    }
}

/// What was decided before anything was touched.
struct Plan {
    source: SourcePlan,
    driver: Option<DriverPlan>,
}

/// Builds an image and makes it the current one. Instances that exist keep theirs.
///
/// # Errors
/// [`BuildError`], with a stable code; then nothing new can be seen, and a download is kept to be resumed.
pub async fn build(wish: &BuildWish, progress: &mut dyn FnMut(Progress)) -> Result<ImageRecord, BuildError> {
    let plan = plan(wish)?;
    let store = Store::make(&wish.place.image_dir).map_err(BuildError::Publish)?;
    store.check_link().map_err(BuildError::Publish)?;
    let _lock = Lock::take(store.dir()).map_err(BuildError::Lock)?;
    let part = match &plan.source.image {
        Location::Url(url) => Some(part_name(url)),
        Location::File(_) => None,
    };
    store.sweep(part.as_deref()).map_err(BuildError::Publish)?;
    let room = check_host(wish, &plan)?;
    let nonce = uuid::Uuid::new_v4().simple().to_string();
    let dir = store.dir().join(format!("{WORK}{nonce}"));
    let site = Site { wish, plan: &plan, store: &store, dir: &dir, nonce: &nonce, room };
    let made = site.make(progress).await;
    // Only tidiness: the next build sweeps what cannot be removed now.
    let _ = durable::remove_tree(&dir);
    let record = made?;
    if let Some(part) = part {
        let _ = durable::remove_file(&store.dir().join(FETCHED).join(part));
    }
    Ok(record)
}

fn plan(wish: &BuildWish) -> Result<Plan, BuildError> {
    let source = plan_source(&wish.source).map_err(BuildError::Source)?;
    let Some(customisation) = &wish.customise else { return Ok(Plan { source, driver: None }) };
    for name in &customisation.packages {
        check_package(name).map_err(BuildError::Customise)?;
    }
    let driver = plan_driver(&customisation.driver, &customisation.gpus).map_err(BuildError::Driver)?;
    if driver.is_some() && wish.place.start == Start::Direct {
        return Err(BuildError::DirectDriver);
    }
    Ok(Plan { source, driver })
}

/// Refuses what would take from renters, before anything is fetched. Returns the room that a download may take.
fn check_host(wish: &BuildWish, plan: &Plan) -> Result<Room, BuildError> {
    let place = &wish.place;
    if wish.customise.is_some() {
        let host = HostCapacity::observe(&place.image_dir);
        let host = host.map_err(BuildError::other("reading the host's capacity"))?;
        plan_memory(host.memory_available, place.reserve_memory)?;
    }
    let copied = match &plan.source.image {
        // What cannot be read is told when it is copied.
        Location::File(path) => fs::metadata(path).map_or(0, |found| found.len()),
        Location::Url(_) => 0,
    };
    let needed = plan_need(copied, wish.customise.is_some(), plan.driver.is_some());
    let room = Room::observe(place)?;
    room.check(needed, &place.image_dir)?;
    Ok(room)
}

/// One build under way.
struct Site<'a> {
    wish: &'a BuildWish,
    plan: &'a Plan,
    store: &'a Store,
    dir: &'a Path,
    nonce: &'a str,
    room: Room,
}

impl Site<'_> {
    async fn make(&self, progress: &mut dyn FnMut(Progress)) -> Result<ImageRecord, BuildError> {
        durable::create_dir(self.dir, 0o711).map_err(BuildError::other("making the build's folder"))?;
        let fetched = self.store.dir().join(FETCHED);
        let changes = plan_need(0, self.wish.customise.is_some(), self.plan.driver.is_some());
        let folders = Folders { work: self.dir, fetched: &fetched, room: self.room, changes };
        let source = obtain(&self.plan.source, folders, progress).await?;
        // Before any tool touches it: a header can name any file of the host.
        let image = inspect_base(&source.file).map_err(BuildError::Unfit)?;
        open_to_all(&source.file)?;
        let size = self.size(image)?;
        let boot_files = self.boot_files()?;
        let (report, disk) = match &self.wish.customise {
            Some(customisation) => {
                let work = Work {
                    place: &self.wish.place,
                    dir: self.dir,
                    source: &source.file,
                    image,
                    size,
                    boot_files: boot_files.as_ref(),
                    nonce: self.nonce,
                };
                let report = customise(&work, customisation, self.plan.driver.as_ref(), progress).await?;
                (Some(report), self.dir.join("work.qcow2"))
            }
            None => (None, self.untouched(&source.file, image, size).await?),
        };
        progress(Progress::Packing);
        let folder = pack(&self.wish.place, self.dir, &disk).await?;
        if self.plan.driver.is_none() {
            // With a driver the kernel may be a newer one than the files beside the source are of.
            self.keep_boot_files(&folder, boot_files.as_ref())?;
        }
        progress(Progress::Publishing);
        self.publish(&folder, &source, report).await
    }

    fn size(&self, image: BaseImage) -> Result<ByteSize, BuildError> {
        let needed = image.virtual_size;
        match (self.wish.size, &self.wish.customise) {
            (Some(gib), _) if ByteSize::from_gib(gib) < needed => {
                Err(BuildError::Size { wanted: gib, needed: needed.bytes().div_ceil(1 << 30) })
            }
            (Some(gib), _) => Ok(ByteSize::from_gib(gib)),
            (None, Some(_)) => Ok(needed.max(ByteSize::from_gib(CUSTOMISED_GIB))),
            (None, None) => Ok(needed),
        }
    }

    /// The files beside a local source; they are needed only for direct boot.
    fn boot_files(&self) -> Result<Option<Firmware>, BuildError> {
        let direct = self.wish.place.start == Start::Direct;
        let found = match &self.plan.source.image {
            Location::File(path) => firmware::find_boot_files(path),
            Location::Url(url) => Err(BootFilesError::Missing { file: url.into() }),
        };
        match found {
            Ok(files) => Ok(Some(files)),
            Err(error) if direct => Err(BuildError::other("finding the boot files")(error)),
            Err(BootFilesError::Missing { .. }) => Ok(None),
            Err(error) => Err(BuildError::other("finding the boot files")(error)),
        }
    }

    /// A disk of the right size over the source, for an image that is not customised.
    async fn untouched(
        &self,
        source: &Path,
        image: BaseImage,
        size: ByteSize,
    ) -> Result<PathBuf, BuildError> {
        let disk = self.dir.join("work.qcow2");
        make_disk(&self.wish.place, &disk, source, (image, size)).await?;
        Ok(disk)
    }

    fn keep_boot_files(&self, folder: &Path, files: Option<&Firmware>) -> Result<(), BuildError> {
        let Some(Firmware::Direct { kernel, initrd, cmdline }) = files else { return Ok(()) };
        for (from, name) in [(kernel, "disk.vmlinuz"), (initrd, "disk.initrd")] {
            let to = folder.join(name);
            let bytes = fs::read(from).map_err(BuildError::file("read", from))?;
            durable::replace(&to, &bytes, 0o444).map_err(BuildError::other("keeping a boot file"))?;
        }
        durable::replace(&folder.join("disk.cmdline"), cmdline.as_bytes(), 0o444)
            .map_err(BuildError::other("keeping the kernel's command line"))
    }

    async fn publish(
        &self,
        folder: &Path,
        source: &Obtained,
        report: Option<Report>,
    ) -> Result<ImageRecord, BuildError> {
        let disk = folder.join(DISK);
        let (path, count) = (disk.clone(), AtomicU64::new(0));
        let digest = tokio::task::spawn_blocking(move || Digest::sha256_of(&path, &count))
            .await
            .map_err(io::Error::other)
            .and_then(|digest| digest)
            .map_err(BuildError::file("read", &disk))?;
        let size = fs::metadata(&disk).map_err(BuildError::file("read", &disk))?.len();
        let image = inspect_packed(&disk)?;
        let report = report.unwrap_or_default();
        let driver = report.fact("driver").zip(report.fact("modules"));
        let wish = self.wish.customise.as_ref();
        let record = ImageRecord {
            id: ImageId::of(&digest),
            sha256: digest.hex().to_owned(),
            created_at: Timestamp::now(),
            size,
            virtual_size: image.virtual_size.bytes(),
            base: BaseRecord {
                name: self.wish.source.from.to_string(),
                from: self.plan.source.image.to_string(),
                digest: source.digest.to_string(),
                proof: source.proof.clone(),
            },
            options: Options {
                customised: wish.is_some(),
                driver: wish.map_or_else(|| "none".to_owned(), |wish| wish.driver.to_string()),
                packages: wish.map(|wish| wish.packages.clone()).unwrap_or_default(),
                jupyter: wish.is_some_and(|wish| wish.jupyter),
                container_toolkit: wish.is_some_and(|wish| wish.container_toolkit),
            },
            system: report.fact("system"),
            kernel: report.fact("kernel"),
            driver: driver.map(|(version, modules)| DriverRecord { version, modules }),
            packages: report.packages,
        };
        self.store.publish(folder, &record).map_err(BuildError::Publish)?;
        Ok(record)
    }
}

/// A disk of `size` over the source that the machine's user may write.
pub(crate) async fn make_disk(
    place: &Place,
    disk: &Path,
    source: &Path,
    (image, size): (BaseImage, ByteSize),
) -> Result<(), BuildError> {
    let plan = disk::plan_overlay(disk, source, image, size, place.owner())
        .map_err(BuildError::other("planning the disk"))?;
    disk::create_overlay(&plan, &place.qemu_img).await.map_err(BuildError::other("creating the disk"))
}

pub(crate) fn myself() -> Owner {
    Owner { uid: rustix::process::geteuid().as_raw(), gid: rustix::process::getegid().as_raw() }
}

/// For the machine's user, whatever the umask is.
pub(crate) fn open_to_all(path: &Path) -> Result<(), BuildError> {
    fs::set_permissions(path, fs::Permissions::from_mode(0o644)).map_err(BuildError::file("open", path))
}
