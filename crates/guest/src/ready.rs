//! Host side of the ready port: the guest says `ready <boot id>` once its sshd listens, and again whenever it is
//! asked or the connection is made anew. Called by the instance's task, from launch on.
//!
//! The guest's side is `seed/ready.sh`. Whoever is root there can write anything here: what is not a signal is
//! dropped, lines are short, and reading stops when there is too much of it, so that the writer blocks and not we.

use std::{
    fmt, io,
    path::{Path, PathBuf},
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    time::Instant,
};
use uuid::Uuid;

/// Longer lines are dropped.
const MAX_LINE_BYTES: usize = 256;
/// The port is read at most this often per [`PERIOD`], [`MAX_LINE_BYTES`] at a time.
const MAX_READS: u32 = 8;
const PERIOD: Duration = Duration::from_secs(1);
/// Makes a guest that missed the change of connections say it again.
const QUESTION: &[u8] = b"?\n";

/// The guest's sshd listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReadySignal {
    /// The guest kernel's boot id: another one means that it has booted again.
    pub boot_id: Uuid,
}

/// The ready port cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ReadyError {
    /// QEMU does not accept on its socket in time.
    #[error("the ready port {path} did not answer within {} ms", deadline.as_millis())]
    Deadline {
        /// The socket.
        path: PathBuf,
        /// The time it had.
        deadline: Duration,
    },
    /// The socket is missing or refuses.
    #[error("cannot connect to the ready port {path}")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// QEMU closed the socket: it exited, or it gave the port to somebody else.
    #[error("the ready port {path} was closed")]
    Closed {
        /// The socket.
        path: PathBuf,
    },
    /// Reading failed.
    #[error("cannot read the ready port {path}")]
    Read {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// A connection to the ready port of one VM.
pub struct ReadyPort {
    stream: UnixStream,
    path: PathBuf,
    /// What was read of an unfinished line.
    pending: Vec<u8>,
    /// The rest of the current line is to be dropped.
    skipping: bool,
    reads: u32,
    period: Instant,
}

impl ReadyPort {
    /// Connects to QEMU's socket at `path` and asks the guest.
    ///
    /// # Errors
    /// When the socket is missing, refuses, or does not take the question within `deadline`.
    pub async fn connect(path: &Path, deadline: Duration) -> Result<ReadyPort, ReadyError> {
        let path = path.to_owned();
        let open = async {
            let mut stream = UnixStream::connect(&path).await?;
            stream.write_all(QUESTION).await?;
            Ok(stream)
        };
        match tokio::time::timeout(deadline, open).await {
            Ok(Ok(stream)) => Ok(ReadyPort {
                stream,
                path,
                pending: Vec::new(),
                skipping: false,
                reads: 0,
                period: Instant::now(),
            }),
            Ok(Err(source)) => Err(ReadyError::Connect { path, source }),
            Err(_) => Err(ReadyError::Deadline { path, deadline }),
        }
    }

    /// Waits for the next signal. Cancel-safe; may wait for ever, which is the caller's deadline to bound.
    ///
    /// # Errors
    /// When the connection ends.
    pub async fn next(&mut self) -> Result<ReadySignal, ReadyError> {
        loop {
            if let Some(signal) = self.take_signal() {
                return Ok(signal);
            }
            self.wait_for_budget().await;
            let mut chunk = [0; MAX_LINE_BYTES];
            let read = self.stream.read(&mut chunk).await;
            match read.map(|count| chunk.get(..count).unwrap_or_default()) {
                Ok([]) => return Err(ReadyError::Closed { path: self.path.clone() }),
                Ok(bytes) => {
                    self.reads += 1;
                    self.pending.extend_from_slice(bytes);
                }
                Err(source) => return Err(ReadyError::Read { path: self.path.clone(), source }),
            }
        }
    }

    /// Takes whole lines off `pending` up to and including the first signal.
    fn take_signal(&mut self) -> Option<ReadySignal> {
        while let Some(end) = self.pending.iter().position(|b| *b == b'\n') {
            let line: Vec<u8> = self.pending.drain(..=end).collect();
            if std::mem::take(&mut self.skipping) {
                continue;
            }
            if let Some(signal) = parse(&line) {
                return Some(signal);
            }
        }
        if self.pending.len() > MAX_LINE_BYTES {
            self.pending.clear();
            self.skipping = true;
        }
        None
    }

    async fn wait_for_budget(&mut self) {
        let end = self.period + PERIOD;
        if self.reads >= MAX_READS {
            tokio::time::sleep_until(end).await;
        }
        if Instant::now() >= end {
            self.period = Instant::now();
            self.reads = 0;
        }
    }
}

impl fmt::Debug for ReadyPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ReadyPort({})", self.path.display())
    }
}

