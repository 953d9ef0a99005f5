//! Gives and takes a renter's access to a running guest. The file is changed here, as data; the guest only runs two
//! constant commands, and content travels on stdin: nothing of a key is ever part of a command line.
//! Called by the instance's task for POST and DELETE of SSH keys.

use crate::{
    keys::{AuthorizedKeys, GuestKey},
    session::{ExecError, ExecOutput, Session},
};
use std::time::Duration;

/// Each of the two commands has this long.
const DEADLINE: Duration = Duration::from_secs(10);

/// Prints root's file; a missing one is an empty one.
const READ: &str = "/bin/sh -c 'f=/root/.ssh/authorized_keys; if [ -e $f ]; then exec cat $f; fi'";

/// Replaces root's file by what follows the first line of stdin, which states its size: a connection that breaks
/// half-way must not lock anybody out. Mode and owner stay.
const WRITE: &str = "/bin/sh -c 'set -eu; umask 077; d=/root/.ssh; f=$d/authorized_keys; read -r size; \
mkdir -p $d; t=$(mktemp $d/.authorized_keys.XXXXXXXX); trap \"rm -f $t\" EXIT; cat >$t; \
[ $(wc -c <$t) -eq $size ]; if [ -e $f ]; then chown --reference=$f $t; chmod --reference=$f $t; fi; \
sync $t; mv -f $t $f'";

/// A guest's authorised keys could not be changed.
#[derive(Debug, thiserror::Error)]
pub enum AuthorizeError {
    /// The management key was named; without it the guest could not be managed any more.
    #[error("this SSH key is the agent's management key; it cannot be removed")]
    ManagementKey,
    /// The file could not be read.
    #[error("cannot read the guest's authorized keys")]
    Read {
        /// Why.
        #[source]
        source: ExecError,
    },
    /// The file could not be written; it is as it was.
    #[error("cannot write the guest's authorized keys")]
    Write {
        /// Why.
        #[source]
        source: ExecError,
    },
    /// A command ran and failed.
    #[error("the guest failed to {attempt} its authorized keys (status {status}): {said}")]
    Failed {
        /// `read` or `write`.
        attempt: &'static str,
        /// Exit status.
        status: u32,
        /// The beginning of its complaint, made printable.
        said: String,
    },
}

/// Lets `key` in as root. Tells whether that changed anything.
///
/// # Errors
/// When the guest cannot be asked or fails.
pub async fn authorize(session: &Session, key: &GuestKey) -> Result<bool, AuthorizeError> {
    let mut file = read(session).await?;
    if !file.add(key) {
        return Ok(false);
    }
    write(session, &file).await.map(|()| true)
}

/// Ends the access of `key`. Tells whether that changed anything.
///
/// # Errors
/// When `key` is the `management` key, or the guest cannot be asked or fails.
pub async fn revoke(
    session: &Session,
    management: &GuestKey,
    key: &GuestKey,
) -> Result<bool, AuthorizeError> {
    if key == management {
        return Err(AuthorizeError::ManagementKey);
    }
    let mut file = read(session).await?;
    if !file.remove(key) {
        return Ok(false);
    }
    write(session, &file).await.map(|()| true)
}

async fn read(session: &Session) -> Result<AuthorizedKeys, AuthorizeError> {
    let output = session.exec(READ, &[], DEADLINE).await.map_err(|source| AuthorizeError::Read { source })?;
    succeeded("read", &output)?;
    Ok(AuthorizedKeys::parse(&output.stdout))
}

async fn write(session: &Session, file: &AuthorizedKeys) -> Result<(), AuthorizeError> {
    let content = file.render();
    let mut stdin = format!("{}\n", content.len()).into_bytes();
    stdin.extend(content);
    let output =
        session.exec(WRITE, &stdin, DEADLINE).await.map_err(|source| AuthorizeError::Write { source })?;
    succeeded("write", &output)
}

fn succeeded(attempt: &'static str, output: &ExecOutput) -> Result<(), AuthorizeError> {
    if output.status == 0 {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let said = said.chars().take(200).map(|c| if c.is_ascii_graphic() { c } else { ' ' }).collect();
    Err(AuthorizeError::Failed { attempt, status: output.status, said })
}

#[cfg(test)]
mod tests;
