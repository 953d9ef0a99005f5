//! The process frpc: taking over the one of an earlier agent, starting one, ending it. Called by `task`.
//!
//! ```text
//! an earlier one lives ── started with what we would start it with ──▶ adopted, untouched
//!                      └─ with something else ─▶ ended ─┐
//! none lives ───────────────────────────────────────────┴▶ files written, store removed ─▶ started without routes
//! ```
//! It is ended before its files change: an agent killed in between never leaves a frpc that disagrees with them.

use std::{fs, io, net::Ipv4Addr, path::Path, time::Duration};

use qudata_host::{
    durable::{self, DurableError},
    launch::{Confinement, EndError, Launch, LaunchError, Launcher, log_path},
    process::{Process, ProcessError},
    size::ByteSize,
};
use secrecy::{ExposeSecret, SecretString};
use tokio::{net::TcpListener, time::Instant};

use crate::{
    admin::Admin,
    config::{Abilities, AdminAccess, Config, ConfigError},
    log::SessionLog,
    publish::{ConfigFile, Publication, PublishError},
    setup::TunnelSetup,
    version::{ProbeError, Version, probe},
};

/// Name of the launch.
const NAME: &str = "frpc";
/// How long the kernel may take to end it.
const END_DEADLINE: Duration = Duration::from_secs(10);
/// A session holds at most two descriptors here.
const FILES: u64 = 65_536;
/// Go's threads.
const TASKS: u64 = 512;
/// A slow reader may hold 6 MiB of each session.
const MEMORY: ByteSize = ByteSize::from_gib(2);
/// It carries everybody's traffic, and comes after the agent and before the tenants' work.
const NICE: i32 = 0;

/// A living frpc.
pub(crate) struct Frpc {
    pub(crate) process: Process,
    pub(crate) admin: Admin,
    pub(crate) log: SessionLog,
    pub(crate) publication: Publication,
    pub(crate) since: Instant,
}