fn parse(line: &[u8]) -> Option<ReadySignal> {
    let boot_id = std::str::from_utf8(line).ok()?.strip_prefix("ready ")?.strip_suffix('\n')?;
    // `Uuid` reads other spellings too; the kernel has one.
    if boot_id.len() != uuid::fmt::Hyphenated::LENGTH {
        return None;
    }
    Some(ReadySignal { boot_id: Uuid::try_parse(boot_id).ok()? })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tokio::net::UnixListener;

    const BOOT: &str = "0b1e54ac-5d44-4d7a-9c4e-1c2f3a4b5c6d";
    const SECOND: Duration = Duration::from_secs(1);

    async fn connected() -> (ReadyPort, UnixStream, tempfile::TempDir) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ready.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let port = ReadyPort::connect(&path, SECOND).await.unwrap();
        let (mut guest, _) = listener.accept().await.unwrap();
        let mut question = [0; 2];
        guest.read_exact(&mut question).await.unwrap();
        assert_eq!(&question, QUESTION);
        (port, guest, dir)
    }

    fn signal() -> ReadySignal {
        ReadySignal { boot_id: Uuid::parse_str(BOOT).unwrap() }
    }

    #[tokio::test]
    async fn garbage_is_dropped_and_every_signal_is_heard() {
        let (mut port, mut guest, _dir) = connected().await;
        let long = "x".repeat(700);
        let said = format!(
            "hello\nready\nready {BOOT} \nready not-a-boot-id\n\u{fffd}\n{long}ready {BOOT}\nready {BOOT}\n"
        );
        guest.write_all(said.as_bytes()).await.unwrap();
        guest.write_all(format!("ready {BOOT}\n").as_bytes()).await.unwrap();
        drop(guest);
        assert_eq!(port.next().await.unwrap(), signal());
        assert_eq!(port.next().await.unwrap(), signal());
        assert!(matches!(port.next().await, Err(ReadyError::Closed { .. })));
    }

    #[tokio::test]
    async fn a_cancelled_wait_loses_nothing() {
        let (mut port, mut guest, _dir) = connected().await;
        let (first, second) = BOOT.split_at(7);
        guest.write_all(format!("ready {first}").as_bytes()).await.unwrap();
        let waited = tokio::time::timeout(Duration::from_millis(50), port.next()).await;
        assert!(waited.is_err());
        guest.write_all(format!("{second}\n").as_bytes()).await.unwrap();
        assert_eq!(port.next().await.unwrap(), signal());
    }

    #[tokio::test]
    async fn a_flood_blocks_the_writer_and_not_the_reader() {
        let (mut port, mut guest, _dir) = connected().await;
        let flood = tokio::spawn(async move {
            let mut sent = 0;
            while let Ok(count) = guest.write(&[b'\n'; 4096]).await {
                sent += count;
            }
            sent
        });
        let waited = tokio::time::timeout(Duration::from_millis(2500), port.next()).await;
        assert!(waited.is_err());
        // Three periods of reading; what lies in the socket's buffers was not read.
        assert!(port.reads <= MAX_READS);
        assert!(port.pending.len() <= MAX_LINE_BYTES);
        drop(port);
        let sent = flood.await.unwrap();
        assert!(sent < 1024 * 1024, "{sent} bytes were taken");
    }

    #[tokio::test]
    async fn a_missing_socket_is_named() {
        let error = ReadyPort::connect(Path::new("/nonexistent/ready.sock"), SECOND).await.unwrap_err();
        assert!(error.to_string().contains("/nonexistent/ready.sock"));
        assert!(matches!(error, ReadyError::Connect { .. }));
    }

    proptest! {
        #[test]
        fn only_the_exact_line_is_a_signal(line in proptest::collection::vec(any::<u8>(), 0..80)) {
            let exact = format!("ready {BOOT}\n");
            prop_assert_eq!(parse(&line).is_some(), line == exact.as_bytes());
        }
    }

    #[test]
    fn other_spellings_of_a_uuid_are_no_boot_id() {
        let simple = BOOT.replace('-', "");
        assert_eq!(parse(format!("ready {BOOT}\n").as_bytes()), Some(signal()));
        for other in
            [simple.clone(), format!("{{{BOOT}}}"), format!("urn:uuid:{BOOT}"), format!("{simple}    ")]
        {
            assert_eq!(parse(format!("ready {other}\n").as_bytes()), None, "{other}");
        }
    }
}
