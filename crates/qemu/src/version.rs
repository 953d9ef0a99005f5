//! Which QEMU and which Linux the host has, as values that can be compared. Called by the agent at its start and by
//! `passthrough`, whose advice depends on both.

use std::{fmt, path::Path, str::FromStr};

use qudata_host::command::{Tool, ToolError};

use crate::qmp::{QemuVersion, VersionNumber};

/// What QEMU's first line of `--version` begins with.
const BANNER: &str = "QEMU emulator version ";

/// A Linux release, as far as features depend on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KernelVersion {
    /// 6 of 6.12.
    pub major: u32,
    /// 12 of 6.12.
    pub minor: u32,
}

/// A text that names no version.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{value:?} does not begin with a version such as 7.2")]
pub struct ParseVersionError {
    /// What was given, cut to 40 characters.
    pub value: String,
}

/// QEMU's version is not known.
#[derive(Debug, thiserror::Error)]
pub enum QemuVersionError {
    /// The program could not be run.
    #[error("cannot ask QEMU for its version")]
    Run(#[source] ToolError),
    /// It printed something else.
    #[error("QEMU does not tell its version: it printed {printed:?}")]
    Printed {
        /// The first line, cut to 80 characters.
        printed: String,
    },
}

/// Runs `program --version`.
///
/// # Errors
/// When it cannot be run, or is no QEMU.
pub async fn observe_qemu(program: &Path) -> Result<QemuVersion, QemuVersionError> {
    let output = Tool::new(program).arg("--version").run().await.map_err(QemuVersionError::Run)?;
    let text = String::from_utf8_lossy(&output.stdout);
    let line = text.lines().next().unwrap_or_default();
    parse_banner(line).ok_or_else(|| QemuVersionError::Printed { printed: line.chars().take(80).collect() })
}

/// The version in `QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)`.
fn parse_banner(line: &str) -> Option<QemuVersion> {
    let rest = line.strip_prefix(BANNER)?;
    let qemu = rest.parse().ok()?;
    let package = rest.split_once('(').map_or("", |(_, rest)| rest.trim_end_matches([')', '\r']));
    Some(QemuVersion { qemu, package: package.to_owned() })
}

/// The version of the running kernel.
///
/// # Errors
/// When the kernel's release does not begin with one.
pub fn observe_kernel() -> Result<KernelVersion, ParseVersionError> {
    rustix::system::uname().release().to_string_lossy().parse()
}

/// The numbers at the start of a text, separated by dots; what follows is the distributor's.
fn numbers(text: &str) -> Result<[u32; 3], ParseVersionError> {
    let refuse = || ParseVersionError { value: text.chars().take(40).collect() };
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (head, _) = text.split_at(end);
    let mut parts = head.split('.');
    let mut next = || parts.next().filter(|part| !part.is_empty());
    let major = next().ok_or_else(refuse)?.parse().map_err(|_| refuse())?;
    let minor = next().ok_or_else(refuse)?.parse().map_err(|_| refuse())?;
    let micro = next().unwrap_or("0").parse().map_err(|_| refuse())?;
    Ok([major, minor, micro])
}

impl FromStr for VersionNumber {
    type Err = ParseVersionError;

    fn from_str(text: &str) -> Result<Self, ParseVersionError> {
        let [major, minor, micro] = numbers(text)?;
        Ok(Self { major, minor, micro })
    }
}

impl FromStr for KernelVersion {
    type Err = ParseVersionError;

    fn from_str(text: &str) -> Result<Self, ParseVersionError> {
        let [major, minor, _] = numbers(text)?;
        Ok(Self { major, minor })
    }
}

impl fmt::Display for VersionNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

impl fmt::Display for KernelVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn banners_of_distributions() {
        for (line, number, package) in [
            (
                "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)",
                "7.2.22",
                "Debian 1:7.2+dfsg-7+deb12u18+b3",
            ),
            ("QEMU emulator version 10.0.2", "10.0.2", ""),
            ("QEMU emulator version 9.2.0 (qemu-9.2.0-1.fc42)", "9.2.0", "qemu-9.2.0-1.fc42"),
            ("QEMU emulator version 9.1.50 (v9.1.0-1-gabc-dirty)", "9.1.50", "v9.1.0-1-gabc-dirty"),
        ] {
            let version = parse_banner(line).unwrap();
            assert_eq!(version.qemu, number.parse().unwrap(), "{line}");
            assert_eq!(version.package, package, "{line}");
        }
        for line in ["", "qemu-img version 7.2.22", "QEMU emulator version x", "QEMU emulator version 7"] {
            assert_eq!(parse_banner(line), None, "{line}");
        }
    }

    #[test]
    fn versions_are_ordered_by_number() {
        let kernel = |text: &str| text.parse::<KernelVersion>().unwrap();
        assert!(kernel("6.9.0-rc1") < kernel("6.12.0-1-amd64"));
        assert_eq!(kernel("6.18-fc"), KernelVersion { major: 6, minor: 18 });
        assert!("9.10.0".parse::<VersionNumber>().unwrap() > "9.2".parse().unwrap());
        for text in ["", "6", ".6", "6.", "linux", "6..1", "99999999999.1"] {
            assert!(text.parse::<KernelVersion>().is_err(), "{text}");
        }
    }

    #[test]
    fn this_host_has_a_kernel() {
        assert!(observe_kernel().unwrap().major >= 4);
    }

    #[tokio::test]
    async fn real_qemu_tells_its_version() {
        let version = observe_qemu(Path::new("qemu-system-x86_64")).await.unwrap();
        assert!(version.qemu >= "7.2".parse().unwrap(), "{version:?}");
        let error = observe_qemu(Path::new("/bin/echo")).await.unwrap_err();
        assert!(
            matches!(&error, QemuVersionError::Printed { printed } if printed.starts_with("echo")),
            "{error}"
        );
    }

    proptest! {
        #[test]
        fn parsing_never_panics(text in ".{0,40}") {
            let _ = (text.parse::<VersionNumber>(), parse_banner(&format!("{BANNER}{text}")));
        }
    }
}
