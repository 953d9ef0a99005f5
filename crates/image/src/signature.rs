//! The signature of a checksum file, judged by the distribution's own tool: gpgv, or sqv where that has taken its place.
//! Called by `obtain`.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use qudata_host::command::{Tool, ToolError};

const DEADLINE: Duration = Duration::from_secs(30);

/// A checksum file that nothing can be believed of.
#[derive(Debug, thiserror::Error)]
pub enum SignatureError {
    /// The keys are not here.
    #[error(
        "there is no keyring {}: install the package that has the publisher's keys (for Ubuntu's images ubuntu-keyring or \
         ubuntu-cloudimage-keyring), or name one with --keyring",
        keyring.display()
    )]
    NoKeyring {
        /// What was looked for.
        keyring: PathBuf,
    },
    /// No tool can check it.
    #[error("neither gpgv nor sqv can be started: install the package gpgv")]
    NoTool(#[source] ToolError),
    /// The signature does not fit.
    #[error(
        "the signature of {} is not good by the keys of {}: {said}; somebody may have changed it, do not use it",
        list.display(), keyring.display()
    )]
    Bad {
        /// The checksum file.
        list: PathBuf,
        /// The keys.
        keyring: PathBuf,
        /// The end of what the tool said.
        said: String,
    },
    /// The tool did not come to a verdict.
    #[error("the signature of {} could not be checked", list.display())]
    Tool {
        /// The checksum file.
        list: PathBuf,
        /// Why.
        #[source]
        source: ToolError,
    },
}

/// Passes when `signature` is a good signature of `list` by a key of `keyring`.
pub(crate) async fn check(list: &Path, signature: &Path, keyring: &Path) -> Result<(), SignatureError> {
    if !keyring.is_file() {
        return Err(SignatureError::NoKeyring { keyring: keyring.to_owned() });
    }
    let run = |tool: &str| {
        Tool::new(tool).arg("--keyring").arg(keyring).arg(signature).arg(list).deadline(DEADLINE).run()
    };
    let mut verdict = run("gpgv").await;
    if matches!(verdict, Err(ToolError::Start { .. })) {
        verdict = run("sqv").await;
    }
    match verdict {
        Ok(_) => Ok(()),
        Err(error @ ToolError::Start { .. }) => Err(SignatureError::NoTool(error)),
        Err(ToolError::Failed { stderr, .. }) => Err(SignatureError::Bad {
            list: list.to_owned(),
            keyring: keyring.to_owned(),
            said: stderr.lines().rev().take(2).collect::<Vec<_>>().join("; "),
        }),
        Err(source) => Err(SignatureError::Tool { list: list.to_owned(), source }),
    }
}
