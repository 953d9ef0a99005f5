//! `cargo xtask test`: every test this machine can run, and one line with the sum last. Called by main and by CI.
//!
//! Two runs of cargo: the workspace's own tests, then the product tests in tests/, which need the built agent, the guest
//! image and root. `--quick` leaves out the tests whose name contains `slow_`.
use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};

use anyhow::{Context, Result};

use crate::cargo::{self, cargo};
use crate::tool::{self, say};
use crate::{deps, image};

/// The package with the product tests.
const PRODUCT: &str = "qudata-tests";
/// Part of the name of each test that takes longer than half a minute.
const SLOW: &str = "slow_";

#[derive(Debug, Default, PartialEq, Eq)]
struct Sum {
    passed: u64,
    failed: u64,
    skipped: u64,
}

impl Sum {
    /// Adds what one line of cargo's output says, if it is a result.
    fn add(&mut self, line: &str) {
        let Some(result) = line.strip_prefix("test result: ") else { return };
        for part in result.split([';', '.']) {
            let mut words = part.split_whitespace();
            let (Some(number), Some(what)) =
                (words.next().and_then(|word| word.parse::<u64>().ok()), words.next())
            else {
                continue;
            };
            match what {
                "passed" => self.passed += number,
                "failed" => self.failed += number,
                "ignored" | "filtered" => self.skipped += number,
                _ => {}
            }
        }
    }
}

/// Runs everything; true when all passed.
pub(crate) fn run(quick: bool) -> Result<bool> {
    deps::ensure(&[deps::PRODUCT, deps::TESTS])?;
    let mut sum = Sum::default();
    let mut complete = true;
    say("unit, property and golden tests");
    complete &= cargo_test(&mut cargo(), &["--workspace", "--exclude", PRODUCT], quick, &mut sum)?;
    say("product tests");
    complete &= cargo_test(&mut product(false)?, &["--package", PRODUCT], quick, &mut sum)?;
    let passed = complete && sum.failed == 0;
    if !passed && sum.failed == 0 {
        // Something did not build or died without a result: that is a failure too.
        sum.failed = 1;
    }
    let skipped = if sum.skipped > 0 { format!(", {} skipped", sum.skipped) } else { String::new() };
    println!("{} passed, {} failed{skipped}", sum.passed, sum.failed);
    Ok(passed)
}

/// cargo with what the product tests and the benchmarks need: a built agent and images.
pub(crate) fn product(release: bool) -> Result<Command> {
    let agent = cargo::build_agent(release)?;
    let images = image::ensure()?;
    let variables = [
        ("QUDATA_TEST_AGENT", &agent),
        ("QUDATA_TEST_IMAGE", &images.guest),
        ("QUDATA_TEST_BLANK", &images.blank),
    ];
    let mut command = cargo();
    command.envs(variables);
    if !tool::is_root() {
        // The agent needs root; cargo does not, and leaves no root-owned files behind this way.
        let names = variables.map(|(name, _)| name).join(",");
        command.env(runner_variable()?, format!("sudo --preserve-env={names} --"));
    }
    Ok(command)
}

/// Name of the variable that tells cargo through what to start test binaries.
fn runner_variable() -> Result<String> {
    let text = tool::output(Command::new("rustc").arg("-vV"))?;
    let host =
        text.lines().find_map(|line| line.strip_prefix("host: ")).context("rustc -vV names no host")?;
    Ok(format!("CARGO_TARGET_{}_RUNNER", host.to_uppercase().replace('-', "_")))
}

/// One run of cargo test, shown as it goes and added up; false when it did not end well.
fn cargo_test(command: &mut Command, which: &[&str], quick: bool, sum: &mut Sum) -> Result<bool> {
    command.args(["test", "--no-fail-fast"]).args(which);
    if quick {
        command.args(["--", "--skip", SLOW]);
    }
    let mut child =
        command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().context("cannot start cargo test")?;
    let output = child.stdout.take().context("cargo test has no output")?;
    for line in BufReader::new(output).split(b'\n') {
        let line = line.context("cannot read the output of cargo test")?;
        let line = String::from_utf8_lossy(&line);
        sum.add(&line);
        writeln!(std::io::stdout(), "{line}").context("cannot write to stdout")?;
    }
    Ok(child.wait().context("cannot wait for cargo test")?.success())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_add_up_and_other_lines_do_not() {
        let mut sum = Sum::default();
        for line in [
            "running 3 tests",
            "test a ... ok",
            "test result: ok. 12 passed; 0 failed; 1 ignored; 0 measured; 4 filtered out; finished in 0.10s",
            "test result: FAILED. 2 passed; 3 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.25s",
            "5 passed",
        ] {
            sum.add(line);
        }
        assert_eq!(sum, Sum { passed: 14, failed: 3, skipped: 5 });
    }

    #[test]
    fn the_runner_is_set_for_this_host() {
        let name = runner_variable().unwrap();
        assert!(
            name.starts_with("CARGO_TARGET_") && name.ends_with("_RUNNER") && !name.contains('-'),
            "{name}"
        );
    }
}
