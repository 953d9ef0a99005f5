//! The owner of one instance: a single loop that alone changes its state, its record and its VM.
//!
//! Inputs in this order: delete · what happens to the VM · a finished operation · requests · the deadline of a boot.
//! What takes time (bring-up, proving the guest, a command, a key) is a future held by the loop, never an await inside a
//! branch, so that DELETE takes effect at once and GET never waits.

use std::{
    collections::BTreeMap,
    future::Future,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use jiff::Timestamp;
use qudata_api::{InstanceState, InstanceView, Problem, Sample, Teardown};
use qudata_guest::keys::HostKey;
use qudata_host::process::{ExitReport, Process, ProcessError};
use qudata_qemu::vm::Vm;
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinHandle,
    time::Instant,
};

use super::{
    calls::CallOutcome,
    events::EventLog,
    guest_access::GuestAccess,
    handle::{Handle, Holds, MAILBOX, Request},
    provision::{ProvisionError, Started},
    record::InstanceRecord,
    snapshot, teardown,
    vm_watch::{VmLink, VmNews},
};
use crate::site::Site;

/// Deletes that may wait at once; the second and third are a nervous caller's.
const DELETES: usize = 8;

pub(super) type BoxFuture<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// How the life of a task begins.
#[derive(Debug)]
pub enum Beginning {
    /// A new instance.
    Provision(Box<HostKey>),
    /// One whose bring-up an earlier agent did not finish, or that starts again after a reboot.
    BringUp,
    /// A VM of an earlier agent, alive.
    Adopted(Box<Adopted>),
    /// Nothing is to run, and what may be left of its VM is ended.
    End,
    /// Nothing is to be done.
    Rest,
    /// An earlier agent was told to delete it.
    Delete,
}

/// A VM taken over.
#[derive(Debug)]
pub struct Adopted {
    /// The VM, with or without a QMP connection.
    pub vm: Vm,
    /// Its network, if that is alive too.
    pub passt: Option<Process>,
}

/// What runs for an instance while it has a VM.
pub(super) struct Running {
    pub(super) link: VmLink,
    pub(super) news: mpsc::Receiver<VmNews>,
    pub(super) passt: Option<Process>,
    pub(super) access: GuestAccess,
    /// When the boot in progress should be over.
    pub(super) deadline: Option<Instant>,
    /// What to return to when an unresponsive VM answers again.
    pub(super) before_silence: InstanceState,
    pub(super) sampling: Option<JoinHandle<()>>,
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(sampling) = self.sampling.take() {
            sampling.abort();
        }
    }
}

/// A finished operation of a boot.
pub(super) enum BootOutcome {
    Started(Result<Box<Started>, ProvisionError>),
    Proven,
}

/// The task's state; see the module for what may change it.
pub struct InstanceTask {
    pub(super) site: Arc<Site>,
    pub(super) record: InstanceRecord,
    pub(super) state: InstanceState,
    pub(super) since: Timestamp,
    pub(super) reason: Option<String>,
    pub(super) problems: BTreeMap<&'static str, Problem>,
    pub(super) sample: Option<Sample>,
    pub(super) samples: (mpsc::Sender<Sample>, mpsc::Receiver<Sample>),
    pub(super) events: EventLog,
    pub(super) view: watch::Sender<InstanceView>,
    pub(super) requests: mpsc::Receiver<Request>,
    pub(super) deletes: mpsc::Receiver<oneshot::Sender<Teardown>>,
    pub(super) gone: Arc<AtomicBool>,
    pub(super) running: Option<Running>,
    pub(super) boot: Option<BoxFuture<BootOutcome>>,
    pub(super) call: Option<BoxFuture<CallOutcome>>,
}

impl std::fmt::Debug for InstanceTask {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("InstanceTask")
            .field("id", &self.record.id)
            .field("state", &self.state)
            .finish_non_exhaustive()
    }
}

enum Next {
    Delete(Option<oneshot::Sender<Teardown>>),
    News(Option<VmNews>),
    Booted(BootOutcome),
    Called(CallOutcome),
    NetworkEnded(Result<ExitReport, ProcessError>),
    Asked(Option<Request>),
    Sampled(Option<Sample>),
    Deadline,
}

/// Starts the task of an instance and returns what everyone else holds of it.
pub fn spawn(site: Arc<Site>, record: InstanceRecord, beginning: Beginning) -> Handle {
    let (mailbox, requests) = mpsc::channel(MAILBOX);
    let (delete_sender, deletes) = mpsc::channel(DELETES);
    let events = EventLog::new(record.created_at);
    let state = snapshot::first_state(&record, &beginning);
    let gone = Arc::new(AtomicBool::new(false));
    let view = watch::Sender::new(snapshot::first_view(&site, &record, state));
    let holds = Holds {
        leases: record.leases.clone(),
        cpus: record.spec.cpus,
        memory: record.spec.memory,
        storage: record.spec.storage,
        tunnel_token: record.spec.tunnel_token.clone(),
    };
    let handle = Handle {
        id: record.id,
        holds: Arc::new(holds),
        view: view.subscribe(),
        events: events.clone(),
        mailbox,
        deletes: delete_sender,
        gone: gone.clone(),
    };
    let since = record.since;
    let task = InstanceTask {
        site,
        state,
        since,
        reason: snapshot::first_reason(&record),
        record,
        problems: BTreeMap::new(),
        sample: None,
        samples: mpsc::channel(1),
        events,
        view,
        requests,
        deletes,
        gone,
        running: None,
        boot: None,
        call: None,
    };
    tokio::spawn(task.run(beginning));
    handle
}

