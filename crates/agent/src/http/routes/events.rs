//! `/instances/{id}/events`: the phases of an instance as server-sent events, history first, then live.
//!
//! The stream ends when the instance is gone or the agent ends. A reader that fell behind gets what it missed from the
//! history; one that comes back with `Last-Event-ID` continues after it.

use std::{collections::VecDeque, convert::Infallible};

use axum::{
    body::{Body, Bytes},
    extract::State,
    http::{HeaderMap, header},
    response::{IntoResponse, Response},
};
use futures_util::stream;
use qudata_api::{ErrorBody, ErrorCode, InstanceEvent};
use tokio::{
    sync::broadcast::{Receiver, error::RecvError},
    time::timeout,
};
use uuid::Uuid;

use super::{
    super::{error, input::Id},
    Shared,
};
use crate::refusal::Refusal;

/// A comment: it keeps proxies from closing the stream and finds out that the reader is gone.
const STILL_HERE: &[u8] = b": still here\n\n";

/// Phases of an instance as server-sent events: type `phase`, the sequence number as id, an event as data.
#[utoipa::path(get, path = "/instances/{id}/events",
    params(
        ("id" = Uuid, Path),
        ("Last-Event-ID" = Option<u64>, Header, description = "Continue after this event"),
    ),
    responses(
        (status = 200, content_type = "text/event-stream", body = InstanceEvent),
        (status = 400, body = ErrorBody),
        (status = 404, body = ErrorBody),
    )
)]
pub(super) async fn events(
    State(shared): State<Shared>,
    Id(id): Id,
    headers: HeaderMap,
) -> Result<Response, Refusal> {
    let mut reader = Reader::begin(shared, id)?;
    reader.resume_after(last_seen(&headers)?);
    let stream = stream::unfold(reader, |mut reader| async move {
        let chunk = reader.next().await?;
        Some((Ok::<_, Infallible>(chunk), reader))
    });
    let headers = [(header::CONTENT_TYPE, "text/event-stream"), (header::CACHE_CONTROL, "no-store")];
    Ok((headers, Body::from_stream(stream)).into_response())
}

fn last_seen(headers: &HeaderMap) -> Result<u64, Refusal> {
    let Some(value) = headers.get("last-event-id") else { return Ok(0) };
    value.to_str().ok().and_then(|text| text.parse().ok()).ok_or_else(|| {
        Refusal::new(ErrorCode::InvalidField, "Last-Event-ID: the id of an event is a whole number")
    })
}

struct Reader {
    shared: Shared,
    id: Uuid,
    waiting: VecDeque<InstanceEvent>,
    live: Receiver<InstanceEvent>,
    /// Number of the last event given out.
    last: u64,
}

impl Reader {
    fn begin(shared: Shared, id: Uuid) -> Result<Self, Refusal> {
        let feed = shared.instances.events(id)?;
        Ok(Self { shared, id, waiting: feed.backlog.into(), live: feed.live, last: 0 })
    }

    /// Leaves out what the reader has seen. Numbers begin anew with each agent process: one from the future is of an
    /// earlier one, and everything is news then.
    fn resume_after(&mut self, seen: u64) {
        if self.waiting.back().is_some_and(|newest| newest.seq >= seen) {
            self.last = seen;
        }
    }

    /// The next piece of the stream; none at its end.
    async fn next(&mut self) -> Option<Bytes> {
        loop {
            if let Some(event) = self.waiting.pop_front() {
                if event.seq <= self.last {
                    continue;
                }
                self.last = event.seq;
                return Some(render(&event));
            }
            let received = tokio::select! {
                received = timeout(self.shared.event_silence, self.live.recv()) => received,
                _ = self.shared.closing.wait_for(|closing| *closing) => return None,
            };
            match received {
                Ok(Ok(event)) => self.waiting.push_back(event),
                Ok(Err(RecvError::Lagged(_))) => {
                    let feed = self.shared.instances.events(self.id).ok()?;
                    (self.waiting, self.live) = (feed.backlog.into(), feed.live);
                }
                Ok(Err(RecvError::Closed)) => return None,
                Err(_) => return Some(Bytes::from_static(STILL_HERE)),
            }
        }
    }
}

/// JSON has no raw line breaks, so that it is always one line of data.
fn render(event: &InstanceEvent) -> Bytes {
    let mut text = format!("id: {}\nevent: phase\ndata: ", event.seq).into_bytes();
    text.extend(error::json(event));
    text.extend(b"\n\n");
    text.into()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use jiff::Timestamp;
    use tokio::sync::{broadcast, watch};

    use super::*;
    use crate::http::{metrics::Counters, tests::Served};

    fn event(seq: u64) -> InstanceEvent {
        InstanceEvent { seq, at: Timestamp::UNIX_EPOCH, elapsed_ms: 0, phase: "paused".into(), message: None }
    }

    /// A reader of the first instance with this history; its live feed, and the end of the agent.
    fn reader(
        served: &Served,
        history: &[u64],
        capacity: usize,
    ) -> (Reader, (broadcast::Sender<InstanceEvent>, watch::Sender<bool>)) {
        let (sender, live) = broadcast::channel(capacity);
        let (close, closing) = watch::channel(false);
        let shared = Shared {
            instances: served.instances.clone(),
            counters: Counters::default(),
            closing,
            event_silence: Duration::from_secs(15),
        };
        let waiting = history.iter().copied().map(event).collect();
        (Reader { shared, id: served.ids()[0], waiting, live, last: 0 }, (sender, close))
    }

    async fn numbers(reader: &mut Reader, count: usize) -> Vec<String> {
        let mut lines = Vec::new();
        for _ in 0..count {
            let text = String::from_utf8(reader.next().await.expect("more").to_vec()).unwrap();
            lines.push(text.lines().next().unwrap().to_owned());
        }
        lines
    }

    #[tokio::test]
    async fn history_and_live_events_come_once_and_in_order() {
        let served = Served::with(1).await;
        let (mut reader, (live, _close)) = reader(&served, &[1, 2, 3], 8);
        for seq in [2, 3, 4] {
            live.send(event(seq)).unwrap();
        }
        reader.resume_after(1);
        assert_eq!(numbers(&mut reader, 3).await, ["id: 2", "id: 3", "id: 4"]);
        drop(live);
        assert!(reader.next().await.is_none());
    }

    #[tokio::test]
    async fn a_position_of_an_earlier_agent_process_hides_nothing() {
        let served = Served::with(1).await;
        let (mut reader, _live) = reader(&served, &[1, 2], 8);
        reader.resume_after(40);
        assert_eq!(numbers(&mut reader, 2).await, ["id: 1", "id: 2"]);
    }

    #[tokio::test]
    async fn a_reader_that_fell_behind_goes_on_with_the_history() {
        let served = Served::with(1).await;
        let (mut reader, (live, _close)) = reader(&served, &[], 1);
        for seq in 1..=3 {
            live.send(event(seq)).unwrap();
        }
        let deleted = served.instances.delete(served.ids()[0]);
        let (teardown, read) = tokio::join!(deleted, reader.next());
        let text = String::from_utf8(read.unwrap().to_vec()).unwrap();
        assert!(text.starts_with("id: 1\n") && text.contains("\"deleting\""), "{text}");
        assert!(teardown.unwrap().complete);
        assert!(reader.next().await.is_none());
    }
}
