//! When a guest's sshd began to listen, on this machine's clock. sshd says so itself: its line in the guest's journal bears
//! the time at which it was sent, and nothing has to run in the guest to see it. Over one SSH connection this process then
//! compares the two clocks, and keeps the exchange with the shortest way. Called by the parent module.

use std::{
    io::{BufRead, BufReader, Write},
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use jiff::Timestamp;

use crate::original::Keys;

/// Exchanges of which the best one counts.
const EXCHANGES: usize = 25;
/// Between two of them: a guest's timer tick must not hit each.
const PAUSE: Duration = Duration::from_millis(7);

/// Prints when sshd said first that it listens: microseconds of the guest's clock, stamped by the guest's kernel when the
/// line was sent. systemd.journal-fields(7).
const JOURNAL: &str =
    "journalctl --boot --output=json --output-fields=MESSAGE,_SOURCE_REALTIME_TIMESTAMP _COMM=sshd";

/// Answers each line with the guest's clock.
const CLOCK: &str = "import sys, time
for line in iter(sys.stdin.readline, str()):
    print(time.time(), flush=True)";

/// A moment as seconds of this machine's clock.
pub(crate) fn host_seconds(at: Timestamp) -> f64 {
    at.duration_since(Timestamp::UNIX_EPOCH).as_secs_f64()
}

/// The moment, in seconds of this machine's clock.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Listening {
    at: f64,
    /// How far the clocks' comparison may be off, either way.
    skew: f64,
}

impl Listening {
    /// The longest time that may have passed between the listen and `moment`.
    pub(crate) fn millis_until(&self, moment: f64) -> f64 {
        (moment - self.at + self.skew) * 1000.0
    }

    /// How much shorter that time may be.
    pub(crate) fn bound_millis(&self) -> f64 {
        2.0 * self.skew * 1000.0
    }
}

/// Logs in to the guest behind `port` and asks.
pub(crate) fn ask(keys: &Keys, port: u16) -> Result<Listening> {
    let ssh = keys.ssh(port, &format!("{JOURNAL}; echo; exec python3 -I -S -c '{CLOCK}'"));
    // Anything can hang; then the pipes end.
    let mut command = Command::new("timeout");
    command.arg("60").arg(ssh.get_program()).args(ssh.get_args());
    let command = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn().context("starting ssh")?;
    let answer = converse(&mut child);
    // Its part is done either way.
    let _ = child.kill();
    let _ = child.wait();
    answer.context("asking the guest when its sshd listened")
}

fn converse(child: &mut Child) -> Result<Listening> {
    let mut input = child.stdin.take().context("ssh has no input")?;
    let mut output = BufReader::new(child.stdout.take().context("ssh has no output")?);
    let listened = read_journal(&mut output)?;
    let mut best: Option<(f64, f64)> = None;
    for _ in 0..EXCHANGES {
        let asked = host_seconds(Timestamp::now());
        input.write_all(b"\n")?;
        let guest = read_clock(&mut output)?;
        let answered = host_seconds(Timestamp::now());
        let (half, offset) = ((answered - asked) / 2.0, f64::midpoint(asked, answered) - guest);
        if best.is_none_or(|(least, _)| half < least) {
            best = Some((half, offset));
        }
        thread::sleep(PAUSE);
    }
    let (skew, offset) = best.context("no exchange")?;
    Ok(Listening { at: listened + offset, skew })
}

/// Seconds of the guest's clock at which the journal, up to an empty line, has sshd listen for the first time.
fn read_journal(reader: &mut impl BufRead) -> Result<f64> {
    let mut first = None;
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            bail!("ssh ended early");
        }
        if line.trim().is_empty() {
            return first.context("the guest's journal has no line about sshd listening");
        }
        let entry: serde_json::Value =
            serde_json::from_str(&line).context("a line of the guest's journal")?;
        let text = |key: &str| entry.get(key).and_then(serde_json::Value::as_str);
        if first.is_none()
            && text("MESSAGE").is_some_and(|message| message.starts_with("Server listening on"))
        {
            let stamp = text("_SOURCE_REALTIME_TIMESTAMP").context("the line has no time")?;
            first = Some(stamp.parse::<f64>().context("the time of the line")? / 1e6);
        }
    }
}

fn read_clock(reader: &mut impl BufRead) -> Result<f64> {
    let mut line = String::new();
    if reader.read_line(&mut line)? == 0 {
        bail!("ssh ended early");
    }
    line.trim().parse().with_context(|| format!("the guest's clock says {line:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lag_is_never_flattering() {
        let listening = Listening { at: 10.0, skew: 0.002 };
        let (most, bound) = (listening.millis_until(10.1), listening.bound_millis());
        assert!((most - 102.0).abs() < 1e-6 && (bound - 4.0).abs() < 1e-6);
    }

    #[test]
    fn python_reads_the_script() {
        assert!(!CLOCK.contains('\''), "it stands between quotes");
        let parse = "import sys; compile(sys.argv[1], 'script', 'exec')";
        let parsed = Command::new("python3").args(["-c", parse, CLOCK]).status();
        // A machine without Python cannot say; the guest has it.
        assert!(parsed.map_or(true, |status| status.success()));
    }

    #[test]
    fn the_first_line_about_listening_counts() {
        let journal = r#"{"MESSAGE":"sshd: no hostkeys","_SOURCE_REALTIME_TIMESTAMP":"1000000"}
{"MESSAGE":"Server listening on 0.0.0.0 port 22.","_SOURCE_REALTIME_TIMESTAMP":"2500000"}
{"MESSAGE":"Server listening on :: port 22.","_SOURCE_REALTIME_TIMESTAMP":"2600000"}

"#;
        assert!((read_journal(&mut journal.as_bytes()).unwrap() - 2.5).abs() < 1e-9);
        assert!(read_journal(&mut &b"\n"[..]).is_err() && read_journal(&mut &b"x\n"[..]).is_err());
    }

    #[test]
    fn two_clocks_are_compared_over_pipes() {
        // This machine as its own guest: a shell and a fixed clock play the guest's part.
        let line = r#"{"MESSAGE":"Server listening on :: port 22.","_SOURCE_REALTIME_TIMESTAMP":"5000000"}"#;
        let script = format!("echo '{line}'; echo; while read -r _; do echo 7.5; done");
        let mut command = Command::new("sh");
        let mut child =
            command.args(["-c", &script]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let before = host_seconds(Timestamp::now());
        let listening = converse(&mut child).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(listening.at > before - 2.5 - 0.001 && listening.at < before + 1.0, "{listening:?}");
    }
}
