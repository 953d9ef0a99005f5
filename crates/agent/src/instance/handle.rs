//! What everyone else holds of an instance: a snapshot to read, a mailbox to ask, a way to delete that never queues
//! behind anything.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use qudata_api::{Command, InstanceState, InstanceView, StatusOf, Teardown};
use qudata_guest::keys::GuestKey;
use qudata_host::size::ByteSize;
use tokio::sync::{mpsc, oneshot, watch};
use uuid::Uuid;

use super::{
    events::{EventFeed, EventLog},
    record::{Leases, Sealed},
};
use crate::refusal::Refusal;

/// Requests that may wait for one instance; a caller beyond that is told to try again.
pub(super) const MAILBOX: usize = 16;
/// Longer than the deadlines of everything a request does, so that it only guards against a defect.
const ANSWER_DEADLINE: Duration = Duration::from_secs(60);
/// A teardown takes milliseconds, unless the kernel holds a process; then the caller is told so and it goes on.
const DELETE_DEADLINE: Duration = Duration::from_secs(20);

/// A request to the instance's task.
#[derive(Debug)]
pub(super) enum Request {
    Command(Command, oneshot::Sender<Result<StatusOf, Refusal>>),
    AddKey(GuestKey, oneshot::Sender<Result<(), Refusal>>),
    RemoveKey(GuestKey, oneshot::Sender<Result<(), Refusal>>),
    Console(oneshot::Sender<Result<Vec<u8>, Refusal>>),
    MovePort(PortMove, oneshot::Sender<Result<(), Refusal>>),
}

/// Another public port for a port of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PortMove {
    /// Port in the guest.
    pub guest: u16,
    /// The public port that cannot be had.
    pub from: u16,
    /// The one to try instead.
    pub to: u16,
}

/// Handle of one instance; clones are equal.
#[derive(Debug, Clone)]
pub struct Handle {
    pub(super) id: Uuid,
    /// What it holds, for the inventory.
    pub(super) holds: Arc<Holds>,
    pub(super) view: watch::Receiver<InstanceView>,
    pub(super) events: EventLog,
    pub(super) mailbox: mpsc::Sender<Request>,
    pub(super) deletes: mpsc::Sender<oneshot::Sender<Teardown>>,
    pub(super) gone: Arc<AtomicBool>,
}

/// What an instance holds as long as it exists.
#[derive(Debug, Clone)]
pub struct Holds {
    /// Its leases.
    pub leases: Leases,
    /// Its vCPUs.
    pub cpus: u32,
    /// Its RAM.
    pub memory: ByteSize,
    /// Virtual size of its disk.
    pub storage: ByteSize,
    /// Name of its virtual hosts on the tunnel server.
    pub tunnel_token: Option<Sealed>,
}

impl Handle {
    /// Its id.
    pub fn id(&self) -> Uuid {
        self.id
    }

    /// What it holds.
    pub fn holds(&self) -> &Holds {
        &self.holds
    }

    /// True once it was deleted completely.
    pub fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Acquire)
    }

    /// How it is right now; never waits.
    pub fn view(&self) -> InstanceView {
        let view = self.view.borrow().clone();
        if !self.mailbox.is_closed() || self.is_gone() {
            return view;
        }
        // Its task has ended without having deleted it: a defect. The VM is alive and is adopted by the next agent.
        let reason = Some(
            "the agent lost track of this instance; restart the agent, the VM is not affected".to_owned(),
        );
        InstanceView {
            state: InstanceState::Unresponsive,
            status: InstanceState::Unresponsive.status(),
            reason,
            ..view
        }
    }

    /// Its history and what comes.
    pub fn events(&self) -> EventFeed {
        self.events.feed()
    }

    /// Start, stop, restart.
    ///
    /// # Errors
    /// Why not.
    pub async fn command(&self, command: Command) -> Result<StatusOf, Refusal> {
        self.ask(|reply| Request::Command(command, reply)).await
    }

    /// Lets a key log in.
    ///
    /// # Errors
    /// Why not.
    pub async fn add_key(&self, key: GuestKey) -> Result<(), Refusal> {
        self.ask(|reply| Request::AddKey(key, reply)).await
    }

    /// No longer lets a key log in.
    ///
    /// # Errors
    /// Why not.
    pub async fn remove_key(&self, key: GuestKey) -> Result<(), Refusal> {
        self.ask(|reply| Request::RemoveKey(key, reply)).await
    }

    /// Publishes a port of the guest under another number from now on.
    ///
    /// # Errors
    /// When the instance is busy; it is asked again then.
    pub async fn move_port(&self, change: PortMove) -> Result<(), Refusal> {
        self.ask(|reply| Request::MovePort(change, reply)).await
    }

    /// Adds to its history what others did for it.
    pub fn note(&self, phase: &str, message: Option<String>) {
        self.events.add(phase, message);
    }

    /// The bounded serial log.
    ///
    /// # Errors
    /// When it cannot be read.
    pub async fn console(&self) -> Result<Vec<u8>, Refusal> {
        self.ask(Request::Console).await
    }

    /// Deletes the instance and waits for it.
    ///
    /// # Errors
    /// When too many callers delete it at once.
    pub async fn delete(&self) -> Result<Teardown, Refusal> {
        let (reply, answer) = oneshot::channel();
        match self.deletes.try_send(reply) {
            Ok(()) => {}
            Err(mpsc::error::TrySendError::Closed(_)) => return Err(Refusal::no_such_instance()),
            Err(mpsc::error::TrySendError::Full(_)) => {
                return Err(Refusal::busy("the instance is being deleted already"));
            }
        }
        match tokio::time::timeout(DELETE_DEADLINE, answer).await {
            Ok(Ok(teardown)) => Ok(teardown),
            // The record says "deleting" by now: it goes on, with or without this caller and this agent.
            Ok(Err(_)) | Err(_) => Ok(Teardown { id: Some(self.id), complete: false, residues: Vec::new() }),
        }
    }

    async fn ask<T>(
        &self,
        request: impl FnOnce(oneshot::Sender<Result<T, Refusal>>) -> Request,
    ) -> Result<T, Refusal> {
        let (reply, answer) = oneshot::channel();
        self.mailbox.try_send(request(reply)).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => Refusal::busy("too many calls wait for this instance"),
            mpsc::error::TrySendError::Closed(_) => Refusal::no_such_instance(),
        })?;
        match tokio::time::timeout(ANSWER_DEADLINE, answer).await {
            Ok(Ok(result)) => result,
            // Deleted meanwhile.
            Ok(Err(_)) => Err(Refusal::no_such_instance()),
            Err(_) => Err(Refusal::busy("the instance did not answer in time")),
        }
    }
}

/// Ports as the wire has them.
pub(super) fn port_map(ports: &BTreeMap<u16, u16>) -> BTreeMap<String, String> {
    ports.iter().map(|(guest, host)| (guest.to_string(), host.to_string())).collect()
}
