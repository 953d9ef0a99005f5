//! A small HTTP/1.1 server for stand-ins: one thread a connection, one request each, an answer by a closure. Called by
//! `control_plane` and by the fake frpc.

use std::{
    io::{self, BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use serde_json::Value;

/// A client may take so long for each part of its request.
const PATIENCE: Duration = Duration::from_secs(30);
/// No honest request of the agent is larger.
const LARGEST: usize = 1024 * 1024;

/// A request, read to its end.
#[derive(Debug, Clone)]
pub struct Request {
    /// Method.
    pub method: String,
    /// Path without the query.
    pub path: String,
    /// Header lines, names in lower case.
    pub headers: Vec<(String, String)>,
    /// Body.
    pub body: Vec<u8>,
}

impl Request {
    /// A header's value.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str())
    }

    fn read(reader: &mut impl BufRead) -> io::Result<Self> {
        let first = line(reader)?;
        let mut words = first.split(' ');
        let (Some(method), Some(target), Some("HTTP/1.1" | "HTTP/1.0"), None) =
            (words.next(), words.next(), words.next(), words.next())
        else {
            return Err(no_http(&first));
        };
        let mut headers = Vec::new();
        loop {
            let line = line(reader)?;
            if line.is_empty() {
                break;
            }
            let (name, value) = line.split_once(':').ok_or_else(|| no_http(&line))?;
            headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
        }
        let path = target.split('?').next().unwrap_or_default();
        let mut request =
            Self { method: method.to_owned(), path: path.to_owned(), headers, body: Vec::new() };
        let length = match request.header("content-length").map(str::parse) {
            None => 0,
            Some(Ok(length)) if length <= LARGEST => length,
            Some(_) => return Err(no_http("a body of a length that is none, or too large")),
        };
        request.body.resize(length, 0);
        reader.read_exact(&mut request.body)?;
        Ok(request)
    }
}

fn line(reader: &mut impl BufRead) -> io::Result<String> {
    let mut line = String::new();
    if reader.by_ref().take(16 * 1024).read_line(&mut line)? == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(line.trim_end().to_owned())
}

fn no_http(line: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("not HTTP: {line:?}"))
}

/// An answer.
#[derive(Debug, Clone)]
pub struct Answer {
    /// Status code.
    pub status: u16,
    /// Content type.
    pub kind: &'static str,
    /// Body.
    pub body: Vec<u8>,
}

impl Answer {
    /// A status and nothing else.
    pub fn empty(status: u16) -> Self {
        Self { status, kind: "text/plain; charset=utf-8", body: Vec::new() }
    }

    /// Plain text.
    pub fn text(status: u16, text: &str) -> Self {
        Self { body: text.as_bytes().to_vec(), ..Self::empty(status) }
    }

    /// JSON, with the newline that Go's encoder ends it with.
    pub fn json(status: u16, value: &Value) -> Self {
        Self { status, kind: "application/json", body: format!("{value}\n").into_bytes() }
    }

    fn write(&self, mut stream: impl Write) -> io::Result<()> {
        let Self { status, kind, body } = self;
        let length = body.len();
        write!(
            stream,
            "HTTP/1.1 {status} .\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
        )?;
        stream.write_all(body)
    }
}

/// A listening server; dropping it ends it. Answers under way are given.
#[derive(Debug)]
pub struct Server {
    address: SocketAddr,
    listener: Arc<TcpListener>,
    ending: Arc<AtomicBool>,
    accepting: Option<JoinHandle<()>>,
}

impl Server {
    /// Listens on `address` and answers by `answer`, in many threads at once; without an answer the connection is closed.
    ///
    /// # Errors
    /// When the address cannot be had.
    pub fn start(
        address: SocketAddr,
        answer: impl Fn(&Request) -> Option<Answer> + Send + Sync + 'static,
    ) -> io::Result<Self> {
        let listener = Arc::new(TcpListener::bind(address)?);
        let address = listener.local_addr()?;
        let ending = Arc::new(AtomicBool::new(false));
        let end = Arc::clone(&ending);
        let answer = Arc::new(answer);
        let accepts = Arc::clone(&listener);
        let accepting = thread::spawn(move || {
            for stream in accepts.incoming() {
                if end.load(Ordering::Acquire) {
                    return;
                }
                let answer = Arc::clone(&answer);
                if let Ok(stream) = stream {
                    // A client that is no HTTP client, or is gone: its own affair.
                    thread::spawn(move || drop(serve(&stream, &*answer)));
                }
            }
        });
        Ok(Self { address, listener, ending, accepting: Some(accepting) })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.ending.store(true, Ordering::Release);
        // Not only closed: a child that this process starts just now has a copy of it until it executes its program.
        if rustix::net::shutdown(&*self.listener, rustix::net::Shutdown::Both).is_ok()
            && let Some(thread) = self.accepting.take()
        {
            // It panics for nothing.
            let _ = thread.join();
        }
    }
}

fn serve(stream: &TcpStream, answer: &dyn Fn(&Request) -> Option<Answer>) -> io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let request = match Request::read(&mut BufReader::new(stream)) {
        Ok(request) => request,
        Err(e) if e.kind() == io::ErrorKind::InvalidData => {
            return Answer::text(400, &e.to_string()).write(stream);
        }
        Err(e) => return Err(e),
    };
    match answer(&request) {
        Some(answer) => answer.write(stream),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::http::Client;

    #[test]
    fn requests_are_answered_until_the_server_ends() {
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let server = Server::start(any, |request| {
            let body = String::from_utf8_lossy(&request.body).into_owned();
            let secret = request.header("x-agent-secret").map(str::to_owned);
            let seen =
                json!({ "method": request.method, "path": request.path, "body": body, "secret": secret });
            (request.path != "/silence").then(|| Answer::json(201, &seen))
        })
        .unwrap();
        let client = Client { address: server.address(), secret: Some("s".into()), deadline: PATIENCE };
        let reply = client.call("PUT", "/a/b?c=d", Some(&json!({}))).unwrap();
        let expected = json!({ "method": "PUT", "path": "/a/b", "body": "{}", "secret": "s" });
        assert_eq!((reply.status, reply.json()), (201, expected));
        assert!(client.call("GET", "/silence", None).is_err());
        assert_eq!(client.raw(b"hello\r\n\r\n").unwrap().status, 400);
        assert_eq!(client.raw(b"GET / HTTP/1.1\r\nContent-Length: 9999999\r\n\r\n").unwrap().status, 400);
        drop(server);
        assert!(client.call("GET", "/", None).is_err());
    }
}
