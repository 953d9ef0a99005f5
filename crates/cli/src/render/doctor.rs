//! What `doctor` found, as people read it: grouped by topic, a verdict a line, the remedy below it, what to do next last.

use qudata_doctor::{
    Finding, Report, Verdict,
    explain::{self, Explanation},
};

use super::{fold, line};
use crate::{
    screen::{Look, Tone},
    units::duration,
};

/// Columns before an id, and before a remedy.
const INDENT: usize = 8;
/// From here on sentences stand in a column of their own.
const WIDE: u16 = 110;
/// Longer lines are hard to read.
const PROSE: u16 = 100;

/// All of it; `quiet` leaves out what is as it should be.
pub(crate) fn report(look: &Look, report: &Report, quiet: bool) -> String {
    let mut text = String::new();
    let mut topic = "";
    let column = explain::ALL.iter().map(|check| check.id.len()).max().unwrap_or(0);
    for group in groups(&report.findings) {
        let Some(first) = group.first() else { continue };
        if quiet && first.verdict == Verdict::Pass {
            continue;
        }
        let its_topic = explain::explain(first.id).map_or("", |check| check.topic);
        if its_topic != topic {
            text.push_str(&format!(
                "{}{}\n",
                if text.is_empty() { "" } else { "\n" },
                look.paint(Tone::Strong, its_topic)
            ));
            topic = its_topic;
        }
        let subjects: Vec<&str> = group.iter().filter_map(|finding| finding.subject.as_deref()).collect();
        text.push_str(&row(look, first, &subjects, column));
    }
    if !text.is_empty() {
        text.push('\n');
    }
    text + &closing(look, report)
}

/// Neighbours that say the same of different things are one row.
fn groups(findings: &[Finding]) -> Vec<&[Finding]> {
    let same = |a: &Finding, b: &Finding| {
        (a.id, a.verdict, &a.line, &a.remedy) == (b.id, b.verdict, &b.line, &b.remedy)
    };
    findings.chunk_by(same).collect()
}

/// One finding as it comes, for tests that take their time.
pub(crate) fn finding(look: &Look, finding: &Finding) -> String {
    row(look, finding, finding.subject.as_deref().as_slice(), "selftest.nvidia_smi".len())
}

fn row(look: &Look, finding: &Finding, subjects: &[&str], column: usize) -> String {
    let (word, tone) = match finding.verdict {
        Verdict::Pass => ("PASS", Tone::Good),
        Verdict::Warn => ("WARN", Tone::Notice),
        Verdict::Fail => ("FAIL", Tone::Bad),
    };
    let subject = match subjects {
        [] => String::new(),
        [one] => format!("{}: ", line(one)),
        [one, two] => format!("{}, {}: ", line(one), line(two)),
        many => format!("{} GPUs: ", many.len()),
    };
    let sentence = format!("{subject}{}", line(&finding.line));
    let wide = look.width.is_none_or(|width| width >= WIDE);
    let (column, indent) = if wide { (column, INDENT + column + 2) } else { (0, INDENT) };
    // The id is folded with the sentence where there is no column for it.
    let head = format!("{:column$}  ", finding.id);
    let body = match wide {
        true => format!("{head}{}", fold(look, indent, &sentence)),
        false => fold(look, INDENT, &format!("{}: {sentence}", finding.id)),
    };
    let mut text = format!("  {}  {body}\n", look.paint(tone, word));
    if let Some(remedy) = &finding.remedy {
        text.push_str(&format!("{}→ {}\n", " ".repeat(indent), fold(look, indent + 2, remedy)));
    }
    text
}

fn closing(look: &Look, report: &Report) -> String {
    let counted = |verdict, one: &str, many: &str| match report.count(verdict) {
        0 => None,
        1 => Some(format!("1 {one}")),
        n => Some(format!("{n} {many}")),
    };
    let counts: Vec<String> = [
        counted(Verdict::Fail, "failure", "failures"),
        counted(Verdict::Warn, "warning", "warnings"),
        counted(Verdict::Pass, "check passed", "checks passed"),
    ]
    .into_iter()
    .flatten()
    .collect();
    let took = duration(u64::try_from(report.took.as_millis()).unwrap_or(u64::MAX));
    let (tone, said) = match report.verdict() {
        Verdict::Fail => (Tone::Bad, "This host cannot rent out all it should."),
        Verdict::Warn => {
            (Tone::Notice, "Nothing keeps this host from renting; some things are worth a look.")
        }
        Verdict::Pass => (Tone::Good, "Nothing keeps this host from renting."),
    };
    let counts = format!("{} in {took}.", counts.join(", "));
    let mut text = match look.width {
        // The colour must not be counted as text.
        Some(width) if said.len() + 1 + counts.len() > usize::from(width) => {
            format!("{}\n{}\n", look.paint(tone, said), fold(look, 0, &counts))
        }
        _ => format!("{} {counts}\n", look.paint(tone, said)),
    };
    if let Some((next, remedy)) = report.next().and_then(|next| Some((next, next.remedy.as_ref()?))) {
        let remedy = fold(look, 6, &format!("{remedy} (more: `qudata-agent doctor --explain {}`)", next.id));
        text.push_str(&format!("{} {remedy}\n", look.paint(Tone::Strong, "Next:")));
    }
    text
}

/// The list of `--explain`.
pub(crate) fn checks(look: &Look) -> String {
    let column = explain::ALL.iter().map(|check| check.id.len()).max().unwrap_or(0);
    let row = |check: &Explanation| {
        let id = look.paint(Tone::Strong, &format!("{:column$}", check.id));
        format!("{id}  {}\n", fold(look, column + 2, check.title))
    };
    explain::ALL.iter().map(row).collect()
}

