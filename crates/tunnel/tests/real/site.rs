//! One host with a tunnel: its directory, its frpc, and what the tests wait for.

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::PathBuf,
    process::Command,
    time::Duration,
};

use qudata_host::launch::{Launcher, identity_path, log_path};
use qudata_tunnel::{
    ProxyName, Route, RouteKind, RouteState, Server, Tunnel, TunnelSetup, TunnelState, TunnelStatus,
};
use tempfile::TempDir;
use tokio::time::{Instant, timeout};

use crate::frps::{Frps, program};

/// Long enough for a slow machine, short enough to be noticed.
const DEADLINE: Duration = Duration::from_secs(20);

pub(crate) struct Site {
    _dir: TempDir,
    pub(crate) setup: TunnelSetup,
}

impl Site {
    pub(crate) fn new(frps: &Frps, user: &str, token: &str) -> Self {
        let dir = tempfile::Builder::new().prefix("qudata-tunnel-").tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o711)).unwrap();
        let me = fs::metadata("/proc/self").unwrap();
        let root = me.uid() == 0;
        let shim = std::env::current_exe().unwrap().parent().unwrap().join("../examples/tunnel_shim");
        assert!(
            shim.exists(),
            "cargo builds examples for tests, but not for --test alone; {} is missing",
            shim.display()
        );
        let setup = TunnelSetup {
            frpc: program("frpc", "FRPC_BIN"),
            config: dir.path().join("tunnel/frpc.toml"),
            dir: dir.path().join("tunnel"),
            uid: if root { 60_101 } else { me.uid() },
            gid: if root { 60_101 } else { me.gid() },
            launcher: Launcher::detached(shim, Vec::new()),
            server: Server { host: "127.0.0.1".into(), port: frps.port, token: Some(token.into()), ca: None },
            user: user.into(),
        };
        Self { _dir: dir, setup }
    }

    /// With a frpc that says it is older than it is, so that what it cannot do is done the other way.
    pub(crate) fn claiming(mut self, version: &str) -> Self {
        let real = fs::read(&self.setup.frpc).unwrap();
        let output = Command::new(&self.setup.frpc).arg("--version").output().unwrap();
        let own = String::from_utf8(output.stdout).unwrap().trim().to_owned();
        assert_eq!(own.len(), version.len(), "{own} is put in the place of {version}");
        let mut changed = real;
        let mut at = 0;
        while let Some(found) = changed[at..].windows(own.len()).position(|w| w == own.as_bytes()) {
            at += found;
            changed[at..at + own.len()].copy_from_slice(version.as_bytes());
        }
        let path = self._dir.path().join("frpc");
        fs::write(&path, changed).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        self.setup.frpc = path;
        self
    }

    pub(crate) fn start(&self, routes: Vec<Route>) -> Tunnel {
        Tunnel::start(self.setup.clone(), routes)
    }

    /// The pid of frpc.
    pub(crate) fn pid(&self) -> u32 {
        let identity = Launcher::find(&self.setup.dir, "frpc").unwrap();
        identity
            .unwrap_or_else(|| panic!("{} is missing", identity_path(&self.setup.dir, "frpc").display()))
            .pid
    }

    pub(crate) fn kill_frpc(&self) {
        self.signal_frpc("KILL");
    }

    pub(crate) fn signal_frpc(&self, name: &str) {
        let sent = Command::new("kill").args(["-s", name]).arg(self.pid().to_string()).status();
        assert!(sent.unwrap().success());
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(log_path(&self.setup.dir, "frpc")).unwrap_or_default()
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.setup.dir.join(name)
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        // The identity in the file was checked by nobody: it is ours as long as it runs our frpc.
        if let Ok(Some(identity)) = Launcher::find(&self.setup.dir, "frpc")
            && let Ok(exe) = fs::read_link(format!("/proc/{}/exe", identity.pid))
            && exe == identity.exe
        {
            let _ = Command::new("kill").arg("-9").arg(identity.pid.to_string()).status();
        }
        if std::thread::panicking() {
            let log = self.log();
            let told = log.lines().filter(|line| !line.contains("http re"));
            eprintln!("--- frpc\n{}", told.collect::<Vec<_>>().join("\n"));
        }
    }
}

pub(crate) fn tcp(name: &str, remote_port: u16, local_port: u16) -> Route {
    Route { name: name.parse().unwrap(), kind: RouteKind::Tcp { remote_port }, local_port }
}

pub(crate) fn http(name: &str, domain: &str, local_port: u16) -> Route {
    let domain = domain.parse().unwrap();
    Route { name: name.parse().unwrap(), kind: RouteKind::Http { domain }, local_port }
}

/// Waits until the status is as expected; how long it took.
pub(crate) async fn until(tunnel: &Tunnel, what: &str, expected: impl Fn(&TunnelStatus) -> bool) -> Duration {
    within(tunnel, what, DEADLINE, expected).await
}

pub(crate) async fn within(
    tunnel: &Tunnel,
    what: &str,
    deadline: Duration,
    expected: impl Fn(&TunnelStatus) -> bool,
) -> Duration {
    let begin = Instant::now();
    let mut status = tunnel.status();
    if timeout(deadline, status.wait_for(|status| expected(status))).await.is_err() {
        panic!("not within {deadline:?}: {what}; {:#?}", *tunnel.status().borrow());
    }
    begin.elapsed()
}

pub(crate) fn state_of<'a>(status: &'a TunnelStatus, name: &str) -> Option<&'a RouteState> {
    status.routes.get(&ProxyName::try_from(name).unwrap()).map(|route| &route.state)
}

pub(crate) fn is_up(status: &TunnelStatus, names: &[&str]) -> bool {
    status.state == TunnelState::Up
        && names.iter().all(|name| matches!(state_of(status, name), Some(RouteState::Up { .. })))
}

/// All routes are up, and there are no others.
pub(crate) fn all_up(status: &TunnelStatus, count: usize) -> bool {
    let up = |route: &qudata_tunnel::RouteStatus| matches!(route.state, RouteState::Up { .. });
    status.state == TunnelState::Up && status.routes.len() == count && status.routes.values().all(up)
}

pub(crate) fn is_down(status: &TunnelStatus, expected: &str) -> bool {
    matches!(&status.state, TunnelState::Down { code, .. } if *code == expected)
}
