//! `doctor`: looks at the host, explains a check, or tries each GPU in an instance (`selftest`).

mod guest;
pub(crate) mod selftest;

use std::{
    env,
    ffi::OsString,
    io,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use qudata_agent_core::settings::{DEFAULT_FILE, LoadFrom, Settings, SettingsFile};
use qudata_doctor::{
    Finding, PATIENCE, Report, Scope, SettingsRead, Verdict, examine, examine_apart, explain,
};

use self::selftest::{SelftestWish, selftest};
use super::{
    Context,
    serve::{LOG_FILTER, LOG_FORMAT},
};
use crate::{
    args::doctor::{Doctor, Selftest, Trial},
    exit::{Exit, Failure},
    render::{doctor as render, line},
    screen::Screen,
};

/// The name under which this program looks on behalf of itself, in place of its own: what people see of it in a list of
/// processes when the kernel does not let it go. Everything else on its command line is as it was typed.
const LOOKER: &str = "qudata-agent (looks for doctor)";

/// `socket`: the agent's, where it was named; otherwise it is where the settings say.
pub(super) async fn run(cx: Context<'_>, wish: Doctor, socket: Option<PathBuf>) -> Result<Exit, Failure> {
    if let Some(Trial::Selftest(wish)) = wish.command {
        return try_out(cx, wish).await;
    }
    if let Some(id) = wish.explain {
        return explained(cx.screen, id.as_deref());
    }
    if env::args_os().next().is_some_and(|name| name == LOOKER) {
        let report = look(wish.config.as_deref(), socket).await?;
        let line = serde_json::to_string(&report).map_err(anyhow::Error::new)?;
        cx.screen.print(&format!("{line}\n"))?;
        return Ok(Exit::Done);
    }
    let report = match look_apart().await {
        Ok(report) => report,
        // No second process can be had; then this one looks, and may have to be waited for.
        Err(_) => look(wish.config.as_deref(), socket).await?,
    };
    if cx.screen.json {
        cx.screen.print_json(&report)?;
    } else {
        cx.screen.print(&render::report(&cx.screen.out, &report, wish.quiet))?;
    }
    Ok(verdict(report.verdict(), wish.strict))
}

/// By another process: see [`examine_apart`].
async fn look_apart() -> io::Result<Report> {
    let mut command = Command::new(env::current_exe()?);
    command.arg0(LOOKER).args(env::args_os().skip(1));
    examine_apart(command, PATIENCE).await
}

async fn look(config: Option<&Path>, socket: Option<PathBuf>) -> Result<Report, Failure> {
    let (settings, read) = settings(config, env::vars_os().collect())?;
    let scope = Scope { settings: read, socket, ..Scope::default() };
    Ok(examine(&settings, &scope).await)
}

fn verdict(worst: Verdict, strict: bool) -> Exit {
    match worst {
        Verdict::Pass => Exit::Done,
        Verdict::Warn if !strict => Exit::Done,
        Verdict::Warn | Verdict::Fail => Exit::Failed,
    }
}

fn explained(screen: &Screen, id: Option<&str>) -> Result<Exit, Failure> {
    let Some(id) = id else {
        if screen.json {
            let ids: Vec<_> = explain::ALL.iter().map(|check| check.id).collect();
            screen.print_json(&ids)?;
        } else {
            screen.print(&render::checks(&screen.out))?;
        }
        return Ok(Exit::Done);
    };
    let Some(check) =
        explain::explain(id).or_else(|| id.starts_with("selftest.").then(|| explain::explain("selftest"))?)
    else {
        let sentence =
            format!("there is no check {:?}: `qudata-agent doctor --explain` lists them", line(id));
        return Err(Failure::new(Exit::Usage, sentence));
    };
    if screen.json {
        let text = serde_json::json!({ "id": check.id, "topic": check.topic, "title": check.title, "text": check.text });
        screen.print_json(&text)?;
    } else {
        screen.print(&render::explanation(&screen.out, check))?;
    }
    Ok(Exit::Done)
}

/// Variables with their values.
type Environment = Vec<(OsString, OsString)>;

/// The settings that the agent would have here, or defaults where they cannot be had. Unlike `serve`, changes nothing
/// about the file.
fn settings(config: Option<&Path>, environment: Environment) -> Result<(Settings, SettingsRead), Failure> {
    let path = config.unwrap_or(Path::new(DEFAULT_FILE));
    let file = match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(SettingsFile { path: path.to_owned(), text })),
        Err(error) if error.kind() == io::ErrorKind::NotFound && config.is_none() => Ok(None),
        Err(error) => Err(error),
    };
    let refused = match file {
        Ok(file) => match load(file, environment) {
            Ok(settings) => return Ok((settings, SettingsRead::Understood)),
            Err(error) => {
                let problems: Vec<String> = error.problems.iter().map(ToString::to_string).collect();
                SettingsRead::Refused(problems.join("; "))
            }
        },
        Err(error) => {
            let why = format!("cannot read the settings file {}", path.display());
            match error.kind() {
                io::ErrorKind::PermissionDenied => SettingsRead::Unreadable(why),
                _ => SettingsRead::Refused(format!("{why}: {error}")),
            }
        }
    };
    let defaults = load(None, Environment::new()).map_err(anyhow::Error::new)?;
    Ok((defaults, refused))
}

