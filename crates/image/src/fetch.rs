//! Downloads by the system's curl: resumed, with real progress, given up for lack of progress and never for total time.
//! Called by `obtain`.

use std::{
    fs, io,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use tokio::{
    io::AsyncReadExt,
    process::Command,
    time::{interval, sleep},
};

/// A server that sends less than [`SLOWEST`] bytes a second for so long is given up.
const STALL: Duration = Duration::from_secs(60);
const SLOWEST: u32 = 1024;
const CONNECT: Duration = Duration::from_secs(20);
/// How often the size of the file is looked at.
const BEAT: Duration = Duration::from_millis(250);
/// Attempts in a row that bring nothing.
const FRUITLESS: u32 = 3;
const PAUSE: Duration = Duration::from_secs(1);
/// What setpriv ends with when there is nothing to execute.
const NO_PROGRAM: i32 = 127;
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// How the owner's network reaches the world; nothing else of the environment is the download's business.
const PROXIES: [&str; 7] =
    ["http_proxy", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY", "no_proxy", "NO_PROXY"];

/// A file that did not arrive.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// curl is missing.
    #[error("cannot start curl: install the package curl")]
    NoCurl(#[source] io::Error),
    /// The server does not answer, or not with the file.
    #[error("{url} cannot be had: {said}. Check the network, or name another place with --mirror or --from")]
    Down {
        /// Address.
        url: String,
        /// What curl said.
        said: String,
    },
    /// It begins and does not end.
    #[error(
        "{url} broke off after {have} of {} bytes, {FRUITLESS} times without getting further: {said}. What is here is kept, \
         run the same command again",
        total.map_or_else(|| "an unknown number of".to_owned(), |total| total.to_string())
    )]
    Truncated {
        /// Address.
        url: String,
        /// Bytes that are here.
        have: u64,
        /// Bytes that there are.
        total: Option<u64>,
        /// What curl said.
        said: String,
    },
    /// It has more bytes than such a file may have.
    #[error("{url} has more than {limit} bytes and is not what it should be")]
    TooLarge {
        /// Address.
        url: String,
        /// The limit.
        limit: u64,
    },
    /// It cannot be written.
    #[error("{} cannot be written", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// One file to fetch.
#[derive(Debug)]
pub(crate) struct Fetch<'a> {
    /// Checked before: https, or http on this host.
    pub(crate) url: &'a str,
    /// Where to; what is there is taken for its beginning.
    pub(crate) part: &'a Path,
    /// Most bytes.
    pub(crate) limit: u64,
}

/// How one run of curl ended.
#[derive(Debug, PartialEq, Eq)]
enum Ended {
    Whole,
    /// Broke off, or nobody answered: the next attempt may bring more.
    Again {
        reached: bool,
        said: String,
    },
    /// What is here is no beginning of what the server has.
    Useless,
    /// No attempt will be better.
    Refused(String),
    Unwritable(String),
    /// It is larger than it may be.
    TooLarge,
}

/// Fetches to the end. `told` gets the bytes that are here and the size of the file.
pub(crate) async fn fetch(
    wish: &Fetch<'_>,
    told: &mut dyn FnMut(u64, Option<u64>),
) -> Result<(), FetchError> {
    let url = || wish.url.to_owned();
    let mut fruitless = 0;
    let mut begun_anew = false;
    loop {
        let before = length(wish.part);
        let (ended, total) = attempt(wish, told).await?;
        let have = length(wish.part);
        if ended == Ended::TooLarge || have > wish.limit {
            // Of no use to anybody, and it takes room.
            remove(wish.part)?;
            return Err(FetchError::TooLarge { url: url(), limit: wish.limit });
        }
        fruitless = if have > before { 0 } else { fruitless + 1 };
        match ended {
            Ended::Whole => return Ok(()),
            Ended::Useless if !begun_anew => {
                begun_anew = true;
                remove(wish.part)?;
            }
            Ended::Useless => {
                return Err(FetchError::Down {
                    url: url(),
                    said: "the server sends no part of it".to_owned(),
                });
            }
            Ended::Refused(said) => return Err(FetchError::Down { url: url(), said }),
            Ended::Unwritable(said) => return Err(unwritable(wish.part, &said)),
            Ended::Again { reached: true, said } if fruitless >= FRUITLESS => {
                return Err(FetchError::Truncated { url: url(), have, total, said });
            }
            Ended::Again { reached: false, said } if fruitless >= FRUITLESS => {
                return Err(FetchError::Down { url: url(), said });
            }
            Ended::Again { .. } | Ended::TooLarge => sleep(PAUSE).await,
        }
    }
}

