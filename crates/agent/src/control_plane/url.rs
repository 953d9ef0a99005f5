//! Where the control plane is. Owns the rule which addresses may be used: calls carry secrets, so they go over TLS, or stay
//! on this machine. Parsed by `settings`, used by `call`.

use std::{fmt, net::IpAddr, str::FromStr};

use axum::http::Uri;

/// The base address of the control plane: `https`, or `http` to a loopback address, for tests. It alone decides which
/// machine, port and path are called; nothing that a reply says does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceUrl {
    tls: bool,
    host: String,
    port: u16,
    base: String,
}

/// A text that is no address of a control plane.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "not an address for QUDATA_SERVICE_URL: write https://HOST/PATH, without user and query; \
     http is for loopback addresses only, because calls carry secrets"
)]
pub struct ServiceUrlError;

impl Default for ServiceUrl {
    /// The service of the original.
    fn default() -> Self {
        Self { tls: true, host: "internal.qudata.ai".into(), port: 443, base: "/v0".into() }
    }
}

impl ServiceUrl {
    /// Whether calls go over TLS. Those that do not may only go to loopback addresses.
    pub(super) fn is_tls(&self) -> bool {
        self.tls
    }

    /// Name or address of the machine; IPv6 without brackets.
    #[must_use]
    pub fn host(&self) -> &str {
        &self.host
    }

    /// Its TCP port.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The path of a call below the base.
    pub(super) fn path(&self, call: &str) -> String {
        format!("{}{call}", self.base)
    }

    /// For the `Host` header and for people.
    pub(super) fn authority(&self) -> String {
        let host = if self.host.contains(':') { format!("[{}]", self.host) } else { self.host.clone() };
        let default = if self.tls { 443 } else { 80 };
        if self.port == default { host } else { format!("{host}:{}", self.port) }
    }
}

impl FromStr for ServiceUrl {
    type Err = ServiceUrlError;

    fn from_str(text: &str) -> Result<Self, ServiceUrlError> {
        let uri: Uri = text.parse().map_err(|_| ServiceUrlError)?;
        let tls = match uri.scheme_str() {
            Some("https") => true,
            Some("http") => false,
            _ => return Err(ServiceUrlError),
        };
        let authority = uri.authority().ok_or(ServiceUrlError)?;
        let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_owned();
        let loopback = host == "localhost" || host.parse().is_ok_and(|address: IpAddr| address.is_loopback());
        let plain = !host.is_empty() && !authority.as_str().contains('@') && uri.query().is_none();
        // `host:` and `host:99999` parse as addresses without a port.
        let has_port =
            authority.as_str().rsplit_once(']').map_or(authority.as_str(), |(_, end)| end).contains(':');
        let port = match authority.port_u16() {
            Some(port) if port > 0 => port,
            None if !has_port => {
                if tls {
                    443
                } else {
                    80
                }
            }
            _ => return Err(ServiceUrlError),
        };
        let base = uri.path().trim_end_matches('/').to_owned();
        (plain && (tls || loopback)).then_some(Self { tls, host, port, base }).ok_or(ServiceUrlError)
    }
}

impl fmt::Display for ServiceUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.tls { "https" } else { "http" };
        write!(f, "{scheme}://{}{}", self.authority(), self.base)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn addresses_that_may_be_called() {
        for (text, authority, path) in [
            ("https://internal.qudata.ai/v0", "internal.qudata.ai", "/v0/init"),
            ("https://x.example/v0///", "x.example", "/v0/init"),
            ("https://x.example", "x.example", "/init"),
            ("https://x.example:8443/a/b", "x.example:8443", "/a/b/init"),
            ("https://[2001:db8::1]/v0", "[2001:db8::1]", "/v0/init"),
            ("https://[2001:db8::1]:8443", "[2001:db8::1]:8443", "/init"),
            ("http://127.0.0.1:8080/v0", "127.0.0.1:8080", "/v0/init"),
            ("http://127.8.9.1", "127.8.9.1", "/init"),
            ("http://localhost:1", "localhost:1", "/init"),
            ("http://[::1]:9000", "[::1]:9000", "/init"),
        ] {
            let url: ServiceUrl = text.parse().unwrap_or_else(|e| panic!("{text}: {e}"));
            assert_eq!((url.authority().as_str(), url.path("/init").as_str()), (authority, path), "{text}");
            assert_eq!(url.to_string().parse::<ServiceUrl>().unwrap(), url);
        }
    }

    #[test]
    fn addresses_that_may_not() {
        for text in [
            "",
            "internal.qudata.ai",
            "/v0",
            "ftp://x.example",
            "http://x.example/v0",
            "http://10.0.0.1",
            "http://0.0.0.0:80",
            "http://127.0.0.1.evil.example",
            "http://localhost.evil.example",
            "http://[::2]:80",
            "https://user:password@x.example",
            "http://127.0.0.1@evil.example",
            "https://x.example/?a=b",
            "https://x.example:0",
            "https://x.example:99999",
            "https://x.example:",
            "https:///v0",
            "https://x example",
            "https://x.example\r\nX: y",
        ] {
            assert_eq!(text.parse::<ServiceUrl>(), Err(ServiceUrlError), "{text}");
        }
        assert!(ServiceUrlError.to_string().contains("QUDATA_SERVICE_URL"));
    }

    proptest! {
        #[test]
        fn what_is_not_tls_stays_on_this_machine(text in "(http://)?[a-z0-9.:@\\[\\]/?#-]{0,40}") {
            if let Ok(url) = text.parse::<ServiceUrl>() {
                let address = url.host().parse::<IpAddr>();
                prop_assert!(url.is_tls() || url.host() == "localhost" || address.unwrap().is_loopback());
            }
        }
    }
}
