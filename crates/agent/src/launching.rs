//! Which launcher this agent uses: systemd or its own. Decided once at start, by `daemon`.

use std::{ffi::OsString, path::PathBuf};

use jiff::Timestamp;
use qudata_api::Problem;
use qudata_host::causes::chain;
use qudata_host::launch::{Launcher, SystemdError};

use crate::settings::LauncherKind;

/// The launcher the owner wants, and what is to be said about it. `shim` with `shim_args` is the agent's own start shim.
///
/// # Errors
/// When systemd was asked for by name and cannot be used.
pub async fn choose_launcher(
    wish: LauncherKind,
    shim: PathBuf,
    shim_args: Vec<OsString>,
) -> Result<(Launcher, Option<Problem>), SystemdError> {
    let (launcher, fallback) = match wish {
        LauncherKind::Systemd => (Launcher::systemd().await?, None),
        LauncherKind::Detached => (Launcher::detached(shim, shim_args), None),
        LauncherKind::Auto => Launcher::detect(shim, shim_args).await,
    };
    let confined = launcher.confines();
    tracing::info!(%wish, confined, reason = fallback.as_ref().map(|e| chain(e)), "VMs run as units of systemd if confined");
    Ok((launcher, fallback.and_then(worth_telling)))
}

/// A host without systemd is as its owner wants it; one whose systemd cannot be used is not.
fn worth_telling(error: SystemdError) -> Option<Problem> {
    if matches!(error, SystemdError::NotBooted) {
        return None;
    }
    Some(Problem {
        code: "unconfined".to_owned(),
        message: format!("VMs run without the confinement of systemd: {}", chain(&error)),
        remedy:
            "do what the message says and restart the agent; QUDATA_LAUNCHER=detached accepts it as it is"
                .to_owned(),
        since: Timestamp::now(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_systemd_that_could_be_used_is_a_problem() {
        assert!(worth_telling(SystemdError::NotBooted).is_none());
        let problem = worth_telling(SystemdError::Users).unwrap();
        assert!(problem.message.contains("libnss-systemd"), "{}", problem.message);
    }

    #[tokio::test]
    async fn the_owner_may_do_without() {
        let chosen = choose_launcher(LauncherKind::Detached, "/bin/true".into(), Vec::new()).await;
        let (launcher, problem) = chosen.unwrap();
        assert!(!launcher.confines() && problem.is_none());
    }
}
