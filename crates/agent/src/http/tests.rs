//! The API over real sockets, with instances that rest: nothing of the host is touched.

mod answers;
mod connections;
mod fuzz;
mod local;

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use jiff::Timestamp;
use qudata_guest::keys::{HostKey, ManagementKey};
use qudata_host::{launch::Launcher, size::ByteSize};
use qudata_qemu::egress::Egress;
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::oneshot,
    task::JoinHandle,
    time::timeout,
};
use uuid::Uuid;

use super::*;
use crate::{
    gpus::Gpus,
    instance::{
        record::{InstanceRecord, InstanceSpec, Leases, Phase},
        task::Beginning,
    },
    pages::Pages,
    paths::Paths,
    secret::AgentSecret,
    settings::{LoadFrom, Settings},
    site::Site,
    store::Store,
};

/// An API that serves.
pub(super) struct Served {
    pub(super) address: SocketAddr,
    pub(super) socket: PathBuf,
    pub(super) secret: String,
    pub(super) instances: Instances,
    stop: Option<oneshot::Sender<()>>,
    ended: JoinHandle<()>,
    _dir: tempfile::TempDir,
}

impl Served {
    /// With the ordinary limits and `count` instances.
    pub(super) async fn with(count: u32) -> Self {
        Self::limited(count, Limits::default()).await
    }

    pub(super) async fn limited(count: u32, limits: Limits) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let site = site(dir.path());
        let secret_file = site.paths.secret();
        let secret = AgentSecret::load_or_create(&secret_file).unwrap();
        let socket = site.paths.socket();
        let instances = Instances::new(site, 15001);
        for number in 0..count {
            instances.adopt(record(number), Beginning::Rest);
        }
        let tcp = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = tcp.local_addr().unwrap();
        let unix = sockets::listen_unix(&socket).await.unwrap();
        let (stop, stopped) = oneshot::channel();
        let api = Api { limits, ..Api::new(instances.clone(), secret) };
        let ended = tokio::spawn(serve(api, tcp, unix, async {
            let _ = stopped.await;
        }));
        let secret = std::fs::read_to_string(secret_file).unwrap();
        Self { address, socket, secret, instances, stop: Some(stop), ended, _dir: dir }
    }

    /// Tells the API to end and waits for it.
    pub(super) async fn stop(mut self) {
        self.stop.take().unwrap().send(()).unwrap();
        timeout(Duration::from_secs(10), &mut self.ended).await.expect("ends").unwrap();
    }

    /// A call with the secret.
    pub(super) async fn call(&self, method: &str, path: &str, body: &str) -> Answer {
        let head =
            format!("{method} {path} HTTP/1.1\r\nX-Agent-Secret: {}\r\nConnection: close\r\n", self.secret);
        self.raw(format!("{head}Content-Length: {}\r\n\r\n{body}", body.len()).as_bytes()).await
    }

    /// Bytes as they are, and the first answer to them.
    pub(super) async fn raw(&self, bytes: &[u8]) -> Answer {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        // The answer may come before all is sent.
        let _ = stream.write_all(bytes).await;
        Answer::parse(&read_all(&mut stream).await)
    }

    pub(super) fn ids(&self) -> Vec<Uuid> {
        self.instances.list().iter().map(|view| view.id).collect()
    }
}

/// Everything until the other side is done.
pub(super) async fn read_all(stream: &mut (impl AsyncReadExt + Unpin)) -> Vec<u8> {
    let mut bytes = Vec::new();
    timeout(Duration::from_secs(20), stream.read_to_end(&mut bytes))
        .await
        .expect("the connection is closed")
        .unwrap();
    bytes
}

/// One answer.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) status: u16,
    pub(super) head: String,
    pub(super) body: String,
}

impl Answer {
    pub(super) fn parse(bytes: &[u8]) -> Self {
        let text = String::from_utf8_lossy(bytes);
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no answer: {text:?}"));
        let status = head.split(' ').nth(1).and_then(|s| s.parse().ok()).unwrap_or_else(|| panic!("{head}"));
        Self { status, head: head.to_ascii_lowercase(), body: body.to_owned() }
    }

    pub(super) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }

    /// Checks that this is a refusal in the contract's form.
    #[track_caller]
    pub(super) fn refused(&self, status: u16, code: &str) -> String {
        let body = self.json();
        assert_eq!(
            (self.status, body["ok"].as_bool(), body["code"].as_str()),
            (status, Some(false), Some(code)),
            "{self:?}"
        );
        assert!(self.head.contains("content-type: application/json"), "{self:?}");
        body["error"].as_str().unwrap().to_owned()
    }

    #[track_caller]
    pub(super) fn data(&self) -> Value {
        let body = self.json();
        assert_eq!((self.status, body["ok"].as_bool()), (200, Some(true)), "{self:?}");
        body["data"].clone()
    }
}

fn site(dir: &std::path::Path) -> Arc<Site> {
    let (data, run) = (dir.join("data"), dir.join("run"));
    for dir in [&data, &run] {
        std::fs::create_dir(dir).unwrap();
    }
    let flag = |key, value: &str| (key, value.to_owned());
    let flags = vec![
        flag("standalone", "true"),
        flag("debug", "true"),
        flag("data_dir", data.to_str().unwrap()),
        flag("vm_run_dir", run.to_str().unwrap()),
    ];
    let from = LoadFrom {
        file: None,
        env: Vec::new(),
        flags,
        read: &|path| std::fs::read(path),
        exists: &|path| path.exists(),
    };
    let paths = Paths::new(&data, &run, &data.join("log"));
    let store = Store::open(&paths.store()).unwrap().store;
    Arc::new(Site {
        settings: Settings::load(&from).unwrap(),
        gpus: Gpus::none(store.clone()),
        pages: Pages::of("/nonexistent"),
        qemu_version: None,
        store,
        launcher: Launcher::detached("/nonexistent/shim".into(), Vec::new()),
        egress: Egress::new("qudata_test_http".parse().unwrap(), Vec::new()),
        management_key: ManagementKey::generate().unwrap(),
        vm_groups: Vec::new(),
        program: "/nonexistent/agent".into(),
        boot_id: "boot".into(),
        changes: tokio::sync::watch::Sender::new(()),
        paths,
    })
}

fn record(number: u32) -> InstanceRecord {
    let now = Timestamp::from_second(1_700_000_000 + i64::from(number)).unwrap();
    let port = u16::try_from(number).unwrap();
    InstanceRecord {
        id: Uuid::now_v7(),
        created_at: now,
        spec: InstanceSpec {
            name: format!("vm-{number}"),
            cpus: 1,
            memory: ByteSize::from_mib(256),
            storage: ByteSize::from_gib(1),
            ports: [22].into(),
            ssh_keys: Vec::new(),
            tunnel_token: None,
        },
        leases: Leases {
            slot: number,
            ports: BTreeMap::from([(22, 10_000 + port)]),
            public: BTreeMap::new(),
            management_port: 30_001 + port,
            gpus: Vec::new(),
        },
        host_key: HostKey::generate().unwrap().public().to_line(),
        user_data: None,
        done: std::collections::BTreeSet::new(),
        phase: Phase::Stopped { reason: "the guest powered off".into() },
        since: now,
        ready_at: Some(now),
        incarnation: 1,
        boot_id: "boot".into(),
        base: None,
    }
}
