//! `cargo xtask test`: every test this machine can run, and one line with the sum last. Called by main and by CI.
//!
//! One run of cargo over the workspace, so that nothing is built twice with other features. The product tests in tests/
//! need the guest image, root, and the agent's binary, which cargo builds for the tests of its own package. Tests that
//! need the real frp are marked as ignored and have a run of their own, where there is a frp. `--quick` leaves out the
//! tests whose name contains `slow_`.
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use qudata_testkit::frp::{FRPC_VARIABLE, FRPS_VARIABLE, Frp};

use crate::cargo::{self, cargo};
use crate::frp::{self, Search};
use crate::tool::{self, say};
use crate::{deps, image, lab};

/// Part of the name of each test that takes longer than half a minute.
const SLOW: &str = "slow_";

/// Test binaries with tests that are ignored unless there is a real frp, and for no other reason.
const WITH_REAL_FRP: &[&str] = &["real", "frpc", "product"];

#[derive(Debug, Default, PartialEq, Eq)]
struct Sum {
    passed: u64,
    failed: u64,
    skipped: u64,
}

impl Sum {
    /// Adds what one line of cargo's output says, if it is a result.
    fn add(&mut self, line: &str) {
        if let Some(result) = line.strip_prefix("test result: ") {
            self.add_counts(result);
        }
    }

    /// Adds counts such as `12 passed; 0 failed` or `12 passed, 0 failed`.
    fn add_counts(&mut self, result: &str) {
        for part in result.split([';', '.', ',']) {
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

    /// Adds a run of tests that an earlier run has counted as skipped, because they are ignored by default.
    fn add_ignored(&mut self, ran: &Self) {
        self.passed += ran.passed;
        self.failed += ran.failed;
        self.skipped = self.skipped.saturating_sub(ran.passed + ran.failed);
    }
}

/// Runs everything; true when all passed.
pub(crate) fn run(quick: bool) -> Result<bool> {
    deps::ensure(&[deps::PRODUCT, deps::TESTS])?;
    let mut sum = Sum::default();
    let (agent, search) = (cargo::agent(false)?, frp::search()?);
    say("unit, property, golden and product tests");
    let mut cargo = product(&agent, search.found())?;
    cargo.args(["test", "--no-fail-fast", "--workspace", "--"]);
    let mut complete = cargo_test(&mut cargo, quick, &mut sum)?;
    complete &= real_frp(&agent, &search, quick, &mut sum)?;
    if !quick {
        complete &= lab_scenarios(&mut sum)?;
    }
    let passed = complete && sum.failed == 0;
    if !passed && sum.failed == 0 {
        // Something did not build or died without a result: that is a failure too.
        sum.failed = 1;
    }
    let skipped = if sum.skipped > 0 { format!(", {} skipped", sum.skipped) } else { String::new() };
    println!("{} passed, {} failed{skipped}", sum.passed, sum.failed);
    Ok(passed)
}

/// cargo with what the product tests and the benchmarks need: the agent's binary, images, and frp where there is one.
pub(crate) fn product(agent: &Path, frp: Option<&Frp>) -> Result<Command> {
    let images = image::ensure()?;
    let mut variables = vec![
        ("QUDATA_TEST_AGENT", agent.to_owned()),
        ("QUDATA_TEST_FAKE_FRPC", agent.with_file_name("qudata-fake-frpc")),
        ("QUDATA_TEST_IMAGE", images.guest),
        ("QUDATA_TEST_BLANK", images.blank),
    ];
    if let Some(frp) = frp {
        variables.extend([(FRPS_VARIABLE, frp.frps.clone()), (FRPC_VARIABLE, frp.frpc.clone())]);
    }
    let names: Vec<&str> = variables.iter().map(|(name, _)| *name).collect();
    let mut command = cargo();
    if !tool::is_root() {
        // The agent needs root; cargo does not, and leaves no root-owned files behind this way.
        command.env(runner_variable()?, format!("sudo --preserve-env={} --", names.join(",")));
    }
    command.envs(variables);
    Ok(command)
}

/// Name of the variable that tells cargo through what to start test binaries.
fn runner_variable() -> Result<String> {
    let text = tool::output(Command::new("rustc").arg("-vV"))?;
    let host =
        text.lines().find_map(|line| line.strip_prefix("host: ")).context("rustc -vV names no host")?;
    Ok(format!("CARGO_TARGET_{}_RUNNER", host.to_uppercase().replace('-', "_")))
}

/// The lab where it can run, and a line where it cannot.
fn lab_scenarios(sum: &mut Sum) -> Result<bool> {
    if let Some(reason) = lab::obstacle() {
        say(format!("SKIPPED: the lab, because {reason}"));
        sum.skipped += 1;
        return Ok(true);
    }
    say("scenarios in the lab");
    let mut last = String::new();
    let passed = stream(&mut lab::command(&lab::Lab::brief())?, |line| last = line.to_owned())?;
    sum.add_counts(&last);
    Ok(passed)
}

/// The tests against the real frp where there is one, and a line where there is none: they stay counted as skipped.
fn real_frp(agent: &Path, search: &Search, quick: bool, sum: &mut Sum) -> Result<bool> {
    let frp = match search {
        Search::Found(frp) => frp,
        Search::Nowhere(why) => {
            say(format!("SKIPPED: tests with the real frp, because {why}"));
            return Ok(true);
        }
    };
    say(format!("tests with the real frp {}, {}", frp.version, frp.source));
    let mut cargo = product(agent, Some(frp))?;
    // The whole workspace again, so that nothing is built with other features.
    cargo.args(["test", "--no-fail-fast", "--workspace"]);
    for target in WITH_REAL_FRP {
        cargo.args(["--test", target]);
    }
    cargo.args(["--", "--ignored"]);
    let mut ran = Sum::default();
    let complete = cargo_test(&mut cargo, quick, &mut ran)?;
    sum.add_ignored(&ran);
    Ok(complete)
}

/// One run of cargo test, prepared up to the arguments for the tests; shown as it goes and added up. False when it did not
/// end well.
fn cargo_test(command: &mut Command, quick: bool, sum: &mut Sum) -> Result<bool> {
    if quick {
        command.args(["--skip", SLOW]);
    }
    stream(command, |line| sum.add(line))
}

/// Runs to the end with each line of stdout shown as it comes; false when it did not end well.
fn stream(command: &mut Command, mut each: impl FnMut(&str)) -> Result<bool> {
    let name = command.get_program().to_string_lossy().into_owned();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {name}"))?;
    let output = child.stdout.take().with_context(|| format!("{name} has no output"))?;
    for line in BufReader::new(output).split(b'\n') {
        let line = line.with_context(|| format!("cannot read the output of {name}"))?;
        let line = String::from_utf8_lossy(&line);
        each(&line);
        writeln!(std::io::stdout(), "{line}").context("cannot write to stdout")?;
    }
    Ok(child.wait().with_context(|| format!("cannot wait for {name}"))?.success())
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
        sum.add_counts("5 passed, 1 failed");
        assert_eq!(sum, Sum { passed: 19, failed: 4, skipped: 5 });
    }

    #[test]
    fn what_was_ignored_first_and_run_later_counts_once() {
        let mut sum = Sum { passed: 10, failed: 0, skipped: 7 };
        let mut ran = Sum::default();
        ran.add(
            "test result: ok. 3 passed; 1 failed; 0 ignored; 0 measured; 20 filtered out; finished in 1s",
        );
        sum.add_ignored(&ran);
        assert_eq!(sum, Sum { passed: 13, failed: 1, skipped: 3 });
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
