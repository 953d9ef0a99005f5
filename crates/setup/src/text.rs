//! What `--plan` prints: every package, file with its difference, kernel parameter, unit and restart. Pure; called by the
//! CLI.

use std::fmt::Write;

use crate::{
    error::{AGAIN, SetupError, UNINSTALL},
    files::Files,
    observe::Observed,
    places,
    plan::{Change, FileChange, Plan},
    progress::Step,
    settings_file,
};

/// What to run after a failure. [`AGAIN`] is the line that the owner typed, whose options count; where they, the key and the
/// program are kept, `--continue` has them. A removal that took the program away left a copy of it.
#[must_use]
pub fn next_command(error: &SetupError, files: &Files) -> String {
    let there = |path: &&str| files.exists(path);
    if let Some(options) = error.next.strip_prefix(UNINSTALL)
        && !there(&places::INSTALLED)
        && there(&places::PROGRAM)
    {
        return format!("sudo {} uninstall{options}", places::PROGRAM);
    }
    let kept = [places::INSTALLED, places::WISH, places::API_KEY].iter().all(there);
    match error.next.strip_prefix(AGAIN) {
        Some("") if kept => format!("{AGAIN} --continue"),
        Some("") => "the same line again".to_owned(),
        Some(options) => format!("the same line again, with{options}"),
        None => error.next.clone(),
    }
}

/// Lines around a difference.
const AROUND: usize = 2;

/// The plan for people.
#[must_use]
pub fn describe(observed: &Observed, plan: &Plan) -> String {
    let mut text = String::new();
    // Writing to a String cannot fail, here and below.
    let _ = writeln!(
        text,
        "Host: {}, kernel {}, boot loader {}",
        observed.distribution.name,
        observed.kernel,
        observed.loader.name()
    );
    let gpus: Vec<String> = plan.chosen.gpus.iter().map(|gpu| gpu.address.to_string()).collect();
    let _ = writeln!(
        text,
        "GPUs to rent out: {}",
        if gpus.is_empty() { "none".to_owned() } else { gpus.join(", ") }
    );
    for gpu in &plan.chosen.gpus {
        let name = observed.names.get(&gpu.address).map_or("unknown device", String::as_str);
        let driver = observed.topology.devices.get(&gpu.address).and_then(|device| device.driver.as_deref());
        let _ = writeln!(text, "  {}  {name}, driver {}", gpu.address, driver.unwrap_or("none"));
    }
    for (address, why) in &plan.chosen.left_out {
        let name = observed.names.get(address).map_or("unknown device", String::as_str);
        let _ = writeln!(text, "  {address}  left out: {why} ({name})");
    }
    for note in plan.notes.iter().chain(&later(plan)) {
        let _ = writeln!(text, "Note: {note}");
    }
    if plan.changes.is_empty() {
        text.push_str("\nNothing has to be changed: this host is set up.\n");
        return text;
    }
    let mut last: Option<Step> = None;
    for (step, change) in &plan.changes {
        if last != Some(*step) {
            let _ = writeln!(text, "\n{}", step.name());
            last = Some(*step);
        }
        describe_change(&mut text, change);
    }
    text.push_str("\nNothing was changed.\n");
    text
}

/// Which GPUs are not tried out, because they are rented out.
pub(crate) fn later(plan: &Plan) -> Option<String> {
    let names: Vec<String> = plan.later.iter().map(ToString::to_string).collect();
    (!names.is_empty()).then(|| format!("rented out, and tried out another time: {}", names.join(", ")))
}

fn describe_change(text: &mut String, change: &Change) {
    let _ = match change {
        Change::Package { file, version } => {
            let from = file.as_deref().unwrap_or("what is there");
            writeln!(
                text,
                "  install {} {version} from {from}, with what it depends on and apt says",
                places::PACKAGE
            )
        }
        Change::File(file) => {
            describe_file(text, file);
            Ok(())
        }
        Change::Regenerate { loader, params } => {
            writeln!(text, "  run the tools of {loader}; the kernel is told: {}", params.join(" "))
        }
        Change::Image { from } => {
            writeln!(
                text,
                "  build the base image from {}",
                from.as_deref().unwrap_or("the default distribution")
            )
        }
        Change::Reboot { why } => {
            let unit = places::CONTINUE_FILE;
            let _ = writeln!(
                text,
                "  write and enable {unit}, which goes on after the restart and is removed at the end"
            );
            writeln!(text, "  restart this host: {why}")
        }
        Change::Selftest { gpus } if gpus.is_empty() => writeln!(text, "  try out a VM without a GPU"),
        Change::Selftest { gpus } => {
            let gpus: Vec<String> = gpus.iter().map(ToString::to_string).collect();
            writeln!(text, "  try out a VM with each of {}", gpus.join(", "))
        }
        Change::Enable => writeln!(text, "  enable and start {}", places::AGENT_UNIT),
    };
}

