//! The stream of an instance's phases, `GET /instances/{id}/events`, read as a client reads it. Called by `instances` and
//! by stories that act at a certain phase.

use std::{
    io::{self, BufRead, BufReader, Write},
    net::TcpStream,
    time::{Duration, Instant},
};

use serde_json::Value;

use crate::http::{Client, read_head};

/// One phase reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// Position in the instance's history.
    pub seq: u64,
    /// Milliseconds since the create call.
    pub elapsed_ms: u64,
    /// Its name.
    pub phase: String,
    /// What the agent says about it.
    pub message: String,
}

/// An open stream of events.
#[derive(Debug)]
pub struct Events {
    stream: BufReader<TcpStream>,
}

impl Events {
    /// Opens the stream of `id` after event `after`; 0 is from the beginning.
    ///
    /// # Errors
    /// When the agent does not answer, or answers with anything but a stream.
    pub fn open(client: &Client, id: &str, after: u64) -> io::Result<Self> {
        let mut stream = client.connect()?;
        // As HTTP/1.0, so that the stream comes as it is, without chunks.
        let head = client.head("GET", &format!("/instances/{id}/events")).replace("HTTP/1.1", "HTTP/1.0");
        stream.write_all(format!("{head}Last-Event-ID: {after}\r\n\r\n").as_bytes())?;
        let mut stream = BufReader::new(stream);
        let (status, headers) = read_head(&mut stream)?;
        let streams = |(name, value): &(String, String)| {
            name == "content-type" && value.starts_with("text/event-stream")
        };
        if status != 200 || !headers.iter().any(streams) {
            return Err(io::Error::other(format!("no event stream: status {status}, {headers:?}")));
        }
        Ok(Self { stream })
    }

    /// The next event; none when the stream has ended.
    ///
    /// # Errors
    /// When nothing comes until `deadline`, or something that is no event.
    pub fn next(&mut self, deadline: Instant) -> io::Result<Option<Event>> {
        let mut data = String::new();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            self.stream.get_ref().set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
            let mut line = String::new();
            if self.stream.read_line(&mut line)? == 0 {
                return Ok(None);
            }
            let line = line.trim_end();
            if let Some(part) = line.strip_prefix("data:") {
                data.push_str(part.trim_start());
            } else if line.is_empty() && !data.is_empty() {
                return parse(&data).map(Some);
            }
        }
    }
}

fn parse(data: &str) -> io::Result<Event> {
    let value: Value = serde_json::from_str(data)?;
    let text = |field: &str| value.get(field).and_then(Value::as_str).map(str::to_owned);
    let number = |field: &str| value.get(field).and_then(Value::as_u64);
    let event = || {
        Some(Event {
            seq: number("seq")?,
            elapsed_ms: number("elapsed_ms")?,
            phase: text("phase")?,
            message: text("message").unwrap_or_default(),
        })
    };
    event().ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("no event: {data}")))
}

#[cfg(test)]
mod tests {
    use std::{io::Read, net::TcpListener, thread};

    use super::*;

    #[test]
    fn events_comments_and_the_end() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let server = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut head = [0; 512];
            let n = stream.read(&mut head).unwrap();
            let body =
                ": hello\n\nid: 3\nevent: phase\ndata: {\"seq\":3,\"elapsed_ms\":7,\"phase\":\"ready\"}\n\n";
            write!(stream, "HTTP/1.0 200 OK\r\nContent-Type: text/event-stream\r\n\r\n{body}").unwrap();
            String::from_utf8_lossy(&head[..n]).into_owned()
        });
        let client = Client { address, secret: Some("s".into()), deadline: Duration::from_secs(5) };
        let mut events = Events::open(&client, "x", 2).unwrap();
        let deadline = Instant::now() + Duration::from_secs(5);
        let event = events.next(deadline).unwrap().unwrap();
        assert_eq!((event.seq, event.elapsed_ms, event.phase.as_str()), (3, 7, "ready"));
        assert_eq!(events.next(deadline).unwrap(), None);
        assert!(server.join().unwrap().contains("Last-Event-ID: 2"));
    }
}
