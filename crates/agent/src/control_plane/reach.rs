//! One question that changes nothing: is the control plane there, does it prove who it is, does it know a key? Called by
//! `doctor` and `install`, which ask before there is an agent.

use axum::http::Method;
use secrecy::SecretString;

use super::{
    call::{Call, CallError, CallLimits, Caller, Credential},
    dial::DialError,
    tls::{Trust, TrustError},
    url::ServiceUrl,
};

/// What it said. Whatever it was, it is there and has proven who it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// A 2xx status.
    Accepted,
    /// Another status.
    Refused(u16),
}

/// It did not answer.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct ReachError(CallError);

impl ReachError {
    /// This host is the reason: without certificate authorities nobody can prove anything to it.
    #[must_use]
    pub fn trusts_nobody(&self) -> bool {
        matches!(self.0, CallError::Dial(DialError::Trust(TrustError::NoAuthorities)))
    }

    /// Its name is not found.
    #[must_use]
    pub fn knows_no_name(&self) -> bool {
        matches!(self.0, CallError::Dial(DialError::Resolve { .. }))
    }
}

/// `GET /ping`, as the owner where a key is given, as nobody otherwise. Takes 10 seconds at most.
///
/// # Errors
/// When there is no answer in HTTP from who it should be.
pub async fn reach(url: &ServiceUrl, key: Option<SecretString>) -> Result<Answer, ReachError> {
    let credential = key.map_or(Credential::Nobody, Credential::ApiKey);
    let call = Call {
        method: Method::GET,
        path: "/ping",
        credential: &credential,
        body: Vec::new(),
        wants_reply: false,
    };
    let caller = Caller::new(url.clone(), Trust::system(), CallLimits::default());
    match caller.call(&call).await {
        Ok(_) => Ok(Answer::Accepted),
        Err(CallError::Status { status, .. }) => Ok(Answer::Refused(status)),
        Err(error) => Err(ReachError(error)),
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpListener,
    };

    use super::*;

    /// Asks a service that answers so; what it was asked.
    async fn asked(answer: &'static str, key: Option<&str>) -> (Result<Answer, ReachError>, String) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/v0", listener.local_addr().unwrap()).parse().unwrap();
        let service = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut head = vec![0; 4096];
            let length = stream.read(&mut head).await.unwrap();
            stream.write_all(answer.as_bytes()).await.unwrap();
            String::from_utf8_lossy(&head[..length]).into_owned()
        });
        let said = reach(&url, key.map(SecretString::from)).await;
        (said, service.await.unwrap())
    }

    #[tokio::test]
    async fn every_answer_is_one_and_only_a_key_that_was_given_is_shown() {
        let (said, head) = asked("HTTP/1.1 204 No Content\r\n\r\n", Some("ak-canary")).await;
        assert_eq!(said.unwrap(), Answer::Accepted);
        assert!(
            head.starts_with("GET /v0/ping HTTP/1.1\r\n") && head.contains("x-api-key: ak-canary\r\n"),
            "{head}"
        );
        let (said, head) = asked("HTTP/1.1 401 Unauthorized\r\ncontent-length: 0\r\n\r\n", None).await;
        assert_eq!(said.unwrap(), Answer::Refused(401));
        assert!(!head.contains("x-api-key") && !head.contains("x-agent-secret"), "{head}");
        let (said, _) = asked("SSH-2.0-OpenSSH_9.2\r\n", None).await;
        let error = said.unwrap_err();
        assert!(error.to_string().contains("did not answer in HTTP"), "{error}");
        assert!(!error.trusts_nobody() && !error.knows_no_name(), "{error}");
    }

    #[tokio::test]
    async fn what_this_host_lacks_is_told_apart() {
        let blind = ReachError(CallError::Dial(DialError::Trust(TrustError::NoAuthorities)));
        assert!(blind.trusts_nobody() && !blind.knows_no_name());
        let nowhere = reach(&"https://nowhere.invalid/v0".parse().unwrap(), None).await.unwrap_err();
        assert!(nowhere.knows_no_name() && !nowhere.trusts_nobody(), "{nowhere:?}");
    }
}