impl InstanceTask {
    async fn run(mut self, beginning: Beginning) {
        self.begin(beginning).await;
        while !self.gone.load(Ordering::Acquire) {
            let next = self.next().await;
            match next {
                // Nobody holds a handle any more: the agent is ending. The VM goes on.
                Next::Delete(None) | Next::Asked(None) => return,
                Next::Delete(Some(reply)) => self.delete(Some(reply)).await,
                Next::News(Some(news)) => self.news(news).await,
                Next::News(None) => self.watch_lost(),
                Next::Booted(BootOutcome::Started(result)) => self.started(result).await,
                Next::Booted(BootOutcome::Proven) => self.proven().await,
                Next::Called(outcome) => self.called(outcome).await,
                Next::NetworkEnded(report) => self.network_ended(report),
                Next::Asked(Some(request)) => self.asked(request).await,
                Next::Sampled(sample) => {
                    self.sample = sample;
                    self.publish();
                }
                Next::Deadline => self.boot_too_long().await,
            }
        }
    }

    /// Waits for what comes next. Every branch is cancel-safe: channels, a pidfd, a timer, and futures that stay where
    /// they are until they are finished.
    async fn next(&mut self) -> Next {
        let (news, passt, deadline) = match &mut self.running {
            Some(running) => (Some(&mut running.news), running.passt.as_ref(), running.deadline),
            None => (None, None, None),
        };
        let idle = self.call.is_none();
        tokio::select! {
            biased;
            reply = self.deletes.recv() => Next::Delete(reply),
            news = received(news) => Next::News(news),
            outcome = finished(&mut self.boot) => Next::Booted(outcome),
            outcome = finished(&mut self.call) => Next::Called(outcome),
            report = exited(passt) => Next::NetworkEnded(report),
            request = self.requests.recv(), if idle => Next::Asked(request),
            sample = self.samples.1.recv() => Next::Sampled(sample),
            () = reached(deadline) => Next::Deadline,
        }
    }

    async fn begin(&mut self, beginning: Beginning) {
        match beginning {
            Beginning::Provision(host_key) => {
                self.events.add("accepted", None);
                self.start_boot(Some(*host_key));
            }
            Beginning::BringUp => self.bring_up().await,
            Beginning::End => {
                self.publish();
                self.end_runtime().await;
            }
            Beginning::Adopted(adopted) => self.adopt(*adopted).await,
            Beginning::Rest => self.publish(),
            Beginning::Delete => self.delete(None).await,
        }
    }

    /// Deletes everything. On residue the instance stays, says so, and can be deleted again.
    async fn delete(&mut self, reply: Option<oneshot::Sender<Teardown>>) {
        let id = self.record.id;
        tracing::info!(instance = %id, "deleting");
        // What was going on ends here; a launch on its way is stopped by teardown's rename.
        (self.boot, self.call, self.running) = (None, None, None);
        self.enter(InstanceState::Deleting, None);
        self.events.add("deleting", None);
        self.commit(super::record::Phase::Deleting).await;
        let mut residues = teardown::remove_all(&self.site, &self.record).await;
        if residues.is_empty()
            && let Err(error) = self.site.store.remove(id).await
        {
            residues.push(qudata_host::causes::chain(&error));
        }
        let complete = residues.is_empty();
        let public: Vec<String> = residues.iter().map(|text| self.site.without_paths(text)).collect();
        if complete {
            tracing::info!(instance = %id, "deleted");
            self.gone.store(true, Ordering::Release);
            self.site.changes.send_replace(());
            self.events.close();
        } else {
            tracing::error!(instance = %id, ?residues, "not everything could be removed");
            // It stays "deleting": nothing but another DELETE may be done to what is left.
            let reason = format!("not everything could be removed: {}; delete it again", public.join("; "));
            self.enter(InstanceState::Deleting, Some(reason.clone()));
            self.problem("residue", reason, "remove the cause, then delete the instance again");
        }
        let teardown = Teardown { id: Some(id), complete, residues: public };
        let mut waiting: Vec<_> = reply.into_iter().collect();
        while let Ok(reply) = self.deletes.try_recv() {
            waiting.push(reply);
        }
        for reply in waiting {
            let _ = reply.send(teardown.clone());
        }
    }
}

/// The result of the future in `slot`, which is empty afterwards; never, when it is empty already.
async fn finished<T>(slot: &mut Option<BoxFuture<T>>) -> T {
    match slot {
        Some(future) => {
            let value = future.await;
            *slot = None;
            value
        }
        None => std::future::pending().await,
    }
}

async fn received(news: Option<&mut mpsc::Receiver<VmNews>>) -> Option<VmNews> {
    match news {
        Some(news) => news.recv().await,
        None => std::future::pending().await,
    }
}

async fn exited(process: Option<&Process>) -> Result<ExitReport, ProcessError> {
    match process {
        Some(process) => process.exited().await,
        None => std::future::pending().await,
    }
}

async fn reached(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}
