//! Keeps one VM company: takes orders for it, listens to its events and its ready port, asks every two seconds whether
//! it still answers. A task of its own, so that a QEMU that hangs delays nobody; it reports to the instance's task and
//! decides nothing. Ending it (or the agent) does nothing to the VM.

use std::{path::PathBuf, time::Duration};

use qudata_guest::ready::ReadyPort;
use qudata_host::process::ExitReport;
use qudata_qemu::{
    console::Console,
    qmp::{BlockIoError, CloseReason, Event, QmpEvent, QmpEvents, RunState},
    vm::{Vm, VmError},
};
use tokio::{
    sync::{mpsc, oneshot},
    task::JoinHandle,
    time::{MissedTickBehavior, interval, timeout},
};
use uuid::Uuid;

/// Between two questions whether the VM answers.
const BEAT: Duration = Duration::from_secs(2);
/// How long it may take to answer one.
const BEAT_DEADLINE: Duration = Duration::from_secs(2);
/// Questions without an answer before it is called unresponsive.
const MISSES: u32 = 2;
/// For the ready port: a socket on the same host.
const PORT_DEADLINE: Duration = Duration::from_secs(2);
/// Events still in the socket when QEMU has ended.
const LAST_EVENTS: Duration = Duration::from_millis(200);
const ORDERS: usize = 8;
const NEWS: usize = 32;

/// What can be ordered.
#[derive(Debug)]
pub enum VmOrder {
    /// Stop the processors.
    Pause(oneshot::Sender<Result<(), VmError>>),
    /// Let them run.
    Resume(oneshot::Sender<Result<(), VmError>>),
    /// Pull the reset line.
    Reset(oneshot::Sender<Result<(), VmError>>),
    /// Move what the serial ring holds to the log; failure is fine, the log is what it is.
    DrainConsole(oneshot::Sender<()>),
}

/// What is reported.
#[derive(Debug)]
pub enum VmNews {
    /// It answers (again), and this is what it does.
    Responsive(RunState),
    /// It does not answer.
    Unresponsive,
    /// The guest says that it is up, in this boot of it.
    GuestUp(Uuid),
    /// The machine was reset, by the guest or by order.
    Reset,
    /// The processors were stopped.
    Stopped,
    /// The processors run.
    Resumed,
    /// The guest's kernel crashed.
    Panicked,
    /// A disk request failed.
    DiskError(BlockIoError),
    /// QEMU has ended.
    Ended {
        /// What is known of how.
        report: ExitReport,
        /// The guest powered off, and who wanted it.
        powered_off: Option<PowerOff>,
    },
}

/// Who wanted a guest to power off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PowerOff {
    /// Itself, or who is logged in to it.
    Guest,
    /// Somebody on the host, by stopping the VM's unit: the agent never presses the power button.
    Host,
}

/// The other end of a [`watch`]ed VM. Dropping it ends the watch, not the VM.
#[derive(Debug)]
pub struct VmLink {
    orders: mpsc::Sender<VmOrder>,
    task: JoinHandle<()>,
}

impl VmLink {
    /// Where orders go; a clone outlives this link without keeping the watch alive.
    pub fn orders(&self) -> mpsc::Sender<VmOrder> {
        self.orders.clone()
    }
}

impl Drop for VmLink {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Starts watching. News arrives in order; a full channel holds the watch back, never the VM.
pub fn watch(vm: Vm, console: PathBuf) -> (VmLink, mpsc::Receiver<VmNews>) {
    let (orders, order_queue) = mpsc::channel(ORDERS);
    let (news, news_queue) = mpsc::channel(NEWS);
    let watch = Watch {
        vm,
        events: None,
        ready: None,
        console: Console::new(console),
        news,
        misses: 0,
        answered: false,
        pressed: false,
        powered_off: None,
    };
    let task = tokio::spawn(watch.run(order_queue));
    (VmLink { orders, task }, news_queue)
}

struct Watch {
    vm: Vm,
    events: Option<QmpEvents>,
    ready: Option<ReadyPort>,
    console: Console,
    news: mpsc::Sender<VmNews>,
    misses: u32,
    answered: bool,
    pressed: bool,
    powered_off: Option<PowerOff>,
}

enum Next {
    Ended(ExitReport),
    Event(Result<QmpEvent, CloseReason>),
    Ready(Option<Uuid>),
    Order(VmOrder),
    Beat,
    Over,
}

impl Watch {
    async fn run(mut self, mut orders: mpsc::Receiver<VmOrder>) {
        self.events = self.vm.take_events();
        let mut beat = interval(BEAT);
        beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            // All branches are cancel-safe: a pidfd, a channel, framed readers that keep partial input, a timer.
            let next = tokio::select! {
                biased;
                report = self.vm.exited() => match report {
                    Ok(report) => Next::Ended(report),
                    Err(_) => Next::Over,
                },
                event = next_event(&mut self.events) => Next::Event(event),
                signal = next_signal(&mut self.ready) => Next::Ready(signal),
                order = orders.recv() => order.map_or(Next::Over, Next::Order),
                _ = beat.tick() => Next::Beat,
            };
            match next {
                Next::Ended(report) => return self.end(report).await,
                Next::Event(Ok(event)) => self.event(&event).await,
                Next::Event(Err(_)) => self.events = None,
                Next::Ready(Some(boot)) => self.tell(VmNews::GuestUp(boot)).await,
                Next::Ready(None) => self.ready = None,
                Next::Order(order) => self.obey(order).await,
                Next::Beat => self.beat().await,
                Next::Over => return,
            }
        }
    }

