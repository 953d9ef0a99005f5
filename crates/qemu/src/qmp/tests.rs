//! The client against a scripted QEMU that misbehaves in every way we could think of, and against the real one.

use std::{
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use proptest::prelude::*;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{UnixListener, UnixStream},
    task::JoinHandle,
    time::{sleep, timeout},
};

use super::{codec::FrameReader, *};

const SOON: Duration = Duration::from_millis(150);
const PLENTY: Duration = Duration::from_secs(10);
const GREETING: &[u8] =
    b"{\"QMP\": {\"version\": {\"qemu\": {\"micro\": 22, \"minor\": 2, \"major\": 7}, \"package\": \"x\"}}}\r\n";

type Expected<T> = fn(&T) -> bool;

/// The server's side of one accepted connection.
pub(crate) struct Script {
    frames: FrameReader<tokio::net::unix::OwnedReadHalf>,
    out: tokio::net::unix::OwnedWriteHalf,
}

impl Script {
    /// The name and id of the next command.
    pub(crate) async fn command(&mut self) -> (String, u64) {
        self.next_command().await.expect("the client closed early")
    }

    /// `None` when the client has closed.
    pub(crate) async fn next_command(&mut self) -> Option<(String, u64)> {
        let frame = self.frames.next().await.ok().flatten()?;
        let value: Value = serde_json::from_slice(&frame).unwrap();
        Some((value["execute"].as_str().unwrap().to_owned(), value["id"].as_u64().unwrap()))
    }

    async fn send(&mut self, bytes: impl AsRef<[u8]>) {
        // A client that has just given up is part of the scripts.
        let _ = self.out.write_all(bytes.as_ref()).await;
    }

    pub(crate) async fn answer(&mut self, id: u64, value: Value) {
        self.send(format!("{}\r\n", json!({"return": value, "id": id}))).await;
    }

    pub(crate) async fn negotiate(&mut self) {
        self.send(GREETING).await;
        let (command, id) = self.command().await;
        assert_eq!(command, "qmp_capabilities");
        self.answer(id, json!({})).await;
    }

    pub(crate) async fn client_is_gone(&mut self) -> bool {
        timeout(PLENTY, self.frames.next()).await.is_ok()
    }
}

pub(crate) struct FakeQemu {
    _dir: tempfile::TempDir,
    pub(crate) path: PathBuf,
    listener: UnixListener,
}

impl FakeQemu {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp.sock");
        let listener = UnixListener::bind(&path).unwrap();
        Self { _dir: dir, path, listener }
    }

    /// Serves one connection with `script` and hands the script's result back.
    pub(crate) fn serve<F, T>(
        self,
        script: impl FnOnce(Script) -> F + Send + 'static,
    ) -> (PathBuf, JoinHandle<T>)
    where
        F: Future<Output = T> + Send,
        T: Send + 'static,
    {
        let path = self.path.clone();
        let task = tokio::spawn(async move {
            let (stream, _) = self.listener.accept().await.unwrap();
            let (read, out) = stream.into_split();
            let result = script(Script { frames: FrameReader::new(read), out }).await;
            drop(self);
            result
        });
        (path, task)
    }
}

pub(crate) async fn connected<F, T>(
    script: impl FnOnce(Script) -> F + Send + 'static,
) -> (Qmp, QmpEvents, JoinHandle<T>)
where
    F: Future<Output = T> + Send,
    T: Send + 'static,
{
    let (path, task) = FakeQemu::new().serve(|mut qemu| async move {
        qemu.negotiate().await;
        script(qemu).await
    });
    let (qmp, events) = Qmp::connect(&path, PLENTY).await.unwrap();
    (qmp, events, task)
}

#[tokio::test]
async fn handshake_tells_version_and_peer() {
    let (qmp, _events, _task) = connected(|_| async {}).await;
    assert_eq!(qmp.version().qemu.major, 7);
    assert_eq!(qmp.peer_pid(), Some(std::process::id()));
}

