//! What this host is to the control plane, as it is kept on disk: its id, the secret it was given, the token of its tunnel.
//! Decides at start whether there is a control plane at all; `daemon` asks, `keeper` saves what the service gives.
//!
//! ```text
//! <data>/agent_id       made once, when a control plane is first wanted
//! <data>/agent_secret   what callers present; given by the control plane, or made here where there is none
//! <data>/tunnel_token   given by the control plane
//! ```
//! A host with the first two was registered before. The files are those of the original: its registrations go on.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use qudata_host::durable::{self, DurableError};
use uuid::Uuid;

use crate::{
    instance::{record::Sealed, spec::check_tunnel_token},
    secret::{AgentSecret, SecretError},
    settings::{Settings, TunnelKind},
};

/// What is kept of the control plane cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RegistrationError {
    /// A file is there and cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The file with the id holds something else.
    #[error(
        "{} is damaged: it holds no agent id (a UUID); put back a copy, or remove the file, and the control plane takes \
         this machine for a new host",
        path.display()
    )]
    AgentId {
        /// The file.
        path: PathBuf,
    },
    /// The file with the token holds something else.
    #[error("{} is damaged: it holds no tunnel token; remove the file, and the control plane gives a new one", path.display())]
    TunnelToken {
        /// The file.
        path: PathBuf,
    },
    /// The secret cannot be read or kept.
    #[error("the secret of this agent cannot be used")]
    Secret(#[source] SecretError),
    /// A file cannot be written.
    #[error("cannot keep what the control plane gave")]
    Write(#[source] DurableError),
    /// frp is wanted, and nothing says who this host belongs to.
    #[error(
        "QUDATA_TUNNEL=frp (the default) needs a control plane, and this host was never registered: set QUDATA_API_KEY, \
         or start with --standalone, or set QUDATA_TUNNEL=none"
    )]
    NoKey,
}

/// A host's place with the control plane.
#[derive(Debug, Clone)]
pub struct Registration {
    /// Id of this agent, the same for ever.
    pub agent_id: Uuid,
    /// What the control plane gave last; none before the first registration.
    pub secret: Option<AgentSecret>,
    /// Name of the agent's virtual host at the tunnel server; none before the first registration.
    pub tunnel_token: Option<Sealed>,
}

/// Whether there is a control plane.
#[derive(Debug)]
pub enum Membership {
    /// There is none: callers present the secret made here.
    Local(AgentSecret),
    /// There is one.
    Member {
        /// What it knows this host by.
        registration: Registration,
        /// What callers present until it gives another.
        secret: AgentSecret,
    },
}

impl Membership {
    /// Whether there is a control plane: there is one for a host that has an API key or was registered before, unless it
    /// is standalone. How ports are published (`QUDATA_TUNNEL`) does not matter for that; but frp without a control plane
    /// is refused. A host without any has a secret of its own, as when it is standalone.
    ///
    /// # Errors
    /// When what was kept cannot be read or is damaged, or frp is wanted without key and registration.
    pub fn decide(settings: &Settings) -> Result<Self, RegistrationError> {
        let data = &settings.data_dir;
        let local = || AgentSecret::load_or_create(&secret_file(data)).map_err(RegistrationError::Secret);
        if settings.standalone {
            return local().map(Self::Local);
        }
        match (Registration::load(data)?, &settings.api_key) {
            (Some(registration), _) => {
                let secret = registration.secret.clone().unwrap_or_else(AgentSecret::random);
                Ok(Self::Member { registration, secret })
            }
            (None, Some(_)) => Self::begin(data),
            (None, None) if settings.tunnel == TunnelKind::Frp => Err(RegistrationError::NoKey),
            (None, None) => local().map(Self::Local),
        }
    }

    /// A host that registers for the first time. A secret from its time without a control plane goes before there is an
    /// id: it is none of the service's, and must never be taken for one that it gave. Until it gives one, a secret that
    /// nobody knows keeps TCP callers out.
    fn begin(data: &Path) -> Result<Self, RegistrationError> {
        durable::remove_file(&secret_file(data)).map_err(RegistrationError::Write)?;
        let agent_id = match load_id(data)? {
            Some(id) => id,
            None => {
                let id = Uuid::new_v4();
                durable::replace(&data.join("agent_id"), id.to_string().as_bytes(), 0o600)
                    .map_err(RegistrationError::Write)?;
                id
            }
        };
        let registration = Registration { agent_id, secret: None, tunnel_token: None };
        Ok(Self::Member { registration, secret: AgentSecret::random() })
    }

