//! Services that hang, lie, flood and redirect. After each of them the host is what it was, the client still tries, not too
//! often, and has taken in no more than it may.

use super::*;

/// What the kernel keeps for two sockets that nobody reads from, and the largest reply.
const MOST_TAKEN: usize = 16 << 20;

/// What a script does after it has read the call.
type Script = fn(TcpStream, Arc<AtomicUsize>) -> Pin<Box<dyn Future<Output = ()> + Send>>;

/// A reply, whole and at once, then the end of the connection.
macro_rules! say {
    ($text:expr) => {
        |mut stream, _| {
            Box::pin(async move {
                let _ = stream.write_all(($text).as_ref()).await;
                let _ = stream.shutdown().await;
            })
        }
    };
}

/// A success with this as its body.
macro_rules! json {
    ($body:expr) => {
        say!({
            let body: String = ($body).into();
            format!(
                "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
                body.len()
            )
        })
    };
}

/// A reply that never ends: a beginning, and then the same again and again, with a pause between.
macro_rules! flood {
    ($start:expr, $again:expr, $pause:expr) => {
        |mut stream, sent| {
            Box::pin(async move {
                let start: &[u8] = $start.as_ref();
                let again: Vec<u8> = $again.into();
                let pause: Duration = $pause;
                let mut next = start.to_vec();
                while stream.write_all(&next).await.is_ok() {
                    sent.fetch_add(next.len(), Ordering::Relaxed);
                    next.clone_from(&again);
                    if !pause.is_zero() {
                        tokio::time::sleep(pause).await;
                    }
                }
            })
        }
    };
}

/// Says this and then nothing, for ever.
macro_rules! hang {
    ($text:expr) => {
        |mut stream, _| {
            Box::pin(async move {
                let _ = stream.write_all($text.as_ref()).await;
                std::future::pending::<()>().await;
            })
        }
    };
}

const SLOW: Duration = Duration::from_millis(100);
const FAST: Duration = Duration::ZERO;
const GONE: &str = "control_plane_unreachable";
const ODD: &str = "control_plane_reply";
/// Too large, or too late where the machine is busy.
const EITHER: &str = "control_plane_";