    async fn tell(&self, news: VmNews) {
        // The instance's task is gone only when the agent ends.
        let _ = self.news.send(news).await;
    }

    async fn event(&mut self, event: &QmpEvent) {
        match event.event() {
            Event::Powerdown => self.pressed = true,
            Event::Shutdown { guest, .. } => {
                let wanted = if self.pressed { PowerOff::Host } else { PowerOff::Guest };
                self.powered_off = guest.then_some(wanted);
            }
            Event::Reset { .. } => {
                // What was pressed before the reset was not heard.
                self.pressed = false;
                self.tell(VmNews::Reset).await;
            }
            Event::Stop => self.tell(VmNews::Stopped).await,
            Event::Resume => self.tell(VmNews::Resumed).await,
            Event::GuestPanicked { .. } => self.tell(VmNews::Panicked).await,
            Event::BlockIoError(error) => self.tell(VmNews::DiskError(error)).await,
            Event::Other => {}
        }
    }

    async fn obey(&mut self, order: VmOrder) {
        match order {
            VmOrder::Pause(reply) => _ = reply.send(self.vm.pause().await),
            VmOrder::Resume(reply) => _ = reply.send(self.vm.resume().await),
            VmOrder::Reset(reply) => _ = reply.send(self.vm.reset().await),
            VmOrder::DrainConsole(reply) => {
                if let Some(qmp) = self.vm.qmp()
                    && let Err(error) = self.console.drain(qmp).await
                {
                    tracing::debug!(error = %qudata_host::causes::chain(&error), "the serial ring was not read");
                }
                let _ = reply.send(());
            }
        }
    }

    /// Asks whether it answers; connects again what has come apart.
    async fn beat(&mut self) {
        if self.events.is_none() {
            // Events may have been lost in between; the state that follows says what became of them.
            if self.vm.reconnect(BEAT_DEADLINE).await.is_err() {
                return self.missed().await;
            }
            self.events = self.vm.take_events();
            self.answered = false;
        }
        match timeout(BEAT_DEADLINE, self.vm.run_state()).await {
            Ok(Ok(state)) => {
                self.misses = 0;
                if !std::mem::replace(&mut self.answered, true) {
                    self.tell(VmNews::Responsive(state)).await;
                }
            }
            Ok(Err(_)) | Err(_) => self.missed().await,
        }
        if self.ready.is_none() {
            self.ready = ReadyPort::connect(&self.vm.paths().ready_socket(), PORT_DEADLINE).await.ok();
        }
    }

    async fn missed(&mut self) {
        self.misses = self.misses.saturating_add(1);
        if self.misses == MISSES {
            self.answered = false;
            self.tell(VmNews::Unresponsive).await;
        }
    }

    async fn end(mut self, report: ExitReport) {
        while let Ok(Ok(event)) = timeout(LAST_EVENTS, next_event(&mut self.events)).await {
            self.event(&event).await;
        }
        self.tell(VmNews::Ended { report, powered_off: self.powered_off }).await;
    }
}

async fn next_event(events: &mut Option<QmpEvents>) -> Result<QmpEvent, CloseReason> {
    match events {
        Some(events) => events.next().await,
        None => std::future::pending().await,
    }
}

/// `None` when the port came apart.
async fn next_signal(port: &mut Option<ReadyPort>) -> Option<Uuid> {
    match port {
        Some(port) => port.next().await.ok().map(|signal| signal.boot_id),
        None => std::future::pending().await,
    }
}
