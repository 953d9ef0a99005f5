//! What a guest prints on its serial port, kept within a bound. QEMU holds the newest part in a ring that reading
//! empties; this moves it to a file that outlives QEMU and the agent. Called by the task that owns an instance; the
//! file is read by whoever shows a console.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Seek, SeekFrom, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use base64::{Engine, prelude::BASE64_STANDARD};
use rustix::fs::OFlags;

use crate::{
    machine,
    qmp::{Qmp, QmpError},
};

/// The file never grows beyond this.
pub const CONSOLE_LIMIT: u64 = 1 << 20;
/// What is kept when it would. Less than the limit, so that a full file is not rewritten for every line.
const KEPT: u64 = CONSOLE_LIMIT / 4 * 3;
/// One read of the ring; as base64 it fits a QMP message well.
const READ_SIZE: usize = 256 << 10;
/// Enough reads to empty the ring once. A guest that prints faster than this loses its oldest output, by design.
const READS: usize = 5;

/// The serial log of one instance.
#[derive(Debug)]
pub struct Console {
    file: PathBuf,
}

/// Output could not be moved from the ring to the file.
#[derive(Debug, thiserror::Error)]
pub enum DrainError {
    /// QEMU did not hand it over. After a timeout the part that was asked for may be lost.
    #[error("cannot read the serial output from QEMU")]
    Read(#[source] QmpError),
    /// QEMU handed over something that is not base64.
    #[error("QEMU's serial output is not base64")]
    Decode(#[source] base64::DecodeError),
    /// It could not be written; what had been taken from the ring is lost.
    #[error("cannot write the serial log {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// The log could not be read.
#[derive(Debug, thiserror::Error)]
#[error("cannot read the serial log {}", path.display())]
pub struct TailError {
    /// The file.
    pub path: PathBuf,
    /// Why.
    #[source]
    pub source: io::Error,
}

impl Console {
    /// The log kept in `file`, which need not exist yet. Its directory must be writable by the agent alone.
    #[must_use]
    pub fn new(file: PathBuf) -> Self {
        Self { file }
    }

    /// Where it is kept.
    #[must_use]
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// Moves what QEMU holds to the file and returns how many bytes that were.
    ///
    /// Takes `&mut self` because two at once would mix their parts up. Dropping the future may lose one part.
    ///
    /// # Errors
    /// [`DrainError`].
    pub async fn drain(&mut self, qmp: &Qmp) -> Result<usize, DrainError> {
        let mut moved = 0;
        for _ in 0..READS {
            let text = qmp.ringbuf_read(machine::id::CONSOLE, READ_SIZE).await.map_err(DrainError::Read)?;
            let part = BASE64_STANDARD.decode(text).map_err(DrainError::Decode)?;
            let length = part.len();
            if length > 0 {
                self.append(part).await?;
            }
            moved += length;
            if length < READ_SIZE {
                break;
            }
        }
        Ok(moved)
    }

    async fn append(&self, part: Vec<u8>) -> Result<(), DrainError> {
        let path = self.file.clone();
        let written = tokio::task::spawn_blocking(move || append(&path, &part)).await;
        written
            .unwrap_or_else(|join| Err(io::Error::other(join)))
            .map_err(|source| DrainError::Write { path: self.file.clone(), source })
    }

    /// The newest `max` bytes, with or without a living QEMU; empty when nothing was ever printed.
    ///
    /// # Errors
    /// [`TailError`].
    pub async fn tail(&self, max: u64) -> Result<Vec<u8>, TailError> {
        let path = self.file.clone();
        let read = tokio::task::spawn_blocking(move || read_tail(&path, max.min(CONSOLE_LIMIT))).await;
        read.unwrap_or_else(|join| Err(io::Error::other(join)))
            .map_err(|source| TailError { path: self.file.clone(), source })
    }
}

/// Appends within the limit. The part alone may be as long as one read of the ring, far below the limit.
fn append(path: &Path, part: &[u8]) -> io::Result<()> {
    let mut file = open(path, OpenOptions::new().append(true).create(true).mode(0o600))?;
    let length = file.metadata()?.len();
    let part_length = u64::try_from(part.len()).unwrap_or(u64::MAX);
    if length.saturating_add(part_length) <= CONSOLE_LIMIT {
        return file.write_all(part);
    }
    let mut kept = read_tail(path, KEPT.saturating_sub(part_length))?;
    kept.extend_from_slice(part);
    // Beside it and renamed: a reader sees the old log or the new one, never a gap.
    let mut shorter = path.as_os_str().to_owned();
    shorter.push(".new");
    let shorter = PathBuf::from(shorter);
    let mut file = open(&shorter, OpenOptions::new().write(true).create(true).truncate(true).mode(0o600))?;
    file.write_all(&kept)?;
    fs::rename(&shorter, path)
}

/// The last `max` bytes of a plain file; none when it is absent.
pub(crate) fn read_tail(path: &Path, max: u64) -> io::Result<Vec<u8>> {
    let mut file = match open(path, OpenOptions::new().read(true)) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(max)))?;
    let mut bytes = Vec::new();
    file.take(max).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Opens a plain file only. Nobody but the agent should be able to write there; if somebody could, a link to a file of
/// the host's or a pipe that blocks for ever would be the first things to put there.
fn open(path: &Path, options: &mut OpenOptions) -> io::Result<File> {
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = options.custom_flags(flags.bits().cast_signed()).open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() || metadata.nlink() > 1 {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a plain file of its own"));
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use proptest::prelude::*;

    use super::*;
    use crate::qmp::tests::{RealQemu, connected};

    const RING: &str = "ringbuf,id=console,size=16384";

    #[tokio::test]
    async fn real_qemus_ring_moves_to_the_file_and_survives_it() {
        let dir = tempfile::tempdir().unwrap();
        let mut console = Console::new(dir.path().join("console.log"));
        assert_eq!(console.tail(100).await.unwrap(), b"");
        let qemu = RealQemu::start(&["-machine", "none", "-chardev", RING]).await;
        let (qmp, events) = qemu.connect().await;
        assert_eq!(console.drain(&qmp).await.unwrap(), 0);

        let data = BASE64_STANDARD.encode(b"\xff\x00boot\r\n");
        write(&qmp, &data).await;
        assert_eq!(console.drain(&qmp).await.unwrap(), 8);
        assert_eq!(console.drain(&qmp).await.unwrap(), 0, "reading empties the ring");

        // Little, because QEMU reads its monitor byte by byte.
        let block: Vec<u8> = (0..=255).cycle().take(3_000).collect();
        for _ in 0..8 {
            write(&qmp, &BASE64_STANDARD.encode(&block)).await;
        }
        assert_eq!(console.drain(&qmp).await.unwrap(), 16 << 10, "the ring keeps its newest part");
        drop((qmp, events, qemu));
        assert_eq!(console.tail(3).await.unwrap(), block[block.len() - 3..]);
        let tail = console.tail(u64::MAX).await.unwrap();
        assert_eq!(tail.len(), 8 + (16 << 10));
        assert!(tail.ends_with(&[block.as_slice(), &block].concat()) && tail.starts_with(b"\xff\0boot\r\n"));
    }

    async fn write(qmp: &Qmp, base64: &str) {
        let arguments = serde_json::json!({"device": "console", "data": base64, "format": "base64"});
        let deadline = crate::qmp::COMMAND_DEADLINE;
        qmp.execute::<serde_json::Value>("ringbuf-write", arguments, deadline).await.unwrap();
    }

    #[tokio::test]
    async fn a_guest_that_prints_without_end_is_left_after_one_ring() {
        let (qmp, _events, task) = connected(|mut qemu| async move {
            let full = BASE64_STANDARD.encode(vec![b'x'; READ_SIZE]);
            let mut reads = 0;
            loop {
                let (command, id) = qemu.command().await;
                if command != "ringbuf-read" {
                    break;
                }
                reads += 1;
                qemu.answer(id, full.as_str().into()).await;
            }
            reads
        })
        .await;
        let dir = tempfile::tempdir().unwrap();
        let mut console = Console::new(dir.path().join("console.log"));
        assert_eq!(console.drain(&qmp).await.unwrap(), READS * READ_SIZE);
        assert!(fs::metadata(console.file()).unwrap().len() <= CONSOLE_LIMIT);
        let _ = tokio::time::timeout(std::time::Duration::from_millis(50), qmp.stop()).await;
        assert_eq!(task.await.unwrap(), READS);
    }

    #[tokio::test]
    async fn what_is_not_base64_is_refused() {
        let (qmp, _events, _task) = connected(|mut qemu| async move {
            let (_, id) = qemu.command().await;
            qemu.answer(id, "no base64!".into()).await;
            qemu
        })
        .await;
        let dir = tempfile::tempdir().unwrap();
        let mut console = Console::new(dir.path().join("console.log"));
        assert!(matches!(console.drain(&qmp).await, Err(DrainError::Decode(_))));
        assert!(!console.file().exists());
    }

    // orig: a guest writing to its serial port filled the host's disk.
    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn the_file_is_bounded_and_ends_with_the_newest(sizes in proptest::collection::vec(1usize..READ_SIZE, 1..16)) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("console.log");
            let mut all = Vec::new();
            for (index, size) in sizes.into_iter().enumerate() {
                let part = vec![u8::try_from(index).unwrap(); size];
                append(&path, &part).unwrap();
                all.extend_from_slice(&part);
                let kept = read_tail(&path, CONSOLE_LIMIT).unwrap();
                prop_assert!(fs::metadata(&path).unwrap().len() <= CONSOLE_LIMIT);
                prop_assert!(all.ends_with(&kept));
                let least = all.len().min(usize::try_from(KEPT).unwrap());
                prop_assert!(kept.len() >= least);
            }
        }
    }

    #[test]
    fn only_a_plain_file_of_its_own_is_opened() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("shadow");
        fs::write(&target, "secret").unwrap();
        let link = dir.path().join("link");
        symlink(&target, &link).unwrap();
        let hard = dir.path().join("hard");
        fs::hard_link(&target, &hard).unwrap();
        let pipe = dir.path().join("pipe");
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        for path in [&link, &hard, &pipe, &dir.path().to_owned()] {
            assert!(append(path, b"x").is_err(), "{}", path.display());
            assert!(read_tail(path, 10).is_err(), "{}", path.display());
        }
        assert_eq!(fs::read(&target).unwrap(), b"secret");
    }
}