    /// What callers present first.
    pub fn secret(&self) -> &AgentSecret {
        match self {
            Self::Local(secret) | Self::Member { secret, .. } => secret,
        }
    }
}

impl Registration {
    /// What an earlier agent was given; none when it was not registered.
    fn load(data: &Path) -> Result<Option<Self>, RegistrationError> {
        let Some(agent_id) = load_id(data)? else { return Ok(None) };
        let Some(secret) = AgentSecret::load(&secret_file(data)).map_err(RegistrationError::Secret)? else {
            return Ok(None);
        };
        let path = token_file(data);
        let tunnel_token = match read_line(&path)?.as_deref() {
            None | Some("") => None,
            Some(text) => Some(check_tunnel_token(text).ok_or(RegistrationError::TunnelToken { path })?),
        };
        Ok(Some(Self { agent_id, secret: Some(secret), tunnel_token }))
    }
}

/// Keeps what the control plane gave, each file whole or as it was. The secret comes last: it is what makes a registration.
pub(super) fn save(
    data: &Path,
    secret: Option<&AgentSecret>,
    token: Option<&Sealed>,
) -> Result<(), RegistrationError> {
    if let Some(token) = token {
        durable::replace(&token_file(data), token.open().as_bytes(), 0o600)
            .map_err(RegistrationError::Write)?;
    }
    match secret {
        Some(secret) => secret.save(&secret_file(data)).map_err(RegistrationError::Secret),
        None => Ok(()),
    }
}

fn secret_file(data: &Path) -> PathBuf {
    data.join("agent_secret")
}

fn token_file(data: &Path) -> PathBuf {
    data.join("tunnel_token")
}

fn load_id(data: &Path) -> Result<Option<Uuid>, RegistrationError> {
    let path = data.join("agent_id");
    let Some(text) = read_line(&path)? else { return Ok(None) };
    let id = text.parse().ok().filter(|id: &Uuid| !id.is_nil());
    id.map(Some).ok_or(RegistrationError::AgentId { path })
}

