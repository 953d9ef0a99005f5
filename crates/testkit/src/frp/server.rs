//! One real frps with an address of its own in 127.0.0.0/8, so that it has all ports there for itself: whoever tests
//! against it uses the ports of production, and what it publishes never meets what the agent listens on. Called by tests
//! and the demo.
#![allow(clippy::panic, reason = "dev only: a test that cannot go on stops here, with a sentence")]

use std::{
    fs::{self, File, Permissions},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    ops::RangeInclusive,
    os::unix::{fs::PermissionsExt, process::CommandExt},
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::{Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use tempfile::TempDir;

use super::{Frp, Place};
use crate::http::{Client, VirtualHost};

/// Where the ports are unless somebody listens there on all addresses.
const PORT: u16 = 7000;
const VHOST_HTTP_PORT: u16 = 8080;
const START: Duration = Duration::from_secs(20);

/// What a server allows, and whom.
#[derive(Debug, Clone)]
pub struct Options {
    /// What clients must know.
    pub token: String,
    /// TCP ports that clients may publish.
    pub tcp_ports: RangeInclusive<u16>,
    /// Certificate and key in PEM; without them the server makes its own, which no client can check.
    pub certificate: Option<(PathBuf, PathBuf)>,
}

impl Default for Options {
    fn default() -> Self {
        Self { token: "token-of-the-test-fleet".to_owned(), tcp_ports: 10_000..=15_000, certificate: None }
    }
}

/// A server, running or stopped. Dropping it ends it, and nothing but it.
#[derive(Debug)]
pub struct Frps {
    program: PathBuf,
    place: Place,
    port: u16,
    vhost_http_port: u16,
    dir: TempDir,
    options: Mutex<Options>,
    child: Mutex<Option<Child>>,
}

impl Frps {
    /// Starts one and waits until it takes connections.
    ///
    /// # Panics
    /// With a sentence, when it does not start.
    pub fn start(frp: &Frp, options: Options) -> Self {
        let place = Place::take();
        let address = place.address();
        let dir = tempfile::Builder::new().prefix("qudata-frps-").tempdir();
        let dir = dir.unwrap_or_else(|e| panic!("cannot make a directory for frps: {e}"));
        let frps = Self {
            program: frp.frps.clone(),
            place,
            port: free(address, PORT),
            vhost_http_port: free(address, VHOST_HTTP_PORT),
            dir,
            options: Mutex::new(options),
            child: Mutex::new(None),
        };
        frps.launch();
        frps
    }

    /// SIGKILL: as when its machine dies. Sessions through it end, its ports are free.
    pub fn stop(&self) {
        if let Some(mut child) = self.child().take() {
            // Both fail only for a child that is gone already.
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Starts it again on the same address and ports, after [`Self::stop`] or with one.
    pub fn restart(&self) {
        self.stop();
        self.launch();
    }

    /// From the next start on, clients must know another token.
    pub fn set_token(&self, token: &str) {
        token.clone_into(&mut lock(&self.options).token);
    }

    /// The token that clients must know.
    pub fn token(&self) -> String {
        lock(&self.options).token.clone()
    }

    /// Its address: what clients connect to, and where published TCP ports are.
    pub fn address(&self) -> IpAddr {
        self.place.address().into()
    }

    /// Its port for clients.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Where it takes HTTP by virtual host.
    pub fn vhost_http(&self) -> SocketAddr {
        (self.place.address(), self.vhost_http_port).into()
    }

    /// TCP ports it allows.
    pub fn tcp_ports(&self) -> RangeInclusive<u16> {
        lock(&self.options).tcp_ports.clone()
    }

    /// A published TCP port, as the world reaches it.
    pub fn tcp(&self, port: u16) -> SocketAddr {
        (self.place.address(), port).into()
    }

    /// HTTP to `domain` as the world speaks it: to the server, naming the virtual host.
    pub fn http(&self, domain: &str) -> VirtualHost {
        VirtualHost {
            server: Client { address: self.vhost_http(), secret: None, deadline: Duration::from_secs(30) },
            name: domain.to_owned(),
        }
    }

    /// Its process id, while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.child().as_ref().map(Child::id)
    }

    /// What it has logged so far, over all its starts.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.log_file()).unwrap_or_default()).into_owned()
    }

    fn log_file(&self) -> PathBuf {
        self.dir.path().join("frps.log")
    }

    fn child(&self) -> MutexGuard<'_, Option<Child>> {
        lock(&self.child)
    }

    fn launch(&self) {
        let config = self.dir.path().join("frps.toml");
        let write = fs::write(
            &config,
            render(self.place.address(), [self.port, self.vhost_http_port], &lock(&self.options)),
        )
        .and_then(|()| fs::set_permissions(&config, Permissions::from_mode(0o600)));
        write.unwrap_or_else(|e| panic!("cannot write {}: {e}", config.display()));
        let log = File::options().create(true).append(true).open(self.log_file());
        let log = log.unwrap_or_else(|e| panic!("cannot write the log of frps: {e}"));
        let child = Command::new(&self.program)
            .arg("-c")
            .arg(&config)
            .env_clear()
            .current_dir(self.dir.path())
            .stdin(Stdio::null())
            // Ctrl-C is for whoever started it, and ends it when that is done.
            .process_group(0)
            .stderr(log.try_clone().unwrap_or_else(|e| panic!("cannot open a file twice: {e}")))
            .stdout(log)
            .spawn();
        let child = child.unwrap_or_else(|e| panic!("cannot start {}: {e}", self.program.display()));
        *self.child() = Some(child);
        self.wait_until_up();
    }

    fn wait_until_up(&self) {
        let until = Instant::now() + START;
        while TcpStream::connect((self.place.address(), self.port)).is_err() {
            let ended = self.child().as_mut().map(Child::try_wait);
            if let Some(Ok(Some(status))) = ended {
                panic!("frps ended at its start with {status}:\n{}", self.log());
            }
            assert!(Instant::now() < until, "frps takes no connections:\n{}", self.log());
            thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Frps {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("--- log of frps on {}:\n{}", self.place.address(), self.log());
        }
        self.stop();
    }
}

/// A lock that no test's panic closes: what it guards is whole at every moment.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A free port of the address: `wanted`, unless somebody listens there on all addresses.
fn free(address: Ipv4Addr, wanted: u16) -> u16 {
    let listener = TcpListener::bind((address, wanted)).or_else(|_| TcpListener::bind((address, 0)));
    let bound = listener.and_then(|listener| listener.local_addr());
    bound.unwrap_or_else(|e| panic!("no free port on {address}: {e}")).port()
}

/// The server's settings. The values are a test's own; serializing them keeps quotes and the like out of the syntax.
fn render(address: Ipv4Addr, [port, vhost_http_port]: [u16; 2], options: &Options) -> String {
    let mut table = toml::toml! {
        // frps allows errors to be told to clients by default; said here because tests read them.
        detailedErrorsToClient = true

        [auth]
        method = "token"

        [log]
        to = "console"
        level = "info"
        disablePrintColor = true
    };
    let mut set = |key: &str, value: toml::Value| table.insert(key.to_owned(), value);
    set("bindAddr", address.to_string().into());
    set("proxyBindAddr", address.to_string().into());
    set("bindPort", i64::from(port).into());
    set("vhostHTTPPort", i64::from(vhost_http_port).into());
    let (start, end) = (i64::from(*options.tcp_ports.start()), i64::from(*options.tcp_ports.end()));
    let range = toml::Table::from_iter([("start".to_owned(), start.into()), ("end".to_owned(), end.into())]);
    set("allowPorts", toml::Value::Array(vec![range.into()]));
    if let Some(auth) = table.get_mut("auth").and_then(toml::Value::as_table_mut) {
        auth.insert("token".to_owned(), options.token.clone().into());
    }
    if let Some((certificate, key)) = &options.certificate {
        let file = |path: &PathBuf| toml::Value::from(path.to_string_lossy().into_owned());
        let tls = toml::Table::from_iter([
            ("certFile".to_owned(), file(certificate)),
            ("keyFile".to_owned(), file(key)),
        ]);
        let transport = toml::Table::from_iter([("tls".to_owned(), tls.into())]);
        table.insert("transport".to_owned(), transport.into());
    }
    toml::to_string(&table).unwrap_or_else(|e| panic!("settings of frps: {e}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_stays_a_value() {
        let options = Options { token: "a\"\n[b]\nc = \"d".to_owned(), ..Options::default() };
        let read: toml::Table = toml::from_str(&render(Ipv4Addr::LOCALHOST, [1, 2], &options)).unwrap();
        assert_eq!(read["auth"]["token"].as_str(), Some(options.token.as_str()));
        assert_eq!(read["allowPorts"][0]["end"].as_integer(), Some(15_000));
        assert!(!read.contains_key("b"));
    }

    #[test]
    fn a_port_that_somebody_has_on_all_addresses_is_not_taken() {
        let all = TcpListener::bind("0.0.0.0:0").unwrap();
        let taken = all.local_addr().unwrap().port();
        assert_ne!(free(Ipv4Addr::new(127, 78, 0, 1), taken), taken);
    }
}