fn load(
    file: Option<SettingsFile>,
    mut env: Environment,
) -> Result<Settings, qudata_agent_core::settings::SettingsError> {
    let (read, exists) = (|path: &Path| std::fs::read(path), |path: &Path| path.exists());
    // How the agent logs is no setting.
    env.retain(|(name, _)| name != LOG_FORMAT && name != LOG_FILTER);
    Settings::load(&LoadFrom { file, env, flags: Vec::new(), read: &read, exists: &exists })
}

async fn try_out(cx: Context<'_>, wish: Selftest) -> Result<Exit, Failure> {
    let screen = cx.screen;
    let tell = |finding: &Finding| {
        // A reader that went away is found out at the end.
        let _ = (!screen.json).then(|| screen.print(&render::finding(&screen.out, finding)));
    };
    let wish = SelftestWish {
        gpus: wish.gpus,
        keep: wish.keep,
        timeout: Duration::from_secs(u64::from(wish.timeout)),
        tell: &tell,
    };
    let report = selftest(cx.agent, wish).await?;
    if screen.json {
        screen.print_json(&report)?;
    } else {
        screen.print(&render::selftest(&screen.out, report.passed, report.gpus.len(), &report.kept))?;
    }
    Ok(if report.passed { Exit::Done } else { Exit::Failed })
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    fn file(dir: &Path, text: &str) -> PathBuf {
        let path = dir.join("agent.toml");
        std::fs::write(&path, text).unwrap();
        path
    }

    #[test]
    fn broken_settings_are_a_finding_and_defaults_are_looked_at() {
        let dir = tempfile::tempdir().unwrap();
        let (settings, read) = settings(Some(&file(dir.path(), "vm_cpus = 3\n")), Vec::new()).unwrap();
        assert_eq!((settings.vm_cpus, read), (3, SettingsRead::Understood));
        for (text, told) in
            [("vm_cpu = 3\n", "vm_cpu"), ("accel = \"fast\"\n", "accel"), ("= =\n", "agent.toml")]
        {
            let (settings, read) = self::settings(Some(&file(dir.path(), text)), Vec::new()).unwrap();
            assert_eq!(settings.vm_cpus, 4, "{text}");
            assert!(matches!(&read, SettingsRead::Refused(why) if why.contains(told)), "{read:?}");
        }
        let (_, read) = self::settings(Some(&dir.path().join("none.toml")), Vec::new()).unwrap();
        assert!(matches!(&read, SettingsRead::Refused(why) if why.contains("none.toml")), "{read:?}");
    }

    #[test]
    fn a_look_leaves_the_settings_file_as_it_is() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let path = file(dir.path(), "");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        settings(Some(&path), Vec::new()).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o644);
    }

    #[test]
    fn warnings_fail_only_where_that_is_wanted() {
        let table = [
            (Verdict::Pass, true, Exit::Done),
            (Verdict::Warn, false, Exit::Done),
            (Verdict::Warn, true, Exit::Failed),
            (Verdict::Fail, false, Exit::Failed),
        ];
        for (worst, strict, exit) in table {
            assert_eq!(verdict(worst, strict), exit, "{worst:?} {strict}");
        }
    }
}
