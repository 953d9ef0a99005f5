//! Why there is no new image, with the stable code that the installation shows. Made by `build` and what it calls.

use std::{
    error::Error,
    io,
    path::{Path, PathBuf},
};

use qudata_host::{command::ToolError, size::ByteSize};
use qudata_qemu::disk::InspectBaseError;

use crate::{
    boot::BootError, customise::CustomiseError, driver::PlanDriverError, fetch::FetchError, lock::LockError,
    signature::SignatureError, source::PlanSourceError, space::Room, store::StoreError, users::UsersError,
};

/// An image that was not made. Nothing of it can be seen by anybody.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The source cannot be taken.
    #[error("the source of the image is refused")]
    Source(#[source] PlanSourceError),
    /// No driver fits.
    #[error("there is no driver for the GPUs of this host")]
    Driver(#[source] PlanDriverError),
    /// Somebody else builds, or the lock cannot be had.
    #[error("this is not the time to build")]
    Lock(#[source] LockError),
    /// A download failed.
    #[error("the download failed")]
    Fetch(#[source] FetchError),
    /// The list of digests is not to be believed.
    #[error("the checksum file is not to be believed")]
    Signature(#[source] SignatureError),
    /// The list does not have the image.
    #[error(
        "{list} does not list {name} once: it is of another release, or the image has another name there"
    )]
    NotListed {
        /// The list.
        list: String,
        /// The image's name.
        name: String,
    },
    /// The image is not the one that was meant.
    #[error(
        "{image} is not what it should be: its digest is {found}, and {expected} is expected. It was changed or damaged; \
         nothing was made of it"
    )]
    Checksum {
        /// Which.
        image: String,
        /// Of what was meant.
        expected: String,
        /// Of what came.
        found: String,
    },
    /// It is no image, or depends on other files.
    #[error("the image is refused")]
    Unfit(#[source] InspectBaseError),
    /// It has more than was asked for.
    #[error("--size {wanted} is less than the {needed} GiB that the image needs")]
    Size {
        /// GiB asked for.
        wanted: u64,
        /// GiB needed.
        needed: u64,
    },
    /// The disk would be full, or what is promised to instances would not be there.
    #[error(
        "at least {} are needed on the file system of {}, which has {} free; the disks of instances may still grow by {}, and \
         {} are kept free (host_reserve_disk). Make room, or set QUDATA_IMAGE_DIR to a larger one, and run the same command \
         again",
        readable(*needed), dir.display(), readable(room.free), readable(room.promised), readable(room.reserve)
    )]
    NoRoom {
        /// What must fit.
        needed: ByteSize,
        /// What there is.
        room: Room,
        /// The images' folder.
        dir: PathBuf,
    },
    /// Renters' machines need the memory.
    #[error(
        "{} MiB of memory are needed to customise an image, and this host has {} MiB available, of which it keeps {} MiB \
         (host_reserve_memory): end what takes the memory, or build when fewer instances run. --no-customise needs none",
        needed.mib(), available.mib(), reserve.mib()
    )]
    Memory {
        /// For the machine and QEMU.
        needed: ByteSize,
        /// `MemAvailable`.
        available: ByteSize,
        /// What the owner keeps.
        reserve: ByteSize,
    },
    /// The images of instances cannot be told from their disks.
    #[error("cannot tell how much room the disks of the instances still need")]
    Users(#[source] UsersError),
    /// Nothing could boot it.
    #[error(
        "instances of this host boot the kernel beside the image (firmware = \"direct\"), and a driver may bring a newer \
         one: no instance could start from it. Set firmware to uefi or bios, or build with --driver none"
    )]
    DirectDriver,
    /// A file cannot be made or read.
    #[error("cannot {attempt} {}", path.display())]
    File {
        /// As a verb.
        attempt: &'static str,
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// qemu-img failed.
    #[error("{what} failed")]
    Tool {
        /// What was tried.
        what: &'static str,
        /// Why.
        #[source]
        source: ToolError,
    },
    /// Something else, named.
    #[error("{what} failed")]
    Other {
        /// What was tried.
        what: &'static str,
        /// Why.
        #[source]
        source: Box<dyn Error + Send + Sync>,
    },
    /// The machine could not be run.
    #[error("the machine that customises the image could not be run")]
    Boot(#[source] BootError),
    /// The work inside failed.
    #[error("the image could not be customised")]
    Customise(#[source] CustomiseError),
    /// It could not be published.
    #[error("the image was made and could not be published")]
    Publish(#[source] StoreError),
}

impl BuildError {
    /// The stable code.
    #[must_use]
    pub fn code(&self) -> &'static str {
        if self.is_full() {
            return "disk_too_small";
        }
        match self {
            Self::Lock(LockError::Busy { .. }) => "busy",
            Self::Fetch(FetchError::Down { .. }) => "mirror_down",
            Self::Fetch(FetchError::Truncated { .. }) => "download_truncated",
            Self::Signature(SignatureError::Bad { .. } | SignatureError::NoKeyring { .. }) => "bad_signature",
            Self::NotListed { .. } | Self::Checksum { .. } => "bad_checksum",
            Self::NoRoom { .. } => "disk_too_small",
            Self::Memory { .. } => "memory_too_small",
            Self::Source(_)
            | Self::Driver(_)
            | Self::Lock(_)
            | Self::Fetch(_)
            | Self::Signature(_)
            | Self::Unfit(_)
            | Self::Size { .. }
            | Self::File { .. }
            | Self::Tool { .. }
            | Self::Other { .. }
            | Self::Boot(_)
            | Self::Customise(_)
            | Self::Users(_)
            | Self::DirectDriver
            | Self::Publish(_) => "image_failed",
        }
    }

    /// Whether it failed for lack of room, wherever that was noticed.
    fn is_full(&self) -> bool {
        let mut cause: Option<&(dyn Error + 'static)> = Some(self);
        while let Some(error) = cause {
            let by_kind = error.downcast_ref::<io::Error>().map(io::Error::kind);
            let by_word = error.downcast_ref::<ToolError>().is_some_and(|tool| {
                matches!(tool, ToolError::Failed { stderr, .. } if stderr.contains("No space left on device"))
            });
            if by_kind == Some(io::ErrorKind::StorageFull) || by_word {
                return true;
            }
            cause = error.source();
        }
        false
    }

    pub(crate) fn file(attempt: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::File { attempt, path, source }
    }

    pub(crate) fn tool(what: &'static str) -> impl FnOnce(ToolError) -> Self {
        move |source| Self::Tool { what, source }
    }

    pub(crate) fn other<E: Error + Send + Sync + 'static>(what: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::Other { what, source: Box::new(source) }
    }
}

/// As people count: GiB with one digit behind the point, MiB below one; rounded up.
fn readable(size: ByteSize) -> String {
    if size < ByteSize::from_gib(1) {
        return format!("{} MiB", size.bytes().div_ceil(1 << 20));
    }
    let tenths = (u128::from(size.bytes()) * 10).div_ceil(1 << 30);
    format!("{}.{} GiB", tenths / 10, tenths % 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_has_its_code_wherever_it_is_noticed() {
        let full = || io::Error::from(io::ErrorKind::StorageFull);
        let tool = ToolError::Failed {
            command: "qemu-img".into(),
            status: "exit status: 1".into(),
            code: Some(1),
            stderr: "error while writing: No space left on device".into(),
        };
        for error in [
            BuildError::file("write", Path::new("/a"))(full()),
            BuildError::Fetch(FetchError::Write { path: "/a".into(), source: full() }),
            BuildError::tool("packing the image")(tool),
            BuildError::NoRoom { needed: ByteSize::from_gib(1), room: Room::default(), dir: "/a".into() },
        ] {
            assert_eq!(error.code(), "disk_too_small", "{error}");
        }
        let other = BuildError::file("write", Path::new("/a"))(io::ErrorKind::PermissionDenied.into());
        assert_eq!(other.code(), "image_failed");
    }
}
