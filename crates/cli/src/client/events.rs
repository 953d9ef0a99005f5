//! The events of one instance as a stream that survives a restart of the agent. Owns reconnecting; used by `instance
//! create` and `instance events`.

use std::{collections::VecDeque, time::Duration};

use http_body_util::BodyExt;
use hyper::{Method, body::Incoming};
use jiff::Timestamp;
use qudata_api::InstanceEvent;
use tokio::time::{Instant, sleep, timeout};
use uuid::Uuid;

use super::{Agent, READ_DEADLINE, refusal, sse::Decoder};
use crate::exit::{Exit, Failure};

/// The server writes a comment every 15 s; after this silence it is not there any more.
const SILENCE: Duration = Duration::from_secs(45);
/// An upgrade of the agent takes a few seconds.
const RECONNECT_FOR: Duration = Duration::from_secs(30);
/// More than the history that an agent keeps of one instance.
const HISTORY: usize = 1024;
const RECONNECT_PAUSE: Duration = Duration::from_millis(300);

/// Events of an instance, in order, each once.
#[derive(Debug)]
pub(crate) struct EventStream {
    agent: Agent,
    id: Uuid,
    body: Incoming,
    decoder: Decoder,
    ready: VecDeque<InstanceEvent>,
    seen: VecDeque<(u64, Timestamp)>,
}

impl Agent {
    /// All events of the instance, from the first.
    pub(crate) async fn events(&self, id: Uuid) -> Result<EventStream, Failure> {
        let body = self.open_events(id).await?;
        let (decoder, ready, seen) = Default::default();
        Ok(EventStream { agent: self.clone(), id, body, decoder, ready, seen })
    }

    async fn open_events(&self, id: Uuid) -> Result<Incoming, Failure> {
        let opened = async {
            let path = format!("/instances/{id}/events");
            let response = self.open(Method::GET, &path, bytes::Bytes::new()).await?;
            let status = response.status();
            if status.is_success() {
                return Ok(response.into_body());
            }
            let body = response.into_body().collect().await.map(|b| b.to_bytes()).unwrap_or_default();
            Err(refusal(status, &body))
        };
        let late = |_| self.silent(&format!("no answer within {} s", READ_DEADLINE.as_secs()));
        timeout(READ_DEADLINE, opened).await.map_err(late)?
    }
}

impl EventStream {
    /// The next event; `None` when the instance is gone. May be dropped and called again.
    pub(crate) async fn next(&mut self) -> Result<Option<InstanceEvent>, Failure> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Ok(Some(event));
            }
            match timeout(SILENCE, self.body.frame()).await {
                Ok(Some(Ok(frame))) => {
                    if let Some(piece) = frame.data_ref() {
                        self.take(piece)?;
                    }
                }
                // Whether the instance is gone or the agent ended is learnt by asking again.
                Ok(Some(Err(_)) | None) | Err(_) => {
                    let Some(body) = self.reopen().await? else { return Ok(None) };
                    (self.body, self.decoder) = (body, Decoder::default());
                }
            }
        }
    }

    fn take(&mut self, piece: &[u8]) -> Result<(), Failure> {
        for message in self.decoder.feed(piece) {
            if message.event != "phase" {
                continue;
            }
            let event: InstanceEvent = serde_json::from_str(&message.data)
                .map_err(|e| anyhow::Error::new(e).context("an event is not understood"))?;
            // A restarted agent counts anew: the number alone does not tell whether an event is known.
            let mark = (event.seq, event.at);
            if !self.seen.contains(&mark) {
                self.seen.push_back(mark);
                self.ready.push_back(event);
            }
            while self.seen.len() > HISTORY {
                self.seen.pop_front();
            }
        }
        Ok(())
    }

    async fn reopen(&self) -> Result<Option<Incoming>, Failure> {
        let end = Instant::now() + RECONNECT_FOR;
        loop {
            // A pause first: a server that closes every stream must not be hammered.
            sleep(RECONNECT_PAUSE).await;
            match self.agent.open_events(self.id).await {
                Ok(body) => return Ok(Some(body)),
                Err(failure) if failure.exit == Exit::NotFound => return Ok(None),
                Err(failure) if failure.exit != Exit::Unreachable || Instant::now() > end => {
                    return Err(failure);
                }
                Err(_) => {}
            }
        }
    }
}
