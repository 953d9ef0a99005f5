//! The whole client against services over real sockets: ours, broken ones, hostile ones.

mod contract;
mod hostile;
mod life;
mod tls;

use std::{
    collections::BTreeMap,
    net::Ipv4Addr,
    path::Path,
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
    time::{Instant, timeout},
};
use uuid::Uuid;

use super::{ControlPlaneState::Down, *};

/// Patience for what must happen.
const SOON: Duration = Duration::from_secs(10);

/// Short bounds, so that a test of a hang is short. The size of replies is the real one.
fn quick() -> Timing {
    Timing {
        limits: CallLimits {
            connect: Duration::from_millis(400),
            total: Duration::from_millis(800),
            ..CallLimits::default()
        },
        pauses: Pauses { shortest: Duration::from_millis(50), longest: Duration::from_millis(400) },
        ping: Duration::from_millis(100),
        stats: Duration::from_millis(50),
    }
}

/// A call as a service saw it.
#[derive(Debug, Clone)]
struct Asked {
    /// `POST /v0/init`.
    what: String,
    headers: BTreeMap<String, String>,
    body: serde_json::Value,
}

impl Asked {
    async fn read(stream: &mut (impl AsyncRead + Unpin)) -> Option<Self> {
        let mut bytes = Vec::new();
        let end = loop {
            if let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n") {
                break end;
            }
            if stream.read_buf(&mut bytes).await.ok()? == 0 {
                return None;
            }
        };
        let head = String::from_utf8(bytes[..end].to_vec()).unwrap();
        let mut lines = head.lines();
        let what = lines.next().unwrap().rsplit_once(' ').unwrap().0.to_owned();
        let headers: BTreeMap<String, String> = lines
            .map(|line| line.split_once(": ").unwrap())
            .map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()))
            .collect();
        let length = headers.get("content-length").map_or(0, |length| length.parse().unwrap());
        while bytes.len() < end + 4 + length {
            if stream.read_buf(&mut bytes).await.ok()? == 0 {
                return None;
            }
        }
        let body = serde_json::from_slice(&bytes[end + 4..]).unwrap_or_default();
        Some(Self { what, headers, body })
    }

    /// The secret it came with.
    fn secret(&self) -> Option<&str> {
        self.headers.get("x-agent-secret").map(String::as_str)
    }
}

type Act = Arc<dyn Fn(TcpStream) -> Pin<Box<dyn Future<Output = ()> + Send>> + Send + Sync>;

/// A service that does with each connection what it is told.
struct Service {
    port: u16,
    connections: Arc<AtomicUsize>,
    accepting: JoinHandle<()>,
}

impl Drop for Service {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

impl Service {
    async fn start(act: Act) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let connections = Arc::new(AtomicUsize::new(0));
        let count = connections.clone();
        let accepting = tokio::spawn(async move {
            let mut attending = JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                count.fetch_add(1, Ordering::Relaxed);
                attending.spawn(act(stream));
            }
        });
        Self { port, connections, accepting }
    }

    fn connections(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }

    fn url(&self) -> String {
        format!("http://127.0.0.1:{}/v0", self.port)
    }
}

/// Answers calls with a status and JSON by what a function says, and writes them down.
#[derive(Clone, Default)]
struct Desk {
    asked: Arc<Mutex<Vec<Asked>>>,
    in_flight: Arc<AtomicUsize>,
    most_in_flight: Arc<AtomicUsize>,
}

impl Desk {
    async fn open<F>(&self, answer: F) -> Service
    where
        F: Fn(&Asked) -> (u16, serde_json::Value) + Send + Sync + 'static,
    {
        let (desk, answer) = (self.clone(), Arc::new(answer));
        Service::start(Arc::new(move |stream| {
            let (desk, answer) = (desk.clone(), answer.clone());
            Box::pin(async move { desk.attend(stream, &*answer).await })
        }))
        .await
    }

    async fn attend<S, F>(&self, mut stream: S, answer: &F)
    where
        S: AsyncRead + AsyncWrite + Unpin,
        F: Fn(&Asked) -> (u16, serde_json::Value),
    {
        let Some(asked) = Asked::read(&mut stream).await else { return };
        let now = self.in_flight.fetch_add(1, Ordering::Relaxed) + 1;
        self.most_in_flight.fetch_max(now, Ordering::Relaxed);
        let (status, body) = answer(&asked);
        self.asked.lock().unwrap().push(asked);
        let body = body.to_string();
        let head = format!("HTTP/1.1 {status} X\r\nContent-Length: {}\r\n\r\n", body.len());
        let _ = stream.write_all(format!("{head}{body}").as_bytes()).await;
        self.in_flight.fetch_sub(1, Ordering::Relaxed);
        let _ = stream.shutdown().await;
    }

