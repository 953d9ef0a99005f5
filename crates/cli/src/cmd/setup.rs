//! `install` and `uninstall`: turns words into a wish, finds the key, and says how it ended. The work is `qudata-setup`'s.

mod host;
mod terminal;

use std::path::Path;

use qudata_setup::{
    SecretString,
    error::{Code, SetupError},
    files::{Files, Open},
    hands::SystemHands,
    install::{self, Job, Outcome},
    outside::Means,
    text,
    uninstall::{self, Removal},
    wish::Wish,
};
use tokio::runtime::Handle;

use self::{host::Host, terminal::Terminal};
use super::Context;
use crate::{
    args::setup::{Install, Iommu, Uninstall},
    client::Agent,
    exit::{Exit, Failure},
    screen::Screen,
};

/// Where a key may be given without anybody seeing it.
const KEY: &str = "QUDATA_API_KEY";
/// Of a key file, so much is read.
const LONGEST_KEY: usize = 512;

pub(super) async fn install(cx: Context<'_>, wish: Install) -> Result<Exit, Failure> {
    let key = key(wish.api_key_file.as_deref(), std::env::var(KEY).ok())?;
    let plan_only = wish.plan;
    let wish = (!wish.go_on).then(|| asked(wish)).transpose()?;
    off_the_runtime(cx, move |means, screen| {
        let secret: Option<SecretString> = key.map(Into::into);
        let job = Job { wish, key: secret.as_ref(), root: is_root() };
        if plan_only {
            let (observed, plan) = install::look(means, &job).map_err(told)?;
            screen.print(&text::describe(&observed, &plan))?;
            return Ok(Exit::Done);
        }
        match install::install(means, &job).map_err(told)? {
            Outcome::Ready { .. } | Outcome::Rebooting => Ok(Exit::Done),
        }
    })
    .await
}

pub(super) async fn uninstall(cx: Context<'_>, wish: Uninstall) -> Result<Exit, Failure> {
    let removal = Removal { purge: wish.purge, yes: wish.yes, root: is_root() };
    off_the_runtime(cx, move |means, screen| {
        if wish.plan {
            screen.print(&uninstall::describe(means, removal).map_err(told)?)?;
            return Ok(Exit::Done);
        }
        for line in uninstall::uninstall(means, removal).map_err(told)? {
            screen.print(&format!("{line}\n"))?;
        }
        Ok(Exit::Done)
    })
    .await
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// The work waits for commands; what it asks of the agent runs on the runtime meanwhile.
async fn off_the_runtime(
    cx: Context<'_>,
    work: impl FnOnce(Means<'_>, &Screen) -> Result<Exit, Failure> + Send + 'static,
) -> Result<Exit, Failure> {
    let (agent, screen, handle): (Agent, Screen, Handle) =
        (cx.agent.clone(), cx.screen.clone(), Handle::current());
    let done = tokio::task::spawn_blocking(move || {
        let files = Files::below("/", Box::new(Open));
        let outside = Host::new(agent, handle.clone());
        let person = Terminal::new(screen.clone(), handle);
        work(Means { files: &files, hands: &SystemHands, outside: &outside, person: &person }, &screen)
    });
    done.await.map_err(anyhow::Error::new)?
}

fn asked(wish: Install) -> Result<Wish, Failure> {
    let absolute = |path: &Path| {
        std::path::absolute(path).map_err(|e| Failure::new(Exit::Usage, format!("{}: {e}", path.display())))
    };
    let mut settings = wish.settings;
    settings.extend(wish.service_url.map(|url| ("service_url".to_owned(), url)));
    let image = match wish.image {
        // A name or an address stays as it is.
        Some(image) if image.contains('/') && !image.contains("://") => {
            Some(absolute(Path::new(&image))?.display().to_string())
        }
        other => other,
    };
    Ok(Wish {
        package: wish.package.as_deref().map(absolute).transpose()?,
        gpus: wish.gpus.unwrap_or_default(),
        reboot: wish.reboot.into(),
        iommu_on: wish.iommu == Iommu::On,
        yes: wish.yes,
        image,
        image_options: wish.image_options,
        standalone: wish.standalone,
        settings,
        skip_selftest: wish.skip_selftest,
        offline: wish.offline,
    })
}

/// The key from a file or from the environment. No part of it is ever shown.
fn key(file: Option<&Path>, env: Option<String>) -> Result<Option<String>, Failure> {
    let refuse = |place: &str, why: &str| {
        let what = format!("{place} {why}");
        told(SetupError::new(Code::BadKey, what, "A key is one line that starts with ak-."))
    };
    let (place, text) = match (file, env.filter(|text| !text.is_empty())) {
        (Some(path), _) => {
            let place = path.display().to_string();
            let text =
                std::fs::read_to_string(path).map_err(|e| refuse(&place, &format!("cannot be read: {e}")))?;
            (place, text)
        }
        (None, Some(text)) => (format!("${KEY}"), text),
        (None, None) => return Ok(None),
    };
    let text = text.trim();
    let plain = text.bytes().all(|byte| byte.is_ascii_graphic());
    if plain && text.starts_with("ak-") && (4..=LONGEST_KEY).contains(&text.len()) {
        return Ok(Some(text.to_owned()));
    }
    Err(refuse(&place, "holds no API key"))
}

/// `error: [code] what is wrong: why. What to do. Next: the command`.
fn told(error: SetupError) -> Failure {
    let exit = match error.code {
        Code::Busy | Code::InstancesExist | Code::RebootNeeded => Exit::Refused,
        Code::BadSettings => Exit::Usage,
        _ => Exit::Failed,
    };
    let next = text::next_command(&error, &Files::below("/", Box::new(Open)));
    let sentence = format!("{error}{}. {}\nNext: {next}", error.causes(), error.remedy);
    Failure::new(exit, sentence)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_taken_from_a_file_or_the_environment_and_never_shown() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("key");
        std::fs::write(&file, "ak-file\n").unwrap();
        assert_eq!(key(Some(&file), Some("ak-env".into())).unwrap().unwrap(), "ak-file");
        assert_eq!(key(None, Some("ak-env".into())).unwrap().unwrap(), "ak-env");
        assert_eq!(key(None, Some(String::new())).unwrap(), None);
        for bad in ["canary", "ak-", "ak-canary two", "ak-canary\u{e9}"] {
            let failure = key(None, Some(bad.into())).unwrap_err();
            assert!(
                failure.sentence.starts_with("[bad_key] ") && !failure.sentence.contains("canary"),
                "{failure}"
            );
        }
        assert!(key(Some(Path::new("/no/such")), None).unwrap_err().sentence.contains("/no/such"));
    }

    #[test]
    fn failures_have_code_cause_remedy_and_next_command() {
        let error = SetupError::new(Code::HostFault, "cannot write /etc/x", "Make room.")
            .because(std::io::Error::other("no space"))
            .next("df -h /etc");
        assert_eq!(
            told(error).sentence,
            "[host_fault] cannot write /etc/x: no space. Make room.\nNext: df -h /etc"
        );
    }
}
