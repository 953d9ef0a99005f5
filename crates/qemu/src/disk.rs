//! The renter's disk: a qcow2 overlay over the base image. Owns its creation and removal; called by the agent's
//! bring-up and teardown. What a base image is, decides [`base`] without running a tool on it.

pub mod base;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use qudata_host::command::{Tool, ToolError};
use qudata_host::durable::{self, DurableError};
use qudata_host::size::ByteSize;

pub use self::base::{BaseFormat, BaseImage, InspectBaseError, inspect_base};
use crate::owned;
pub use crate::owned::Owner;

/// Creating writes some hundred KiB of metadata; more time than this means that the host disk hangs.
const CREATE_DEADLINE: Duration = Duration::from_secs(30);

/// One overlay, decided but not made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OverlayPlan {
    overlay: PathBuf,
    base: PathBuf,
    format: BaseFormat,
    size: ByteSize,
    owner: Owner,
}

/// A wish for a disk that cannot be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlanOverlayError {
    /// The disk would cut the image's end off.
    #[error(
        "a disk of {wanted} is smaller than the base image, which needs {base}: ask for at least that much"
    )]
    TooSmall {
        /// Size asked for.
        wanted: ByteSize,
        /// Virtual size of the base image.
        base: ByteSize,
    },
    /// A relative path would be read relative to the overlay.
    #[error("{} is no absolute path", path.display())]
    Relative {
        /// The path.
        path: PathBuf,
    },
}

/// An overlay that was not made.
#[derive(Debug, thiserror::Error)]
pub enum CreateOverlayError {
    /// A file is there already: it may be a renter's disk.
    #[error("the disk {} exists already and is left alone", overlay.display())]
    Exists {
        /// The existing file.
        overlay: PathBuf,
    },
    /// The file could not be created.
    #[error("cannot create the disk file {}", overlay.display())]
    File {
        /// The file.
        overlay: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// qemu-img did not write the image.
    #[error("cannot write the disk image {}", overlay.display())]
    Image {
        /// The file.
        overlay: PathBuf,
        /// The cause.
        #[source]
        source: ToolError,
    },
}

/// Decides an overlay of `size` over `base`.
///
/// # Errors
/// When `size` is below the base image's, or a path is relative.
pub fn plan_overlay(
    overlay: &Path,
    base: &Path,
    image: BaseImage,
    size: ByteSize,
    owner: Owner,
) -> Result<OverlayPlan, PlanOverlayError> {
    // An absolute path also keeps qemu-img from reading `nbd:…` or `json:…` into a name.
    if let Some(path) = [overlay, base].into_iter().find(|path| !path.is_absolute()) {
        return Err(PlanOverlayError::Relative { path: path.into() });
    }
    if size < image.virtual_size {
        return Err(PlanOverlayError::TooSmall { wanted: size, base: image.virtual_size });
    }
    Ok(OverlayPlan { overlay: overlay.into(), base: base.into(), format: image.format, size, owner })
}

/// Makes the overlay by one run of `qemu_img`; nothing is left behind on failure.
///
/// # Errors
/// When a file is there already, or the image cannot be written.
pub async fn create_overlay(plan: &OverlayPlan, qemu_img: &Path) -> Result<(), CreateOverlayError> {
    // qemu-img would truncate what it finds; creating the file first makes that impossible and keeps it private.
    owned::create_new(&plan.overlay, plan.owner).map_err(|source| match source.kind() {
        io::ErrorKind::AlreadyExists => CreateOverlayError::Exists { overlay: plan.overlay.clone() },
        _ => CreateOverlayError::File { overlay: plan.overlay.clone(), source },
    })?;
    let run = Tool::new(qemu_img).args(create_args(plan)).deadline(CREATE_DEADLINE).run().await;
    run.map(drop).map_err(|source| {
        let _ = fs::remove_file(&plan.overlay);
        CreateOverlayError::Image { overlay: plan.overlay.clone(), source }
    })
}

/// Removes a disk for good; `false` when there was none.
///
/// # Errors
/// When the file exists and cannot be removed.
pub fn remove_overlay(overlay: &Path) -> Result<bool, DurableError> {
    durable::remove_file(overlay)
}

fn create_args(plan: &OverlayPlan) -> Vec<std::ffi::OsString> {
    // Subclusters: a first small write copies 4 KiB of the base instead of 64 (measured 2.7 times the rate).
    // -u: the base was inspected here; qemu-img must not open it.
    let mut args: Vec<std::ffi::OsString> = ["create", "-q", "-u", "-f", "qcow2"].map(Into::into).into();
    args.extend(["-o", "extended_l2=on,cluster_size=128k", "-F", plan.format.name(), "-b"].map(Into::into));
    args.extend([plan.base.clone().into(), plan.overlay.clone().into()]);
    args.push(plan.size.bytes().to_string().into());
    args
}

#[cfg(test)]
mod tests;
