//! What listens on the host behind the routes, and calls from the other side.

use std::{net::Ipv4Addr, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::timeout,
};

/// From one tick of a stream to the next.
pub(crate) const TICK: Duration = Duration::from_millis(5);
const DEADLINE: Duration = Duration::from_secs(30);

/// Sends back what it gets.
pub(crate) async fn echo() -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut read, mut write) = stream.split();
                let _ = tokio::io::copy(&mut read, &mut write).await;
            });
        }
    });
    port
}

/// Sends a byte every [`TICK`] to whoever comes.
pub(crate) async fn ticker() -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            stream.set_nodelay(true).unwrap();
            tokio::spawn(async move { while tick(&mut stream, b"x").await {} });
        }
    });
    port
}

async fn tick(stream: &mut TcpStream, text: &[u8]) -> bool {
    tokio::time::sleep(TICK).await;
    stream.write_all(text).await.is_ok()
}

/// HTTP: sends back the body of a POST; a GET gets `name`, or ticks without end at `/ticks`.
pub(crate) async fn web(name: &'static str) -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            stream.set_nodelay(true).unwrap();
            tokio::spawn(answer(stream, name));
        }
    });
    port
}

async fn answer(mut stream: TcpStream, name: &str) {
    let Some((head, mut body)) = read_head(&mut stream).await else { return };
    if head.starts_with("GET /ticks ") {
        let begin = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n";
        if stream.write_all(begin).await.is_ok() {
            while tick(&mut stream, b"1\r\nx\r\n").await {}
        }
        return;
    }
    let length = content_length(&head).unwrap_or(0);
    while body.len() < length {
        if stream.read_buf(&mut body).await.unwrap_or(0) == 0 {
            return;
        }
    }
    let body = if head.starts_with("POST ") { body } else { name.into() };
    let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n", body.len());
    let _ = stream.write_all(head.as_bytes()).await;
    let _ = stream.write_all(&body).await;
}

async fn read_head(stream: &mut TcpStream) -> Option<(String, Vec<u8>)> {
    let mut bytes = Vec::new();
    loop {
        if let Some(at) = bytes.windows(4).position(|w| w == b"\r\n\r\n") {
            let body = bytes.split_off(at + 4);
            return Some((String::from_utf8(bytes).unwrap(), body));
        }
        if stream.read_buf(&mut bytes).await.ok()? == 0 {
            return None;
        }
    }
}

fn content_length(head: &str) -> Option<usize> {
    head.lines().find_map(|line| line.to_lowercase().strip_prefix("content-length:")?.trim().parse().ok())
}

/// A connection to a port of frps.
pub(crate) async fn connect(port: u16) -> TcpStream {
    let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.unwrap();
    stream.set_nodelay(true).unwrap();
    stream
}

/// Whether what is sent comes back.
pub(crate) async fn echoes(stream: &mut TcpStream, bytes: &[u8]) -> bool {
    let (mut read, mut write) = stream.split();
    let mut back = vec![0; bytes.len()];
    let both = async { tokio::join!(write.write_all(bytes), read.read_exact(&mut back)) };
    let Ok((sent, got)) = timeout(DEADLINE, both).await else { return false };
    sent.is_ok() && got.is_ok() && back == bytes
}

/// An HTTP call through frps: status and body.
pub(crate) async fn call(vhost: u16, host: &str, body: Option<&[u8]>) -> (u16, Vec<u8>) {
    let mut stream = connect(vhost).await;
    let method = if body.is_some() { "POST" } else { "GET" };
    let body = body.unwrap_or_default();
    let length = body.len();
    let head = format!(
        "{method} / HTTP/1.1\r\nhost: {host}\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    let (mut read, mut write) = stream.split();
    let mut reply = Vec::new();
    let both = async { tokio::join!(write.write_all(body), read.read_to_end(&mut reply)) };
    let (sent, got) = timeout(DEADLINE, both).await.unwrap();
    sent.unwrap();
    got.unwrap();
    let at = reply.windows(4).position(|w| w == b"\r\n\r\n").unwrap();
    let body = reply.split_off(at + 4);
    let head = String::from_utf8(reply).unwrap();
    assert_eq!(content_length(&head), Some(body.len()), "{head}");
    (head.split(' ').nth(1).unwrap().parse().unwrap(), body)
}

/// Bytes that are not the same anywhere.
pub(crate) fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[3]
    })
    .take(length)
    .collect()
}

/// Waits until nobody listens there: frps lets go of a port a moment after frpc has said so, or has gone.
pub(crate) async fn closed(port: u16) {
    let gone = async {
        while TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(Duration::from_secs(5), gone).await.unwrap_or_else(|_| panic!("{port} is still open"));
}
