//! A real frps of one test, with ports of its own.

use std::{
    env, fs,
    net::{Ipv4Addr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        LazyLock,
        atomic::{AtomicU16, Ordering},
    },
    time::{Duration, Instant},
};

use tempfile::TempDir;

/// TCP ports a test may ask for.
const TCP_PORTS: u16 = 60;
/// So many tests' worth of ports there are.
const RANGES: u16 = 300;

/// A program of frp.
pub(crate) fn program(name: &str, variable: &str) -> PathBuf {
    if let Some(path) = env::var_os(variable) {
        return path.into();
    }
    let path = env::var_os("PATH").unwrap();
    let found = env::split_paths(&path).map(|dir| dir.join(name)).find(|path| path.is_file());
    found.unwrap_or_else(|| panic!("no {name}: set {variable} or put it into PATH"))
}

pub(crate) struct Frps {
    dir: TempDir,
    pub(crate) port: u16,
    pub(crate) vhost: u16,
    first_tcp: u16,
    child: Option<Child>,
}

/// What is not the same for all.
#[derive(Default)]
pub(crate) struct Options<'a> {
    pub(crate) token: &'a str,
    /// Certificate and key.
    pub(crate) tls: Option<(&'a Path, &'a Path)>,
}

impl Frps {
    /// A running one.
    pub(crate) fn start(token: &str) -> Self {
        Self::with(&Options { token, tls: None })
    }

    pub(crate) fn with(options: &Options<'_>) -> Self {
        let mut frps = Self {
            dir: tempfile::tempdir().unwrap(),
            port: free_port(),
            vhost: free_port(),
            first_tcp: free_range(),
            child: None,
        };
        frps.configure(options);
        frps.run();
        frps
    }

    /// Takes effect at the next start.
    pub(crate) fn configure(&self, options: &Options<'_>) {
        let Self { port, vhost, first_tcp, .. } = self;
        let tls = options.tls.map_or_else(String::new, |(cert, key)| {
            format!("transport.tls.certFile = {cert:?}\ntransport.tls.keyFile = {key:?}\n")
        });
        let text = format!(
            "bindAddr = \"127.0.0.1\"\nproxyBindAddr = \"127.0.0.1\"\nbindPort = {port}\nvhostHTTPPort = {vhost}\n\
             allowPorts = [{{ start = {first_tcp}, end = {} }}]\nauth.token = {:?}\n{tls}",
            first_tcp + TCP_PORTS - 1,
            options.token,
        );
        fs::write(self.dir.path().join("frps.toml"), text).unwrap();
    }

    pub(crate) fn run(&mut self) {
        let log = fs::File::options().append(true).create(true).open(self.dir.path().join("log")).unwrap();
        let child = Command::new(program("frps", "FRPS_BIN"))
            .arg("-c")
            .arg(self.dir.path().join("frps.toml"))
            .env_clear()
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        self.child = Some(child);
        let begin = Instant::now();
        while TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)).is_err() {
            assert!(begin.elapsed() < Duration::from_secs(10), "frps does not listen: {}", self.log());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub(crate) fn stop(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    /// The `nth` TCP port that frps gives out.
    pub(crate) fn tcp(&self, nth: u16) -> u16 {
        assert!(nth < TCP_PORTS);
        self.first_tcp + nth
    }
}

impl Drop for Frps {
    fn drop(&mut self) {
        self.stop();
        if std::thread::panicking() {
            let log = self.log();
            let lines: Vec<&str> = log.lines().rev().take(40).collect();
            eprintln!("--- frps, latest first\n{}", lines.join("\n"));
        }
    }
}

pub(crate) fn free_port() -> u16 {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port()
}

/// Below the ports the kernel gives out by itself, and never twice in a run.
fn free_range() -> u16 {
    static NEXT: LazyLock<AtomicU16> = LazyLock::new(|| AtomicU16::new(rand::random_range(0..RANGES)));
    loop {
        let first = 12_000 + NEXT.fetch_add(1, Ordering::Relaxed) % RANGES * TCP_PORTS;
        if (first..first + TCP_PORTS).all(|port| TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok()) {
            return first;
        }
    }
}
