//! The history of one instance as the API streams it: bounded, numbered, with a live feed. Filled by the instance's
//! task, read by `http`.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use jiff::Timestamp;
use qudata_api::InstanceEvent;
use tokio::sync::broadcast;

/// Older events are dropped: a history of this length covers a life of many restarts.
const KEPT: usize = 256;
/// A reader that falls behind by more than this is told so and continues with what is new.
const LIVE: usize = 64;

/// What a reader gets: everything so far, and what comes. `live` closes when the instance is gone.
#[derive(Debug)]
pub struct EventFeed {
    /// Events so far, oldest first.
    pub backlog: Vec<InstanceEvent>,
    /// Events to come; none is missing between the two.
    pub live: broadcast::Receiver<InstanceEvent>,
}

/// The history; clones share it.
#[derive(Debug, Clone)]
pub struct EventLog {
    created_at: Timestamp,
    inner: Arc<Mutex<Inner>>,
}

#[derive(Debug)]
struct Inner {
    events: VecDeque<InstanceEvent>,
    next: u64,
    /// `None` once the instance is gone.
    live: Option<broadcast::Sender<InstanceEvent>>,
}

impl EventLog {
    /// An empty history of an instance accepted at `created_at`.
    pub fn new(created_at: Timestamp) -> Self {
        let live = Some(broadcast::Sender::new(LIVE));
        Self { created_at, inner: Arc::new(Mutex::new(Inner { events: VecDeque::new(), next: 1, live })) }
    }

    /// Adds an event that happens now.
    pub fn add(&self, phase: &str, message: Option<String>) {
        let at = Timestamp::now();
        // A clock set back must not make the history unreadable.
        let elapsed_ms = u64::try_from(at.duration_since(self.created_at).as_millis()).unwrap_or(0);
        let mut inner = self.lock();
        let event = InstanceEvent { seq: inner.next, at, elapsed_ms, phase: phase.to_owned(), message };
        inner.next += 1;
        if inner.events.len() == KEPT {
            inner.events.pop_front();
        }
        inner.events.push_back(event.clone());
        if let Some(live) = &inner.live {
            // No reader is the ordinary case.
            let _ = live.send(event);
        }
    }

    /// Everything so far and what comes.
    pub fn feed(&self) -> EventFeed {
        let inner = self.lock();
        let live = match &inner.live {
            Some(live) => live.subscribe(),
            None => broadcast::channel(1).1,
        };
        EventFeed { backlog: inner.events.iter().cloned().collect(), live }
    }

    /// Ends every feed: the instance is gone.
    pub fn close(&self) {
        self.lock().live = None;
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn nothing_is_missing_between_backlog_and_feed() {
        let log = EventLog::new(Timestamp::now());
        log.add("accepted", None);
        let mut feed = log.feed();
        log.add("ready", Some("up".into()));
        log.close();
        assert_eq!(feed.backlog.iter().map(|e| e.seq).collect::<Vec<_>>(), [1]);
        let live = feed.live.recv().await.unwrap();
        assert_eq!((live.seq, live.phase.as_str()), (2, "ready"));
        assert!(feed.live.recv().await.is_err(), "closed with the instance");
        assert!(log.feed().live.recv().await.is_err(), "also for a late reader");
    }

    #[test]
    fn history_is_bounded_and_numbered() {
        let log = EventLog::new(Timestamp::now());
        (0..KEPT + 10).for_each(|_| log.add("paused", None));
        let events = log.feed().backlog;
        assert_eq!(events.len(), KEPT);
        assert!(events.windows(2).all(|w| w[1].seq == w[0].seq + 1));
    }
}
