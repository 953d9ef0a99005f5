//! What a program needs from the system it runs on: its libraries, and the oldest glibc that has all it uses. Called by
//! `control`, which turns it into Depends and refuses what Ubuntu 22.04 cannot run.
use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::tool;

/// glibc of Ubuntu 22.04, the oldest system that is served.
pub(super) const OLDEST_GLIBC: Version = Version(2, 35);

/// A version of glibc, as `2.35`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Version(u16, u16);

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.0, self.1)
    }
}

/// Needs of one program.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Needs {
    /// Names of shared libraries; none for a static program.
    pub libraries: BTreeSet<String>,
    /// The oldest glibc it runs on.
    pub glibc: Option<Version>,
}

/// Asks readelf about `program`. Fails when it needs a newer glibc than the oldest system has, and names the symbols.
pub(super) fn needs(program: &Path) -> Result<Needs> {
    let needs = read(&readelf(program, &["--dynamic", "--version-info"])?)
        .with_context(|| format!("{} cannot be judged", program.display()))?;
    if let Some(glibc) = needs.glibc.filter(|glibc| *glibc > OLDEST_GLIBC) {
        let symbols = newer(&readelf(program, &["--dyn-syms"])?);
        bail!(
            "{} needs glibc {glibc}, and Ubuntu 22.04 has {OLDEST_GLIBC}, because of {}; build it on Ubuntu 22.04",
            program.display(),
            if symbols.is_empty() { "how it was linked".to_owned() } else { symbols.join(", ") }
        );
    }
    Ok(needs)
}

fn readelf(program: &Path, what: &[&str]) -> Result<String> {
    tool::output(Command::new("readelf").args(what).arg("--wide").arg(program).env("LC_ALL", "C"))
}

/// From the output of `readelf --dynamic --version-info`.
fn read(text: &str) -> Result<Needs> {
    let mut needs = Needs::default();
    let mut in_needs = false;
    for line in text.lines() {
        if let Some((_, library)) = line.split_once("(NEEDED)") {
            let name = library.split_once('[').and_then(|(_, rest)| rest.split_once(']'));
            needs.libraries.insert(name.with_context(|| format!("no name in {line:?}"))?.0.to_owned());
        }
        // Which versions of others it uses, not which it offers.
        if line.starts_with("Version ") {
            in_needs = line.starts_with("Version needs section");
        }
        let name = line.split_once("Name: ").and_then(|(_, rest)| rest.split_whitespace().next());
        let Some(version) = name.filter(|_| in_needs).and_then(|name| name.strip_prefix("GLIBC_")) else {
            continue;
        };
        let version =
            glibc(version).with_context(|| format!("it needs GLIBC_{version}, which is no version"))?;
        needs.glibc = needs.glibc.max(Some(version));
    }
    Ok(needs)
}

/// `2.34`, or `2.2.5`, whose last number no system of today lacks. Names that say a feature of the loader, by when it came.
fn glibc(text: &str) -> Option<Version> {
    if text == "ABI_DT_RELR" {
        return Some(Version(2, 36));
    }
    let mut numbers = text.split('.').map(|number| number.parse().ok());
    Some(Version(numbers.next()??, numbers.next()??))
}

/// Symbols of a glibc that is too new, from the output of `readelf --dyn-syms`.
fn newer(text: &str) -> Vec<String> {
    let too_new = |word: &&str| {
        word.split_once("@GLIBC_")
            .and_then(|(_, version)| glibc(version))
            .is_some_and(|version| version > OLDEST_GLIBC)
    };
    text.lines().flat_map(|line| line.split_whitespace().filter(too_new)).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const DYNAMIC: &str = "
 0x0000000000000001 (NEEDED)             Shared library: [libgcc_s.so.1]
 0x0000000000000001 (NEEDED)             Shared library: [libc.so.6]
 0x000000000000000c (INIT)               0x9b000
Version symbols section '.gnu.version' contains 3 entries:
  000:   0 (*local*)       2 (GCC_3.0)       3 (GLIBC_2.39)
Version definition section '.gnu.version_d' contains 1 entry:
  0x0000: Rev: 1  Flags: none  Index: 2  Cnt: 1  Name: GLIBC_2.40
Version needs section '.gnu.version_r' contains 2 entries:
  000000: Version: 1  File: libgcc_s.so.1  Cnt: 1
  0x0010:   Name: GCC_3.0  Flags: none  Version: 6
  0x0050: Version: 1  File: libc.so.6  Cnt: 2
  0x0070:   Name: GLIBC_2.9  Flags: none  Version: 5
  0x0060:   Name: GLIBC_2.34  Flags: none  Version: 16
  0x0080:   Name: GLIBC_2.2.5  Flags: none  Version: 2
";

    #[test]
    fn the_newest_version_that_is_needed_is_the_floor() {
        let needs = read(DYNAMIC).unwrap();
        assert_eq!(
            needs.glibc,
            Some(Version(2, 34)),
            "2.9 is older than 2.34, and what is offered does not count"
        );
        assert!(needs.libraries.contains("libc.so.6") && needs.libraries.len() == 2, "{needs:?}");
        assert_eq!(read("\nThere is no dynamic section in this file.\n").unwrap(), Needs::default());
    }

    #[test]
    fn a_way_of_linking_counts_as_well_and_what_is_unknown_is_not_passed_over() {
        let with = |name: &str| DYNAMIC.replace("GLIBC_2.34", name);
        assert!(read(&with("GLIBC_ABI_DT_RELR")).unwrap().glibc > Some(OLDEST_GLIBC));
        assert!(read(&with("GLIBC_PRIVATE")).is_err());
    }

    #[test]
    fn symbols_that_are_too_new_are_named() {
        let text = "    12: 0 FUNC GLOBAL DEFAULT UND arc4random@GLIBC_2.36 (3)\n    13: 0 FUNC GLOBAL DEFAULT UND stat@GLIBC_2.33 (4)\n";
        assert_eq!(newer(text), ["arc4random@GLIBC_2.36"]);
    }

    #[test]
    fn this_very_program_has_a_floor() {
        let needs =
            read(&readelf(&std::env::current_exe().unwrap(), &["--dynamic", "--version-info"]).unwrap());
        assert!(needs.unwrap().glibc >= Some(Version(2, 17)));
    }
}
