//! The look at the host, made by a process of its own, and its report brought over. Called by the CLI on the side that
//! somebody waits for; on the other side it calls [`crate::examine`] and prints one line.
//!
//! ```text
//! examine_apart ─▶ process: examine ─▶ one line of JSON ─▶ Report
//!        └─ no line by the end: the process is left, all checks say so
//! ```
//! A thread that waits in the kernel (for the configuration space of a card whose driver hangs, for a disk that died)
//! cannot be ended, and neither can its process: a shell or a monitor would wait for it as long as the driver hangs. So
//! the process that looks is another one than the one that is waited for. It has none of the input and
//! outputs of its parent, and nobody waits for its end, not even for the end of what it prints.

use std::{
    io,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use serde::Deserialize;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, BufReader},
    time::timeout,
};

use crate::{
    Finding, Report, Verdict,
    check::unseen,
    explain::{self, ALL},
    observed::Unseen,
};

/// How much later than promised the process may tell: it has to start, on a host that may be busy, and asks a second time
/// for what was late. Used up only by one that is stuck as a whole.
const GRACE: Duration = Duration::from_secs(10);
/// A report on the GPUs of a large server has some ten thousand bytes.
const MOST: u64 = 4 << 20;

/// What a finding is in JSON.
#[derive(Deserialize)]
struct Told {
    id: String,
    subject: Option<String>,
    verdict: Verdict,
    line: String,
    remedy: Option<String>,
}

/// As much of a report as does not follow from its findings.
#[derive(Deserialize)]
struct Line {
    took_ms: u64,
    findings: Vec<Told>,
}

/// The report that `look` prints as one line: the JSON of a [`Report`] without line feeds. `patience` is how long it looks
/// at the host. Where it does not tell, that is the finding of every check.
///
/// # Errors
/// When it cannot be started. Then nothing was looked at.
pub async fn examine_apart(look: Command, patience: Duration) -> io::Result<Report> {
    let begun = Instant::now();
    Ok(match ask(look, patience, GRACE).await? {
        Ok(report) => report,
        Err(why) => Report { findings: not_looked_at(&why), took: begun.elapsed() },
    })
}

async fn ask(mut look: Command, patience: Duration, grace: Duration) -> io::Result<Result<Report, Unseen>> {
    look.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    // Dropped, it is neither ended nor waited for.
    let mut process = tokio::process::Command::from(look).spawn()?;
    let Some(told) = process.stdout.take() else { return Err(io::ErrorKind::BrokenPipe.into()) };
    let mut line = Vec::new();
    let mut told = BufReader::new(told.take(MOST));
    // Up to the end of the line: the pipe stays open as long as a thread of it is stuck.
    Ok(match timeout(patience.saturating_add(grace), told.read_until(b'\n', &mut line)).await {
        Ok(Ok(_)) => parse(&line),
        Ok(Err(error)) => Err(Unseen::Failed(format!("the process that looks cannot be heard: {error}"))),
        Err(_) => Err(Unseen::Late(patience)),
    })
}

fn parse(line: &[u8]) -> Result<Report, Unseen> {
    let early = || Unseen::Failed("the process that looks ended early".to_owned());
    let line: Line = serde_json::from_slice(line).map_err(|_| early())?;
    let finding = |told: Told| {
        let Told { id, subject, verdict, line, remedy } = told;
        Some(Finding { id: explain::explain(&id)?.id, subject, verdict, line, remedy })
    };
    let findings: Option<_> = line.findings.into_iter().map(finding).collect();
    Ok(Report { findings: findings.ok_or_else(early)?, took: Duration::from_millis(line.took_ms) })
}

fn not_looked_at(why: &Unseen) -> Vec<Finding> {
    // The self-test is no part of a look.
    ALL.iter().filter(|check| check.id != "selftest").map(|check| unseen(check.id, why)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::{check, made_up::host};

    /// A process that runs this script; `$1` is a report.
    fn script(script: &str) -> Command {
        let report = Report { findings: check(&host()), took: Duration::from_millis(7) };
        let mut command = Command::new("sh");
        command.args(["-c", script, "sh", &serde_json::to_string(&report).unwrap()]);
        command
    }

    #[tokio::test]
    async fn a_process_that_cannot_end_is_not_waited_for() {
        let begun = Instant::now();
        // Its standard output stays open, as that of a process with a stuck thread does.
        let stuck = script("echo \"$1\"; exec sleep 60");
        let report = examine_apart(stuck, Duration::from_secs(60)).await.unwrap();
        assert_eq!(report, Report { findings: check(&host()), took: Duration::from_millis(7) });
        assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
    }

    #[tokio::test]
    async fn a_process_that_says_nothing_is_left_and_every_check_says_so() {
        let seen = ask(script("exec sleep 60"), Duration::from_millis(200), Duration::from_millis(100)).await;
        let late = Unseen::Late(Duration::from_millis(200));
        assert_eq!(seen.unwrap(), Err(late.clone()));
        let findings = not_looked_at(&late);
        assert!(findings.iter().all(|finding| finding.verdict == Verdict::Warn), "{findings:?}");
        assert_eq!(findings.len() + 1, ALL.len());
    }

    #[tokio::test]
    async fn half_a_report_is_none() {
        for broken in ["exit 1", "printf '%.90s' \"$1\"", "echo '{\"findings\":[]}'"] {
            let seen = ask(script(broken), Duration::from_secs(60), GRACE).await.unwrap();
            assert!(
                matches!(&seen, Err(Unseen::Failed(why)) if why.contains("ended early")),
                "{broken}: {seen:?}"
            );
        }
    }

    #[tokio::test]
    async fn it_has_nothing_of_what_its_parent_is_heard_by() {
        let line = r#"{"id":"disk","verdict":"pass","line":"%s %s"}"#;
        let links = "$(readlink /proc/self/fd/0) $(readlink /proc/self/fd/2)";
        let seen = ask(
            script(&format!("printf '{{\"took_ms\":1,\"findings\":[{line}]}}\\n' {links}")),
            GRACE,
            GRACE,
        )
        .await;
        let report = seen.unwrap().unwrap();
        assert_eq!(report.findings.first().unwrap().line, "/dev/null /dev/null");
    }

    #[tokio::test]
    async fn a_program_that_is_not_there_is_an_error() {
        assert!(examine_apart(Command::new("/nonexistent/look"), GRACE).await.is_err());
    }
}