#[tokio::test]
async fn no_usable_greeting_is_an_error_within_the_deadline() {
    let missing = Qmp::connect(Path::new("/nonexistent/qmp.sock"), SOON).await.unwrap_err();
    assert!(
        matches!(&missing, ConnectError::Connect { source, .. } if source.kind() == std::io::ErrorKind::NotFound)
    );

    let table: [(&'static [u8], Expected<ConnectError>); 6] = [
        (b"", |e| matches!(e, ConnectError::NotQmp { .. })),
        (
            b"SSH-2.0-dropbear\r\n",
            |e| matches!(e, ConnectError::NotQmp { sent, .. } if sent.contains("dropbear")),
        ),
        (b"{\"event\": \"STOP\"}\r\n", |e| matches!(e, ConnectError::NotQmp { .. })),
        (b"{\"QMP\": {}}\r\n", |e| {
            matches!(e, ConnectError::Negotiate { source: QmpError::Closed { .. }, .. })
        }),
        (b"{\"QMP\": {}}\r\n{\"error\": {\"class\": \"X\", \"desc\": \"no\"}, \"id\": 1}\r\n", |e| {
            matches!(e, ConnectError::Negotiate { source: QmpError::Refused { .. }, .. })
        }),
        (b"{\"QMP\": {}}\r\n}{\r\n", |e| matches!(e, ConnectError::Negotiate { .. })),
    ];
    for (sent, expected) in table {
        let (path, _task) = FakeQemu::new().serve(move |mut qemu| async move {
            qemu.send(sent).await;
        });
        let started = Instant::now();
        let error = Qmp::connect(&path, PLENTY).await.unwrap_err();
        assert!(expected(&error), "{}: {error:?}", sent.escape_ascii());
        assert!(started.elapsed() < PLENTY);
    }
}

#[tokio::test]
async fn silence_and_a_full_queue_are_both_no_greeting() {
    let qemu = FakeQemu::new();
    let error = Qmp::connect(&qemu.path, SOON).await.unwrap_err();
    assert!(matches!(error, ConnectError::NoGreeting { .. }));
    assert!(error.to_string().contains("another client"), "{error}");

    let listener =
        rustix::net::socket(rustix::net::AddressFamily::UNIX, rustix::net::SocketType::STREAM, None).unwrap();
    let path = qemu.path.with_file_name("full.sock");
    rustix::net::bind(&listener, &rustix::net::SocketAddrUnix::new(&path).unwrap()).unwrap();
    rustix::net::listen(&listener, 0).unwrap();
    let _first = UnixStream::connect(&path).await.unwrap();
    let started = Instant::now();
    let error = Qmp::connect(&path, SOON).await.unwrap_err();
    assert!(matches!(error, ConnectError::NoGreeting { .. }), "{error:?}");
    assert!(started.elapsed() >= SOON, "the queue may move until the deadline");
}

#[tokio::test]
async fn replies_find_their_commands_in_any_order_between_events() {
    let (qmp, mut events, task) = connected(|mut qemu| async move {
        let mut commands = Vec::new();
        for _ in 0..3 {
            commands.push(qemu.command().await);
        }
        for (command, id) in commands.into_iter().rev() {
            qemu.send(format!("{}\r\n", json!({"event": format!("BEFORE_{command}"), "new": 1}))).await;
            qemu.answer(id, json!(command)).await;
        }
        qemu.answer(99, json!("nobody asked")).await;
        qemu.send(b"{\"news\": true}\r\n{\"return\": 1}\r\n").await;
        let (_, id) = qemu.command().await;
        qemu.send(format!(
            "{}\r\n",
            json!({"error": {"class": "GenericError", "desc": "not now"}, "id": id})
        ))
        .await;
        let (_, id) = qemu.command().await;
        qemu.answer(id, json!({"running": "perhaps"})).await;
        qemu
    })
    .await;
    let ask = |name: &'static str| qmp.execute::<String>(name, Value::Null, PLENTY);
    let (a, b, c) = tokio::join!(ask("a"), ask("b"), ask("c"));
    assert_eq!((a.unwrap(), b.unwrap(), c.unwrap()), ("a".into(), "b".into(), "c".into()));
    let mut names = Vec::new();
    for _ in 0..3 {
        names.push(events.next().await.unwrap().name);
    }
    assert_eq!(names, ["BEFORE_c", "BEFORE_b", "BEFORE_a"]);
    let error = qmp.cont().await.unwrap_err();
    assert!(matches!(&error, QmpError::Refused { class, .. } if class == "GenericError"), "{error:?}");
    assert!(error.to_string().contains("cont") && error.to_string().contains("not now"));
    assert!(matches!(qmp.query_status().await, Err(QmpError::Malformed { .. })));
    assert_eq!(qmp.close_reason(), None);
    drop(task.await.unwrap());
}

#[tokio::test]
async fn a_late_reply_is_not_the_next_one() {
    let (qmp, _events, _task) = connected(|mut qemu| async move {
        let (_, slow) = qemu.command().await;
        let (_, fast) = qemu.command().await;
        qemu.answer(slow, json!("slow")).await;
        qemu.answer(fast, json!("fast")).await;
        qemu
    })
    .await;
    let error = qmp.execute::<String>("slow", Value::Null, SOON).await.unwrap_err();
    assert!(matches!(&error, QmpError::Timeout { command, after } if command == "slow" && *after == SOON));
    assert_eq!(qmp.execute::<String>("fast", Value::Null, PLENTY).await.unwrap(), "fast");
}

#[tokio::test]
async fn a_command_given_up_before_it_was_written_is_never_sent() {
    let (qmp, _events, task) = connected(|mut qemu| async move { qemu.command().await.0 }).await;
    // Polled once: queued, but the writer task has not run yet.
    tokio::select! {
        biased;
        done = qmp.execute::<Value>("given-up", Value::Null, PLENTY) => panic!("{done:?}"),
        () = std::future::ready(()) => {}
    }
    let _ = qmp.execute::<Value>("wanted", Value::Null, SOON).await;
    assert_eq!(task.await.unwrap(), "wanted");
}

#[tokio::test]
async fn every_way_to_end_tells_everybody_at_once() {
    let mut flood = vec![b'x'; FRAME_LIMIT + 1];
    flood.push(b'\n');
    let events = b"{\"event\": \"RESET\"}\r\n".repeat(EVENT_CAPACITY + 1);
    let table: [(Vec<u8>, Expected<CloseReason>); 5] = [
        (Vec::new(), |r| *r == CloseReason::Ended),
        (flood, |r| *r == CloseReason::FrameTooLong { limit: FRAME_LIMIT }),
        (b"qemu: oops\n".to_vec(), |r| matches!(r, CloseReason::Malformed(text) if text.contains("oops"))),
        (b"{\"error\": {\"class\": \"GenericError\", \"desc\": \"JSON parse error\"}}\r\n".to_vec(), |r| {
            matches!(r, CloseReason::Desynchronised(_))
        }),
        (events, |r| *r == CloseReason::EventOverflow { capacity: EVENT_CAPACITY }),
    ];
    for (bytes, expected) in table {
        let (qmp, mut events, _task) = connected(|mut qemu| async move {
            qemu.command().await;
            qemu.send(bytes).await;
        })
        .await;
        let started = Instant::now();
        let error = qmp.execute::<Value>("query-status", Value::Null, PLENTY).await.unwrap_err();
        let QmpError::Closed { reason, .. } = error else { panic!("{error:?}") };
        assert!(expected(&reason), "{reason:?}");
        assert!(matches!(qmp.stop().await, Err(QmpError::Closed { .. })));
        let last = loop {
            if let Err(reason) = events.next().await {
                break reason;
            }
        };
        assert_eq!((Some(last), events.next().await.unwrap_err()), (qmp.close_reason(), reason));
        assert!(started.elapsed() < PLENTY);
    }
}

#[tokio::test]
async fn dropping_the_last_handle_closes_the_connection() {
    let (qmp, events, task) = connected(|mut qemu| async move { qemu.client_is_gone().await }).await;
    let second = qmp.clone();
    drop(qmp);
    sleep(Duration::from_millis(20)).await;
    assert!(!task.is_finished(), "a clone still holds it");
    drop((second, events));
    assert!(task.await.unwrap());
}

#[tokio::test]
async fn events_nobody_wants_do_no_harm() {
    let (qmp, events, _task) = connected(|mut qemu| async move {
        let (_, id) = qemu.command().await;
        qemu.send(b"{\"event\": \"RESET\"}\r\n".repeat(2 * EVENT_CAPACITY)).await;
        qemu.answer(id, json!({"running": true, "status": "from-the-future"})).await;
        qemu
    })
    .await;
    drop(events);
    let status = qmp.query_status().await.unwrap();
    assert!(status.running && status.state == RunState::Unknown("from-the-future".to_owned()));
}

#[tokio::test]
async fn a_qemu_that_does_not_read_is_given_up() {
    let (qmp, _events, _task) = connected(|qemu| async move {
        // Holds the connection open and never reads again.
        let _ = qemu.out.writable().await;
        std::future::pending::<()>().await;
        drop(qemu.frames);
    })
    .await;
    let big = json!("x".repeat(8 << 20));
    let error = qmp.execute::<Value>("big", big, PLENTY).await.unwrap_err();
    assert!(matches!(error, QmpError::Closed { reason: CloseReason::WriteStalled { .. }, .. }), "{error:?}");
}

/// What a confused or hostile peer may send, piece by piece.
fn pieces() -> impl Strategy<Value = Vec<Vec<u8>>> {
    let piece = prop_oneof![
        proptest::collection::vec(any::<u8>(), 0..40),
        Just(GREETING.to_vec()),
        Just(b"{\"event\": \"SHUTDOWN\", \"data\": {\"guest\": true}}\r\n".to_vec()),
        (0u64..6).prop_map(|id| format!("{{\"return\": {{}}, \"id\": {id}}}\r\n").into_bytes()),
        (0u64..6).prop_map(|id| format!("{{\"error\": {{}}, \"id\": {id}}}\n").into_bytes()),
        Just(b"{\"return\": ".to_vec()),
        Just(b"\r\n".to_vec()),
        Just(b"{\"event\": \"STOP\"}".to_vec()),
    ];
    proptest::collection::vec(piece, 0..12)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn whatever_comes_nothing_hangs(negotiated in any::<bool>(), pieces in pieces(), hold in any::<bool>()) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let deadline = Duration::from_millis(40);
        let started = Instant::now();
        runtime.block_on(async move {
            let (path, _task) = FakeQemu::new().serve(move |mut qemu| async move {
                if negotiated {
                    qemu.negotiate().await;
                }
                for piece in pieces {
                    qemu.send(piece).await;
                    tokio::task::yield_now().await;
                }
                if hold {
                    sleep(PLENTY).await;
                }
            });
            let Ok((qmp, mut events)) = Qmp::connect(&path, deadline).await else { return };
            let _ = qmp.execute::<Value>("query-status", Value::Null, deadline).await;
            let _ = timeout(deadline, async { while events.next().await.is_ok() {} }).await;
            let _ = qmp.execute::<Value>("cont", Value::Null, deadline).await;
        });
        prop_assert!(started.elapsed() < Duration::from_secs(3), "{:?}", started.elapsed());
    }
}

