//! A small blocking HTTP/1.1 client that also sends what no decent client would: raw bytes, halves of requests, nothing.
//! Called by `agent` and by tests of the API's limits.

use std::{
    io::{self, BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use serde_json::Value;

/// An answer.
#[derive(Debug, Clone)]
pub struct Reply {
    /// Status code.
    pub status: u16,
    /// Header lines, names in lower case.
    pub headers: Vec<(String, String)>,
    /// Body.
    pub body: Vec<u8>,
}

impl Reply {
    /// Reads one answer from a stream; the body by its length, or to the end where no length is given.
    ///
    /// # Errors
    /// When the stream fails, ends early or carries something else than HTTP.
    pub fn read(stream: impl Read) -> io::Result<Self> {
        let mut reader = BufReader::new(stream);
        let (status, headers) = read_head(&mut reader)?;
        let mut reply = Self { status, headers, body: Vec::new() };
        if let Some(length) = reply.header("content-length").and_then(|text| text.parse::<u64>().ok()) {
            reader.take(length).read_to_end(&mut reply.body)?;
            if u64::try_from(reply.body.len()).ok() != Some(length) {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        } else {
            reader.read_to_end(&mut reply.body)?;
        }
        Ok(reply)
    }

    /// A header's value.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str())
    }

    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The body as JSON, `null` when it is none.
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or(Value::Null)
    }

    /// `data` of a success.
    pub fn data(&self) -> Value {
        self.json().get("data").cloned().unwrap_or(Value::Null)
    }

    /// `code` of a failure.
    pub fn code(&self) -> String {
        self.json().get("code").and_then(Value::as_str).unwrap_or_default().to_owned()
    }

    /// `error` of a failure.
    pub fn error(&self) -> String {
        self.json().get("error").and_then(Value::as_str).unwrap_or_default().to_owned()
    }
}

/// Reads status line and headers.
///
/// # Errors
/// When the stream fails, ends early or carries something else than HTTP.
pub fn read_head(reader: &mut impl BufRead) -> io::Result<(u16, Vec<(String, String)>)> {
    let first = read_line(reader)?;
    let status = first.split(' ').nth(1).and_then(|text| text.parse().ok());
    let status = status.filter(|_| first.starts_with("HTTP/1.")).ok_or_else(|| no_http(&first))?;
    let mut headers = Vec::new();
    loop {
        let line = read_line(reader)?;
        if line.is_empty() {
            return Ok((status, headers));
        }
        let (name, value) = line.split_once(':').ok_or_else(|| no_http(&line))?;
        headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
    }
}

fn no_http(line: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("not HTTP: {line:?}"))
}

fn read_line(reader: &mut impl BufRead) -> io::Result<String> {
    let mut line = String::new();
    if reader.take(64 * 1024).read_line(&mut line)? == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(line.trim_end().to_owned())
}

/// One agent's API as somebody with (or without) its secret sees it. A connection a call.
#[derive(Debug, Clone)]
pub struct Client {
    /// Where it listens.
    pub address: SocketAddr,
    /// Value of `X-Agent-Secret`; none sends no such header.
    pub secret: Option<String>,
    /// How long connecting, writing and reading may take, each.
    pub deadline: Duration,
}

impl Client {
    /// Opens a connection and sends nothing.
    ///
    /// # Errors
    /// When nobody listens.
    pub fn connect(&self) -> io::Result<TcpStream> {
        let stream = TcpStream::connect_timeout(&self.address, self.deadline)?;
        stream.set_read_timeout(Some(self.deadline))?;
        stream.set_write_timeout(Some(self.deadline))?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }

    /// Sends exactly these bytes and reads an answer.
    ///
    /// # Errors
    /// When there is no answer.
    pub fn raw(&self, bytes: &[u8]) -> io::Result<Reply> {
        let mut stream = self.connect()?;
        // A server that has refused already may have closed its side: its answer is what counts.
        let sent = stream.write_all(bytes);
        let reply = Reply::read(&stream);
        sent.and(Ok(())).or_else(|e| if reply.is_ok() { Ok(()) } else { Err(e) })?;
        reply
    }

    /// The head of a request, up to the empty line and without it.
    pub fn head(&self, method: &str, path: &str) -> String {
        self.head_for("agent", method, path)
    }

    fn head_for(&self, host: &str, method: &str, path: &str) -> String {
        let secret =
            self.secret.as_ref().map(|secret| format!("X-Agent-Secret: {secret}\r\n")).unwrap_or_default();
        format!("{method} {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n{secret}")
    }

    /// One call with a body of any sort.
    ///
    /// # Errors
    /// When there is no answer.
    pub fn send(&self, method: &str, path: &str, body: &[u8]) -> io::Result<Reply> {
        self.raw(&whole(self.head(method, path), body))
    }

    /// One call with a JSON body, or without one.
    ///
    /// # Errors
    /// When there is no answer.
    pub fn call(&self, method: &str, path: &str, body: Option<&Value>) -> io::Result<Reply> {
        self.send(method, path, body.map(Value::to_string).unwrap_or_default().as_bytes())
    }
}

/// A head with its body.
fn whole(head: String, body: &[u8]) -> Vec<u8> {
    let mut bytes = head.into_bytes();
    bytes.extend_from_slice(
        format!("Content-Type: application/json\r\nContent-Length: {}\r\n\r\n", body.len()).as_bytes(),
    );
    bytes.extend_from_slice(body);
    bytes
}

/// A server that has several names, asked by one of them: what a reverse proxy such as frps routes by.
#[derive(Debug, Clone)]
pub struct VirtualHost {
    /// The server.
    pub server: Client,
    /// The name, sent as `Host`.
    pub name: String,
}

impl VirtualHost {
    /// One call with a body of any sort.
    ///
    /// # Errors
    /// When there is no answer.
    pub fn send(&self, method: &str, path: &str, body: &[u8]) -> io::Result<Reply> {
        self.server.raw(&whole(self.server.head_for(&self.name, method, path), body))
    }

    /// One call with a JSON body, or without one.
    ///
    /// # Errors
    /// When there is no answer.
    pub fn call(&self, method: &str, path: &str, body: Option<&Value>) -> io::Result<Reply> {
        self.send(method, path, body.map(Value::to_string).unwrap_or_default().as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_read_by_length_and_to_the_end() {
        let text = "HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\nX-A:  b \r\n\r\n{}rest";
        let reply = Reply::read(text.as_bytes()).unwrap();
        assert_eq!((reply.status, reply.header("x-a"), reply.body.as_slice()), (404, Some("b"), &b"{}"[..]));
        let open = Reply::read(&b"HTTP/1.0 200 OK\r\n\r\n{\"ok\":true,\"data\":1}"[..]).unwrap();
        assert_eq!(open.data(), 1);
    }

    #[test]
    fn half_an_answer_and_no_http_are_errors() {
        for text in
            ["", "HTTP/1.1 200 OK\r\n", "SSH-2.0-x\r\n\r\n", "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nab"]
        {
            assert!(Reply::read(text.as_bytes()).is_err(), "{text:?}");
        }
    }
}