/// The content of a small text file; none when it is absent. What is no text is nothing that was kept here.
fn read_line(path: &Path) -> Result<Option<String>, RegistrationError> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(String::from_utf8_lossy(&bytes).trim_end().to_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(RegistrationError::Read { path: path.to_owned(), source }),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::settings::LoadFrom;

    fn settings(data: &Path, given: &[(&str, &str)]) -> Settings {
        let mut env = vec![("QUDATA_DATA_DIR".into(), data.into())];
        env.extend(given.iter().map(|(name, value)| (name.into(), value.into())));
        let (read, exists) = (&|_: &Path| Err(io::ErrorKind::NotFound.into()), &|_: &Path| false);
        Settings::load(&LoadFrom { file: None, env, flags: Vec::new(), read, exists }).unwrap()
    }

    const KEY: (&str, &str) = ("QUDATA_API_KEY", "ak-1");
    const NO_TUNNEL: (&str, &str) = ("QUDATA_TUNNEL", "none");

    #[test]
    fn a_host_without_key_and_registration_is_its_own_unless_it_wants_a_tunnel() {
        let dir = tempfile::tempdir().unwrap();
        for given in [&[("QUDATA_STANDALONE", "true"), KEY][..], &[NO_TUNNEL]] {
            let membership = Membership::decide(&settings(dir.path(), given)).unwrap();
            assert!(matches!(membership, Membership::Local(_)), "{given:?}");
            let kept = fs::read(dir.path().join("agent_secret")).unwrap();
            assert!(membership.secret().matches(&kept));
        }
        let said = Membership::decide(&settings(dir.path(), &[])).unwrap_err().to_string();
        assert!(said.contains("QUDATA_API_KEY") && said.contains("--standalone"), "{said}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "no id without a control plane");
    }

    #[test]
    fn an_id_is_made_once() {
        let dir = tempfile::tempdir().unwrap();
        let id = || match Membership::decide(&settings(dir.path(), &[KEY, NO_TUNNEL])).unwrap() {
            Membership::Member { registration, .. } => registration.agent_id,
            Membership::Local(_) => panic!("a key means a control plane"),
        };
        let first = id();
        assert_eq!(first.get_version_num(), 4);
        assert_eq!(id(), first);
        let path = dir.path().join("agent_id");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(!dir.path().join("agent_secret").exists(), "nothing is registered yet");
        for damaged in ["", "canary", "00000000-0000-0000-0000-000000000000", "\u{0}"] {
            fs::write(&path, damaged).unwrap();
            let error = Membership::decide(&settings(dir.path(), &[KEY])).unwrap_err();
            assert!(matches!(error, RegistrationError::AgentId { .. }), "{error:?}");
            assert!(error.to_string().contains("remove the file"), "{error}");
            assert_eq!(fs::read(&path).unwrap(), damaged.as_bytes(), "a damaged file is left alone");
        }
    }

    #[test]
    fn a_registration_of_the_original_goes_on_without_a_key() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("agent_id"), "7c0a3b9e-3c38-4b0f-8a6e-111111111111\n").unwrap();
        fs::write(dir.path().join("agent_secret"), "sk-0123456789abcdef\n").unwrap();
        let Membership::Member { registration, secret } =
            Membership::decide(&settings(dir.path(), &[])).unwrap()
        else {
            panic!("it was registered");
        };
        assert_eq!(registration.agent_id.to_string(), "7c0a3b9e-3c38-4b0f-8a6e-111111111111");
        assert!(secret.matches(b"sk-0123456789abcdef") && registration.tunnel_token.is_none());
    }

    #[test]
    fn what_was_given_is_found_again_and_private() {
        let dir = tempfile::tempdir().unwrap();
        let settings = settings(dir.path(), &[KEY]);
        let Membership::Member { registration, secret } = Membership::decide(&settings).unwrap() else {
            panic!("a key means a control plane");
        };
        assert!(registration.secret.is_none());
        let given = AgentSecret::parse("sk-0123456789abcdef").unwrap();
        save(dir.path(), Some(&given), Some(&Sealed::new("abc"))).unwrap();
        let Membership::Member { registration: found, secret: now } = Membership::decide(&settings).unwrap()
        else {
            panic!("it is registered");
        };
        assert_eq!(found.agent_id, registration.agent_id);
        assert!(now.matches(b"sk-0123456789abcdef") && !now.matches(secret.expose().as_bytes()));
        assert_eq!(found.tunnel_token.unwrap().open(), "abc");
        for file in ["agent_secret", "tunnel_token"] {
            let mode = fs::metadata(dir.path().join(file)).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{file}");
        }
        fs::write(dir.path().join("tunnel_token"), "a\"b").unwrap();
        let error = Membership::decide(&settings).unwrap_err();
        assert!(error.to_string().contains("remove the file"), "{error}");
    }

    #[test]
    fn a_secret_from_the_time_alone_is_none_of_the_services() {
        let dir = tempfile::tempdir().unwrap();
        let alone = Membership::decide(&settings(dir.path(), &[("QUDATA_STANDALONE", "1")])).unwrap();
        // The service is down when the owner gives the key, and the agent is started once more.
        for _ in 0..2 {
            let Membership::Member { registration, secret } =
                Membership::decide(&settings(dir.path(), &[KEY])).unwrap()
            else {
                panic!("a key means a control plane");
            };
            assert!(registration.secret.is_none(), "it must not be sent");
            assert!(!secret.matches(alone.secret().expose().as_bytes()));
        }
    }

    #[test]
    fn what_cannot_be_written_is_said_and_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent_secret");
        fs::create_dir(&path).unwrap();
        let error = save(dir.path(), Some(&AgentSecret::random()), None).unwrap_err();
        assert!(matches!(error, RegistrationError::Secret(_)), "{error:?}");
        assert!(path.is_dir());
    }
}
