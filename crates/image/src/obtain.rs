//! From a source's plan to a proven file in a folder of ours. Called by `build`.

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use qudata_host::size::ByteSize;
use tokio::time::interval;

use crate::{
    digest::{self, Digest},
    error::BuildError,
    fetch::{Fetch, FetchError, fetch},
    progress::Progress,
    signature,
    source::{Location, Proof, SourcePlan},
    space::Room,
};

/// Larger than any cloud image.
const IMAGE_MAX: u64 = 256 << 30;
/// Larger than any list of digests.
const LIST_MAX: u64 = 8 << 20;
const BEAT: Duration = Duration::from_millis(250);
/// End of the name of a download.
pub(crate) const PART: &str = "part";

/// A proven image.
#[derive(Debug)]
pub(crate) struct Obtained {
    /// The file; ours, and nobody else writes it.
    pub(crate) file: PathBuf,
    pub(crate) digest: Digest,
    /// What proved it.
    pub(crate) proof: String,
}

/// The folders of a build.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Folders<'a> {
    /// Of this build only.
    pub(crate) work: &'a Path,
    /// Of downloads, which are kept until an image was made of them.
    pub(crate) fetched: &'a Path,
    /// On their file system.
    pub(crate) room: Room,
    /// What must stay of it for what is made of the image.
    pub(crate) changes: ByteSize,
}

/// Name of a download's file.
pub(crate) fn part_name(url: &str) -> String {
    let digest = Digest::sha256_of_text(url);
    format!("{}.{PART}", digest.hex().chars().take(16).collect::<String>())
}

/// Gets the image and proves it.
pub(crate) async fn obtain(
    plan: &SourcePlan,
    folders: Folders<'_>,
    progress: &mut dyn FnMut(Progress),
) -> Result<Obtained, BuildError> {
    // The proof first: it is small, and without it the image is of no use.
    let (expected, proof) = expected(plan, folders).await?;
    match &plan.image {
        Location::File(path) => {
            let file = folders.work.join("source");
            copy(path, &file, progress).await?;
            let digest = digest_of(&file, expected.as_ref(), progress).await?;
            compare(plan, &digest, expected.as_ref())?;
            Ok(Obtained { file, digest, proof })
        }
        Location::Url(url) => {
            let file = folders.fetched.join(part_name(url));
            let resumed = fs::metadata(&file).is_ok_and(|found| found.len() > 0);
            let mut digest = fetched(url, &file, folders, expected.as_ref(), progress).await?;
            if resumed && compare(plan, &digest, expected.as_ref()).is_err() {
                // The beginning may be of an older image with the same name.
                remove(&file)?;
                digest = fetched(url, &file, folders, expected.as_ref(), progress).await?;
            }
            if let Err(error) = compare(plan, &digest, expected.as_ref()) {
                remove(&file)?;
                return Err(error);
            }
            Ok(Obtained { file, digest, proof })
        }
    }
}

fn remove(file: &Path) -> Result<(), BuildError> {
    fs::remove_file(file).map_err(BuildError::file("remove", file))
}

async fn fetched(
    url: &str,
    file: &Path,
    folders: Folders<'_>,
    expected: Option<&Digest>,
    progress: &mut dyn FnMut(Progress),
) -> Result<Digest, BuildError> {
    let limit = plan_limit(folders.room, folders.changes, fs::metadata(file).map_or(0, |found| found.len()));
    let wish = Fetch { url, part: file, limit };
    fetch(&wish, &mut |done, total| progress(Progress::Fetching { done, total })).await.map_err(|error| {
        match error {
            // Not a strange image, but a small disk.
            FetchError::TooLarge { .. } if limit < IMAGE_MAX => {
                let needed = folders.room.left().saturating_add(ByteSize::from_bytes(1));
                let dir = folders.fetched.parent().unwrap_or(folders.fetched).to_owned();
                BuildError::NoRoom { needed, room: folders.room, dir }
            }
            error => BuildError::Fetch(error),
        }
    })?;
    digest_of(file, expected, progress).await
}

/// Most bytes that an image may have which is to be fetched, of which `have` are here and take their room already.
fn plan_limit(room: Room, changes: ByteSize, have: u64) -> u64 {
    room.left().saturating_sub(changes).bytes().saturating_add(have).min(IMAGE_MAX)
}

/// The digest that the image must have, and what says so.
async fn expected(plan: &SourcePlan, folders: Folders<'_>) -> Result<(Option<Digest>, String), BuildError> {
    let (checksums, signed_by, keyring) = match &plan.proof {
        Proof::Own => return Ok((None, "the owner's own file".to_owned())),
        Proof::Digest(digest) => {
            return Ok((Some(digest.clone()), format!("{} given by the owner", digest.algorithm())));
        }
        Proof::Signed { checksums, signature, keyring } => (checksums, signature, keyring),
    };
    let (list, mark) = (folders.work.join("checksums"), folders.work.join("checksums.signature"));
    small(checksums, &list).await?;
    small(signed_by, &mark).await?;
    signature::check(&list, &mark, keyring).await.map_err(BuildError::Signature)?;
    // Read after it was proven, from a folder that nobody else writes.
    let text = fs::read(&list).map_err(BuildError::file("read", &list))?;
    let digest = digest::find(&String::from_utf8_lossy(&text), &plan.name)
        .ok_or_else(|| BuildError::NotListed { list: checksums.to_string(), name: plan.name.clone() })?;
    let proof = format!("{checksums} signed by a key of {}", keyring.display());
    Ok((Some(digest), proof))
}

