//! Creating one instance with the moment of the call known exactly, and wishes for instances. Called by benchmarks.

use std::io::Write;

use anyhow::{Context, Result, bail};
use jiff::Timestamp;
use qudata_testkit::{agent::TestAgent, http::Reply};
use serde_json::{Value, json};

/// An instance and when it was asked for.
#[derive(Debug)]
pub(crate) struct Ordered {
    pub(crate) id: String,
    /// `data` of the answer.
    pub(crate) created: Value,
    /// Just before the first byte of the call was sent.
    pub(crate) sent: Timestamp,
}

/// The smallest wish, for a VM without a guest.
pub(crate) fn blank() -> Value {
    json!({ "cpus": "1", "memory": "256M", "storage_gb": "1", "ports": ["22", "8000"] })
}

/// A wish for a Debian guest that `key` may log in to.
pub(crate) fn guest(key: &str, memory: &str) -> Value {
    json!({ "cpus": "1", "memory": memory, "storage_gb": "3", "ports": ["22", "8000"], "ssh_pubkeys": [key] })
}

/// `POST /instances` on a connection that is open already, as a control plane keeps one.
pub(crate) fn order(agent: &TestAgent, wish: &Value) -> Result<Ordered> {
    let client = agent.client();
    let (head, body) = (client.head("POST", "/instances"), wish.to_string());
    let request =
        format!("{head}Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}", body.len());
    let mut stream = client.connect().context("connecting to the agent")?;
    let sent = Timestamp::now();
    stream.write_all(request.as_bytes()).context("sending the create call")?;
    let reply = Reply::read(&stream).context("reading the answer to the create call")?;
    if reply.status != 200 {
        bail!("create was refused: {}; the agent's log: {}", reply.text(), complaints(&agent.logs()));
    }
    let created = reply.data();
    let id = created.get("id").and_then(Value::as_str).context("create gave no id")?.to_owned();
    Ok(Ordered { id, created, sent })
}

/// The last errors in a log.
fn complaints(log: &str) -> String {
    let lines: Vec<&str> = log.lines().filter(|line| line.contains("ERROR")).collect();
    lines.get(lines.len().saturating_sub(3)..).unwrap_or_default().join(" | ")
}

impl Ordered {
    /// Host port of a guest port.
    pub(crate) fn port(&self, guest_port: u16) -> Result<u16> {
        let port = self.created.get("ports").and_then(|ports| ports.get(guest_port.to_string()));
        let port = port.and_then(Value::as_str).and_then(|text| text.parse().ok());
        port.with_context(|| format!("guest port {guest_port} was not published: {}", self.created))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn complaints_are_the_last_errors() {
        let log = "a ERROR 1\nb INFO\nc ERROR 2\nd ERROR 3\ne ERROR 4\n";
        assert_eq!(complaints(log), "c ERROR 2 | d ERROR 3 | e ERROR 4");
        assert_eq!(complaints(""), "");
    }
}