/// curl says why in words only: whether the disk is full is asked of the disk.
fn unwritable(path: &Path, said: &str) -> FetchError {
    let free = path.parent().and_then(|dir| rustix::fs::statvfs(dir).ok());
    let full = free.is_some_and(|fs| fs.f_bavail.saturating_mul(fs.f_frsize) < 1 << 20);
    let kind = if full { io::ErrorKind::StorageFull } else { io::ErrorKind::Other };
    FetchError::Write { path: path.to_owned(), source: io::Error::new(kind, said.to_owned()) }
}

fn length(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |found| found.len())
}

fn remove(path: &Path) -> Result<(), FetchError> {
    match fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(FetchError::Write { path: path.to_owned(), source })
        }
        _ => Ok(()),
    }
}

async fn attempt(
    wish: &Fetch<'_>,
    told: &mut dyn FnMut(u64, Option<u64>),
) -> Result<(Ended, Option<u64>), FetchError> {
    let head = wish.part.with_extension("head");
    remove(&head)?;
    let mut child = command(wish, &head).spawn().map_err(FetchError::NoCurl)?;
    let mut stderr = child.stderr.take();
    let mut said = Vec::new();
    let total = || fs::read_to_string(&head).ok().and_then(|text| Head::parse(&text)).and_then(|h| h.total);
    let status = {
        let listen = async {
            if let Some(pipe) = &mut stderr {
                // What it cannot say is no reason to stop the download.
                let _ = pipe.take(64 << 10).read_to_end(&mut said).await;
            }
            child.wait().await
        };
        tokio::pin!(listen);
        let mut beat = interval(BEAT);
        loop {
            tokio::select! {
                status = &mut listen => break status,
                _ = beat.tick() => {
                    let have = length(wish.part);
                    told(have, total());
                    if have > wish.limit {
                        return Ok((Ended::TooLarge, total()));
                    }
                }
            }
        }
    };
    let status = status.map_err(FetchError::NoCurl)?;
    if status.code() == Some(NO_PROGRAM) {
        return Err(FetchError::NoCurl(io::ErrorKind::NotFound.into()));
    }
    let answer = fs::read_to_string(&head).ok().and_then(|text| Head::parse(&text)).unwrap_or_default();
    remove(&head)?;
    let have = length(wish.part);
    told(have, answer.total);
    let said = String::from_utf8_lossy(&said).lines().last().unwrap_or("it ended without a word").to_owned();
    Ok((judge(status.code(), have, &answer, said), answer.total))
}

fn command(wish: &Fetch<'_>, head: &Path) -> Command {
    // Nobody but us writes the file: curl ends when we do, however that happens.
    let mut command = Command::new("setpriv");
    command.env_clear().env("PATH", PATH).env("LC_ALL", "C");
    for name in PROXIES {
        if let Some(value) = std::env::var_os(name) {
            command.env(name, value);
        }
    }
    // -q first: no settings of root's may change what follows.
    command.args(["--pdeathsig", "KILL", "--", "curl", "-q"]).args(["--fail", "--silent", "--show-error"]);
    if wish.url.starts_with("http://") {
        // On this host only, which a redirection could leave.
        command.args(["--proto", "=http", "--noproxy", "*"]);
    } else {
        command.args(["--proto", "=https", "--proto-redir", "=https", "--location", "--max-redirs", "5"]);
    }
    command.arg("--connect-timeout").arg(CONNECT.as_secs().to_string());
    command.arg("--speed-limit").arg(SLOWEST.to_string());
    command.arg("--speed-time").arg(STALL.as_secs().to_string());
    // Of what is still to come. A server may tell no length, and old curls know no limit then: the size is looked at as well.
    let rest = wish.limit.saturating_sub(length(wish.part)).max(1);
    command.arg("--max-filesize").arg(rest.to_string());
    command.arg("--dump-header").arg(head).arg("--output").arg(wish.part);
    command.args(["--continue-at", "-", "--"]).arg(wish.url);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true);
    command
}