    fn asked(&self, what: &str) -> Vec<Asked> {
        let all = self.asked.lock().unwrap();
        all.iter().filter(|asked| asked.what.ends_with(what)).cloned().collect()
    }

    async fn until_asked(&self, what: &str, times: usize) {
        until(&format!("{times} times {what}"), || self.asked(what).len() >= times).await;
    }
}

async fn until(what: &str, condition: impl Fn() -> bool) {
    let end = Instant::now() + SOON;
    while !condition() {
        assert!(Instant::now() < end, "not within {SOON:?}: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// A host with its files, and a client to start on it.
struct Host {
    dir: tempfile::TempDir,
    callers: watch::Receiver<AgentSecret>,
    setup: Option<ControlPlaneSetup>,
    stats: Arc<Mutex<Option<StatsInput>>>,
}

const OLD_SECRET: &str = "old-secret-0123456789";
const OLD_TOKEN: &str = "old-token";

impl Host {
    /// One that was registered before.
    fn registered(url: &str) -> Self {
        let secret = AgentSecret::parse(OLD_SECRET).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let token = Sealed::new(OLD_TOKEN);
        registration::save(dir.path(), Some(&secret), Some(&token)).unwrap();
        Self::new(url, dir, Some(secret), Some(token))
    }

    /// One that was not.
    fn fresh(url: &str) -> Self {
        Self::new(url, tempfile::tempdir().unwrap(), None, None)
    }

    fn new(url: &str, dir: tempfile::TempDir, secret: Option<AgentSecret>, token: Option<Sealed>) -> Self {
        let agent_id = Uuid::new_v4();
        std::fs::write(dir.path().join("agent_id"), agent_id.to_string()).unwrap();
        let sender = watch::Sender::new(secret.clone().unwrap_or_else(AgentSecret::random));
        let callers = sender.subscribe();
        let stats: Arc<Mutex<Option<StatsInput>>> = Arc::default();
        let source = stats.clone();
        let setup = ControlPlaneSetup {
            service: url.parse().unwrap(),
            api_key: Some("ak-canary".into()),
            registration: Registration { agent_id, secret, tunnel_token: token },
            data_dir: dir.path().to_owned(),
            introduction: Introduction { agent_port: 15_001, address: None, test_mode: true },
            look: HostLook {
                root: dir.path().join("no-root"),
                data_dir: dir.path().to_owned(),
                gpus: None,
                location: Location::default(),
            },
            secret: sender,
            stats: Arc::new(move || source.lock().unwrap().clone()),
        };
        Self { dir, callers, setup: Some(setup), stats }
    }

    fn start(&mut self) -> ControlPlane {
        ControlPlane::begin(self.setup.take().unwrap(), Trust::system(), quick())
    }

    fn files(&self) -> BTreeMap<String, Vec<u8>> {
        files(self.dir.path())
    }

    fn accepts(&self, secret: &str) -> bool {
        self.callers.borrow().matches(secret.as_bytes())
    }
}

fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap());
    let read = |entry: std::fs::DirEntry| {
        (entry.file_name().into_string().unwrap(), std::fs::read(entry.path()).unwrap())
    };
    entries.map(read).collect()
}

/// Waits for a state and answers the code of the failure, if it is one.
async fn settled(client: &ControlPlane) -> Option<(&'static str, String)> {
    let mut status = client.status();
    let left = timeout(SOON, status.wait_for(|status| status.state != ControlPlaneState::Registering));
    let status = left.await.expect("no state").unwrap();
    match &status.state {
        Down { code, reason, .. } => Some((*code, reason.clone())),
        ControlPlaneState::Registering | ControlPlaneState::Registered => None,
    }
}

async fn until_registered(client: &ControlPlane) {
    let mut status = client.status();
    let registered = timeout(SOON, status.wait_for(|status| status.state == ControlPlaneState::Registered));
    if registered.await.is_err() {
        panic!("not registered: {:?}", client.status().borrow());
    }
}

async fn until_down(client: &ControlPlane, code: &str) {
    let mut status = client.status();
    let is_down = |status: &ControlPlaneStatus| matches!(&status.state, Down { code: c, .. } if *c == code);
    if timeout(SOON, status.wait_for(is_down)).await.is_err() {
        panic!("not {code}: {:?}", client.status().borrow());
    }
}
