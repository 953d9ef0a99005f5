//! Where a base image comes from and what proves it. Pure: words and wishes in, a plan out. Called by `build`.

use std::{
    fmt,
    net::IpAddr,
    path::{Path, PathBuf},
    str::FromStr,
};

use crate::digest::Digest;

/// Cloud images known by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Known {
    /// Debian 12. The generic kernel: the cloud kernel leaves out what graphics drivers need.
    Debian12,
    /// Ubuntu 22.04.
    Ubuntu2204,
    /// Ubuntu 24.04.
    Ubuntu2404,
}

impl Known {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Debian12, Self::Ubuntu2204, Self::Ubuntu2404];

    /// The word that means it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Debian12 => "debian-12",
            Self::Ubuntu2204 => "ubuntu-22.04",
            Self::Ubuntu2404 => "ubuntu-24.04",
        }
    }

    /// Folder of its publisher: the image and its checksum files.
    const fn folder(self) -> &'static str {
        match self {
            Self::Debian12 => "https://cloud.debian.org/images/cloud/bookworm/latest",
            Self::Ubuntu2204 => "https://cloud-images.ubuntu.com/releases/22.04/release",
            Self::Ubuntu2404 => "https://cloud-images.ubuntu.com/releases/24.04/release",
        }
    }

    const fn file(self) -> &'static str {
        match self {
            Self::Debian12 => "debian-12-generic-amd64.qcow2",
            Self::Ubuntu2204 => "ubuntu-22.04-server-cloudimg-amd64.img",
            Self::Ubuntu2404 => "ubuntu-24.04-server-cloudimg-amd64.img",
        }
    }

    /// Names of the checksum file and of its signature, and the keyring that the distribution ships. Debian signs none.
    const fn signed(self) -> Option<(&'static str, &'static str, &'static str)> {
        match self {
            Self::Debian12 => None,
            Self::Ubuntu2204 | Self::Ubuntu2404 => {
                Some(("SHA256SUMS", "SHA256SUMS.gpg", "/usr/share/keyrings/ubuntu-cloudimage-keyring.gpg"))
            }
        }
    }
}

/// A file, here or elsewhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Location {
    /// `https`, or `http` on this host.
    Url(String),
    /// On this host.
    File(PathBuf),
}

/// A text that names no place files are taken from.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{text:?} is not allowed: write https://…, http:// on this host itself (127.0.0.1 or [::1]), or a file's path"
)]
pub struct ParseLocationError {
    /// What was given, cut to 200 characters.
    pub text: String,
}

impl FromStr for Location {
    type Err = ParseLocationError;

    fn from_str(text: &str) -> Result<Self, ParseLocationError> {
        let refuse = || ParseLocationError { text: text.chars().take(200).collect() };
        if text.is_empty() || text.chars().any(char::is_control) {
            return Err(refuse());
        }
        let Some((scheme, rest)) = text.split_once("://") else { return Ok(Self::File(text.into())) };
        match scheme {
            "https" if !host(rest).is_empty() => Ok(Self::Url(text.to_owned())),
            "http" if is_loopback(host(rest)) => Ok(Self::Url(text.to_owned())),
            "file" if rest.starts_with('/') => Ok(Self::File(rest.into())),
            _ => Err(refuse()),
        }
    }
}

/// The host in what stands behind `://`. A user name in it would make the eye read another host.
fn host(rest: &str) -> &str {
    let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
    if authority.contains('@') {
        return "";
    }
    match authority.strip_prefix('[') {
        Some(inner) => inner.split(']').next().unwrap_or_default(),
        None => authority.split(':').next().unwrap_or_default(),
    }
}

fn is_loopback(host: &str) -> bool {
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Url(url) => f.write_str(url),
            Self::File(path) => write!(f, "{}", path.display()),
        }
    }
}

impl Location {
    /// The last part of its path: the name that a checksum file has for it.
    fn file_name(&self) -> &str {
        match self {
            Self::Url(url) => {
                let path = url.split(['?', '#']).next().unwrap_or_default();
                path.rsplit('/').next().unwrap_or_default()
            }
            Self::File(path) => path.file_name().and_then(|name| name.to_str()).unwrap_or_default(),
        }
    }
}

/// What the image is made from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A cloud image known by name.
    Known(Known),
    /// Somebody's image.
    Place(Location),
}

impl FromStr for Source {
    type Err = ParseLocationError;

    fn from_str(text: &str) -> Result<Self, ParseLocationError> {
        match Known::ALL.into_iter().find(|known| known.name() == text) {
            Some(known) => Ok(Self::Known(known)),
            None => text.parse().map(Self::Place),
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Known(known) => f.write_str(known.name()),
            Self::Place(place) => place.fmt(f),
        }
    }
}