async fn small(from: &Location, to: &Path) -> Result<(), BuildError> {
    match from {
        Location::Url(url) => {
            let wish = Fetch { url, part: to, limit: LIST_MAX };
            fetch(&wish, &mut |_, _| ()).await.map_err(BuildError::Fetch)
        }
        Location::File(path) => {
            let file = File::open(path).map_err(BuildError::file("read", path))?;
            let mut bytes = Vec::new();
            let read = file.take(LIST_MAX + 1).read_to_end(&mut bytes);
            let length = read.map_err(BuildError::file("read", path))?;
            if u64::try_from(length).unwrap_or(u64::MAX) > LIST_MAX {
                let large = FetchError::TooLarge { url: path.display().to_string(), limit: LIST_MAX };
                return Err(BuildError::Fetch(large));
            }
            fs::write(to, bytes).map_err(BuildError::file("write", to))
        }
    }
}

fn compare(plan: &SourcePlan, digest: &Digest, expected: Option<&Digest>) -> Result<(), BuildError> {
    match expected {
        Some(expected) if expected != digest => Err(BuildError::Checksum {
            image: plan.image.to_string(),
            expected: expected.to_string(),
            found: digest.to_string(),
        }),
        _ => Ok(()),
    }
}

/// Copies a file of the owner's, so that what is proven is what is used.
async fn copy(from: &Path, to: &Path, progress: &mut dyn FnMut(Progress)) -> Result<(), BuildError> {
    let found = fs::metadata(from).map_err(BuildError::file("read", from))?;
    if !found.is_file() {
        let source = io::Error::new(io::ErrorKind::InvalidInput, "it is no regular file");
        return Err(BuildError::file("read", from)(source));
    }
    let paths = (from.to_owned(), to.to_owned());
    let copied = counted("copying", found.len(), progress, move |count| {
        let mut source = File::open(&paths.0).map_err(BuildError::file("read", &paths.0))?;
        let mut target = File::create_new(&paths.1).map_err(BuildError::file("write", &paths.1))?;
        let mut buffer = vec![0; 1 << 20];
        loop {
            let length = source.read(&mut buffer).map_err(BuildError::file("read", &paths.0))?;
            if length == 0 {
                return Ok(());
            }
            let part = buffer.get(..length).unwrap_or_default();
            target.write_all(part).map_err(BuildError::file("write", &paths.1))?;
            count.fetch_add(u64::try_from(length).unwrap_or(0), Ordering::Relaxed);
        }
    });
    copied.await
}

async fn digest_of(
    file: &Path,
    like: Option<&Digest>,
    progress: &mut dyn FnMut(Progress),
) -> Result<Digest, BuildError> {
    let total = fs::metadata(file).map_err(BuildError::file("read", file))?.len();
    let (path, like) = (file.to_owned(), like.cloned());
    counted("verifying", total, progress, move |count| {
        let digest = match like {
            Some(like) => like.of_file_like(&path, count),
            None => Digest::sha256_of(&path, count),
        };
        digest.map_err(BuildError::file("read", &path))
    })
    .await
}

/// Runs `work` on a thread that may wait for the disk, and tells how far it is by the counter it is given.
async fn counted<T: Send + 'static>(
    what: &'static str,
    total: u64,
    progress: &mut dyn FnMut(Progress),
    work: impl FnOnce(&AtomicU64) -> Result<T, BuildError> + Send + 'static,
) -> Result<T, BuildError> {
    let count = Arc::new(AtomicU64::new(0));
    let counter = Arc::clone(&count);
    let mut running = tokio::task::spawn_blocking(move || work(&counter));
    let mut beat = interval(BEAT);
    loop {
        tokio::select! {
            done = &mut running => {
                return done.unwrap_or_else(|join| Err(BuildError::other("reading the image")(join)));
            }
            _ = beat.tick() => {
                progress(Progress::Reading { what, done: count.load(Ordering::Relaxed), total });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_download_leaves_room_for_what_is_made_of_it() {
        let gib = ByteSize::from_gib;
        let room = Room { free: gib(20), promised: gib(5), reserve: gib(2) };
        assert_eq!(plan_limit(room, gib(8), 0), 5 << 30);
        // What is here already takes its room already.
        assert_eq!(plan_limit(room, gib(8), 1 << 30), 6 << 30);
        assert_eq!(plan_limit(room, gib(30), 0), 0);
        assert_eq!(plan_limit(Room { free: gib(1 << 20), ..room }, gib(8), 0), IMAGE_MAX);
    }
}
