//! The size rule: a file one can read in one sitting. Counts the lines of each source file without its tests. Called by
//! the parent module. (The length of functions is clippy's business: clippy.toml.)
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::cargo;
use crate::tool::say;

const HARD: usize = 600;
const SOFT: usize = 400;
const MEDIAN: usize = 200;

/// Where source lies that the rule is about; tests/ is tests altogether.
const FOLDERS: &[&str] = &["crates", "bench", "lab", "xtask"];

pub(super) fn check() -> Result<()> {
    let root = cargo::root();
    let mut sizes = Vec::new();
    for folder in FOLDERS {
        walk(&root.join(folder), &mut |path| {
            let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
            let name = path.strip_prefix(&root).unwrap_or(path);
            sizes.push((lines_without_tests(&text), name.display().to_string()));
            Ok(())
        })?;
    }
    sizes.sort();
    let verdict = judge(&sizes);
    for name in &verdict.long {
        say(format!("warning: {name}; think about splitting it before it grows past {HARD}"));
    }
    if !verdict.broken.is_empty() {
        bail!("{}", verdict.broken.join("\n  "));
    }
    Ok(())
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Verdict {
    broken: Vec<String>,
    long: Vec<String>,
}

/// `sizes` in ascending order.
fn judge(sizes: &[(usize, String)]) -> Verdict {
    let mut verdict = Verdict::default();
    for (lines, name) in sizes {
        let sentence = format!("{name} has {lines} lines without tests");
        if *lines > HARD {
            verdict.broken.push(format!("{sentence}; {HARD} is the limit"));
        } else if *lines > SOFT {
            verdict.long.push(sentence);
        }
    }
    if let Some((median, _)) = sizes.get(sizes.len() / 2)
        && *median > MEDIAN
    {
        verdict.broken.push(format!("the median file has {median} lines; {MEDIAN} is the limit"));
    }
    verdict
}

/// Lines up to the test module, which by convention ends the file.
fn lines_without_tests(text: &str) -> usize {
    let lines: Vec<&str> = text.lines().collect();
    let tests = lines
        .windows(2)
        .position(|pair| matches!(pair, ["#[cfg(test)]", module] if module.starts_with("mod tests")));
    tests.unwrap_or(lines.len())
}

fn walk(dir: &Path, visit: &mut impl FnMut(&PathBuf) -> Result<()>) -> Result<()> {
    for entry in fs::read_dir(dir).with_context(|| format!("cannot list {}", dir.display()))? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if path.is_dir() && name != "tests" {
            walk(&path, visit)?;
        } else if path.extension().is_some_and(|ext| ext == "rs") && name != "tests.rs" {
            visit(&path)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tests_do_not_count() {
        assert_eq!(lines_without_tests("a\nb\n#[cfg(test)]\nmod tests {\n}\n"), 2);
        assert_eq!(lines_without_tests("a\n#[cfg(test)]\nuse x;\nb\n"), 4);
    }

    #[test]
    fn limits_are_told_apart() {
        let sizes = [(10, "a.rs".into()), (20, "b.rs".into()), (401, "c.rs".into()), (601, "d.rs".into())];
        let verdict = judge(&sizes);
        assert!(verdict.long.iter().any(|line| line.contains("c.rs")));
        assert!(verdict.broken.iter().any(|line| line.contains("d.rs")));
        assert!(verdict.broken.iter().any(|line| line.contains("median")));
        assert_eq!(judge(&[(200, "a.rs".into())]), Verdict::default());
    }
}
