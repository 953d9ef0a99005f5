//! The seed as an ISO 9660 image with Joliet names, which is what cloud-init's NoCloud looks for by its label.

use super::Seed;
use hadris_iso::{
    joliet::JolietLevel,
    read::PathSeparator,
    write::{
        File, InputFiles, IsoImageWriter,
        options::{CreationFeatures, IsoFormatOptions},
    },
};
use qudata_host::durable::{self, DurableError};
use std::{io::Cursor, path::Path, sync::Arc};

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
        source: Box<dyn std::error::Error + Send + Sync>,
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
    durable::replace(path, &build(seed)?, 0o600).map_err(|source| SeedImageError::Write { source })
}

fn build(seed: &Seed) -> Result<Vec<u8>, SeedImageError> {
    let file = |name: &str, text: &str| File::File {
        name: Arc::new(name.to_owned()),
        contents: text.as_bytes().to_vec(),
    };
    let files = InputFiles {
        path_separator: PathSeparator::ForwardSlash,
        files: vec![
            file("meta-data", &seed.meta_data),
            file("network-config", &seed.network_config),
            file("user-data", &seed.user_data),
            file("vendor-data", &seed.vendor_data),
        ],
    };
    let options = IsoFormatOptions {
        volume_name: VOLUME_LABEL.to_owned(),
        system_id: None,
        volume_set_id: None,
        publisher_id: None,
        preparer_id: None,
        application_id: None,
        sector_size: 2048,
        features: CreationFeatures::joliet(JolietLevel::Level3),
        path_separator: PathSeparator::ForwardSlash,
        strict_charset: false,
    };
    let mut image = Cursor::new(Vec::new());
    IsoImageWriter::create(&mut image, files, options)
        .map_err(|source| SeedImageError::Build { source: Box::new(source) })?;
    Ok(image.into_inner())
}
