//! frpc's log: whether it has a session with frps, and in what words it was refused one, which its admin server does not
//! tell. Kept short here as well: frpc notes every call to its admin server. Called by `rounds` and `frpc`.

use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

/// What is read of it at once; more than this is skipped.
const READ_MAX: u64 = 64 * 1024;
/// It is cut to its last [`READ_MAX`] when it is longer than this.
const LENGTH_MAX: u64 = 1024 * 1024;
/// What an error shows of frpc's last words.
const LAST_WORDS: usize = 300;

/// What frpc noted last about its session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Session {
    /// It asks frps for one.
    Trying,
    /// It got none, and why.
    Failed(String),
    /// It has one.
    LoggedIn,
}

/// The log of one frpc, read as it grows.
#[derive(Debug)]
pub(crate) struct SessionLog {
    path: PathBuf,
    offset: u64,
    session: Option<Session>,
    failure: Option<String>,
    failures: u64,
    logins: u64,
}

impl SessionLog {
    /// The log at `path`, of which what a new frpc writes counts.
    pub(crate) fn at_end(path: PathBuf) -> Self {
        let offset = path.metadata().map_or(0, |found| found.len());
        Self { path, offset, session: None, failure: None, failures: 0, logins: 0 }
    }

    /// The log at `path` of a frpc that runs already.
    pub(crate) fn of_running(path: PathBuf) -> Self {
        let offset = path.metadata().map_or(0, |found| found.len().saturating_sub(READ_MAX));
        Self { path, offset, session: None, failure: None, failures: 0, logins: 0 }
    }

    /// What frpc noted last about its session, as of the last [`SessionLog::read_on`].
    pub(crate) fn session(&self) -> Option<&Session> {
        self.session.as_ref()
    }

    /// In which words it was last refused one since it had one.
    pub(crate) fn failure(&self) -> Option<&str> {
        self.failure.as_deref()
    }

    /// How often it was refused one.
    pub(crate) fn failures(&self) -> u64 {
        self.failures
    }

    /// How often it has got one.
    pub(crate) fn logins(&self) -> u64 {
        self.logins
    }

    /// Reads what was added, and cuts the log when it has grown long.
    pub(crate) fn read_on(&mut self) -> io::Result<()> {
        let mut file = File::options().read(true).append(true).open(&self.path)?;
        let length = file.metadata()?.len();
        if length < self.offset {
            self.offset = 0;
        }
        self.offset = self.offset.max(length.saturating_sub(READ_MAX));
        let added = read_from(&mut file, self.offset)?;
        // A line that is being written is read when it is whole.
        let whole = added.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        for line in String::from_utf8_lossy(added.get(..whole).unwrap_or_default()).lines() {
            self.note(line);
        }
        self.offset += u64::try_from(whole).unwrap_or(0);
        if length > LENGTH_MAX {
            self.cut(&mut file, length)?;
        }
        Ok(())
    }

    fn note(&mut self, line: &str) {
        let Some(session) = session_in(line) else { return };
        match &session {
            Session::Failed(words) => {
                self.failure = Some(words.clone());
                self.failures += 1;
            }
            Session::LoggedIn => {
                self.failure = None;
                self.logins += 1;
            }
            Session::Trying => {}
        }
        self.session = Some(session);
    }

    /// Both sides append, so what frpc writes meanwhile is lost at most.
    fn cut(&mut self, file: &mut File, length: u64) -> io::Result<()> {
        let kept = read_from(file, length.saturating_sub(READ_MAX))?;
        file.set_len(0)?;
        file.write_all(&kept)?;
        self.offset = file.metadata()?.len();
        Ok(())
    }
}

