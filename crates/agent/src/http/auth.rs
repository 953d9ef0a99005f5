//! Who may call. TCP callers present the secret; local ones are known by the credentials that the kernel vouches for.
//! Asked by `call` before anything else of a request is looked at.

use std::{ffi::CString, time::Duration};

use axum::http::HeaderMap;
use nix::unistd::{Group, Uid, User, getgrouplist};
use qudata_api::ErrorCode;
use tokio::{net::unix::UCred, time::timeout};

use crate::{refusal::Refusal, secret::CurrentSecret};

/// Members may use the local socket.
pub(super) const GROUP: &str = "qudata";
/// Header with the secret.
pub(super) const HEADER: &str = "x-agent-secret";
/// A user database that answers over a network can hang.
const DATABASE_DEADLINE: Duration = Duration::from_secs(2);

/// The other side of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Peer {
    /// Anybody who reached the TCP port.
    Tcp,
    /// A process of this host.
    Local {
        /// Whether it may call.
        allowed: bool,
    },
}

impl Peer {
    /// A word for the log.
    pub(super) fn kind(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Local { .. } => "local",
        }
    }

    /// The peer with these credentials.
    pub(super) async fn of(credentials: std::io::Result<UCred>) -> Self {
        let Ok(credentials) = credentials else { return Self::Local { allowed: false } };
        let (uid, gid) = (credentials.uid(), credentials.gid());
        // Whoever runs as the agent could read its secret just as well.
        if uid == 0 || uid == rustix::process::geteuid().as_raw() {
            return Self::Local { allowed: true };
        }
        let asked =
            timeout(DATABASE_DEADLINE, tokio::task::spawn_blocking(move || in_group(uid, gid, GROUP))).await;
        let allowed = matches!(asked, Ok(Ok(true)));
        if !allowed {
            tracing::warn!(uid, "a local user that is neither root nor in the group is refused");
        }
        Self::Local { allowed }
    }
}

/// Whether a user, with the group its process runs as, is in the group `name`.
fn in_group(uid: u32, gid: u32, name: &str) -> bool {
    let Ok(Some(group)) = Group::from_name(name) else { return false };
    if group.gid.as_raw() == gid {
        return true;
    }
    let Ok(Some(user)) = User::from_uid(Uid::from_raw(uid)) else { return false };
    let Ok(user_name) = CString::new(user.name) else { return false };
    getgrouplist(&user_name, user.gid).is_ok_and(|groups| groups.contains(&group.gid))
}

/// Lets a caller in or says why not.
///
/// # Errors
/// 401 without a secret, 403 with a wrong one or for a local user that is not allowed.
pub(super) fn admit(peer: Peer, headers: &HeaderMap, secret: &CurrentSecret) -> Result<(), Refusal> {
    match peer {
        Peer::Local { allowed: true } => return Ok(()),
        Peer::Local { allowed: false } => {
            let sentence = format!("only root and members of the group {GROUP} may use this socket");
            return Err(Refusal::new(ErrorCode::Forbidden, sentence));
        }
        Peer::Tcp => {}
    }
    let mut given = headers.get_all(HEADER).iter();
    match (given.next(), given.next()) {
        (Some(one), None) if secret.matches(one.as_bytes()) => Ok(()),
        (Some(_), _) => Err(Refusal::new(ErrorCode::Forbidden, "the secret in X-Agent-Secret is wrong")),
        (None, _) => Err(Refusal::new(
            ErrorCode::SecretMissing,
            "send the agent's secret in the header X-Agent-Secret",
        )),
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::watch;

    use super::*;
    use crate::secret::AgentSecret;

    #[test]
    fn a_replaced_secret_is_refused_from_that_moment_on() {
        let secret = |text| AgentSecret::parse(text).unwrap();
        let sender = watch::Sender::new(secret("old-secret-0123456789"));
        let current = CurrentSecret::from(sender.subscribe());
        let code = |text: &'static str| {
            let headers = HeaderMap::from_iter([(HEADER.parse().unwrap(), text.parse().unwrap())]);
            admit(Peer::Tcp, &headers, &current).map_err(|refusal| refusal.code)
        };
        assert_eq!(code("old-secret-0123456789"), Ok(()));
        sender.send_replace(secret("new-secret-0123456789"));
        assert_eq!(code("old-secret-0123456789"), Err(ErrorCode::Forbidden));
        assert_eq!(code("new-secret-0123456789"), Ok(()));
    }

    #[test]
    fn group_membership_is_looked_up() {
        // root, bin and nobody are on every Linux.
        assert!(in_group(65534, 0, "root"), "by the group of the process");
        assert!(in_group(0, 12345, "root"), "by the user database");
        assert!(!in_group(65534, 65534, "root"));
        assert!(!in_group(4_000_000_000, 65534, "root"), "a user nobody knows");
        assert!(!in_group(0, 0, "no-such-group"));
    }
}