/// What was said about the source and its proof.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceWish {
    /// The image.
    pub from: Source,
    /// Folder that has a known image's files under the publisher's names.
    pub mirror: Option<String>,
    /// Checksum file.
    pub checksums: Option<Location>,
    /// Detached signature of the checksum file.
    pub signature: Option<Location>,
    /// Keys that may have signed it.
    pub keyring: Option<PathBuf>,
    /// The digest, known from elsewhere.
    pub digest: Option<Digest>,
}

impl SourceWish {
    /// Only the source; what proves it is what is known of it.
    #[must_use]
    pub const fn from(from: Source) -> Self {
        Self { from, mirror: None, checksums: None, signature: None, keyring: None, digest: None }
    }
}

/// What an image must pass before anything is made of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Proof {
    /// It has this digest.
    Digest(Digest),
    /// A signed file lists its digest.
    Signed {
        /// The list.
        checksums: Location,
        /// Its detached signature.
        signature: Location,
        /// The keys.
        keyring: PathBuf,
    },
    /// It lies on this host: whoever may build images may have put it there.
    Own,
}

/// The source, decided.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SourcePlan {
    pub(crate) image: Location,
    /// What a checksum file calls it.
    pub(crate) name: String,
    pub(crate) proof: Proof,
}

/// A source that is not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlanSourceError {
    /// Nothing would prove the image.
    #[error(
        "{image} has no signature: look its digest up where you trust it and give it with --sha256 or --sha512, or give \
         --checksums, --signature and --keyring"
    )]
    Unproven {
        /// The image.
        image: String,
    },
    /// A checksum file alone proves nothing, nor does a signature alone.
    #[error("--checksums, --signature and --keyring go together, and {missing} is not given")]
    Incomplete {
        /// The option that is missing.
        missing: &'static str,
    },
    /// There is no folder of somebody's own image.
    #[error(
        "--mirror is for images known by name: give the image's own address with --from instead of {from}"
    )]
    MirrorOfPlace {
        /// What was said.
        from: String,
    },
    /// The mirror is no place.
    #[error("the mirror cannot be used")]
    Mirror(#[source] ParseLocationError),
    /// An address that ends in a slash has no file.
    #[error("{image} names no file")]
    NoName {
        /// The address.
        image: String,
    },
    /// A path that depends on where one stands.
    #[error("{} is no absolute path", path.display())]
    Relative {
        /// The path.
        path: PathBuf,
    },
}

/// Decides what is fetched and what must prove it.
pub(crate) fn plan_source(wish: &SourceWish) -> Result<SourcePlan, PlanSourceError> {
    let (image, folder) = match (&wish.from, &wish.mirror) {
        (Source::Known(known), mirror) => {
            let folder = mirror.as_deref().unwrap_or_else(|| known.folder()).trim_end_matches('/');
            (at(folder, known.file())?, Some((*known, folder.to_owned())))
        }
        (Source::Place(place), None) => (place.clone(), None),
        (Source::Place(place), Some(_)) => {
            return Err(PlanSourceError::MirrorOfPlace { from: place.to_string() });
        }
    };
    let name = image.file_name().to_owned();
    if name.is_empty() {
        return Err(PlanSourceError::NoName { image: image.to_string() });
    }
    let proof = plan_proof(wish, &image, folder.as_ref().map(|(known, folder)| (*known, folder.as_str())))?;
    for place in [Some(&image), wish.checksums.as_ref(), wish.signature.as_ref()].into_iter().flatten() {
        if let Location::File(path) = place {
            absolute(path)?;
        }
    }
    wish.keyring.as_deref().map_or(Ok(()), absolute)?;
    Ok(SourcePlan { image, name, proof })
}

fn absolute(path: &Path) -> Result<(), PlanSourceError> {
    if path.is_absolute() { Ok(()) } else { Err(PlanSourceError::Relative { path: path.to_owned() }) }
}