/// There is no frpc.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FrpcError {
    #[error("the tunnel cannot be set up")]
    Settings(#[source] ConfigError),
    #[error("frpc cannot be used")]
    Program(#[source] ProbeError),
    #[error("frpc cannot be configured")]
    Configure(#[source] PublishError),
    #[error("the files of the tunnel cannot be written")]
    Files(#[source] DurableError),
    #[error("the configuration of an earlier frpc cannot be read")]
    Read(#[source] io::Error),
    #[error("no port can be had for frpc's admin server")]
    Port(#[source] io::Error),
    #[error("frpc cannot be started")]
    Launch(#[source] LaunchError),
    #[error("an earlier frpc cannot be found")]
    Locate(#[source] LaunchError),
    #[error("an earlier frpc cannot be watched")]
    Watch(#[source] ProcessError),
    #[error("an earlier frpc cannot be ended")]
    End(#[source] EndError),
}

impl FrpcError {
    /// A stable word and what to do.
    pub(crate) fn advice(&self) -> (&'static str, &'static str) {
        match self {
            Self::Settings(_) => ("tunnel_settings", "correct the agent's settings and restart it"),
            Self::Program(ProbeError::Missing(_)) => {
                ("frpc_missing", "install frp, or tell the agent where frpc is")
            }
            Self::Program(_) => ("frpc_unusable", "install frpc 0.68 or newer, which the agent uses best"),
            Self::Configure(error) => error.advice(),
            Self::Files(_) | Self::Read(_) => {
                ("tunnel_files", "make room or correct the rights, as the message says")
            }
            Self::Port(_) | Self::Launch(_) | Self::Locate(_) | Self::Watch(_) | Self::End(_) => {
                ("frpc_launch", "do what the message says; it is tried again")
            }
        }
    }
}

/// There is no frpc that can be used.
pub(crate) struct NotAttained {
    pub(crate) error: FrpcError,
    /// No other one runs either, so nothing is routed.
    pub(crate) nothing_runs: bool,
}

/// What an earlier agent left.
enum Earlier {
    Nothing,
    /// A frpc that runs with what it would be started with now.
    Same(Box<Frpc>),
    /// A frpc that runs with something else.
    Other,
}

/// The frpc of an earlier agent if it runs with what this one would start it with, otherwise a new one. The version is
/// that of the program as it is now.
pub(crate) async fn attain(setup: &TunnelSetup) -> Result<(Frpc, Option<Version>), NotAttained> {
    let fail = |nothing_runs| move |error| NotAttained { error, nothing_runs };
    let version = probe(&setup.frpc).await;
    let nothing_runs = match look_for_earlier(setup).await.map_err(fail(false))? {
        Earlier::Same(frpc) => return Ok((*frpc, version.ok())),
        Earlier::Nothing => true,
        Earlier::Other => false,
    };
    // One that works is not ended for one that could not be started.
    let version = version.map_err(FrpcError::Program).map_err(fail(nothing_runs))?;
    let plan = |access| Config::plan(setup, Abilities::of(version), access).map_err(FrpcError::Settings);
    plan(AdminAccess::generate(0)).map_err(fail(nothing_runs))?;
    end(setup).await.map_err(FrpcError::End).map_err(fail(false))?;
    let frpc = async {
        let port = free_port().await.map_err(FrpcError::Port)?;
        start(setup, plan(AdminAccess::generate(port))?).await
    };
    Ok((frpc.await.map_err(fail(true))?, Some(version)))
}

/// Ends it, whoever started it; absence is success.
pub(crate) async fn end(setup: &TunnelSetup) -> Result<(), EndError> {
    end_in(&setup.launcher, &setup.dir).await
}

/// The same for the launch in `dir`.
pub(crate) async fn end_in(launcher: &Launcher, dir: &Path) -> Result<(), EndError> {
    launcher.end(dir, NAME, END_DEADLINE).await
}

/// What frpc said last.
pub(crate) fn last_words(setup: &TunnelSetup) -> String {
    crate::log::last_words(&log_path(&setup.dir, NAME))
}

fn config_file(setup: &TunnelSetup) -> ConfigFile {
    ConfigFile { frpc: setup.frpc.clone(), path: setup.config.clone(), uid: setup.uid, gid: setup.gid }
}

async fn look_for_earlier(setup: &TunnelSetup) -> Result<Earlier, FrpcError> {
    let located = setup.launcher.locate(&setup.dir, NAME).await.map_err(FrpcError::Locate)?;
    let Some(identity) = located else { return Ok(Earlier::Nothing) };
    let process = Process::adopt(&identity).map_err(FrpcError::Watch)?;
    let Some(process) = process else { return Ok(Earlier::Nothing) };
    let file = config_file(setup);
    let Some(found) = file.read().map_err(FrpcError::Read)? else { return Ok(Earlier::Other) };
    let (found, access) = (found.without_routes(), found.web_server);
    // As that frpc was told it, whatever version is installed by now.
    let same = Config::plan(setup, found.abilities(), access.clone()).is_ok_and(|wanted| wanted == found);
    if !same || !token_is_on_file(setup, &found).map_err(FrpcError::Read)? {
        tracing::info!(pid = identity.pid, "frpc runs with other settings and is to be restarted");
        return Ok(Earlier::Other);
    }
    tracing::info!(pid = identity.pid, "frpc runs already");
    Ok(Earlier::Same(Box::new(Frpc {
        process,
        admin: Admin::new(&access),
        log: SessionLog::of_running(log_path(&setup.dir, NAME)),
        publication: Publication::unknown(file, found),
        since: Instant::now(),
    })))
}

/// Whether the file that frpc read its token from, if it did, holds the one that is wanted.
fn token_is_on_file(setup: &TunnelSetup, found: &Config) -> io::Result<bool> {
    match &setup.server.token {
        Some(token) if found.abilities().token_file => match fs::read(setup.token_file()) {
            Ok(bytes) => Ok(bytes == token.expose_secret().as_bytes()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        },
        Some(_) | None => Ok(true),
    }
}

async fn start(setup: &TunnelSetup, config: Config) -> Result<Frpc, FrpcError> {
    make_directories(setup).map_err(FrpcError::Files)?;
    let file = config_file(setup);
    if let Some(token) = setup.server.token.as_ref().map(SecretString::expose_secret) {
        file.write_private(&setup.token_file(), token).map_err(FrpcError::Files)?;
    }
    let text = config.render(&Default::default()).map_err(FrpcError::Settings)?;
    file.replace(&text).await.map_err(FrpcError::Configure)?;
    let log = SessionLog::at_end(log_path(&setup.dir, NAME));
    let process = setup.launcher.launch(&launch(setup)).await.map_err(FrpcError::Launch)?;
    tracing::info!(pid = process.identity().pid, "frpc was started");
    Ok(Frpc {
        process,
        admin: Admin::new(&config.web_server),
        log,
        publication: Publication::empty(file, config),
        since: Instant::now(),
    })
}

/// A store of an earlier frpc would bring routes back that nobody wants any more: its directory is made anew.
fn make_directories(setup: &TunnelSetup) -> Result<(), DurableError> {
    durable::create_dir(&setup.dir, 0o711)?;
    if let Some(parent) = setup.config.parent().filter(|parent| !parent.exists()) {
        durable::create_dir(parent, 0o711)?;
    }
    let state = setup.state_dir();
    durable::remove_tree(&state)?;
    durable::create_dir(&state, 0o700)?;
    durable::give_to(&state, setup.uid, setup.gid)
}

/// Free at this moment. Should somebody else take it before frpc does, frpc ends and is started anew with another one.
async fn free_port() -> io::Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?.local_addr()?.port())
}

fn launch(setup: &TunnelSetup) -> Launch {
    let mut readable = vec![setup.frpc.clone()];
    // The directory and not the file, which is replaced.
    readable.extend(setup.config.parent().map(Path::to_owned));
    readable.extend(setup.server.ca.clone().filter(|ca| ca.exists()));
    Launch {
        program: setup.frpc.clone(),
        args: vec!["-c".into(), setup.config.clone().into()],
        uid: setup.uid,
        gid: setup.gid,
        groups: Vec::new(),
        dir: setup.dir.clone(),
        name: NAME.to_owned(),
        nice: NICE,
        no_files: FILES,
        confinement: Confinement {
            description: "tunnel of the qudata agent".to_owned(),
            writable: vec![setup.state_dir()],
            readable,
            memory_max: Some(MEMORY),
            tasks_max: Some(TASKS),
            ..Confinement::default()
        },
        ending: None,
    }
}
