//! frp for tests: which frps and frpc this machine offers, a real frps under a test's control, and a fake frpc. Called by
//! tests of the tunnel, by the demo, and by xtask, which also knows where to get frp when the machine has none.
//!
//! ```text
//! FRPS_BIN and FRPC_BIN ──▶ PATH ──▶ (xtask: a pinned release ──▶ the Go toolchain)
//! ```

mod fake;
mod place;
mod server;

use std::{
    env, fmt,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

pub use self::{
    fake::FakeFrpc,
    place::Place,
    server::{Frps, Options},
};

use crate::tool;

/// Names frps in the environment.
pub const FRPS_VARIABLE: &str = "FRPS_BIN";
/// Names frpc in the environment.
pub const FRPC_VARIABLE: &str = "FRPC_BIN";

/// `--version` of a program that may lie on a slow disk.
const ANSWER: Duration = Duration::from_secs(20);

/// A frp version, `0.70.1`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// Before the first dot.
    pub major: u32,
    /// Between the dots.
    pub minor: u32,
    /// After the second dot.
    pub patch: u32,
}

/// What the tests need: routes that come and go one by one (the store of frpc).
pub const OLDEST: Version = Version { major: 0, minor: 68, patch: 0 };

impl Version {
    /// Reads what `frpc --version` prints.
    pub fn parse(text: &str) -> Option<Self> {
        let mut parts = text.trim().split('.').map(|part| part.parse().ok());
        let (major, minor, patch) = (parts.next()??, parts.next()??, parts.next()??);
        parts.next().is_none().then_some(Self { major, minor, patch })
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

/// A server and a client of frp that run on this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frp {
    /// The server.
    pub frps: PathBuf,
    /// The client.
    pub frpc: PathBuf,
    /// The client's version.
    pub version: Version,
    /// Where they come from, as the end of a sentence.
    pub source: String,
}

impl Frp {
    /// Starts both with `--version`, so that what is wrong with them is known before a test needs them.
    ///
    /// # Errors
    /// A sentence: which of the two does not run, or tells no version.
    pub fn probe(frps: &Path, frpc: &Path, source: &str) -> Result<Self, String> {
        version_of(frps)?;
        let version = version_of(frpc)?;
        Ok(Self { frps: frps.to_owned(), frpc: frpc.to_owned(), version, source: source.to_owned() })
    }
}

fn version_of(program: &Path) -> Result<Version, String> {
    let shown = program.display();
    let output = tool::run(Command::new(program).arg("--version"), ANSWER)
        .map_err(|e| format!("{shown} does not run: {e}"))?;
    if !output.status.success() {
        return Err(format!("{shown} --version ended with {}: {}", output.status, output.stderr.trim()));
    }
    Version::parse(&output.stdout).ok_or_else(|| {
        let line = output.stdout.lines().next().unwrap_or_default();
        format!("{shown} --version printed {line:?} instead of a version")
    })
}

/// The pair that the environment names; none when it names none. One without the other is an error: it would be run
/// against a stranger.
pub fn named() -> Option<Result<Frp, String>> {
    match (env::var_os(FRPS_VARIABLE), env::var_os(FRPC_VARIABLE)) {
        (None, None) => None,
        (Some(frps), Some(frpc)) => Some(Frp::probe(
            Path::new(&frps),
            Path::new(&frpc),
            &format!("named by {FRPS_VARIABLE} and {FRPC_VARIABLE}"),
        )),
        _ => {
            Some(Err(format!("only one of {FRPS_VARIABLE} and {FRPC_VARIABLE} is set; set both or neither")))
        }
    }
}

/// The pair on `PATH`.
///
/// # Errors
/// A sentence: which of the two is not there, does not run or is too old.
pub fn on_path() -> Result<Frp, String> {
    let path = env::var_os("PATH").unwrap_or_default();
    let find = |name: &str| {
        let found = env::split_paths(&path).map(|dir| dir.join(name)).find(|file| file.is_file());
        found.ok_or_else(|| format!("no {name} on PATH"))
    };
    let frp = Frp::probe(&find("frps")?, &find("frpc")?, "found on PATH")?;
    if frp.version < OLDEST {
        return Err(format!("{} is version {}, older than {OLDEST}", frp.frpc.display(), frp.version));
    }
    Ok(frp)
}

/// The pair to test with: what the environment names, else what is on `PATH`.
///
/// # Errors
/// A sentence that says why there is none. A named pair that does not work is never replaced by another.
pub fn find() -> Result<Frp, String> {
    named().unwrap_or_else(|| {
        on_path().map_err(|why| {
            format!(
                "{why}, and {FRPS_VARIABLE} and {FRPC_VARIABLE} are not set: run `cargo xtask frp`, \
                 which prints where it put both"
            )
        })
    })
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt};

    use super::*;

    #[test]
    fn versions_are_read_and_ordered() {
        let parse = |text| Version::parse(text);
        assert_eq!(parse("0.70.1\n").unwrap().to_string(), "0.70.1");
        assert!(parse("0.70.1") > parse("0.68.12") && parse("1.0.0") > parse("0.70.1"));
        for text in ["", "frpc", "0.70", "0.70.1.2", "0.70.x", "v0.70.1"] {
            assert_eq!(parse(text), None, "{text:?}");
        }
    }

    #[test]
    fn a_pair_is_probed_before_it_is_used() {
        let dir = tempfile::tempdir().unwrap();
        let script = |name: &str, text: &str| {
            let file = dir.path().join(name);
            fs::write(&file, text).unwrap();
            fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
            file
        };
        let good = script("frps", "#!/bin/sh\necho 0.70.1\n");
        let silent = script("silent", "#!/bin/sh\necho usage: something\n");
        let broken = script("broken", "#!/bin/sh\necho no luck >&2\nexit 3\n");
        assert_eq!(Frp::probe(&good, &good, "made here").unwrap().version.minor, 70);
        for (frpc, expected) in [
            (&silent, "instead of a version"),
            (&broken, "no luck"),
            (&dir.path().join("absent"), "does not run"),
        ] {
            let words = Frp::probe(&good, frpc, "made here").unwrap_err();
            assert!(words.contains(expected), "{words}");
        }
    }
}
