//! The machine's own apt sources, as far as they serve its Debian release: the image comes from the same place as the machine.
//! Called by `rootfs`. Names no server: what /etc/apt says is what is used.
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::tool;

/// Sources to build from, and how this machine wants them fetched.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Sources {
    /// Lines of the one-line style.
    pub lines: String,
    /// Stanzas of the deb822 style.
    pub stanzas: String,
    /// apt options that must also hold inside the guest, e.g. for a mirror that is a snapshot.
    pub options: Vec<String>,
    /// Proxies of this machine: environment of the build only, they mean nothing inside the guest.
    pub proxies: Vec<(String, String)>,
}

/// The release this machine runs, e.g. `bookworm`.
pub(super) fn release() -> Result<String> {
    let text = fs::read_to_string("/etc/os-release").context("cannot read /etc/os-release")?;
    let field = |name: &str| {
        text.lines()
            .filter_map(|line| line.split_once('='))
            .find(|(key, _)| *key == name)
            .map(|(_, value)| value.trim_matches('"').to_owned())
    };
    match (field("ID").as_deref(), field("VERSION_CODENAME")) {
        (Some("debian"), Some(codename)) => Ok(codename),
        (id, _) => bail!(
            "the guest image is built from the packages of Debian, and this machine is {}; build it on a Debian 12 machine and set QUDATA_BASE_IMAGE",
            id.unwrap_or("unknown")
        ),
    }
}

/// Reads /etc/apt for `release`.
pub(super) fn read(release: &str) -> Result<Sources> {
    let mut found = Sources::default();
    for path in source_files()? {
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        if path.extension().is_some_and(|ext| ext == "sources") {
            found.stanzas.push_str(&stanzas_for(&text, release));
        } else {
            found.lines.push_str(&lines_for(&text, release));
        }
    }
    if found.lines.is_empty() && found.stanzas.is_empty() {
        bail!("no apt source in /etc/apt has the component main of {release}; add one and run this again");
    }
    let config = tool::output(Command::new("apt-config").arg("dump"))?;
    (found.options, found.proxies) = fetch_settings(&config);
    Ok(found)
}

fn source_files() -> Result<Vec<PathBuf>> {
    let main = Path::new("/etc/apt/sources.list");
    let mut files: Vec<PathBuf> = main.exists().then(|| main.to_owned()).into_iter().collect();
    let parts = Path::new("/etc/apt/sources.list.d");
    if parts.is_dir() {
        for entry in fs::read_dir(parts).context("cannot list /etc/apt/sources.list.d")? {
            let path = entry?.path();
            if path.extension().is_some_and(|ext| ext == "list" || ext == "sources") {
                files.push(path);
            }
        }
    }
    files.sort();
    Ok(files)
}

/// A suite of the release itself: `bookworm`, `bookworm-updates`, never somebody else's `stable`.
fn serves(suite: &str, release: &str) -> bool {
    suite.strip_prefix(release).is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
}

fn lines_for(text: &str, release: &str) -> String {
    let keep = |line: &&str| {
        let Some(rest) = line.trim_start().strip_prefix("deb ") else { return false };
        // Options in brackets may hold spaces.
        let rest = rest.trim_start();
        let rest = match rest.strip_prefix('[') {
            Some(inner) => inner.split_once(']').map_or("", |(_, after)| after),
            None => rest,
        };
        let mut words = rest.split_whitespace().skip(1);
        words.next().is_some_and(|suite| serves(suite, release)) && words.any(|component| component == "main")
    };
    text.lines().filter(keep).map(|line| format!("{}\n", line.trim())).collect()
}

fn stanzas_for(text: &str, release: &str) -> String {
    let lines = text.lines().filter(|line| !line.starts_with('#')).collect::<Vec<_>>();
    lines
        .split(|line| line.trim().is_empty())
        .filter(|stanza| {
            let field = |name: &str| {
                stanza.iter().filter_map(|line| line.split_once(':')).find_map(|(key, value)| {
                    key.trim()
                        .eq_ignore_ascii_case(name)
                        .then(|| value.split_whitespace().collect::<Vec<_>>())
                })
            };
            field("Types").is_some_and(|types| types.contains(&"deb"))
                && field("Enabled").is_none_or(|on| !on.contains(&"no"))
                && field("Components").is_some_and(|components| components.contains(&"main"))
                && field("Suites").is_some_and(|suites| suites.iter().any(|suite| serves(suite, release)))
        })
        .map(|stanza| format!("{}\n\n", stanza.join("\n")))
        .collect()
}

/// From the output of `apt-config dump`: options to keep and proxies to pass on.
fn fetch_settings(config: &str) -> (Vec<String>, Vec<(String, String)>) {
    let mut options = Vec::new();
    let mut proxies = Vec::new();
    for line in config.lines() {
        let Some((key, value)) = line.trim_end_matches(';').split_once(' ') else { continue };
        match key {
            "Acquire::Check-Valid-Until" | "Acquire::Check-Date" | "Acquire::Max-FutureTime" => {
                options.push(format!("{key} {value}"));
            }
            "Acquire::http::Proxy" | "Acquire::https::Proxy" => {
                let scheme = if key.contains("https") { "https" } else { "http" };
                proxies.push((format!("{scheme}_proxy"), value.trim_matches('"').to_owned()));
            }
            _ => {}
        }
    }
    (options, proxies)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_release_itself_is_taken_from_one_line_sources() {
        let text = "# deb http://a.example/d bookworm main\n\
                    deb http://a.example/d bookworm main contrib\n\
                    deb [arch=amd64 signed-by=/k.gpg] http://a.example/d bookworm-updates main\n\
                    deb-src http://a.example/d bookworm main\n\
                    deb [signed-by=/x.gpg] http://b.example/x bookworm stable\n\
                    deb http://c.example/n nodistro main\n";
        assert_eq!(
            lines_for(text, "bookworm"),
            "deb http://a.example/d bookworm main contrib\n\
             deb [arch=amd64 signed-by=/k.gpg] http://a.example/d bookworm-updates main\n"
        );
    }

    #[test]
    fn only_the_release_itself_is_taken_from_stanzas() {
        let debian =
            "Types: deb\nURIs: http://a.example/d\nSuites: bookworm bookworm-updates\nComponents: main\n";
        let text = format!(
            "# remark\n{debian}\nTypes: deb\nURIs: http://b.example\nSuites: bookworm\nComponents: stable\n\n\
             Types: deb-src\nURIs: http://a.example/d\nSuites: bookworm\nComponents: main\n\n\
             Enabled: no\nTypes: deb\nURIs: http://a.example/d\nSuites: bookworm\nComponents: main\n"
        );
        assert_eq!(stanzas_for(&text, "bookworm"), format!("{debian}\n"));
    }

    #[test]
    fn a_prefix_is_not_a_release() {
        assert!(serves("bookworm-security", "bookworm") && !serves("bookwormish", "bookworm"));
    }

    #[test]
    fn fetch_settings_are_split_into_kept_and_passing() {
        let dump = "Acquire \"\";\nAcquire::Check-Date \"false\";\nAcquire::http::Proxy \"http://p.example:3128\";\n";
        let (options, proxies) = fetch_settings(dump);
        assert_eq!(options, ["Acquire::Check-Date \"false\""]);
        assert_eq!(proxies, [("http_proxy".to_owned(), "http://p.example:3128".to_owned())]);
    }
}
