//! Which frpc this is and what it can do. Asked before every start.

use std::{fmt, io, path::Path, str::FromStr, time::Duration};

use qudata_host::command::{Tool, ToolError};

/// It prints one line; a host that takes longer than this has a problem worth reporting.
const PROBE_DEADLINE: Duration = Duration::from_secs(10);

/// A version of frp.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// First number.
    pub major: u32,
    /// Second number.
    pub minor: u32,
    /// Third number.
    pub patch: u32,
}

/// The oldest frpc that reads TOML as it is written here.
pub(crate) const OLDEST: Version = Version { major: 0, minor: 52, patch: 0 };
const TOKEN_FILE: Version = Version { major: 0, minor: 64, patch: 0 };
const STORE: Version = Version { major: 0, minor: 68, patch: 0 };

impl Version {
    /// Whether it reads its token from a file (`auth.tokenSource`).
    pub(crate) fn reads_token_file(self) -> bool {
        self >= TOKEN_FILE
    }

    /// Whether routes can be added and removed one by one (`store.path`).
    pub(crate) fn has_store(self) -> bool {
        self >= STORE
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

/// Text that is no version.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no version of the form 1.2.3")]
pub struct NoVersion(String);

impl FromStr for Version {
    type Err = NoVersion;

    fn from_str(text: &str) -> Result<Self, NoVersion> {
        let parse = || -> Option<Self> {
            let mut numbers = text.trim().trim_start_matches('v').splitn(3, '.');
            let (major, minor) = (numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?);
            // Builds of others add something: `0.61.1-sdk`.
            let rest = numbers.next()?;
            let end = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
            Some(Self { major, minor, patch: rest.get(..end)?.parse().ok()? })
        };
        parse().ok_or_else(|| NoVersion(text.chars().take(60).collect()))
    }
}

/// frpc cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ProbeError {
    /// It is not there.
    #[error("there is no frpc at {0}")]
    Missing(String),
    /// It does not run.
    #[error("frpc does not tell its version")]
    Run(#[source] ToolError),
    /// It says something else.
    #[error("frpc does not tell its version")]
    Words(#[source] NoVersion),
    /// It does not read what is written for it.
    #[error("frpc is {0}, and {OLDEST} is the oldest that can be used")]
    TooOld(Version),
}

/// Runs `frpc --version`.
pub(crate) async fn probe(frpc: &Path) -> Result<Version, ProbeError> {
    let run = Tool::new(frpc).arg("--version").deadline(PROBE_DEADLINE).run().await;
    let output = run.map_err(|error| match error {
        ToolError::Start { source, program } if source.kind() == io::ErrorKind::NotFound => {
            ProbeError::Missing(program)
        }
        other => ProbeError::Run(other),
    })?;
    let version: Version = String::from_utf8_lossy(&output.stdout).parse().map_err(ProbeError::Words)?;
    if version < OLDEST { Err(ProbeError::TooOld(version)) } else { Ok(version) }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt};

    use super::*;

    #[test]
    fn versions_are_read_and_compared() {
        let v = |text: &str| text.parse::<Version>().unwrap();
        assert_eq!(v("0.70.1\n").to_string(), "0.70.1");
        assert_eq!(v("v0.61.1-sdk"), Version { major: 0, minor: 61, patch: 1 });
        assert!(v("0.68.0").has_store() && !v("0.67.9").has_store());
        assert!(v("0.64.0").reads_token_file() && !v("0.63.9").reads_token_file());
        for bad in ["", "frpc", "0.70", "0.x.1", "nfrp-client 0.7.3"] {
            assert!(bad.parse::<Version>().is_err(), "{bad:?}");
        }
    }

    #[tokio::test]
    async fn a_program_that_is_no_usable_frpc_says_why() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("frpc");
        let says = |text: &str| {
            fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        };
        assert!(matches!(probe(&path).await, Err(ProbeError::Missing(_))));
        says("echo 0.51.3");
        assert!(matches!(probe(&path).await, Err(ProbeError::TooOld(_))));
        says("echo hello");
        assert!(matches!(probe(&path).await, Err(ProbeError::Words(_))));
        says("exit 3");
        assert!(matches!(probe(&path).await, Err(ProbeError::Run(_))));
        says("echo 0.61.1");
        assert_eq!(probe(&path).await.unwrap().minor, 61);
    }
}