/// Name, what it does, and what the client says about it.
const SCRIPTS: &[(&str, Script, &str)] = &[
    ("silence", hang!(""), GONE),
    ("hang in the status line", hang!("HTTP/1.1 2"), GONE),
    ("hang in the head", hang!("HTTP/1.1 200 OK\r\nContent-Type: appl"), GONE),
    ("hang before the body", hang!("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n"), GONE),
    ("hang in the body", hang!("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n{\"ok\""), GONE),
    ("hang in a chunk", hang!("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{\"o"), GONE),
    ("a head byte by byte", flood!("HTTP/1.1 200 OK\r\nX: ", "x", SLOW), GONE),
    ("a body byte by byte", flood!("HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n", "x", SLOW), GONE),
    ("a body without end", flood!("HTTP/1.1 200 OK\r\n\r\n", vec![b' '; 1 << 16], FAST), EITHER),
    (
        "chunks without end",
        flood!(
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
            [b"10000\r\n", vec![b' '; 1 << 16].as_slice(), b"\r\n"].concat(),
            FAST
        ),
        EITHER,
    ),
    (
        "small chunks without end",
        flood!("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", "1\r\n \r\n".repeat(999), FAST),
        GONE,
    ),
    (
        "an extension of a chunk without end",
        flood!("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1;", vec![b'x'; 1 << 16], FAST),
        GONE,
    ),
    (
        "trailers without end",
        flood!("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n", "X: y\r\n".repeat(999), FAST),
        GONE,
    ),
    (
        "an exabyte announced",
        flood!("HTTP/1.1 200 OK\r\nContent-Length: 1000000000000000000\r\n\r\n", vec![b' '; 1 << 16], FAST),
        EITHER,
    ),
    ("head lines without end", flood!("HTTP/1.1 200 OK\r\n", "X-A: b\r\n".repeat(999), FAST), GONE),
    ("one head line without end", flood!("HTTP/1.1 200 OK\r\nX-A: ", vec![b'x'; 1 << 16], FAST), GONE),
    ("interim replies without end", flood!("", "HTTP/1.1 100 Continue\r\n\r\n".repeat(99), FAST), GONE),
    ("a failure without end", flood!("HTTP/1.1 500 No\r\n\r\n", vec![b' '; 1 << 16], FAST), GONE),
    (
        "a redirect to itself",
        say!("HTTP/1.1 302 Found\r\nLocation: /v0/init\r\nContent-Length: 0\r\n\r\n"),
        ODD,
    ),
    (
        "a redirect that keeps the body",
        say!("HTTP/1.1 308 Moved\r\nLocation: init\r\nContent-Length: 0\r\n\r\n"),
        ODD,
    ),
    ("a captive portal", say!("HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n<html>log in</html>"), ODD),
    ("no reply to a success", say!("HTTP/1.1 204 No Content\r\n\r\n"), ODD),
    ("JSON cut short", json!("{\"ok\":true,\"data\":{\"secret_key\":\"new-secret-01234"), ODD),
    (
        "wrong types",
        json!(r#"{"ok":true,"data":{"secret_key":12345678901234567890,"tunnel_token":[]}}"#),
        ODD,
    ),
    (
        "wrong types of what is not used",
        json!(r#"{"ok":true,"data":{"secret_key":"new-secret-0123456789","agent_created":"yes"}}"#),
        ODD,
    ),
    (
        "huge numbers",
        json!(format!(r#"{{"ok":true,"data":{{"host_exists":{}}}}}"#, "9".repeat(100_000))),
        ODD,
    ),
    ("deep nesting", json!("[".repeat(500_000)), ODD),
    (
        "two secrets",
        json!(
            r#"{"ok":true,"data":{"secret_key":"new-secret-0123456789","secret_key":"new-secret-9876543210"}}"#
        ),
        ODD,
    ),
    (
        "invalid UTF-8",
        say!(b"HTTP/1.1 200 OK\r\n\r\n{\"ok\":true,\"data\":{\"secret_key\":\"new-secret-0123456789\xff\"}}"),
        ODD,
    ),
    (
        "a secret that is a header",
        json!(r#"{"ok":true,"data":{"secret_key":"new-secret-0123456789\r\nX-Evil: 1"}}"#),
        ODD,
    ),
    (
        "a secret of 100 kB",
        json!(format!(r#"{{"ok":true,"data":{{"secret_key":"{}"}}}}"#, "x".repeat(100_000))),
        ODD,
    ),
    ("a short secret", json!(r#"{"ok":true,"data":{"secret_key":"x"}}"#), ODD),
    ("a success that is none", json!(r#"{"ok":false,"data":{"secret_key":"new-secret-0123456789"}}"#), ODD),
    // orig F2: a token became part of frpc's configuration.
    (
        "orig_f2 quotes",
        json!(
            r#"{"ok":true,"data":{"secret_key":"new-secret-0123456789","tunnel_token":"x\"]\n[[proxies]]\nname = \"evil"}}"#
        ),
        ODD,
    ),
    ("orig_f2 braces", json!(r#"{"ok":true,"data":{"tunnel_token":"{{ .Envs.QUDATA_API_KEY }}"}}"#), ODD),
    ("orig_f2 unicode", json!(r#"{"ok":true,"data":{"tunnel_token":"tok\u0435n"}}"#), ODD),
    (
        "orig_f2 10 kB",
        json!(format!(r#"{{"ok":true,"data":{{"tunnel_token":"{}"}}}}"#, "x".repeat(10_000))),
        ODD,
    ),
    (
        "compressed",
        say!(b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 10\r\n\r\n\x1f\x8b\x08\0\0\0\0\0\x02\xff"),
        ODD,
    ),
    ("no such path", say!("HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"), ODD),
    ("unauthorized", say!("HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n"), "control_plane_refused"),
    ("forbidden", say!("HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n"), "control_plane_refused"),
    (
        "too many requests",
        say!("HTTP/1.1 429 Slow Down\r\nRetry-After: 0\r\nContent-Length: 0\r\n\r\n"),
        GONE,
    ),
    ("internal error", say!("HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n"), GONE),
    // A clock far off, the service's or ours: dates are not looked at.
    (
        "unavailable until 2100",
        say!(
            "HTTP/1.1 503 No\r\nDate: Thu, 01 Jan 1970 00:00:00 GMT\r\nRetry-After: Fri, 31 Dec 2100 23:59:59 GMT\r\n\r\n"
        ),
        GONE,
    ),
    (
        "a body shorter than announced",
        say!("HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{\"ok\":true,"),
        GONE,
    ),
    ("two lengths", say!("HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 200\r\n\r\n{}"), GONE),
    ("a negative length", say!("HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n{}"), GONE),
    (
        "a chunk of impossible size",
        say!("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nFFFFFFFFFFFFFFFFF\r\nx"),
        GONE,
    ),
    ("another protocol", say!("SSH-2.0-OpenSSH_9.2\r\n"), GONE),
    ("a version that does not exist", say!("HTTP/9.9 200 OK\r\n\r\n{}"), GONE),
    ("an impossible status", say!("HTTP/1.1 99999 OK\r\n\r\n{}"), GONE),
    ("NUL in the head", say!("HTTP/1.1 200 OK\r\nX: a\0b\r\n\r\n{}"), GONE),
    ("nothing", say!(""), GONE),
    (
        "a reset",
        |stream, _| {
            Box::pin(async move {
                #[allow(deprecated, reason = "a reset is the point")]
                stream.set_linger(Some(Duration::ZERO)).unwrap();
            })
        },
        GONE,
    ),
    (
        "a reply before the call, and a reset",
        |mut stream, _| {
            Box::pin(async move {
                let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n{").await;
                #[allow(deprecated, reason = "a reset is the point")]
                stream.set_linger(Some(Duration::ZERO)).unwrap();
            })
        },
        GONE,
    ),
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_script_of_a_hostile_service_changes_a_host() {
    assert!(SCRIPTS.len() >= 30, "{}", SCRIPTS.len());
    let mut running = JoinSet::new();
    for &(name, script, expected) in SCRIPTS {
        running.spawn(async move {
            withstand(name, script, expected).await;
            name
        });
    }
    let mut withstood = 0;
    while let Some(done) = running.join_next().await {
        done.unwrap();
        withstood += 1;
    }
    assert_eq!(withstood, SCRIPTS.len());
}

async fn withstand(name: &str, script: Script, expected: &str) {
    let sent = Arc::new(Mutex::new(Vec::new()));
    let all_sent = sent.clone();
    let service = Service::start(Arc::new(move |mut stream| {
        let counter = Arc::new(AtomicUsize::new(0));
        all_sent.lock().unwrap().push(counter.clone());
        Box::pin(async move {
            if Asked::read(&mut stream).await.is_some() {
                script(stream, counter).await;
            }
        })
    }))
    .await;
    let mut host = Host::registered(&service.url());
    let before = host.files();
    let began = Instant::now();
    let client = host.start();
    let (code, reason) = settled(&client).await.unwrap_or_else(|| panic!("{name}: it was believed"));
    assert!(code.starts_with(expected), "{name}: {code}: {reason}");
    assert!(!reason.contains("secret-0123456789") && !reason.contains("ak-canary"), "{name}: {reason}");
    // The first answer within the bounds of a call, with room for a busy machine.
    assert!(began.elapsed() < quick().limits.total * 4, "{name}: {:?}", began.elapsed());
    until(&format!("{name}: the client tries again"), || service.connections() >= 3).await;
    tokio::time::sleep(quick().pauses.longest).await;
    let most = began.elapsed().as_millis() / quick().pauses.shortest.as_millis() + 1;
    let made = service.connections();
    assert!(u128::try_from(made).unwrap() <= most, "{name}: {made} calls in {:?}", began.elapsed());
    assert_eq!(host.files(), before, "{name}: files");
    assert!(host.accepts(OLD_SECRET), "{name}: callers");
    assert_eq!(client.tunnel_token().borrow().as_ref().map(Sealed::open), Some(OLD_TOKEN), "{name}");
    let taken = sent.lock().unwrap().iter().map(|sent| sent.load(Ordering::Relaxed)).max().unwrap();
    assert!(taken <= MOST_TAKEN, "{name}: {taken} bytes were taken in");
}

#[tokio::test]
async fn a_redirect_elsewhere_is_not_followed() {
    let elsewhere = Desk::default();
    let other = elsewhere.open(|_| (200, serde_json::json!({"ok": true}))).await;
    let (url, desk) = (format!("{}/init", other.url()), Desk::default());
    let service = Service::start(Arc::new(move |mut stream| {
        let reply = format!("HTTP/1.1 307 Moved\r\nLocation: {url}\r\nContent-Length: 0\r\n\r\n");
        let desk = desk.clone();
        Box::pin(async move {
            if let Some(asked) = Asked::read(&mut stream).await {
                desk.asked.lock().unwrap().push(asked);
                let _ = stream.write_all(reply.as_bytes()).await;
            }
        })
    }))
    .await;
    let mut host = Host::registered(&service.url());
    let client = host.start();
    let (code, reason) = settled(&client).await.unwrap();
    assert_eq!(code, "control_plane_reply", "{reason}");
    until("it tries again", || service.connections() >= 4).await;
    assert_eq!(other.connections(), 0, "the secret went elsewhere");
}

#[tokio::test]
async fn a_service_that_is_not_there_is_tried_ever_more_rarely() {
    let gone = Service::start(Arc::new(|_| Box::pin(async {}))).await;
    let url = gone.url();
    drop(gone);
    let mut host = Host::registered(&url);
    let before = host.files();
    let client = host.start();
    let (code, reason) = settled(&client).await.unwrap();
    assert_eq!(code, "control_plane_unreachable");
    assert!(reason.contains("cannot connect to 127.0.0.1:"), "{reason}");
    assert_eq!(host.files(), before);
    assert!(host.accepts(OLD_SECRET));
}

#[tokio::test]
async fn a_service_that_gives_a_new_secret_each_time_and_refuses_it_leaves_a_host_of_one_piece() {
    let (desk, count) = (Desk::default(), AtomicUsize::new(0));
    let service = desk
        .open(move |asked| {
            if !asked.what.ends_with("/init") {
                return (403, serde_json::json!({"ok": false, "error": "no"}));
            }
            let n = count.fetch_add(1, Ordering::Relaxed);
            let secret = format!("new-secret-{n:016}");
            (200, serde_json::json!({"ok": true, "data": {"secret_key": secret, "tunnel_token": format!("t{n}"), "host_exists": true}}))
        })
        .await;
    let mut host = Host::registered(&service.url());
    *host.stats.lock().unwrap() = Some(StatsInput { status: qudata_api::Status::Running, sample: None });
    let began = Instant::now();
    let client = host.start();
    desk.until_asked("/init", 5).await;
    // Two tasks, each bounded by itself.
    let most = 2 * (began.elapsed().as_millis() / quick().pauses.shortest.as_millis() + 2);
    let made = service.connections();
    assert!(u128::try_from(made).unwrap() <= most, "{made} calls in {:?}", began.elapsed());
    // Whatever moment it ends at, disk and memory agree.
    drop(client);
    tokio::time::sleep(Duration::from_millis(100)).await;
    let files = host.files();
    let kept = String::from_utf8(files["agent_secret"].clone()).unwrap();
    assert!(kept.starts_with("new-secret-") && files.len() == 3, "{:?}", files.keys());
    let token = String::from_utf8(files["tunnel_token"].clone()).unwrap();
    assert_eq!(token.strip_prefix('t').unwrap().parse::<u64>(), kept["new-secret-".len()..].parse::<u64>());
}

#[tokio::test]
async fn tls_that_is_none_is_said_so() {
    let garbage: Act = Arc::new(|mut stream| {
        Box::pin(async move {
            let _ = stream.write_all(&[0x16; 4096]).await;
            std::future::pending::<()>().await;
        })
    });
    let silence: Act = Arc::new(|stream| {
        Box::pin(async move {
            let _kept = stream;
            std::future::pending::<()>().await;
        })
    });
    for (act, expected) in [(garbage, "control_plane_tls"), (silence, "control_plane_unreachable")] {
        let service = Service::start(act).await;
        let mut host = Host::registered(&service.url().replace("http:", "https:"));
        let before = host.files();
        let client = host.start();
        let (code, reason) = settled(&client).await.unwrap();
        assert_eq!(code, expected, "{reason}");
        until("it tries again", || service.connections() >= 2).await;
        assert_eq!(host.files(), before);
    }
}
