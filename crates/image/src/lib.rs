//! Base images: fetched, proven, customised in a machine of their own, published whole. Knows no instances. Called by the
//! CLI's `image` and by the installation.
//!
//! ```text
//! <images>/                          root, 0711: the users of VMs pass through it
//!   qudata-base.qcow2                a link to the current image, replaced in one step
//!   <id>/disk.qcow2  manifest.json   an image, read-only for good; the id is the beginning of the disk's SHA-256
//!   <id>/disk.{vmlinuz,initrd,cmdline}   for firmware "direct", where the source had them
//!   .users/<name>                    where the instances of an agent are, whose disks may lie over these images
//!   .lock                            one builder at a time
//!   .fetch/<key>.part                a download, kept until an image was made of it
//!   .work-*/                         a build, or an image on its way out: swept by the next one
//! ```

mod boot;
mod build;
mod console_log;
mod customise;
mod digest;
mod driver;
mod error;
mod fetch;
mod launch;
mod lock;
mod machine;
mod memory;
mod obtain;
mod pack;
mod progress;
mod record;
mod report;
mod seed;
mod signature;
mod source;
mod space;
mod store;
mod users;
mod uses;

pub use self::{
    boot::BootError,
    build::{BuildWish, Place, Start, build},
    customise::{Customisation, CustomiseError},
    digest::{Digest, ParseDigestError},
    driver::{DriverWish, Modules, ParseDriverError, PlanDriverError},
    error::BuildError,
    fetch::FetchError,
    lock::LockError,
    progress::Progress,
    record::{BaseRecord, DriverRecord, ImageId, ImageRecord, Options, ParseIdError},
    signature::SignatureError,
    source::{Known, Location, ParseLocationError, PlanSourceError, Proof, Source, SourceWish},
    space::Room,
    store::{Claims, Damaged, Listing, Store, StoreError},
    users::UsersError,
    uses::DiskUse,
};
// What a caller fills `Place` with.
pub use qudata_qemu::{disk::Owner, machine::Accel};