fn describe_file(text: &mut String, file: &FileChange) {
    let verb = if file.before.is_some() { "change" } else { "write" };
    let owner = if file.group { "root:qudata" } else { "root:root" };
    let _ = writeln!(text, "  {verb} {} ({:04o} {owner})", file.path, file.mode);
    if file.secret {
        text.push_str("      (the API key; not shown)\n");
        return;
    }
    let before = file.before.as_deref().unwrap_or_default();
    let secrets: Vec<String> = [before, &file.text].into_iter().flat_map(settings_file::secrets).collect();
    for line in difference(before, &file.text) {
        let _ = writeln!(text, "      {}", without(&line, &secrets));
    }
}

/// The line as others may see it: a plan is shown on a terminal and sent to whoever helps.
fn without(line: &str, secrets: &[String]) -> String {
    if secrets.is_empty() {
        return line.to_owned();
    }
    let name = line.split_once('=').map(|(name, _)| name);
    // By name too: TOML has more than one way to write a text.
    let named = name.is_some_and(|name| {
        let name = name.trim_end().trim_end_matches(['"', '\'']);
        ["key", "token"].iter().any(|end| name.ends_with(end))
    });
    match name {
        Some(name) if named || secrets.iter().any(|secret| line.contains(secret)) => {
            format!("{name}= (not shown)")
        }
        None if secrets.iter().any(|secret| line.contains(secret)) => "(not shown)".to_owned(),
        _ => line.to_owned(),
    }
}

/// The lines that go (`-`), come (`+`) and stand around them (` `).
#[must_use]
pub fn difference(before: &str, after: &str) -> Vec<String> {
    let (old, new): (Vec<&str>, Vec<&str>) = (before.lines().collect(), after.lines().collect());
    let start = old.iter().zip(&new).take_while(|(a, b)| a == b).count();
    let rest = old.len().min(new.len()) - start;
    let end = old.iter().rev().zip(new.iter().rev()).take(rest).take_while(|(a, b)| a == b).count();
    let part = |lines: &[&str], from: usize, to: usize, mark: char| -> Vec<String> {
        let lines = lines.get(from..to).unwrap_or_default();
        lines.iter().map(|line| format!("{mark}{line}")).collect()
    };
    let mut lines = part(&old, start.saturating_sub(AROUND), start, ' ');
    lines.extend(part(&old, start, old.len() - end, '-'));
    lines.extend(part(&new, start, new.len() - end, '+'));
    lines.extend(part(&old, old.len() - end, (old.len() - end + AROUND).min(old.len()), ' '));
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_beside_a_change_is_not_shown() {
        let file = |before: &str, after: &str| FileChange {
            path: places::SETTINGS,
            text: after.to_owned(),
            before: Some(before.to_owned()),
            mode: 0o640,
            group: true,
            secret: false,
        };
        for owners in [
            "api_key = \"ak-canary\"\n",
            "api.key = 'ak-canary'\n",
            "[api]\nkey = \"ak-canary\"\n",
            "api_key = \"ak-\\u0063anary\" # ak-canary\n",
            "frp_token = \"canary\"\n",
            "frp_token = \"\"\"\ncanary\"\"\"\n",
        ] {
            let mut text = String::new();
            describe_file(&mut text, &file(owners, &format!("region = \"ru2\"\n{owners}")));
            describe_file(&mut text, &file(owners, &owners.replace("canary", "canary2")));
            assert!(!text.contains("canary") && !text.contains("0063"), "{owners}{text}");
            assert!(text.contains("region"), "{text}");
        }
    }

    #[test]
    fn the_next_command_is_one_that_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let files = Files::below(dir.path(), Box::new(crate::files::Open));
        let keep = |path: &str| {
            std::fs::create_dir_all(files.at(path).parent().unwrap()).unwrap();
            std::fs::write(files.at(path), "").unwrap();
        };
        let next = |next: &str| {
            let error = SetupError::new(crate::error::Code::MirrorDown, "x", "y").next(next);
            next_command(&error, &files)
        };
        assert_eq!(next(AGAIN), "the same line again");
        assert_eq!(next("qudata-agent install --offline"), "the same line again, with --offline");
        assert_eq!((next("df -h /var"), next(UNINSTALL)), ("df -h /var".into(), UNINSTALL.into()));
        keep(places::PROGRAM);
        assert_eq!(next(UNINSTALL), "sudo /var/lib/qudata/setup/qudata-agent uninstall");
        assert_eq!(
            next("qudata-agent uninstall --purge"),
            "sudo /var/lib/qudata/setup/qudata-agent uninstall --purge"
        );
        [places::INSTALLED, places::WISH, places::API_KEY].into_iter().for_each(keep);
        assert_eq!(
            (next(AGAIN), next(UNINSTALL)),
            ("qudata-agent install --continue".into(), UNINSTALL.into())
        );
        assert_eq!(next("qudata-agent install --offline"), "the same line again, with --offline");
    }

    #[test]
    fn differences_are_small() {
        let old = "a\nb\nc\nd\ne\nf\n";
        assert_eq!(difference(old, "a\nb\nc\nX\ne\nf\n"), [" b", " c", "-d", "+X", " e", " f"]);
        assert_eq!(difference("", "a\n"), ["+a"]);
        assert_eq!(difference("a\n", "a\na\n"), [" a", "+a"]);
        assert_eq!(difference(old, old).iter().filter(|l| !l.starts_with(' ')).count(), 0);
    }
}