fn plan_proof(
    wish: &SourceWish,
    image: &Location,
    known: Option<(Known, &str)>,
) -> Result<Proof, PlanSourceError> {
    if let Some(digest) = &wish.digest {
        return Ok(Proof::Digest(digest.clone()));
    }
    let signed = known.and_then(|(known, folder)| Some((known.signed()?, folder)));
    let (checksums, signature, keyring) = match signed {
        Some(((checksums, signature, keyring), folder)) => (
            Some(wish.checksums.clone().map_or_else(|| at(folder, checksums), Ok)?),
            Some(wish.signature.clone().map_or_else(|| at(folder, signature), Ok)?),
            Some(wish.keyring.clone().unwrap_or_else(|| keyring.into())),
        ),
        None => (wish.checksums.clone(), wish.signature.clone(), wish.keyring.clone()),
    };
    match (checksums, signature, keyring) {
        (Some(checksums), Some(signature), Some(keyring)) => {
            Ok(Proof::Signed { checksums, signature, keyring })
        }
        (None, None, None) => match image {
            Location::File(_) => Ok(Proof::Own),
            Location::Url(url) => Err(PlanSourceError::Unproven { image: url.clone() }),
        },
        (None, _, _) => Err(PlanSourceError::Incomplete { missing: "--checksums" }),
        (_, None, _) => Err(PlanSourceError::Incomplete { missing: "--signature" }),
        (_, _, None) => Err(PlanSourceError::Incomplete { missing: "--keyring" }),
    }
}

fn at(folder: &str, name: &str) -> Result<Location, PlanSourceError> {
    format!("{folder}/{name}").parse().map_err(PlanSourceError::Mirror)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_https_this_host_or_files() {
        for text in [
            "https://images.example/a.img",
            "http://127.0.0.1:8000/a.img",
            "http://[::1]/a.img",
            "http://localhost/a",
            "/a/b.qcow2",
            "file:///a/b.qcow2",
        ] {
            assert!(text.parse::<Location>().is_ok(), "{text}");
        }
        for text in [
            "",
            "http://images.example/a.img",
            "http://127.0.0.1@images.example/a.img",
            "http://127.0.0.1.example/a.img",
            "ftp://images.example/a.img",
            "https:///a",
            "file://a",
            "https://a/\nb",
        ] {
            assert!(text.parse::<Location>().is_err(), "{text}");
        }
        assert_eq!("file:///a/b".parse::<Location>().unwrap(), Location::File("/a/b".into()));
    }

    fn plan(from: &str, change: impl FnOnce(&mut SourceWish)) -> Result<SourcePlan, PlanSourceError> {
        let mut wish = SourceWish::from(from.parse().unwrap());
        change(&mut wish);
        plan_source(&wish)
    }

    #[test]
    fn ubuntu_is_proven_by_its_signature() {
        let plan = plan("ubuntu-24.04", |w| w.mirror = Some("https://mirror.example/noble/".into())).unwrap();
        assert_eq!(plan.name, "ubuntu-24.04-server-cloudimg-amd64.img");
        let Proof::Signed { checksums, signature, keyring } = plan.proof else { panic!("signed") };
        assert_eq!(checksums.to_string(), "https://mirror.example/noble/SHA256SUMS");
        assert_eq!(signature.to_string(), "https://mirror.example/noble/SHA256SUMS.gpg");
        assert!(keyring.ends_with("ubuntu-cloudimage-keyring.gpg"));
    }

    #[test]
    fn what_nobody_signed_needs_a_digest() {
        for from in ["debian-12", "https://images.example/a.img"] {
            let refused = plan(from, |_| ()).unwrap_err();
            assert!(matches!(refused, PlanSourceError::Unproven { .. }), "{refused}");
            let digest: Digest = "ab".repeat(64).parse().unwrap();
            let proven = plan(from, |w| w.digest = Some(digest.clone())).unwrap();
            assert_eq!(proven.proof, Proof::Digest(digest));
        }
    }

    #[test]
    fn a_file_of_ones_own_needs_no_proof_but_half_a_proof_is_none() {
        assert_eq!(plan("/a/b.qcow2", |_| ()).unwrap().proof, Proof::Own);
        let half = plan("/a/b.qcow2", |w| w.checksums = Some("/a/SHA256SUMS".parse().unwrap()));
        assert_eq!(half.unwrap_err(), PlanSourceError::Incomplete { missing: "--signature" });
        let half = plan("/a/b.qcow2", |w| w.keyring = Some("/k".into()));
        assert_eq!(half.unwrap_err(), PlanSourceError::Incomplete { missing: "--checksums" });
        let relative = plan("b.qcow2", |_| ());
        assert!(matches!(relative, Err(PlanSourceError::Relative { .. })));
        let mirror = plan("/a/b.qcow2", |w| w.mirror = Some("https://a".into()));
        assert!(matches!(mirror, Err(PlanSourceError::MirrorOfPlace { .. })));
        assert!(matches!(plan("https://a.example/", |_| ()), Err(PlanSourceError::NoName { .. })));
    }
}
