//! One of the two that the table is asked of: the real frpc with a real frps, or the fake alone.

use std::{
    fs,
    io::{self, Read, Write},
    net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use qudata_testkit::{
    frp::{self, FakeFrpc, Frps, Options, Place},
    http::{Client, Reply, VirtualHost},
    process::Seen,
    tool,
};
use rustix::process::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

/// Password of the admin API.
pub(crate) const PASSWORD: &str = "password-of-the-admin-api";
const TOKEN: &str = "token-of-the-table";
/// The real frpc tries again after up to ten seconds.
const SOON: Duration = Duration::from_secs(30);

enum Server {
    Fake(FakeFrpc, Place),
    Real(Frps),
}

pub(crate) struct Side {
    dir: TempDir,
    program: PathBuf,
    version: String,
    server: Server,
    admin_port: u16,
}

impl Side {
    pub(crate) fn fake() -> Self {
        let fake = FakeFrpc::of(Path::new(env!("CARGO_BIN_EXE_qudata-fake-frpc")));
        let program = fake.program().to_owned();
        let side = Self::new(
            tempfile::tempdir().unwrap(),
            program,
            "0.70.1".to_owned(),
            Server::Fake(fake, Place::take()),
        );
        side.up();
        side
    }

    pub(crate) fn real() -> Self {
        let frp = frp::find().unwrap_or_else(|why| panic!("{why}"));
        let frps = Frps::start(&frp, Options { token: TOKEN.to_owned(), ..Options::default() });
        Self::new(tempfile::tempdir().unwrap(), frp.frpc, frp.version.to_string(), Server::Real(frps))
    }

    fn new(dir: TempDir, program: PathBuf, version: String, server: Server) -> Self {
        let free = TcpListener::bind("127.0.0.1:0").unwrap();
        let admin_port = free.local_addr().unwrap().port();
        Self { dir, program, version, server, admin_port }
    }

    pub(crate) fn version(&self) -> &str {
        &self.version
    }

    pub(crate) fn admin_port(&self) -> u16 {
        self.admin_port
    }

    pub(crate) fn address(&self) -> Ipv4Addr {
        match &self.server {
            Server::Fake(_, place) => place.address(),
            Server::Real(frps) => match frps.address() {
                std::net::IpAddr::V4(address) => address,
                std::net::IpAddr::V6(_) => unreachable!("frps is on an IPv4 address"),
            },
        }
    }

    pub(crate) fn tcp(&self, port: u16) -> SocketAddr {
        (self.address(), port).into()
    }

    /// HTTP to a virtual host.
    pub(crate) fn http(&self, host: &str) -> VirtualHost {
        match &self.server {
            Server::Fake(..) => VirtualHost {
                server: Client { address: self.tcp(FakeFrpc::VHOST_HTTP_PORT), secret: None, deadline: SOON },
                name: host.to_owned(),
            },
            Server::Real(frps) => frps.http(host),
        }
    }

    pub(crate) fn is_closed(&self, port: u16) -> bool {
        TcpStream::connect(self.tcp(port)).is_err()
    }

    /// The server of the real side.
    pub(crate) fn frps(&self) -> &Frps {
        match &self.server {
            Server::Fake(..) => panic!("the fake has no server"),
            Server::Real(frps) => frps,
        }
    }

    /// The server is gone.
    pub(crate) fn down(&self) {
        match &self.server {
            Server::Fake(..) => self.order(&json!({ "session": "down", "allow": [10_000, 15_000] })),
            Server::Real(frps) => frps.stop(),
        }
    }

    /// The server is there.
    pub(crate) fn up(&self) {
        match &self.server {
            Server::Fake(..) => self.order(&json!({ "allow": [10_000, 15_000] })),
            Server::Real(frps) => frps.restart(),
        }
    }

    /// What goes wrong from now on; on the fake side.
    pub(crate) fn order(&self, faults: &Value) {
        match &self.server {
            Server::Fake(fake, _) => fake.order(faults),
            Server::Real(_) => panic!("the real one takes no orders"),
        }
    }

    /// The server wants another token.
    pub(crate) fn refuse_token(&self) {
        match &self.server {
            Server::Fake(..) => self.order(&json!({ "session": "refused" })),
            Server::Real(frps) => {
                frps.set_token("another");
                frps.restart();
            }
        }
    }

    pub(crate) fn store(&self) -> PathBuf {
        self.dir.path().join("store.json")
    }

    /// Settings as the agent writes them, with more at the end.
    pub(crate) fn config(&self, more: &str) -> String {
        let port = match &self.server {
            Server::Fake(..) => 7000,
            Server::Real(frps) => frps.port(),
        };
        format!(
            r#"
serverAddr = "{}"
serverPort = {port}
user = "agent-1"
loginFailExit = false
auth.method = "token"
auth.token = "{TOKEN}"
log.to = "{}"
log.level = "info"
log.maxDays = 3
log.disablePrintColor = true
webServer.addr = "127.0.0.1"
webServer.port = {}
webServer.user = "admin"
webServer.password = "{PASSWORD}"
[store]
path = "{}"
{more}
"#,
            self.address(),
            self.dir.path().join("frpc.log").display(),
            self.admin_port,
            self.store().display(),
        )
    }

    /// Exit code and stdout of a call that ends by itself.
    pub(crate) fn run(&self, arguments: &[&str]) -> (i32, String) {
        let mut command = Command::new(&self.program);
        let output = tool::run(command.args(arguments).env_clear(), SOON).unwrap();
        (output.status.code().unwrap_or(-1), output.stdout)
    }

    pub(crate) fn verify(&self, config: &str) -> (i32, String) {
        let file = self.dir.path().join("verify.toml");
        fs::write(&file, config).unwrap();
        self.run(&["verify", "-c", file.to_str().unwrap()])
    }

    /// Starts it without waiting for anything.
    pub(crate) fn spawn(&self, config: &str) -> Running {
        let file = self.dir.path().join("frpc.toml");
        fs::write(&file, config).unwrap();
        let child = Command::new(&self.program)
            .arg("-c")
            .arg(&file)
            .env_clear()
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let admin = Client {
            address: ([127, 0, 0, 1], self.admin_port).into(),
            secret: None,
            deadline: Duration::from_secs(10),
        };
        Running { child, admin, file, log: self.dir.path().join("frpc.log") }
    }

    /// Starts it and waits until the admin API answers.
    pub(crate) fn start(&self, config: &str) -> Running {
        let running = self.spawn(config);
        running.wait_until("the admin API answers", || {
            running.admin.call("GET", "/healthz", None).is_ok_and(|reply| reply.status == 200)
        });
        running
    }
}

/// One frpc.
pub(crate) struct Running {
    child: Child,
    admin: Client,
    file: PathBuf,
    log: PathBuf,
}

impl Running {
    pub(crate) fn ask(&self, method: &str, path: &str, password: &str, body: &str) -> Reply {
        self.try_ask(method, path, password, body).unwrap()
    }

    /// The same where there may be no answer.
    pub(crate) fn try_ask(&self, method: &str, path: &str, password: &str, body: &str) -> io::Result<Reply> {
        // `admin:<password>` by the system's own encoder.
        let mut base64 = Command::new("sh");
        base64.args(["-c", &format!("printf %s 'admin:{password}' | base64 --wrap=0")]);
        let login = tool::run(&mut base64, SOON).unwrap().stdout;
        let head = format!("{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n");
        let head = format!("{head}Authorization: Basic {login}\r\nContent-Length: {}\r\n\r\n", body.len());
        self.admin.raw(format!("{head}{body}").as_bytes())
    }

    pub(crate) fn call(&self, method: &str, path: &str, body: &Value) -> Reply {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        self.ask(method, path, PASSWORD, &body)
    }

    pub(crate) fn post(&self, body: &Value) -> Reply {
        self.call("POST", "/api/store/proxies", body)
    }

    /// What `/api/status` says of a proxy; null when it does not know it.
    pub(crate) fn status(&self, name: &str) -> Value {
        let all = self.call("GET", "/api/status", &Value::Null).json();
        let mut lists = all.as_object().unwrap().values().filter_map(Value::as_array).flatten();
        lists.find(|proxy| proxy["name"] == name).cloned().unwrap_or_default()
    }

    pub(crate) fn wait_for(&self, name: &str, status: &str) -> Value {
        self.wait_until(&format!("{name} is {status}"), || self.status(name)["status"] == status);
        self.status(name)
    }

    pub(crate) fn wait_for_session(&self) {
        self.wait_until("it has logged in", || self.log().contains("login to server success"));
    }

    #[track_caller]
    pub(crate) fn wait_until(&self, what: &str, mut holds: impl FnMut() -> bool) {
        let until = Instant::now() + SOON;
        while !holds() {
            assert!(Instant::now() < until, "not within {SOON:?}: {what}\n{}", self.log());
            thread::sleep(Duration::from_millis(20));
        }
    }

    pub(crate) fn rewrite(&self, config: &str) {
        fs::write(&self.file, config).unwrap();
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        assert!(Seen::of(self.child.id()).unwrap().signal(signal));
    }

    pub(crate) fn wait(&mut self, within: Duration) -> ExitStatus {
        let until = Instant::now() + within;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < until, "it did not end within {within:?}\n{}", self.log());
            thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Body of the call that adds a TCP proxy to the store.
pub(crate) fn store_body(name: &str, local_port: u16, remote_port: u16) -> Value {
    json!({
        "name": name, "type": "tcp",
        "tcp": { "localIP": "127.0.0.1", "localPort": local_port, "remotePort": remote_port },
    })
}

/// A local service that says back what it hears. Dropping it ends its connections.
pub(crate) struct Echo {
    pub(crate) port: u16,
    streams: Arc<Mutex<Vec<TcpStream>>>,
}

impl Echo {
    pub(crate) fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let streams = Arc::new(Mutex::new(Vec::new()));
        let opened = Arc::clone(&streams);
        // Ends with the test's process.
        thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                opened.lock().unwrap().push(stream.try_clone().unwrap());
                thread::spawn(move || {
                    let mut to = stream.try_clone().unwrap();
                    let _ = io::copy(&mut stream, &mut to);
                    let _ = to.shutdown(Shutdown::Both);
                });
            }
        });
        Self { port, streams }
    }

    /// A connection to it from `address`, used once.
    pub(crate) fn stream(&self, address: SocketAddr) -> TcpStream {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        Self::talk(&mut stream);
        stream
    }

    pub(crate) fn talk(stream: &mut TcpStream) {
        stream.write_all(b"hello").unwrap();
        let mut back = [0; 5];
        stream.read_exact(&mut back).unwrap();
        assert_eq!(&back, b"hello");
    }

    /// What comes back over a connection of its own.
    pub(crate) fn through(&self, address: SocketAddr) -> String {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        stream.write_all(b"hello").unwrap();
        let mut back = [0; 5];
        stream.read_exact(&mut back).unwrap();
        String::from_utf8_lossy(&back).into_owned()
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        for stream in self.streams.lock().unwrap().drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}