fn read_from(file: &mut File, offset: u64) -> io::Result<Vec<u8>> {
    file.seek(SeekFrom::Start(offset))?;
    let mut bytes = Vec::new();
    file.take(READ_MAX).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// The lines of client/service.go, frp 0.52 to 0.70.
fn session_in(line: &str) -> Option<Session> {
    for failed in ["connect to server error: ", "login to server failed: ", "login to the server failed: "] {
        if let Some((_, words)) = line.split_once(failed) {
            return Some(Session::Failed(printable(words)));
        }
    }
    if line.contains("login to server success") {
        return Some(Session::LoggedIn);
    }
    line.contains("try to connect to server").then_some(Session::Trying)
}

/// Words of somebody else, short and on one line.
pub(crate) fn printable(words: &str) -> String {
    words.trim().chars().filter(|c| !c.is_control()).take(LAST_WORDS).collect()
}

/// The last thing a frpc said that has ended.
pub(crate) fn last_words(path: &Path) -> String {
    let read = || -> io::Result<Vec<u8>> {
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        read_from(&mut file, length.saturating_sub(READ_MAX))
    };
    match read() {
        Ok(bytes) => {
            let text = String::from_utf8_lossy(&bytes);
            let mut lines = text.lines().rev().filter(|l| !l.trim().is_empty() && !l.contains("http re"));
            lines.next().map_or_else(|| "it said nothing".to_owned(), printable)
        }
        Err(error) => format!("its log cannot be read: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGIN: &str = "2026-11-24 12:00:00.000 [I] [client/service.go:331] [c7d1] login to server success, get run id [c7d1]\n";
    const TRY: &str = "2026-11-24 12:00:00.000 [I] [client/service.go:309] try to connect to server...\n";
    const REFUSED: &str = "2026-11-24 12:00:00.000 [W] [client/service.go:318] connect to server error: token in login doesn't match token from configuration\n";

    fn append(path: &Path, text: &str) {
        let mut file = File::options().append(true).create(true).open(path).unwrap();
        file.write_all(text.as_bytes()).unwrap();
    }

    #[test]
    fn the_last_word_about_the_session_counts() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("frpc.log");
        append(&path, LOGIN);
        let mut log = SessionLog::at_end(path.clone());
        log.read_on().unwrap();
        assert_eq!(log.session(), None, "what an earlier frpc noted does not count");
        append(&path, TRY);
        append(&path, REFUSED);
        append(&path, TRY);
        log.read_on().unwrap();
        assert_eq!(log.session(), Some(&Session::Trying));
        assert_eq!(log.failure(), Some("token in login doesn't match token from configuration"));
        append(&path, &LOGIN[..80]);
        log.read_on().unwrap();
        assert_eq!(log.session(), Some(&Session::Trying), "half a line");
        append(&path, &LOGIN[80..]);
        log.read_on().unwrap();
        assert_eq!((log.session(), log.failure()), (Some(&Session::LoggedIn), None));
        append(&path, &[TRY, LOGIN].concat());
        log.read_on().unwrap();
        assert_eq!((log.session(), log.logins()), (Some(&Session::LoggedIn), 2), "another one, at once");
        let mut running = SessionLog::of_running(path);
        running.read_on().unwrap();
        assert_eq!(running.session(), Some(&Session::LoggedIn));
    }

    #[test]
    fn a_long_log_is_cut_and_read_on() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("frpc.log");
        let mut log = SessionLog::at_end(path.clone());
        append(&path, &"http request: [/api/status]\n".repeat(60_000));
        append(&path, LOGIN);
        log.read_on().unwrap();
        assert_eq!(log.session(), Some(&Session::LoggedIn));
        assert!(path.metadata().unwrap().len() <= READ_MAX);
        append(&path, REFUSED);
        log.read_on().unwrap();
        assert!(matches!(log.session(), Some(Session::Failed(_))));
    }

    #[test]
    fn last_words_are_not_about_our_own_calls() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("frpc.log");
        append(&path, "listen tcp 127.0.0.1:7400: bind: address already in use\n");
        append(&path, "[I] http response [/api/status]: code [200]\n\n");
        assert!(last_words(&path).starts_with("listen tcp"));
        assert!(last_words(&dir.path().join("none")).contains("cannot be read"));
    }
}