/// By curl's exit codes, curl(1).
fn judge(code: Option<i32>, have: u64, answer: &Head, said: String) -> Ended {
    let complete = answer.total == Some(have);
    match code {
        // A server that closes early without having told a length looks like success.
        Some(0) if answer.total.is_none() || complete => Ended::Whole,
        Some(0) => Ended::Again { reached: true, said: "the server sent less than it told".to_owned() },
        // 416: there is nothing behind what is here.
        Some(22 | 33) if answer.status == 416 && complete => Ended::Whole,
        Some(22 | 33 | 36) if answer.status == 416 || code != Some(22) => Ended::Useless,
        Some(22) if answer.status >= 500 => Ended::Again { reached: false, said },
        Some(22) => Ended::Refused(said),
        Some(23) => Ended::Unwritable(said),
        Some(63) => Ended::TooLarge,
        // Partial file, stalled, empty reply, connection lost while sending or receiving, error of HTTP/2.
        Some(18 | 28 | 52 | 55 | 56 | 92) => Ended::Again { reached: have > 0, said },
        // No such host, no connection, TLS handshake broken off.
        Some(5 | 6 | 7 | 35) => Ended::Again { reached: false, said },
        Some(_) => Ended::Refused(said),
        None => Ended::Again { reached: have > 0, said: "curl was killed".to_owned() },
    }
}

/// The last answer's head.
#[derive(Debug, Default, PartialEq, Eq)]
struct Head {
    status: u16,
    /// Size of the whole file.
    total: Option<u64>,
}

impl Head {
    fn parse(text: &str) -> Option<Self> {
        let text = text.replace('\r', "");
        // Each redirection, and a proxy's answer, has a head of its own.
        let last = text.split("\n\n").filter(|head| head.starts_with("HTTP/")).last()?;
        let status = last.split(' ').nth(1)?.trim().get(..3)?.parse().ok()?;
        let field = |name: &str| {
            let mut lines = last.lines().filter_map(|line| line.split_once(':'));
            lines.find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, value)| value.trim())
        };
        let total = match status {
            200 => field("content-length").and_then(|value| value.parse().ok()),
            206 | 416 => field("content-range").and_then(|v| v.rsplit_once('/')?.1.parse().ok()),
            _ => None,
        };
        Some(Self { status, total })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_size_is_read_from_the_last_head() {
        let table = [
            ("HTTP/1.1 200 OK\r\nContent-Length: 12\r\n\r\n", 200, Some(12)),
            (
                "HTTP/2 302 \r\ncontent-length: 0\r\nlocation: /b\r\n\r\nHTTP/2 206 \r\ncontent-range: bytes 5-9/10\r\n\r\n",
                206,
                Some(10),
            ),
            ("HTTP/1.1 416 .\r\nContent-Range: bytes */77\r\n\r\n", 416, Some(77)),
            ("HTTP/1.1 404 Not Found\r\nContent-Length: 9\r\n\r\n", 404, None),
            ("HTTP/1.1 200 OK\r\n", 200, None),
        ];
        for (text, status, total) in table {
            assert_eq!(Head::parse(text), Some(Head { status, total }), "{text}");
        }
        assert_eq!(Head::parse(""), None);
        assert_eq!(Head::parse("HTTP/1.1"), None);
    }

    #[test]
    fn every_end_is_judged() {
        let head = |status, total| Head { status, total };
        let judged = |code, have, head: &Head| judge(Some(code), have, head, "words".into());
        let again = |reached| Ended::Again { reached, said: "words".into() };
        assert_eq!(judged(0, 10, &head(200, Some(10))), Ended::Whole);
        assert_eq!(judged(0, 10, &head(200, None)), Ended::Whole);
        assert!(matches!(judged(0, 9, &head(200, Some(10))), Ended::Again { reached: true, .. }));
        assert_eq!(judged(22, 10, &head(416, Some(10))), Ended::Whole);
        assert_eq!(judged(22, 11, &head(416, Some(10))), Ended::Useless);
        assert_eq!(judged(33, 5, &head(200, Some(10))), Ended::Useless);
        assert_eq!(judged(22, 0, &head(404, None)), Ended::Refused("words".into()));
        assert_eq!(judged(22, 5, &head(503, None)), again(false));
        assert_eq!(judged(18, 5, &head(200, Some(10))), again(true));
        assert_eq!(judged(7, 5, &head(0, None)), again(false));
        assert_eq!(judged(60, 0, &head(0, None)), Ended::Refused("words".into()));
        assert_eq!(judged(63, 0, &head(200, Some(10))), Ended::TooLarge);
        assert_eq!(judged(23, 5, &head(200, Some(10))), Ended::Unwritable("words".into()));
    }
}