/// A real QEMU without a machine, stopped; ended when dropped.
pub(crate) struct RealQemu {
    child: Child,
    _dir: tempfile::TempDir,
    pub(crate) socket: PathBuf,
}

impl RealQemu {
    pub(crate) async fn start(args: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("qmp.sock");
        let qmp = format!("unix:{},server=on,wait=off", socket.display());
        let child = Command::new("qemu-system-x86_64")
            .args(["-S", "-nodefaults", "-no-user-config", "-display", "none", "-qmp", &qmp])
            .args(args)
            .stdin(Stdio::null())
            .spawn()
            .expect("these tests need qemu-system-x86_64");
        let started = Instant::now();
        // There and listening are two moments.
        while UnixStream::connect(&socket).await.is_err() {
            assert!(started.elapsed() < PLENTY, "QEMU opened no socket");
            sleep(Duration::from_millis(5)).await;
        }
        Self { child, _dir: dir, socket }
    }

    pub(crate) async fn connect(&self) -> (Qmp, QmpEvents) {
        Qmp::connect(&self.socket, PLENTY).await.unwrap()
    }

    fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).unwrap();
    }
}

impl Drop for RealQemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[tokio::test]
async fn real_qemu_answers_the_typed_commands() {
    let uuid = "1b4e28ba-2fa1-41d2-883f-0016d3cca427";
    let qemu = RealQemu::start(&["-machine", "none", "-uuid", uuid]).await;
    let (qmp, mut events) = qemu.connect().await;
    assert_eq!(qmp.peer_pid(), Some(qemu.child.id()));
    assert_eq!(qmp.query_uuid(PLENTY).await.unwrap().to_string(), uuid);
    assert_eq!(&qmp.query_version().await.unwrap(), qmp.version());
    assert_eq!(qmp.query_status().await.unwrap().state, RunState::Prelaunch);
    qmp.cont().await.unwrap();
    assert!(qmp.query_status().await.unwrap().running);
    qmp.stop().await.unwrap();
    assert_eq!(qmp.query_status().await.unwrap().state, RunState::Paused);
    qmp.system_reset().await.unwrap();
    let error = qmp.execute::<Value>("no-such-command", Value::Null, PLENTY).await.unwrap_err();
    assert!(matches!(error, QmpError::Refused { class, .. } if class == "CommandNotFound"));
    qmp.quit().await.unwrap();
    let mut seen = Vec::new();
    let reason = loop {
        match events.next().await {
            Ok(event) => seen.push(event.event()),
            Err(reason) => break reason,
        }
    };
    assert_eq!(reason, CloseReason::Ended);
    assert_eq!(seen[..2], [Event::Resume, Event::Stop]);
    let quit = Event::Shutdown { guest: false, reason: "host-qmp-quit".to_owned() };
    assert!(seen.contains(&quit), "{seen:?}");
}

