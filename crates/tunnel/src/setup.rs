//! What a tunnel is made of: frpc, where its files are, as whom it runs, which frps it joins. Given once, at the start.

use std::path::{Path, PathBuf};

use qudata_host::launch::Launcher;
use secrecy::SecretString;

/// The frps to join.
#[derive(Debug, Clone)]
pub struct Server {
    /// Host name or address.
    pub host: String,
    /// Port for clients.
    pub port: u16,
    /// The token frps asks for; none for an open frps.
    pub token: Option<SecretString>,
    /// Certificates (PEM) that the certificate of frps must go back to, readable by frpc's user. Without, the connection
    /// is encrypted and nobody is verified.
    pub ca: Option<PathBuf>,
}

/// Everything a tunnel needs to start.
#[derive(Debug, Clone)]
pub struct TunnelSetup {
    /// The program frpc, absolute.
    pub frpc: PathBuf,
    /// Its configuration file, `….toml`, in a directory of root that frpc's user may enter; the file with the token is
    /// kept beside it.
    pub config: PathBuf,
    /// Directory of the launch, owned by root: identity and log of frpc. Made when it is not there.
    pub dir: PathBuf,
    /// User frpc runs as.
    pub uid: u32,
    /// Group frpc runs as.
    pub gid: u32,
    /// How it is started.
    pub launcher: Launcher,
    /// The frps to join.
    pub server: Server,
    /// What tells this host's routes from those of others: the agent's id.
    pub user: String,
}

impl TunnelSetup {
    /// Directory that frpc may write: its store of routes.
    pub(crate) fn state_dir(&self) -> PathBuf {
        state_dir(&self.dir)
    }

    /// frpc's store of routes.
    pub(crate) fn store(&self) -> PathBuf {
        store_in(&self.dir)
    }

    /// The file with the token, for a frpc that reads it from one.
    pub(crate) fn token_file(&self) -> PathBuf {
        self.config.with_extension("token")
    }
}

/// Directory that the frpc of the launch in `dir` may write.
pub(crate) fn state_dir(dir: &Path) -> PathBuf {
    dir.join("state")
}

/// The store of the frpc of the launch in `dir`.
pub(crate) fn store_in(dir: &Path) -> PathBuf {
    state_dir(dir).join("routes.json")
}
