//! The platform that rents machines out: it drives an agent through the tunnel, as the world outside does. It knows what
//! the control plane knows and reaches nothing but the tunnel server. Called by product tests and the demo.

use std::{
    io,
    net::SocketAddr,
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use crate::{
    control_plane::Registered,
    http::{Client, Reply, VirtualHost},
};

/// One agent, as the platform reaches it.
#[derive(Debug, Clone)]
pub struct Platform {
    api: VirtualHost,
}

impl Platform {
    /// The agent that has `registered`, behind the tunnel server that takes HTTP at `server`.
    pub fn new(server: SocketAddr, registered: &Registered) -> Self {
        let name = format!("{}-{}", registered.tunnel_token, registered.agent_port);
        let secret = Some(registered.secret.clone());
        Self {
            api: VirtualHost {
                server: Client { address: server, secret, deadline: Duration::from_secs(30) },
                name,
            },
        }
    }

    /// One call of the agent's API.
    ///
    /// # Errors
    /// When frps does not answer. Where frps knows no such agent, it answers 404 by itself.
    pub fn call(&self, method: &str, path: &str, body: Option<&Value>) -> io::Result<Reply> {
        self.api.call(method, path, body)
    }

    /// One call that must succeed; its `data`.
    ///
    /// # Errors
    /// A sentence with the agent's own words.
    pub fn order(&self, method: &str, path: &str, body: Option<&Value>) -> Result<Value, String> {
        let reply = self.call(method, path, body);
        let reply = reply.map_err(|e| format!("{method} {path} through the tunnel got no answer: {e}"))?;
        if reply.status == 200 && reply.json().get("ok") == Some(&Value::Bool(true)) {
            return Ok(reply.data());
        }
        let words = if reply.error().is_empty() { reply.text() } else { reply.error() };
        Err(format!("{method} {path} through the tunnel was answered {}: {words}", reply.status))
    }

    /// Waits until the agent's API answers through the tunnel; how long that took.
    ///
    /// # Errors
    /// When it does not within `within`; the sentence tells the last answer.
    pub fn wait_until_reachable(&self, within: Duration) -> Result<Duration, String> {
        let start = Instant::now();
        loop {
            match self.order("GET", "/instances", None) {
                Ok(_) => return Ok(start.elapsed()),
                Err(why) if start.elapsed() > within => return Err(why),
                Err(_) => thread::sleep(Duration::from_millis(50)),
            }
        }
    }

    /// `POST /instances`.
    ///
    /// # Errors
    /// A sentence with the agent's own words, as in all calls below.
    pub fn create(&self, wish: &Value) -> Result<Value, String> {
        self.order("POST", "/instances", Some(wish))
    }

    /// `GET /instances`: the `data`.
    ///
    /// # Errors
    /// As in [`Self::create`].
    pub fn list(&self) -> Result<Value, String> {
        self.order("GET", "/instances", None)
    }

    /// Lets another key log in.
    ///
    /// # Errors
    /// As in [`Self::create`].
    pub fn add_key(&self, id: &str, public_key: &str) -> Result<(), String> {
        self.order("POST", "/ssh", Some(&json!({ "id": id, "ssh_pubkey": public_key }))).map(drop)
    }

    /// No longer lets a key log in.
    ///
    /// # Errors
    /// As in [`Self::create`].
    pub fn remove_key(&self, id: &str, public_key: &str) -> Result<(), String> {
        self.order("DELETE", "/ssh", Some(&json!({ "id": id, "ssh_pubkey": public_key }))).map(drop)
    }

    /// Pauses.
    ///
    /// # Errors
    /// As in [`Self::create`].
    pub fn pause(&self, id: &str) -> Result<(), String> {
        self.command(id, "stop")
    }

    /// Goes on after a pause.
    ///
    /// # Errors
    /// As in [`Self::create`].
    pub fn resume(&self, id: &str) -> Result<(), String> {
        self.command(id, "start")
    }

    fn command(&self, id: &str, command: &str) -> Result<(), String> {
        self.order("PUT", "/instances", Some(&json!({ "id": id, "command": command }))).map(drop)
    }

    /// Deletes, and waits until the agent no longer knows the instance.
    ///
    /// # Errors
    /// As in [`Self::create`], and when the instance is still there after `within`.
    pub fn delete(&self, id: &str, within: Duration) -> Result<(), String> {
        self.order("DELETE", &format!("/instances?id={id}"), None)?;
        self.wait_until_gone(id, within)
    }

    /// Waits until the agent no longer knows an instance that is being deleted.
    ///
    /// # Errors
    /// When it still does after `within`.
    pub fn wait_until_gone(&self, id: &str, within: Duration) -> Result<(), String> {
        let until = Instant::now() + within;
        loop {
            let status = self.call("GET", &format!("/instances/{id}"), None).map(|reply| reply.status);
            match status {
                // frps answers 404 too, when it knows no such agent: ask the agent for more than that.
                Ok(404) => return self.list().map(drop),
                Ok(200) | Err(_) if Instant::now() < until => thread::sleep(Duration::from_millis(50)),
                Ok(other) => return Err(format!("instance {id} is answered {other} after DELETE")),
                Err(e) => return Err(format!("no answer after DELETE: {e}")),
            }
        }
    }
}
