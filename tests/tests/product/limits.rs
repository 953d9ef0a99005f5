//! Limits of the API: size, time, number. Each is answered, and other callers go on.

use std::{
    io::Write,
    thread,
    time::{Duration, Instant},
};

use qudata_testkit::{agent::TestAgent, http::Reply};
use qudata_tests::{AT_ONCE, SOON, blank_agent};

#[test]
fn size_time_and_number_are_bounded() {
    let agent = blank_agent();
    let mut baseline = agent.baseline();
    too_large(&agent);
    let body = agent.client().head("POST", "/instances") + "Content-Length: 100\r\n\r\n{";
    thread::scope(|scope| {
        scope.spawn(|| too_slow(&agent, "GET /instances HTTP/1.1\r\nHost: a\r\n", 5));
        scope.spawn(|| too_slow(&agent, &body, 10));
        scope.spawn(|| assert_eq!(agent.call("GET", "/ping", None).status, 200));
    });
    too_many(&agent);
    agent.assert_clean(&mut baseline);
}

fn too_large(agent: &TestAgent) {
    let client = agent.client();
    let wish = "{\"no_such_field\":1}";
    let body = |size: usize| (" ".repeat(size - wish.len()) + wish).into_bytes();
    let fits = client.send("POST", "/instances", &body(64 * 1024)).unwrap();
    assert_eq!(fits.status, 400, "64 KiB are read and understood: {}", fits.text());
    let over = client.send("POST", "/instances", &body(64 * 1024 + 1)).unwrap();
    assert_eq!((over.status, over.code().as_str()), (413, "body_too_large"));
    let chunks = client.head("POST", "/instances") + "Transfer-Encoding: chunked\r\n\r\n";
    let chunk = format!("{:x}\r\n{}\r\n", 40_000, " ".repeat(40_000));
    let over = client.raw(format!("{chunks}{chunk}{chunk}0\r\n\r\n").as_bytes()).unwrap();
    assert_eq!((over.status, over.code().as_str()), (413, "body_too_large"), "without a length");
    let long = "a".repeat(16 * 1024);
    for head in [
        format!("GET /ping HTTP/1.1\r\nHost: a\r\nX-Long: {long}\r\n\r\n"),
        format!("GET /{long} HTTP/1.1\r\nHost: a\r\n\r\n"),
    ] {
        let reply = client.raw(head.as_bytes()).unwrap();
        assert_eq!((reply.status, reply.code().as_str()), (431, "header_too_large"));
    }
}

/// Sends the start of a request and waits: 408 after about `seconds`.
fn too_slow(agent: &TestAgent, start: &str, seconds: u64) {
    let begin = Instant::now();
    let mut stream = agent.client().connect().unwrap();
    stream.write_all(start.as_bytes()).unwrap();
    let reply = Reply::read(&stream).unwrap();
    assert_eq!((reply.status, reply.code().as_str()), (408, "request_timeout"), "{start:?}");
    let (took, due) = (begin.elapsed(), Duration::from_secs(seconds));
    assert!(
        took + Duration::from_millis(200) > due && took < due + AT_ONCE,
        "408 after {took:?}, due after {due:?}"
    );
}

fn too_many(agent: &TestAgent) {
    let client = agent.client();
    let mut open: Vec<_> = (0..64).map(|_| client.connect().unwrap()).collect();
    let reply = Reply::read(client.connect().unwrap()).unwrap();
    assert_eq!((reply.status, reply.code().as_str()), (503, "busy"));
    open.truncate(60);
    let until = Instant::now() + SOON;
    while client.call("GET", "/ping", None).map_or(0, |reply| reply.status) != 200 {
        assert!(Instant::now() < until, "no answer although connections are free again");
    }
}
