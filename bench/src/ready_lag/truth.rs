//! When a guest's sshd began to listen, on this machine's clock. A watcher in the guest notes two moments of the guest's
//! clock: the last look that found nothing, and the first that found the port. Over one SSH connection this process
//! then compares the two clocks, and keeps the exchange with the shortest way. Called by the parent module.

use std::{
    io::{BufRead, BufReader, Write},
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use jiff::Timestamp;
use serde_json::json;

use crate::original::Keys;

/// Exchanges of which the best one counts.
const EXCHANGES: usize = 25;
/// Between two of them: a guest's timer tick must not hit each.
const PAUSE: Duration = Duration::from_millis(7);

/// Looks for a listener on port 22 every 5 ms. No percent, dollar or backslash: systemd reads the line first.
const WATCHER: &str = r#"
import os, time
def listens():
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        if os.path.exists(table):
            for line in open(table):
                words = line.split()
                if words[1].endswith(":0016") and words[3] == "0A":
                    return True
    return False
before = -1.0
while True:
    now = time.monotonic()
    if listens():
        break
    before = now
    time.sleep(0.005)
after = time.monotonic()
with open("/run/qudata-bench.new", "w") as file:
    print(before, after, file=file)
os.rename("/run/qudata-bench.new", "/run/qudata-bench")
"#;

/// Answers each line with the guest's clock.
const CLOCK: &str = "import sys, time
for line in iter(sys.stdin.readline, str()):
    print(time.monotonic(), flush=True)";

/// cloud-init user-data that starts the watcher as early as anything of a renter's can run.
pub(crate) fn user_data() -> String {
    let command = [
        "systemd-run",
        "--quiet",
        "--no-block",
        "--collect",
        "--unit=qudata-bench-watch",
        // Otherwise it would wait for the same targets as sshd, and come late.
        "--property=DefaultDependencies=no",
        "--",
        "/usr/bin/python3",
        "-I",
        "-S",
        "-c",
        WATCHER,
    ];
    format!("#cloud-config\n{}\n", json!({ "bootcmd": [command] }))
}

/// A moment as seconds of this machine's clock.
pub(crate) fn host_seconds(at: Timestamp) -> f64 {
    at.duration_since(Timestamp::UNIX_EPOCH).as_secs_f64()
}

/// The guest's two looks, in seconds of this machine's clock.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Listening {
    /// The last look without a listener.
    not_yet: f64,
    /// After the first look with one.
    seen: f64,
    /// How far the clocks' comparison may be off, either way.
    skew: f64,
}

impl Listening {
    /// The longest time that may have passed between the listen and `moment`.
    pub(crate) fn millis_until(&self, moment: f64) -> f64 {
        (moment - self.not_yet + self.skew) * 1000.0
    }

    /// How much shorter that time may be.
    pub(crate) fn bound_millis(&self) -> f64 {
        (self.seen - self.not_yet + 2.0 * self.skew) * 1000.0
    }
}

/// Logs in to the guest behind `port` and asks.
pub(crate) fn ask(keys: &Keys, port: u16) -> Result<Listening> {
    wait_for_note(keys, port)?;
    let ssh = keys.ssh(port, &format!("cat /run/qudata-bench && exec python3 -I -S -c '{CLOCK}'"));
    // Anything can hang; then the pipes end.
    let mut command = Command::new("timeout");
    command.arg("60").arg(ssh.get_program()).args(ssh.get_args());
    let command = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn().context("starting ssh")?;
    let answer = converse(&mut child);
    // Its part is done either way.
    let _ = child.kill();
    let _ = child.wait();
    answer.context("asking the guest for its clock")
}

/// The watcher writes its note right after it has seen sshd, but it has to get its turn on the guest's one processor.
fn wait_for_note(keys: &Keys, port: u16) -> Result<()> {
    for _ in 0..20 {
        let mut test = keys.ssh(port, "test -e /run/qudata-bench");
        let output = qudata_testkit::tool::run(&mut test, Duration::from_secs(30))?;
        if output.status.success() {
            return Ok(());
        }
        thread::sleep(Duration::from_millis(250));
    }
    bail!("the watcher in the guest left no note")
}

fn converse(child: &mut Child) -> Result<Listening> {
    let mut input = child.stdin.take().context("ssh has no input")?;
    let mut output = BufReader::new(child.stdout.take().context("ssh has no output")?);
    let looks = read_numbers(&mut output)?;
    let [before, after] = looks.as_slice() else { bail!("the watcher's note is {looks:?}") };
    if *before < 0.0 {
        bail!("the watcher came when sshd listened already");
    }
    let mut best: Option<(f64, f64)> = None;
    for _ in 0..EXCHANGES {
        let asked = host_seconds(Timestamp::now());
        input.write_all(b"\n")?;
        let guest = read_numbers(&mut output)?;
        let answered = host_seconds(Timestamp::now());
        let [guest] = guest.as_slice() else { bail!("the guest's clock says {guest:?}") };
        let (half, offset) = ((answered - asked) / 2.0, f64::midpoint(asked, answered) - guest);
        if best.is_none_or(|(least, _)| half < least) {
            best = Some((half, offset));
        }
        thread::sleep(PAUSE);
    }
    let (skew, offset) = best.context("no exchange")?;
    Ok(Listening { not_yet: before + offset, seen: after + offset, skew })
}

fn read_numbers(reader: &mut impl BufRead) -> Result<Vec<f64>> {
    let mut line = String::new();
    if reader.read_line(&mut line)? == 0 {
        bail!("ssh ended early");
    }
    line.split_whitespace().map(|word| word.parse().with_context(|| format!("{line:?}"))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lag_is_never_flattering() {
        let listening = Listening { not_yet: 10.0, seen: 10.006, skew: 0.002 };
        let (most, bound) = (listening.millis_until(10.1), listening.bound_millis());
        assert!((most - 102.0).abs() < 1e-6 && (bound - 10.0).abs() < 1e-6);
        // The least: seen only at the very end, by a clock that is off the other way.
        assert!((most - bound - (10.1 - 10.006 - 0.002) * 1000.0).abs() < 1e-6);
    }

    #[test]
    fn python_reads_the_scripts_and_systemd_leaves_them_alone() {
        for script in [WATCHER, CLOCK] {
            assert!(!script.contains(['%', '$', '\\']), "{script}");
            assert!(!CLOCK.contains('\''), "it stands between quotes");
            let parse = "import sys; compile(sys.argv[1], 'script', 'exec')";
            let parsed = Command::new("python3").args(["-c", parse, script]).status();
            // A machine without Python cannot say; the guest has it.
            assert!(parsed.map_or(true, |status| status.success()), "{script}");
        }
    }

    #[test]
    fn user_data_is_a_cloud_config() {
        assert!(qudata_guest::seed::UserData::parse(&user_data()).is_ok());
    }

    #[test]
    fn two_clocks_are_compared_over_pipes() {
        // This machine as its own guest: `CLOCK`'s part is played by a shell and a fixed clock.
        let script = "echo 5.0 5.005; while read -r _; do echo 7.5; done";
        let mut command = Command::new("sh");
        let mut child =
            command.args(["-c", script]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let before = host_seconds(Timestamp::now());
        let listening = converse(&mut child).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(
            listening.not_yet > before - 2.5 - 0.001 && listening.not_yet < before + 1.0,
            "{listening:?}"
        );
        assert!((listening.seen - listening.not_yet - 0.005).abs() < 1e-5);
    }
}
