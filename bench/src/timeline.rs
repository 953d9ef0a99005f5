//! The phases of one instance with the moments the agent gave them, read from its event stream. The harness's own reader
//! leaves the moments out; here they are the point. Called by benchmarks that create instances.

use std::{
    io::{BufRead, BufReader, ErrorKind, Write},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use jiff::Timestamp;
use qudata_api::InstanceEvent;
use qudata_testkit::http::{Client, read_head};

/// What happened so far, oldest first.
#[derive(Debug)]
pub(crate) struct Timeline(Vec<InstanceEvent>);

impl Timeline {
    /// Reads the events of `id` from the first one up to `phase`.
    pub(crate) fn until(client: &Client, id: &str, phase: &str, within: Duration) -> Result<Self> {
        let deadline = Instant::now() + within;
        let mut stream = client.connect()?;
        // As HTTP/1.0, so that the stream comes as it is, without chunks.
        let head = client.head("GET", &format!("/instances/{id}/events")).replace("HTTP/1.1", "HTTP/1.0");
        stream.write_all(format!("{head}\r\n").as_bytes())?;
        let mut reader = BufReader::new(&stream);
        let (status, _) = read_head(&mut reader)?;
        if status != 200 {
            bail!("the events of {id} were refused with {status}");
        }
        let mut events = Vec::new();
        let mut line = String::new();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!("no {phase} of {id} within {within:?}: {}", passed(&events));
            }
            stream.set_read_timeout(Some(left))?;
            match reader.read_line(&mut line) {
                Ok(0) => bail!("the events of {id} ended before {phase}: {}", passed(&events)),
                Ok(_) => {}
                // What was read of the line stays in it.
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => continue,
                Err(e) => return Err(e).context("reading events"),
            }
            if let Some(data) = line.strip_prefix("data:") {
                let event: InstanceEvent = serde_json::from_str(data).context("reading an event")?;
                let (last, failed) = (event.phase == phase, event.phase == "failed");
                events.push(event);
                if failed && !last {
                    bail!("{id} failed instead of {phase}: {}", passed(&events));
                }
                if last {
                    return Ok(Self(events));
                }
            }
            line.clear();
        }
    }

    /// When `phase` was reached first.
    pub(crate) fn at(&self, phase: &str) -> Result<Timestamp> {
        let event = self.0.iter().find(|event| event.phase == phase);
        event.map(|event| event.at).with_context(|| format!("no {phase} among {}", passed(&self.0)))
    }
}

fn passed(events: &[InstanceEvent]) -> String {
    let words: Vec<String> = events
        .iter()
        .map(|e| format!("{} ms {} {}", e.elapsed_ms, e.phase, e.message.as_deref().unwrap_or_default()))
        .collect();
    words.join(", ")
}

#[cfg(test)]
mod tests {
    use std::{io::Read, net::TcpListener, thread};

    use super::*;

    fn served(body: &'static str, phase: &str) -> Result<Timeline> {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let server = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut head = [0; 512];
            assert!(stream.read(&mut head).unwrap() > 0);
            write!(stream, "HTTP/1.0 200 OK\r\n\r\n{body}").unwrap();
        });
        let client = Client { address, secret: None, deadline: Duration::from_secs(5) };
        let timeline = Timeline::until(&client, "x", phase, Duration::from_secs(5));
        server.join().unwrap();
        timeline
    }

    const BODY: &str = ": hi\n\nid: 1\nevent: phase\n\
        data: {\"seq\":1,\"at\":\"2026-01-01T00:00:00.000000001Z\",\"elapsed_ms\":0,\"phase\":\"accepted\"}\n\n\
        data: {\"seq\":2,\"at\":\"2026-01-01T00:00:01Z\",\"elapsed_ms\":1000,\"phase\":\"failed\"}\n\n";

    #[test]
    fn moments_are_exact() {
        let at = served(BODY, "accepted").unwrap().at("accepted").unwrap();
        assert_eq!(at.subsec_nanosecond(), 1);
    }

    #[test]
    fn a_failure_and_an_early_end_are_told_with_what_passed() {
        let error = served(BODY, "ready").unwrap_err().to_string();
        assert!(error.contains("failed instead of ready") && error.contains("accepted"), "{error}");
        let error = served(": hi\n\n", "ready").unwrap_err().to_string();
        assert!(error.contains("ended before ready"), "{error}");
    }
}
