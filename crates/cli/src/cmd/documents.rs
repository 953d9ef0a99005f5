//! `completions`, `man`, `settings`: what packages and people want to know about the program, made from the code.

use std::path::Path;

use anyhow::Context as _;
use clap::CommandFactory;
use qudata_agent_core::settings::{DEFAULT_FILE, describe};
use serde::Serialize;

use super::serve;
use crate::{
    args::CommandLine,
    exit::{Exit, Failure},
    render::fold,
    screen::{Look, Screen, Tone},
};

/// `completions SHELL`.
pub(super) fn completions(screen: &Screen, shell: clap_complete::Shell) -> Result<Exit, Failure> {
    let mut command = CommandLine::command();
    let name = command.get_name().to_owned();
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut command, name, &mut script);
    screen.print_bytes(&script)?;
    Ok(Exit::Done)
}

/// `man DIR`: one page for each command, as `git` has them.
pub(super) fn man(dir: &Path) -> Result<Exit, Failure> {
    clap_mangen::generate_to(CommandLine::command(), dir)
        .with_context(|| format!("cannot write manual pages to {}", dir.display()))?;
    Ok(Exit::Done)
}

/// One setting, as `settings` shows it.
#[derive(Debug, Serialize)]
struct Setting {
    /// Key in the file; absent where only the environment has it.
    key: Option<&'static str>,
    variable: String,
    default: &'static str,
    allowed: &'static str,
    meaning: &'static str,
}

/// `settings`.
pub(super) fn settings(screen: &Screen) -> Result<Exit, Failure> {
    let all = all_settings();
    if screen.json {
        screen.print_json(&all)?;
    } else {
        screen.print(&listing(&screen.out, &all))?;
    }
    Ok(Exit::Done)
}

fn all_settings() -> Vec<Setting> {
    let documented = describe().into_iter().map(|doc| Setting {
        key: Some(doc.key),
        variable: doc.env,
        default: doc.default,
        allowed: doc.allowed,
        meaning: doc.meaning,
    });
    documented.chain(logging()).collect()
}

fn logging() -> [Setting; 2] {
    [
        Setting {
            key: None,
            variable: serve::LOG_FILTER.to_owned(),
            default: "info",
            allowed: "error, warn, info, debug or trace, also as module=level,module=level",
            meaning: "What is logged. RUST_LOG counts where this is not set.",
        },
        Setting {
            key: None,
            variable: serve::LOG_FORMAT.to_owned(),
            default: "text on a terminal, json otherwise",
            allowed: "text or json",
            meaning: "Form of the log, which goes to standard error.",
        },
    ]
}

fn listing(look: &Look, all: &[Setting]) -> String {
    let mut text = format!("Read from {DEFAULT_FILE} and the environment; the environment wins.\n");
    for setting in all {
        let variable = look.paint(Tone::Faint, &setting.variable);
        let title = match setting.key {
            Some(key) => format!("{}  {variable}", look.paint(Tone::Strong, key)),
            None => look.paint(Tone::Strong, &setting.variable),
        };
        let default = match setting.default {
            "" => String::new(),
            default => format!("; default: {default}"),
        };
        text.push_str(&format!("\n{title}\n    {}\n", fold(look, 4, setting.meaning)));
        text.push_str(&format!("    {}\n", fold(look, 4, &format!("Allowed: {}{default}", setting.allowed))));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_setting_says_what_it_is_and_fits() {
        let all = all_settings();
        let look = crate::render::sample::look(Some(80));
        let text = listing(&look, &all);
        for setting in &all {
            assert!(text.contains(&setting.variable), "{setting:?}");
            assert!(!setting.meaning.is_empty() && !setting.allowed.is_empty(), "{setting:?}");
        }
        let long: Vec<_> = text.lines().filter(|l| l.chars().count() > 80).collect();
        assert!(long.is_empty(), "{long:?}");
        assert!(all.iter().any(|s| s.variable == "QUDATA_ACCEL"));
    }

    #[test]
    fn there_is_a_page_for_every_command_and_it_tells_the_exit_codes() {
        let dir = tempfile::tempdir().unwrap();
        man(dir.path()).unwrap();
        let page = |name: &str| std::fs::read_to_string(dir.path().join(name)).unwrap();
        assert!(page("qudata-agent.1").contains("no such instance"));
        assert!(page("qudata-agent-instance-create.1").contains("tunnel"));
        assert!(!dir.path().join("qudata-agent-probe-kvm.1").exists(), "hidden commands have no page");
    }
}
