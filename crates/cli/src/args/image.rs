//! The words of `image`.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueHint};
use qudata_image::{Digest, DriverWish, Location, ParseDigestError, Source};

/// See [`super::Command::Image`].
#[derive(Debug, Subcommand)]
pub(crate) enum Image {
    /// Build an image and make it the one that new instances get
    ///
    /// A cloud image is fetched, proven by the signature of its publisher, booted once to be customised, and published whole.
    /// Instances that exist keep the image they have.
    Build(Box<Build>),
    /// List the images: what they are made of, which is the current one, and how many instances use each
    #[command(visible_alias = "ls")]
    List(Config),
    /// Read an image to its end and compare it with what was published
    Verify(Verify),
    /// Remove an image that is neither the current one nor used by any instance
    Remove(Remove),
}

/// Names the settings, which say where images and instances are.
#[derive(Debug, Args)]
pub(crate) struct Config {
    /// Settings file [default: /etc/qudata/agent.toml, if it exists]
    #[arg(long = "config", value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) file: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct Build {
    /// What to build from: debian-12, ubuntu-22.04, ubuntu-24.04, an address, or a file
    #[arg(long, value_name = "IMAGE", default_value = "ubuntu-24.04", value_parser = source)]
    pub(crate) from: Source,
    /// Folder that has the files of --from under their publisher's names
    #[arg(long, value_name = "URL", value_hint = ValueHint::Url)]
    pub(crate) mirror: Option<String>,
    /// List of checksums that has the image: an address or a file
    #[arg(long, value_name = "URL|FILE", value_parser = place)]
    pub(crate) checksums: Option<Location>,
    /// Signature of that list, apart from it: an address or a file
    #[arg(long, value_name = "URL|FILE", value_parser = place)]
    pub(crate) signature: Option<Location>,
    /// Keys that may have signed it
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) keyring: Option<PathBuf>,
    /// The image's SHA-256, from where you trust it
    #[arg(long, value_name = "HEX", value_parser = digest::<64>, conflicts_with_all = ["sha512", "checksums", "signature"])]
    pub(crate) sha256: Option<Digest>,
    /// The image's SHA-512, from where you trust it
    #[arg(long, value_name = "HEX", value_parser = digest::<128>, conflicts_with_all = ["checksums", "signature"])]
    pub(crate) sha512: Option<Digest>,
    /// NVIDIA driver: auto (the distribution's, where there is an NVIDIA GPU), none, distro, or a version such as 570; with
    /// open: or proprietary: before it the kernel modules are chosen as well
    #[arg(long, value_name = "DRIVER", default_value = "auto")]
    pub(crate) driver: DriverWish,
    /// Size of the disk in GiB, the least that an instance can have [default: 10, or what the image has]
    #[arg(long, value_name = "GIB", value_parser = clap::value_parser!(u64).range(1..=16_384))]
    pub(crate) size: Option<u64>,
    /// Package of the distribution to install; may be given several times
    #[arg(long = "package", value_name = "NAME")]
    pub(crate) packages: Vec<String>,
    /// Install JupyterLab, on port 8888 with a token that each instance makes for itself
    ///
    /// It is taken from PyPI as it is there at that moment: nobody's signature is checked.
    #[arg(long)]
    pub(crate) jupyter: bool,
    /// Install NVIDIA's container toolkit from NVIDIA's repository
    #[arg(long)]
    pub(crate) container_toolkit: bool,
    /// Publish the image as it came, without booting it
    #[arg(long, conflicts_with_all = ["driver", "packages", "jupyter", "container_toolkit"])]
    pub(crate) no_customise: bool,
    /// Afterwards remove the images that nothing uses
    #[arg(long)]
    pub(crate) prune: bool,
    #[command(flatten)]
    pub(crate) config: Config,
}

/// Names an image.
#[derive(Debug, Clone, Args)]
pub(crate) struct Which {
    /// Id, or a beginning of it that no other has
    #[arg(value_name = "ID")]
    pub(crate) id: String,
}

#[derive(Debug, Args)]
pub(crate) struct Verify {
    #[command(flatten)]
    pub(crate) which: Which,
    #[command(flatten)]
    pub(crate) config: Config,
}

#[derive(Debug, Args)]
pub(crate) struct Remove {
    #[command(flatten)]
    pub(crate) which: Which,
    #[command(flatten)]
    pub(crate) config: Config,
    /// Do not ask
    #[arg(long, short)]
    pub(crate) yes: bool,
}

/// A file is meant from where the user stands.
fn place(text: &str) -> Result<Location, String> {
    match text.parse().map_err(|e: qudata_image::ParseLocationError| e.to_string())? {
        Location::File(path) => std::path::absolute(&path).map(Location::File).map_err(|e| e.to_string()),
        url @ Location::Url(_) => Ok(url),
    }
}

fn source(text: &str) -> Result<Source, String> {
    match text.parse().map_err(|e: qudata_image::ParseLocationError| e.to_string())? {
        known @ Source::Known(_) => Ok(known),
        Source::Place(_) => place(text).map(Source::Place),
    }
}

fn digest<const DIGITS: usize>(text: &str) -> Result<Digest, String> {
    let digest: Digest = text.parse().map_err(|e: ParseDigestError| e.to_string())?;
    if digest.hex().len() == DIGITS { Ok(digest) } else { Err(format!("{DIGITS} digits are expected")) }
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser};

    use crate::args::{Command, CommandLine};

    use super::*;

    fn parse(line: &str) -> Image {
        let line = CommandLine::try_parse_from(line.split(' ')).unwrap();
        let Command::Image(image) = line.command else { panic!("an image is meant") };
        image
    }

    #[test]
    fn every_command_can_be_told_which_settings_are_meant() {
        for words in ["build", "list", "verify 0123", "remove 0123 --yes"] {
            let file = |line: &str| match parse(line) {
                Image::Build(wish) => wish.config.file,
                Image::List(config) => config.file,
                Image::Verify(wish) => wish.config.file,
                Image::Remove(wish) => wish.config.file,
            };
            let line = format!("qudata-agent image {words}");
            assert_eq!(file(&line), None, "{line}");
            assert_eq!(file(&format!("{line} --config /a.toml")), Some("/a.toml".into()), "{line}");
        }
    }

    #[test]
    fn what_nobody_signed_is_said_where_it_is_asked_for() {
        let line = ["qudata-agent", "image", "build", "--help"];
        let help = CommandLine::command().try_get_matches_from(line).unwrap_err().to_string();
        assert!(help.contains("from PyPI") && help.contains("nobody's signature"), "{help}");
    }
}
