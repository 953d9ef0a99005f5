//! One published port in the words of frp, and why frps may not take it. Values are checked where they are made, so that
//! nothing unchecked reaches a configuration.

use std::{fmt, str::FromStr};

/// The longest name and the longest domain.
const NAME_MAX: usize = 128;
const DOMAIN_MAX: usize = 200;
/// What an error shows of a refused value.
const SHOWN: usize = 40;

/// A value that frp would not take.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{shown} cannot be {what}: it takes 1 to {max} letters, digits, dots, dashes and underscores{further}"
)]
pub struct NameError {
    shown: String,
    what: &'static str,
    max: usize,
    further: &'static str,
}

/// The name of a route, unique within one tunnel; frps sees it behind the tunnel's user and a dot.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ProxyName(String);

impl ProxyName {
    /// The name as frp knows it.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<&str> for ProxyName {
    type Error = NameError;

    fn try_from(text: &str) -> Result<Self, NameError> {
        if is_plain(text, NAME_MAX) {
            return Ok(Self(text.to_owned()));
        }
        Err(NameError { shown: shorten(text), what: "the name of a route", max: NAME_MAX, further: "" })
    }
}

impl FromStr for ProxyName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        Self::try_from(text)
    }
}

impl fmt::Display for ProxyName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A host name by which frps recognises the HTTP requests of a route.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Domain(String);

impl Domain {
    /// The domain as it stands in a `Host` header.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Domain {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let edge = |c: char| c == '.' || c == '-';
        if is_plain(text, DOMAIN_MAX) && !text.starts_with(edge) && !text.ends_with(edge) {
            return Ok(Self(text.to_owned()));
        }
        let further = ", with neither a dot nor a dash at its ends";
        Err(NameError { shown: shorten(text), what: "a domain of the tunnel", max: DOMAIN_MAX, further })
    }
}

impl fmt::Display for Domain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

pub(crate) fn is_plain(text: &str, max: usize) -> bool {
    let letter = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    (1..=max).contains(&text.len()) && text.chars().all(letter)
}

/// Printable and short, whatever it was.
fn shorten(text: &str) -> String {
    let mut shown: String = text.chars().take(SHOWN).collect();
    if shown.len() < text.len() {
        shown.push('…');
    }
    format!("{shown:?}")
}

/// How the world reaches a route.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RouteKind {
    /// By a TCP port of frps.
    Tcp {
        /// The port.
        remote_port: u16,
    },
    /// By the HTTP port of frps, with this `Host`.
    Http {
        /// The host name.
        domain: Domain,
    },
}

/// One published port. The local side is always 127.0.0.1.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// Its name.
    pub name: ProxyName,
    /// How the world reaches it.
    pub kind: RouteKind,
    /// Where it ends on this host.
    pub local_port: u16,
}

/// Why frps does not take a route.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// There is a route of this name and user already: an earlier session of this very tunnel that frps still believes
    /// alive, which ends by itself, or a second host with this agent's id. frps looks at the name first, so the reasons
    /// below are never our own doing.
    NameTaken,
    /// Somebody else has the port.
    PortTaken,
    /// frps gives out no such port.
    PortNotAllowed,
    /// Somebody else has the domain.
    DomainTaken,
    /// Something else; the words tell.
    Other,
}

impl Refusal {
    /// The reason behind frps' words (server/ports, server/control, pkg/util/vhost of frp 0.70).
    pub(crate) fn from_words(words: &str) -> Self {
        let any = |parts: &[&str]| parts.iter().any(|part| words.contains(part));
        if any(&["port already used", "port unavailable"]) {
            Self::PortTaken
        } else if any(&["port not allowed"]) {
            Self::PortNotAllowed
        } else if any(&["already exists", "already in use"]) {
            Self::NameTaken
        } else if any(&["router config conflict"]) {
            Self::DomainTaken
        } else {
            Self::Other
        }
    }

    /// Whether it ends by itself when somebody else lets go.
    pub(crate) fn is_taken(self) -> bool {
        match self {
            Self::PortTaken | Self::NameTaken | Self::DomainTaken => true,
            Self::PortNotAllowed | Self::Other => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_domains_hold_nothing_that_means_something_elsewhere() {
        for good in ["a", "vm-0192.ssh_22", &"x".repeat(128)] {
            assert_eq!(ProxyName::try_from(good).unwrap().to_string(), good);
        }
        for bad in ["", "a b", "ü", "a\nb", "{{x}}", "a/b", "a\"", &"x".repeat(129)] {
            assert!(ProxyName::try_from(bad).is_err(), "{bad:?}");
        }
        for good in ["tok.ru1.qudata.ai", "t0k-8080", &"x".repeat(200)] {
            assert_eq!(good.parse::<Domain>().unwrap().as_str(), good);
        }
        for bad in ["", ".a", "a.", "-a", "a-", "a:80", "*", "a\"\n[[proxies]]", &"x".repeat(201)] {
            assert!(bad.parse::<Domain>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_refused_value_is_shown_short_and_printable() {
        let long = format!("tok\"en\n{}", "x".repeat(10_000));
        let sentence = long.parse::<Domain>().unwrap_err().to_string();
        assert!(sentence.len() < 250 && !sentence.contains('\n'), "{sentence}");
        assert!(sentence.contains("1 to 200 letters"), "{sentence}");
    }

    #[test]
    fn frps_words_become_reasons() {
        let table = [
            ("port already used", Refusal::PortTaken),
            ("port unavailable", Refusal::PortTaken),
            ("port not allowed", Refusal::PortNotAllowed),
            ("proxy [u.n] already exists", Refusal::NameTaken),
            ("proxy name [u.n] is already in use", Refusal::NameTaken),
            ("router config conflict", Refusal::DomainTaken),
            ("exceed the max_ports_per_client", Refusal::Other),
        ];
        for (words, reason) in table {
            assert_eq!(Refusal::from_words(words), reason, "{words}");
        }
    }
}
