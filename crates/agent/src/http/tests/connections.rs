//! Bounds on connections, heads and bodies, with bytes written by hand.

use super::*;

fn short() -> Limits {
    Limits {
        connections: 4,
        head_deadline: Duration::from_millis(300),
        body_deadline: Duration::from_millis(300),
        farewell: Duration::from_millis(500),
        shutdown: Duration::from_millis(500),
        ..Limits::default()
    }
}

const PING: &[u8] = b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n";

async fn read_some(stream: &mut TcpStream) -> String {
    let mut buffer = vec![0; 4096];
    let count = timeout(Duration::from_secs(5), stream.read(&mut buffer)).await.unwrap().unwrap();
    String::from_utf8_lossy(&buffer[..count]).into_owned()
}

#[tokio::test]
async fn a_head_may_arrive_byte_by_byte_and_connections_are_reused() {
    let served = Served::with(0).await;
    let mut stream = TcpStream::connect(served.address).await.unwrap();
    stream.set_nodelay(true).unwrap();
    for byte in PING {
        stream.write_all(&[*byte]).await.unwrap();
    }
    assert!(read_some(&mut stream).await.ends_with("{\"ok\":true}"));
    stream.write_all(&[PING, PING].concat()).await.unwrap();
    let mut both = read_some(&mut stream).await;
    while both.matches("{\"ok\":true}").count() < 2 {
        both += &read_some(&mut stream).await;
    }
}

