//! The seed as the image that cloud-init's NoCloud looks for by its label.

use super::Seed;
use qudata_host::{
    durable::{self, DurableError},
    iso::{self, BuildIsoError},
};
use std::path::Path;

/// The label by which cloud-init finds the seed.
pub const VOLUME_LABEL: &str = "CIDATA";

/// The seed image could not be made.
#[derive(Debug, thiserror::Error)]
pub enum SeedImageError {
    /// The ISO library failed.
    #[error("cannot build the seed image")]
    Build {
        /// What it says.
        #[source]
        source: BuildIsoError,
    },
    /// The file could not be written.
    #[error("cannot save the seed image")]
    Write {
        /// Which file, and why.
        #[source]
        source: DurableError,
    },
}

pub(super) fn write(seed: &Seed, path: &Path) -> Result<(), SeedImageError> {
    let image = iso::build(
        VOLUME_LABEL,
        &[
            ("meta-data", &seed.meta_data),
            ("network-config", &seed.network_config),
            ("user-data", &seed.user_data),
            ("vendor-data", &seed.vendor_data),
        ],
    )
    .map_err(|source| SeedImageError::Build { source })?;
    durable::replace(path, &image, 0o600).map_err(|source| SeedImageError::Write { source })
}
