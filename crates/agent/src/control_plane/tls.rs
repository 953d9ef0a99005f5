//! Whom the control plane's client trusts: the certificate authorities of the system, read when the first call needs them.
//! Part of `call`.

use std::sync::Arc;

use tokio::sync::OnceCell;
use tokio_rustls::rustls::{self, ClientConfig, RootCertStore, crypto::aws_lc_rs};

/// TLS cannot be set up.
#[derive(Debug, thiserror::Error)]
pub(super) enum TrustError {
    /// There are no certificate authorities.
    #[error("this host has no certificate authorities: install the package ca-certificates")]
    NoAuthorities,
    /// The TLS library refused its configuration.
    #[error("TLS cannot be set up")]
    Tls(#[source] rustls::Error),
    /// Reading them ended unexpectedly.
    #[error("the certificate authorities cannot be read")]
    Read(#[source] tokio::task::JoinError),
}

/// The TLS configuration, made once it is needed; a failure is tried again by the next call.
#[derive(Debug, Clone)]
pub(super) struct Trust(Arc<OnceCell<Arc<ClientConfig>>>);

impl Trust {
    /// The authorities that this system trusts.
    pub(super) fn system() -> Self {
        Self(Arc::default())
    }

    /// These authorities.
    #[cfg(test)]
    pub(super) fn only(roots: RootCertStore) -> Self {
        Self(Arc::new(OnceCell::new_with(Some(config(roots).unwrap()))))
    }

    pub(super) async fn config(&self) -> Result<Arc<ClientConfig>, TrustError> {
        let made = self.0.get_or_try_init(|| async {
            // A hundred files: not on a thread that serves tenants.
            tokio::task::spawn_blocking(|| config(system_roots()?)).await.map_err(TrustError::Read)?
        });
        made.await.cloned()
    }
}

fn system_roots() -> Result<RootCertStore, TrustError> {
    let found = rustls_native_certs::load_native_certs();
    for error in &found.errors {
        tracing::warn!(%error, "a certificate authority of this host cannot be read");
    }
    let mut roots = RootCertStore::empty();
    let (taken, _odd) = roots.add_parsable_certificates(found.certs);
    if taken == 0 { Err(TrustError::NoAuthorities) } else { Ok(roots) }
}

fn config(roots: RootCertStore) -> Result<Arc<ClientConfig>, TrustError> {
    let config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(TrustError::Tls)?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(Arc::new(config))
}
