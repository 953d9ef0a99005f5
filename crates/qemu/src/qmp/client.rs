//! One connection to one QEMU: who is waiting for which reply, and how the connection ends. Called by everything that
//! speaks to a VM; the typed commands are in [`super::command`].
//!
//! Two tasks per connection, one per half of the socket; nothing is locked while either waits for QEMU. When the
//! connection ends, for whatever reason, that reason is set once and everybody who waits is told at once.

use std::{
    collections::HashMap,
    io,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::{
    io::AsyncWriteExt,
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::{mpsc, oneshot, watch},
    time::{sleep, timeout},
};

use super::{
    codec::{self, FRAME_LIMIT, FrameError, FrameReader, Message, QemuVersion, Refusal},
    error::{CloseReason, ConnectError, QmpError},
    event::QmpEvent,
};

/// Events kept for an owner who is busy. Guests cause events, so there must be a limit; reaching it ends the
/// connection, because an owner who missed an event knows less than one who knows that he must ask again.
pub const EVENT_CAPACITY: usize = 256;
/// Commands under way or queued; far more than one owner ever has.
const COMMAND_CAPACITY: usize = 32;
/// A socket that takes no bytes for this long belongs to a QEMU that does not read.
const WRITE_DEADLINE: Duration = Duration::from_secs(2);
/// Between two attempts to enter a full queue.
const QUEUE_PAUSE: Duration = Duration::from_millis(10);

/// A connection to QEMU. Clones share it; it closes when the last clone is gone.
#[derive(Debug, Clone)]
pub struct Qmp {
    outgoing: mpsc::Sender<Outgoing>,
    link: Arc<Link>,
    version: Arc<QemuVersion>,
    peer_pid: Option<u32>,
}

/// The events of one connection, in order. Dropping it means that nobody wants them.
#[derive(Debug)]
pub struct QmpEvents {
    incoming: mpsc::Receiver<QmpEvent>,
    link: Arc<Link>,
}

/// What both tasks and all handles share.
#[derive(Debug)]
struct Link {
    state: Mutex<LinkState>,
    /// Wakes the two tasks; the reason itself is in `state`.
    closed: watch::Sender<bool>,
}

#[derive(Debug, Default)]
struct LinkState {
    waiting: HashMap<u64, oneshot::Sender<Reply>>,
    last_id: u64,
    reason: Option<CloseReason>,
}

type Reply = Result<Value, Refusal>;

#[derive(Debug)]
struct Outgoing {
    id: u64,
    frame: Vec<u8>,
}

impl Qmp {
    /// Connects, waits for the greeting and leaves negotiation mode, all before `deadline` has passed.
    ///
    /// # Errors
    /// [`ConnectError`]; none of its kinds says anything about the health of the process behind the socket.
    pub async fn connect(path: &Path, deadline: Duration) -> Result<(Self, QmpEvents), ConnectError> {
        let no_greeting = || ConnectError::NoGreeting { path: path.to_owned(), after: deadline };
        let started = Instant::now();
        let stream = match timeout(deadline, enqueue(path)).await {
            Err(_) => return Err(no_greeting()),
            Ok(stream) => stream.map_err(|source| ConnectError::Connect { path: path.to_owned(), source })?,
        };
        let peer_pid =
            stream.peer_cred().ok().and_then(|peer| peer.pid()).and_then(|pid| pid.try_into().ok());
        let (read_half, write_half) = stream.into_split();
        let mut frames = FrameReader::new(read_half);
        let left = deadline.saturating_sub(started.elapsed());
        let version = match timeout(left, frames.next()).await {
            Err(_) => return Err(no_greeting()),
            Ok(frame) => {
                greeting(frame).map_err(|sent| ConnectError::NotQmp { path: path.to_owned(), sent })?
            }
        };
        let (qmp, events) = Self::start(frames, write_half, version, peer_pid);
        let left = deadline.saturating_sub(started.elapsed());
        qmp.execute::<Value>("qmp_capabilities", Value::Null, left)
            .await
            .map_err(|source| ConnectError::Negotiate { path: path.to_owned(), source })?;
        Ok((qmp, events))
    }

    fn start(
        frames: FrameReader<OwnedReadHalf>,
        write_half: OwnedWriteHalf,
        version: QemuVersion,
        peer_pid: Option<u32>,
    ) -> (Self, QmpEvents) {
        let link = Arc::new(Link { state: Mutex::default(), closed: watch::Sender::new(false) });
        let (outgoing, commands) = mpsc::channel(COMMAND_CAPACITY);
        let (events, incoming) = mpsc::channel(EVENT_CAPACITY);
        tokio::spawn(read_messages(frames, events, Arc::clone(&link)));
        tokio::spawn(write_commands(write_half, commands, Arc::clone(&link)));
        let qmp = Self { outgoing, link: Arc::clone(&link), version: Arc::new(version), peer_pid };
        (qmp, QmpEvents { incoming, link })
    }

    /// Sends a command and waits for its reply. `arguments` is an object, or `Null` for none.
    ///
    /// Dropping the future gives the command up; one that was not yet written is then never sent.
    ///
    /// # Errors
    /// [`QmpError`]; see there for which of them leave open whether the command took effect.
    pub async fn execute<T: DeserializeOwned>(
        &self,
        command: &str,
        arguments: Value,
        deadline: Duration,
    ) -> Result<T, QmpError> {
        let name = || command.to_owned();
        let closed = |reason| QmpError::Closed { command: name(), reason };
        let (id, reply) = self.link.expect_reply().map_err(closed)?;
        let frame = codec::render(command, &arguments, id);
        let exchange = async {
            // Both fail only after the link has closed; the reason is looked up below.
            self.outgoing.send(Outgoing { id, frame }).await.ok()?;
            reply.await.ok()
        };
        match timeout(deadline, exchange).await {
            Err(_) => Err(QmpError::Timeout { command: name(), after: deadline }),
            Ok(None) => Err(closed(self.link.reason())),
            Ok(Some(Err(Refusal { class, desc }))) => Err(QmpError::Refused { command: name(), class, desc }),
            Ok(Some(Ok(value))) => serde_json::from_value(value)
                .map_err(|source| QmpError::Malformed { command: name(), source }),
        }
    }

    /// The version QEMU greeted with.
    #[must_use]
    pub fn version(&self) -> &QemuVersion {
        &self.version
    }

    /// The process that listened on the socket when it was connected, as the kernel tells it.
    #[must_use]
    pub fn peer_pid(&self) -> Option<u32> {
        self.peer_pid
    }

    /// How the connection ended, or `None` while it is open.
    #[must_use]
    pub fn close_reason(&self) -> Option<CloseReason> {
        self.link.lock().reason.clone()
    }
}

impl QmpEvents {
    /// The next event; after the last one, how the connection ended. Cancel-safe.
    ///
    /// # Errors
    /// The [`CloseReason`], again and again.
    pub async fn next(&mut self) -> Result<QmpEvent, CloseReason> {
        match self.incoming.recv().await {
            Some(event) => Ok(event),
            None => Err(self.link.reason()),
        }
    }
}

impl Link {
    fn lock(&self) -> MutexGuard<'_, LinkState> {
        // Nothing below panics while it holds the lock; were it otherwise, the map would still be whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Registers one more waiter, or tells why there is nothing to wait for.
    fn expect_reply(&self) -> Result<(u64, oneshot::Receiver<Reply>), CloseReason> {
        let mut state = self.lock();
        if let Some(reason) = &state.reason {
            return Err(reason.clone());
        }
        state.waiting.retain(|_, waiter| !waiter.is_closed());
        state.last_id += 1;
        let (waiter, reply) = oneshot::channel();
        let id = state.last_id;
        state.waiting.insert(id, waiter);
        Ok((id, reply))
    }

    fn is_awaited(&self, id: u64) -> bool {
        self.lock().waiting.get(&id).is_some_and(|waiter| !waiter.is_closed())
    }

    /// A reply nobody waits for any more is dropped: its command timed out.
    fn deliver(&self, id: u64, reply: Reply) {
        let waiter = self.lock().waiting.remove(&id);
        if let Some(waiter) = waiter {
            let _ = waiter.send(reply);
        }
    }

    /// Ends the connection; the first reason counts.
    fn close(&self, reason: CloseReason) {
        let mut state = self.lock();
        state.reason.get_or_insert(reason);
        state.waiting.clear();
        self.closed.send_replace(true);
    }

    fn reason(&self) -> CloseReason {
        self.lock().reason.clone().unwrap_or(CloseReason::Ended)
    }

    async fn closed(&self) {
        // The sender lives in `self`, so waiting cannot fail.
        let _ = self.closed.subscribe().wait_for(|closed| *closed).await;
    }
}

/// Connects. A full queue of connections not yet accepted is the same silence as no greeting, one step earlier, and may
/// pass as well: a QEMU that was stopped still has to work off the attempts that were given up.
async fn enqueue(path: &Path) -> io::Result<UnixStream> {
    loop {
        match UnixStream::connect(path).await {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => sleep(QUEUE_PAUSE).await,
            done => return done,
        }
    }
}

fn greeting(frame: Result<Option<Vec<u8>>, FrameError>) -> Result<QemuVersion, String> {
    match frame {
        Ok(Some(frame)) => match codec::parse(&frame)? {
            Message::Greeting(version) => Ok(version),
            other => Err(format!("{other:?}").chars().take(200).collect()),
        },
        Ok(None) => Err("the end of the connection".to_owned()),
        Err(FrameError::TooLong) => Err(format!("more than {FRAME_LIMIT} bytes without a line end")),
        Err(FrameError::Io(error)) => Err(error.to_string()),
    }
}

async fn read_messages(
    mut frames: FrameReader<OwnedReadHalf>,
    events: mpsc::Sender<QmpEvent>,
    link: Arc<Link>,
) {
    let reason = loop {
        let frame = tokio::select! {
            biased;
            () = link.closed() => return,
            frame = frames.next() => frame,
        };
        let frame = match frame {
            Ok(Some(frame)) => frame,
            Ok(None) => break CloseReason::Ended,
            Err(FrameError::TooLong) => break CloseReason::FrameTooLong { limit: FRAME_LIMIT },
            Err(FrameError::Io(error)) => break CloseReason::of(&error),
        };
        if let Err(reason) = take(&frame, &events, &link) {
            break reason;
        }
    };
    // Before `events` is dropped, so that whoever sees the end of the events sees its reason too.
    link.close(reason);
}

fn take(frame: &[u8], events: &mpsc::Sender<QmpEvent>, link: &Link) -> Result<(), CloseReason> {
    match codec::parse(frame).map_err(CloseReason::Malformed)? {
        Message::Event(event) => match events.try_send(event) {
            Ok(()) | Err(mpsc::error::TrySendError::Closed(_)) => Ok(()),
            Err(mpsc::error::TrySendError::Full(_)) => {
                Err(CloseReason::EventOverflow { capacity: EVENT_CAPACITY })
            }
        },
        Message::Reply { id: Some(id), result } => {
            link.deliver(id, result);
            Ok(())
        }
        Message::Reply { id: None, result: Err(refusal) } => Err(CloseReason::Desynchronised(refusal.desc)),
        Message::Reply { id: None, result: Ok(_) } | Message::Greeting(_) | Message::Unknown => Ok(()),
    }
}

async fn write_commands(mut half: OwnedWriteHalf, mut commands: mpsc::Receiver<Outgoing>, link: Arc<Link>) {
    let reason = loop {
        let next = tokio::select! {
            biased;
            () = link.closed() => return,
            next = commands.recv() => next,
        };
        let Some(Outgoing { id, frame }) = next else { break CloseReason::Dropped };
        if !link.is_awaited(id) {
            continue;
        }
        match timeout(WRITE_DEADLINE, half.write_all(&frame)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => break CloseReason::of(&error),
            Err(_) => break CloseReason::WriteStalled { after: WRITE_DEADLINE },
        }
    };
    link.close(reason);
}