#[tokio::test]
async fn real_qemu_serves_one_client_and_the_next_after_it() {
    let qemu = RealQemu::start(&["-machine", "none"]).await;
    let (first, _events) = qemu.connect().await;
    let error = Qmp::connect(&qemu.socket, SOON).await.unwrap_err();
    assert!(matches!(error, ConnectError::NoGreeting { .. }), "{error:?}");
    first.query_status().await.unwrap();
    drop((first, _events));
    let (again, _events) = qemu.connect().await;
    again.query_status().await.unwrap();
}

#[tokio::test]
async fn a_stopped_qemu_is_silent_and_comes_back() {
    let qemu = RealQemu::start(&["-machine", "none"]).await;
    let (qmp, events) = qemu.connect().await;
    qemu.signal(rustix::process::Signal::STOP);
    let started = Instant::now();
    let error = qmp.execute::<Value>("query-status", Value::Null, SOON).await.unwrap_err();
    assert!(matches!(error, QmpError::Timeout { .. }), "{error:?}");
    drop((qmp, events));
    for _ in 0..4 {
        let error = Qmp::connect(&qemu.socket, SOON).await.unwrap_err();
        assert!(matches!(error, ConnectError::NoGreeting { .. }), "{error:?}");
    }
    assert!(started.elapsed() < Duration::from_secs(5));
    qemu.signal(rustix::process::Signal::CONT);
    let (qmp, _events) = qemu.connect().await;
    qmp.query_status().await.unwrap();
}

#[tokio::test]
async fn real_qemu_is_not_confused_by_what_we_send() {
    let qemu = RealQemu::start(&["-machine", "none"]).await;
    let mut raw = UnixStream::connect(&qemu.socket).await.unwrap();
    raw.write_all(b"{\"execute\": \"qmp_capabilities\", \"id\": 1}\n garbage }{ \n").await.unwrap();
    let mut seen = vec![0; 4096];
    let read = timeout(PLENTY, raw.read(&mut seen)).await.unwrap().unwrap();
    assert!(read > 0);
    drop(raw);
    let (qmp, _events) = qemu.connect().await;
    qmp.query_status().await.unwrap();
}