/// One check of `--explain ID`.
pub(crate) fn explanation(look: &Look, check: &Explanation) -> String {
    let narrow = Look { width: Some(look.width.map_or(PROSE, |width| width.min(PROSE))), ..look.clone() };
    let title = fold(&narrow, 0, &format!("{}: {}", check.id, check.title));
    let mut text = format!("{}\n", look.paint(Tone::Strong, &title));
    for paragraph in check.text.split("\n\n") {
        text.push_str(&format!("\n{}\n", fold(&narrow, 0, paragraph)));
    }
    text
}

/// The end of a self-test, whose findings were told before.
pub(crate) fn selftest(look: &Look, passed: bool, gpus: usize, kept: &[String]) -> String {
    let tried = match gpus {
        0 => "no GPU".to_owned(),
        1 => "1 GPU".to_owned(),
        n => format!("{n} GPUs"),
    };
    let (tone, said) = match (passed, gpus) {
        (true, 0) => (Tone::Good, "The self-test passed without a GPU: there is none.".to_owned()),
        (true, _) => (Tone::Good, format!("The self-test passed with {tried}.")),
        (false, _) => (Tone::Bad, format!("The self-test failed ({tried} tried).")),
    };
    let kept: String = kept.iter().map(|name| format!("kept: {}\n", line(name))).collect();
    format!("{}\n{kept}", look.paint(tone, &said))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use jiff::Timestamp;

    use super::*;

    fn look(width: Option<u16>) -> Look {
        Look { width, colour: false, now: Timestamp::UNIX_EPOCH }
    }

    fn found(
        id: &'static str,
        subject: Option<&str>,
        verdict: Verdict,
        text: &str,
        remedy: Option<&str>,
    ) -> Finding {
        let (subject, remedy) = (subject.map(str::to_owned), remedy.map(str::to_owned));
        Finding { id, subject, verdict, line: text.to_owned(), remedy }
    }

    fn mixed() -> Report {
        use Verdict::{Fail, Pass, Warn};
        let [a, b, c] = ["0000:41:00.0", "0000:42:00.0", "0000:61:00.0"].map(Some);
        let findings = vec![
            found("cpu.virtualization", None, Pass, "AMD-V, 128 threads", None),
            found(
                "iommu.enabled",
                Some("kernel"),
                Fail,
                "the IOMMU is off, although the firmware offers it",
                Some("remove amd_iommu=off and iommu=off from the kernel's command line and boot again"),
            ),
            found("gpu.power", a, Pass, "it answers", None),
            found("gpu.power", b, Pass, "it answers", None),
            found("gpu.power", c, Pass, "it answers", None),
            found("gpu.reset", a, Pass, "by flr", None),
            found("gpu.reset", b, Pass, "by flr", None),
            found(
                "gpu.link",
                a,
                Warn,
                "8 of 16 lanes are in use: the card works, slower",
                Some(
                    "reseat the card or its riser; a slot with fewer lanes, or lanes that slots share, stay as they are",
                ),
            ),
            found("gpu.link", b, Pass, "16 lanes, up to 32 GT/s", None),
        ];
        Report { findings, took: Duration::from_millis(412) }
    }

    #[test]
    fn reports_at_all_widths() {
        for (name, width) in [("80", Some(80)), ("140", Some(140)), ("piped", None)] {
            insta::assert_snapshot!(format!("doctor_{name}"), report(&look(width), &mixed(), false));
        }
        insta::assert_snapshot!("doctor_quiet", report(&look(Some(80)), &mixed(), true));
    }

    #[test]
    fn nothing_but_the_end_is_said_of_a_host_where_all_is_well() {
        let all = Report { findings: mixed().findings.drain(..1).collect(), took: Duration::from_millis(99) };
        let text = report(&look(Some(80)), &all, true);
        assert_eq!(text, "Nothing keeps this host from renting. 1 check passed in 99 ms.\n");
    }

    #[test]
    fn lines_fit_the_terminal_and_nothing_steers_it() {
        let mut bad = mixed();
        bad.findings[0].line = "\x1b[2J\x1b]0;title\x07cleared".to_owned();
        for width in [40, 80, 109, 110, 140] {
            let text = report(&look(Some(width)), &bad, false);
            let longest = text.lines().map(|line| line.chars().count()).max().unwrap();
            assert!(longest <= usize::from(width.max(80)), "{width}: {text}");
            assert!(!text.contains('\x1b') && text.contains("cleared"), "{text}");
        }
    }

    #[test]
    fn explanations_are_folded_for_reading() {
        insta::assert_snapshot!(
            "explain_80",
            explanation(&look(Some(80)), explain::explain("iommu.enabled").unwrap())
        );
        for check in &explain::ALL {
            let text = explanation(&look(None), check);
            assert!(text.lines().all(|line| line.chars().count() <= usize::from(PROSE)), "{text}");
        }
        assert_eq!(checks(&look(None)).lines().count(), explain::ALL.len());
    }

    #[test]
    fn the_end_of_a_self_test() {
        let said = |passed, gpus| selftest(&look(None), passed, gpus, &[]);
        assert_eq!(said(true, 2), "The self-test passed with 2 GPUs.\n");
        assert!(said(true, 0).contains("without a GPU"));
        assert_eq!(said(false, 1), "The self-test failed (1 GPU tried).\n");
        assert!(selftest(&look(None), true, 1, &["selftest-1".to_owned()]).ends_with("kept: selftest-1\n"));
    }
}
