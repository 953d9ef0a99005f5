//! CHANGELOG.md as Debian wants it: newest version first, bullets of two spaces and a star, lines of 80 letters. Called by
//! `tree`.
use std::process::Command;

use anyhow::{Context, Result};

use super::{NAME, Release};
use crate::tool;

/// Longest line.
const WIDTH: usize = 79;

/// The changelog of the package: the section of this version, or of what is not released yet.
pub(super) fn render(markdown: &str, release: &Release, maintainer: &str) -> Result<String> {
    let changes = bullets(markdown);
    let date = tool::output(
        Command::new("date")
            .args(["--utc", "--rfc-email"])
            .arg(format!("--date=@{}", release.epoch))
            .env("LC_ALL", "C"),
    )?;
    let mut text = format!("{NAME} ({}) unstable; urgency=medium\n\n", release.version);
    if changes.is_empty() {
        return Err(anyhow::anyhow!("the first section has no bullets"))
            .context("CHANGELOG.md tells no changes");
    }
    for change in changes {
        text.push_str(&wrapped(&change));
    }
    text.push_str(&format!("\n -- {maintainer}  {}\n", date.trim()));
    Ok(text)
}

/// The bullets of the first `## ` section, without the marks of markdown.
fn bullets(markdown: &str) -> Vec<String> {
    let section = markdown.lines().skip_while(|line| !line.starts_with("## ")).skip(1);
    section
        .take_while(|line| !line.starts_with("## "))
        .filter_map(|line| line.strip_prefix("- "))
        .map(|line| line.replace('`', "").replace("**", ""))
        .collect()
}

fn wrapped(change: &str) -> String {
    let mut text = String::new();
    let mut line = "  *".to_owned();
    for word in change.split_whitespace() {
        if line.chars().count() + 1 + word.chars().count() > WIDTH {
            text.push_str(&line);
            text.push('\n');
            line = "   ".to_owned();
        }
        line.push(' ');
        line.push_str(word);
    }
    text + &line + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    fn release() -> Release {
        Release { version: "0.2.0".into(), epoch: "1700000000".into() }
    }

    #[test]
    fn the_newest_section_becomes_stars_in_eighty_letters() {
        let long = "word ".repeat(40);
        let markdown = format!(
            "# Changelog\n\nText.\n\n## 0.2.0\n\nWords.\n\n- `serve`: {long}\n- Two.\n\n## 0.1.0\n\n- Old.\n"
        );
        let text = render(&markdown, &release(), "A <a@example.org>").unwrap();
        assert!(
            text.starts_with("qudata-agent (0.2.0) unstable; urgency=medium\n\n  * serve: word"),
            "{text}"
        );
        assert!(
            text.ends_with("\n  * Two.\n\n -- A <a@example.org>  Tue, 14 Nov 2023 22:13:20 +0000\n"),
            "{text}"
        );
        assert!(text.lines().all(|line| line.chars().count() <= WIDTH) && !text.contains("Old"), "{text}");
    }

    #[test]
    fn a_release_that_changes_nothing_is_a_mistake() {
        assert!(render("# Changelog\n\n## 0.2.0\n\nSoon.\n", &release(), "A <a@example.org>").is_err());
    }

    #[test]
    fn our_own_changelog_has_something_to_tell() {
        let text = std::fs::read_to_string(crate::cargo::root().join("CHANGELOG.md")).unwrap();
        assert!(!bullets(&text).is_empty());
    }
}
