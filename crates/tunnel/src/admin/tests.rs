use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
};

use super::*;
use crate::definition::{Defined, tests::tcp};

/// A server that answers one call with `answer` and hands out what it was asked.
async fn answering(answer: Vec<u8>) -> (Admin, tokio::task::JoinHandle<String>) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let asked = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut request = vec![0; 4096];
        let mut length = 0;
        loop {
            length += stream.read(&mut request[length..]).await.unwrap();
            let text = String::from_utf8_lossy(&request[..length]).into_owned();
            let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
            let wanted =
                head.lines().find_map(|l| l.to_lowercase().strip_prefix("content-length: ")?.parse().ok());
            if body.len() >= wanted.unwrap_or(0) {
                let _ = stream.write_all(&answer).await;
                return text;
            }
        }
    });
    let mut access = AdminAccess::generate(port);
    access.password = "pw".into();
    (Admin::new(&access), asked)
}

fn http(status: &str, body: &str) -> Vec<u8> {
    format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}", body.len()).into()
}

#[tokio::test]
async fn status_is_read_over_all_kinds() {
    let body = r#"{"tcp":[{"name":"a","type":"tcp","status":"running","err":"","remote_addr":"h:1","source":"store"}],
        "http":[{"name":"b","type":"http","status":"start error","err":"router config conflict"}]}"#;
    let (admin, asked) = answering(http("200 OK", body)).await;
    let seen = admin.status().await.unwrap();
    let names: Vec<_> = seen.iter().map(|s| (s.name.as_str(), s.phase.as_str())).collect();
    assert_eq!(names, [("b", "start error"), ("a", "running")]);
    let asked = asked.await.unwrap();
    assert!(asked.starts_with("GET /api/status HTTP/1.1\r\n"), "{asked}");
    assert!(asked.contains("authorization: Basic YWdlbnQ6cHc=\r\n"), "{asked}");
}

#[tokio::test]
async fn a_route_is_added_as_json() {
    let (admin, asked) = answering(http("200 OK", "{}")).await;
    let route = StoreProxy::of(&Defined { route: tcp("a", 1, 2), attempt: 0 });
    admin.add(&route).await.unwrap();
    let asked = asked.await.unwrap();
    assert!(asked.starts_with("POST /api/store/proxies HTTP/1.1\r\n"), "{asked}");
    assert!(
        asked.contains("content-type: application/json\r\n") && asked.ends_with("\"remotePort\":1}}"),
        "{asked}"
    );
}

#[tokio::test]
async fn what_is_not_there_is_removed() {
    let (admin, _) = answering(http("404 Not Found", "not found: proxy \"a\"")).await;
    admin.remove(&"a".parse().unwrap()).await.unwrap();
    let (admin, _) = answering(http("500 Oops", "disk full")).await;
    let error = admin.remove(&"a".parse().unwrap()).await.unwrap_err();
    assert!(error.to_string().ends_with("with 500: disk full"), "{error}");
}

#[tokio::test]
async fn a_stranger_is_told_apart() {
    let (admin, _) = answering(http("401 Unauthorized", "Unauthorized")).await;
    assert!(matches!(admin.reload().await, Err(AdminError::Stranger)));
}

#[tokio::test]
async fn an_endless_answer_and_one_that_is_no_json_are_errors() {
    let mut endless = b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n".to_vec();
    endless.extend(std::iter::repeat_n(b' ', BODY_LIMIT + 1));
    let (admin, _) = answering(endless).await;
    assert!(matches!(admin.status().await, Err(AdminError::Broken { .. })));
    let (admin, _) = answering(http("200 OK", "<html>")).await;
    assert!(matches!(admin.status().await, Err(AdminError::Words { .. })));
}

#[tokio::test]
async fn nobody_listening_and_nobody_answering_are_told_apart() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let admin = Admin::new(&AdminAccess::generate(port));
    assert!(matches!(admin.status().await, Err(AdminError::Late { .. })));
    drop(listener);
    assert!(matches!(admin.status().await, Err(AdminError::Connect { .. })));
}

#[test]
fn words_of_a_refusal_are_one_short_line() {
    assert_eq!(words(b"{\"error\":\"no\\nway\"}"), "no way");
    assert_eq!(words(b"plain \n"), "plain");
    assert_eq!(words(&[b'x'; 4000]).len(), WORDS);
}
