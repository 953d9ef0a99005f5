//! What goes wrong on order: the file `<executable>.json`, read whenever it matters, so that a test can change its mind
//! while the program runs. Not the environment: the agent starts frpc with none. Called by everything here.

use std::{collections::BTreeMap, env, fs, io};

use qudata_testkit::frp::Version;
use serde::Deserialize;

use crate::config::Config;

/// What this program is like without faults.
const LIKE: Version = Version { major: 0, minor: 70, patch: 1 };

/// Whether there is a session with the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Session {
    #[default]
    Up,
    /// The server cannot be reached.
    Down,
    /// The server does not take the token.
    Refused,
}

impl Session {
    /// How frpc says it.
    pub(crate) fn words(self, config: &Config) -> String {
        match self {
            Self::Up => "connected".to_owned(),
            Self::Down => {
                format!("dial tcp {}:{}: connect: connection refused", config.server_addr, config.server_port)
            }
            Self::Refused => "token in login doesn't match token from configuration".to_owned(),
        }
    }
}

/// All faults; none by default.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Faults {
    /// The version it claims, with the features of that version alone.
    version: Option<String>,
    /// State of the session.
    pub(crate) session: Session,
    /// What the server says to a proxy instead of publishing it, by its name or its remote port.
    pub(crate) start_errors: BTreeMap<String, String>,
    /// TCP ports that the server allows, first and last; all without.
    pub(crate) allow: Option<(u16, u16)>,
    /// The server takes so long to publish a proxy.
    pub(crate) settle_ms: u64,
    /// A refused proxy is tried again after this time; like frpc without.
    pub(crate) retry_ms: Option<u64>,
    /// Every answer of the admin API comes so late.
    pub(crate) slow_ms: u64,
    /// The admin API takes no password.
    pub(crate) unauthorized: bool,
    /// The admin API does what it is told and closes the connection instead of answering.
    pub(crate) silent: bool,
    /// Ends at once after its start.
    pub(crate) crash_at_start: bool,
    /// Ends when a proxy is to be added or removed, with the change stored and not made.
    pub(crate) crash_on_change: bool,
}

impl Faults {
    /// The faults ordered now.
    pub(crate) fn read() -> Result<Self, String> {
        let program = env::current_exe().map_err(|e| format!("this program does not know its file: {e}"))?;
        let mut file = program.into_os_string();
        file.push(".json");
        match fs::read(&file) {
            Ok(bytes) => Self::parse(&bytes).map_err(|why| format!("{}: {why}", file.display())),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Self::default()),
            Err(e) => Err(format!("{}: {e}", file.display())),
        }
    }

    fn parse(bytes: &[u8]) -> Result<Self, String> {
        let faults: Self = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
        match faults.version.as_deref().map(Version::parse) {
            Some(None) => Err("version is none".to_owned()),
            Some(Some(_)) | None => Ok(faults),
        }
    }

    /// The version to claim.
    pub(crate) fn version(&self) -> Version {
        self.version.as_deref().and_then(Version::parse).unwrap_or(LIKE)
    }
}