#[tokio::test]
async fn a_slow_head_is_408() {
    let served = Served::limited(0, short()).await;
    let mut stream = TcpStream::connect(served.address).await.unwrap();
    for byte in PING.iter().take(20) {
        // A byte now and then does not move the deadline.
        if stream.write_all(&[*byte]).await.is_err() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
    let answer = Answer::parse(&read_all(&mut stream).await);
    let said = answer.refused(408, "request_timeout");
    assert!(said.contains("head did not arrive"), "{said}");
    assert!(answer.head.contains("connection: close"));
}

#[tokio::test]
async fn an_idle_connection_is_closed() {
    let served = Served::limited(0, short()).await;
    let mut stream = TcpStream::connect(served.address).await.unwrap();
    stream.write_all(PING).await.unwrap();
    assert!(read_some(&mut stream).await.contains("200 OK"));
    let began = tokio::time::Instant::now();
    assert!(read_all(&mut stream).await.is_empty());
    assert!(began.elapsed() >= Duration::from_millis(200), "not before its time");
}

#[tokio::test]
async fn a_large_head_is_431() {
    let served = Served::with(0).await;
    for size in [16 << 10, 1 << 20] {
        let head = format!("GET /ping HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(size));
        let answer = served.raw(head.as_bytes()).await;
        let said = answer.refused(431, "header_too_large");
        assert!(said.contains("16384"), "{said}");
        assert!(answer.head.contains("connection: close"));
    }
    let many = format!("GET /ping HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(200));
    served.raw(many.as_bytes()).await.refused(431, "header_too_large");
    let fits = format!("GET /ping HTTP/1.1\r\nConnection: close\r\nX: {}\r\n\r\n", "x".repeat(16_000));
    assert_eq!(served.raw(fits.as_bytes()).await.status, 200);
}

/// hyper bounds later heads: the status is right, there is no body.
#[tokio::test]
async fn a_large_head_later_on_a_connection_is_431_too() {
    let served = Served::with(0).await;
    let later = format!("GET /ping HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(40_000));
    let mut stream = TcpStream::connect(served.address).await.unwrap();
    stream.write_all(PING).await.unwrap();
    assert!(read_some(&mut stream).await.contains("200 OK"));
    stream.write_all(later.as_bytes()).await.unwrap();
    assert_eq!(Answer::parse(&read_all(&mut stream).await).status, 431);
}

#[tokio::test]
async fn what_is_no_http_is_400() {
    let served = Served::with(0).await;
    for bytes in [
        &b"hello\r\n\r\n"[..],
        b"\x16\x03\x01\x02\x00\n\n",
        b"GET /ping HTTP/1.1\r\nContent-Length: x\r\n\r\n",
    ] {
        let said = served.raw(bytes).await.refused(400, "malformed_body");
        assert!(said.contains("HTTP/1.1"), "{said}");
    }
    let mut stream = TcpStream::connect(served.address).await.unwrap();
    stream.write_all(b"GET /ping HT").await.unwrap();
    stream.shutdown().await.unwrap();
    Answer::parse(&read_all(&mut stream).await).refused(400, "malformed_body");
}

#[tokio::test]
async fn a_caller_that_ends_its_own_direction_is_answered() {
    let served = Served::with(0).await;
    let mut stream = TcpStream::connect(served.address).await.unwrap();
    stream.write_all(PING).await.unwrap();
    stream.shutdown().await.unwrap();
    assert_eq!(Answer::parse(&read_all(&mut stream).await).status, 200);
}

#[tokio::test]
async fn a_large_body_is_413_before_and_while_it_is_read() {
    let served = Served::with(0).await;
    let head = format!("POST /instances HTTP/1.1\r\nX-Agent-Secret: {}\r\n", served.secret);
    // Announced: refused before a byte of it, and never invited.
    let announced = format!("{head}Content-Length: 65537\r\nExpect: 100-continue\r\n\r\n");
    let answer = served.raw(announced.as_bytes()).await;
    let said = answer.refused(413, "body_too_large");
    assert!(said.contains("65536"), "{said}");
    assert!(answer.head.contains("connection: close"), "{answer:?}");
    // Sent all the same, far more than any buffer holds: the answer still arrives.
    let mut sent = format!("{head}Content-Length: 4000000\r\n\r\n").into_bytes();
    sent.extend(vec![b' '; 4_000_000]);
    served.raw(&sent).await.refused(413, "body_too_large");
    let mut chunked = format!("{head}Transfer-Encoding: chunked\r\n\r\n").into_bytes();
    (0..100).for_each(|_| chunked.extend(format!("1000\r\n{}\r\n", "x".repeat(4096)).into_bytes()));
    served.raw(&chunked).await.refused(413, "body_too_large");
    let fits = format!("{{\"name\":\"{}\"}}", "x".repeat(65_525));
    served.call("POST", "/instances", &fits).await.refused(400, "invalid_field");
}

#[tokio::test]
async fn a_slow_or_broken_body_is_408_or_400() {
    let served = Served::limited(0, short()).await;
    let head = format!("POST /instances HTTP/1.1\r\nX-Agent-Secret: {}\r\n", served.secret);
    let answer = served.raw(format!("{head}Content-Length: 10\r\n\r\n{{").as_bytes()).await;
    answer.refused(408, "request_timeout");
    assert!(answer.head.contains("connection: close"));
    served
        .raw(format!("{head}Transfer-Encoding: chunked\r\n\r\nzz\r\n").as_bytes())
        .await
        .refused(400, "malformed_body");
}

/// Without the secret nothing of a body is read, whatever its size.
#[tokio::test]
async fn strangers_bodies_are_not_read() {
    let served = Served::with(0).await;
    let answer = served.raw(b"POST /instances HTTP/1.1\r\nContent-Length: 1000\r\n\r\n").await;
    answer.refused(401, "secret_missing");
    assert!(answer.head.contains("connection: close"));
}

#[tokio::test]
async fn connections_over_the_limit_are_503_and_places_come_back() {
    let limits = Limits {
        connections: Limits::default().connections,
        head_deadline: Duration::from_secs(30),
        ..short()
    };
    let served = Served::limited(0, limits).await;
    let mut held = Vec::new();
    for _ in 0..64 {
        let mut stream = TcpStream::connect(served.address).await.unwrap();
        stream.write_all(PING).await.unwrap();
        assert!(read_some(&mut stream).await.contains("200 OK"));
        held.push(stream);
    }
    let answer = served.raw(PING).await;
    let said = answer.refused(503, "busy");
    assert!(said.contains("64 connections are open"), "{said}");
    // The owner has places of its own.
    let mut local = tokio::net::UnixStream::connect(&served.socket).await.unwrap();
    local.write_all(b"GET /host HTTP/1.1\r\nConnection: close\r\n\r\n").await.unwrap();
    assert_eq!(Answer::parse(&read_all(&mut local).await).status, 200);
    held.clear();
    let answered = async {
        loop {
            let answer = served.raw(b"GET /ping HTTP/1.1\r\nConnection: close\r\n\r\n").await;
            if answer.status == 200 {
                break;
            }
        }
    };
    timeout(Duration::from_secs(5), answered).await.expect("a place is free again");
}

#[tokio::test]
async fn the_end_of_the_agent_closes_idle_connections_and_streams() {
    let served = Served::limited(
        1,
        Limits { head_deadline: Duration::from_secs(30), shutdown: Duration::from_secs(5), ..short() },
    )
    .await;
    let mut idle = TcpStream::connect(served.address).await.unwrap();
    idle.write_all(PING).await.unwrap();
    assert!(read_some(&mut idle).await.contains("200 OK"));
    let mut silent = TcpStream::connect(served.address).await.unwrap();
    let mut stream = TcpStream::connect(served.address).await.unwrap();
    let id = served.ids()[0];
    let request = format!("GET /instances/{id}/events HTTP/1.1\r\nX-Agent-Secret: {}\r\n\r\n", served.secret);
    stream.write_all(request.as_bytes()).await.unwrap();
    assert!(read_some(&mut stream).await.contains("text/event-stream"));
    let began = tokio::time::Instant::now();
    served.stop().await;
    assert!(began.elapsed() < Duration::from_secs(4), "nothing had to be cut off");
    for stream in [&mut idle, &mut silent, &mut stream] {
        let rest = read_all(stream).await;
        assert!(rest.is_empty() || rest.ends_with(b"0\r\n\r\n"), "{rest:?}");
    }
}
