//! Small ISO 9660 images with Joliet names: what cloud-init's NoCloud looks for by its label. Pure; called by the guest's
//! seed and by the building of base images.

use std::{io::Cursor, sync::Arc};

use hadris_iso::{
    joliet::JolietLevel,
    read::PathSeparator,
    write::{
        File, InputFiles, IsoImageWriter,
        options::{CreationFeatures, IsoFormatOptions},
    },
};

/// The ISO library failed.
#[derive(Debug, thiserror::Error)]
#[error("cannot build an image of {files} files with the label {label}")]
pub struct BuildIsoError {
    /// Label of the image.
    pub label: String,
    /// How many files it was to hold.
    pub files: usize,
    /// What the library says.
    #[source]
    pub source: Box<dyn std::error::Error + Send + Sync>,
}

/// The bytes of an image with these files, name and content, in its root.
///
/// # Errors
/// When the library refuses a name or the size.
pub fn build(label: &str, files: &[(&str, &str)]) -> Result<Vec<u8>, BuildIsoError> {
    let file = |(name, text): &(&str, &str)| File::File {
        name: Arc::new((*name).to_owned()),
        contents: text.as_bytes().to_vec(),
    };
    let input =
        InputFiles { path_separator: PathSeparator::ForwardSlash, files: files.iter().map(file).collect() };
    let options = IsoFormatOptions {
        volume_name: label.to_owned(),
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
    IsoImageWriter::create(&mut image, input, options).map_err(|source| BuildIsoError {
        label: label.to_owned(),
        files: files.len(),
        source: Box::new(source),
    })?;
    Ok(image.into_inner())
}
