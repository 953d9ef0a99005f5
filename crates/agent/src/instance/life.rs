//! What happens to the VM of an instance and what follows from it: boots, readiness, reboots, power-off, silence, death.
//! Part of the instance's task.

use std::time::Duration;

use jiff::Timestamp;
use qudata_api::InstanceState;
use qudata_guest::{
    keys::{GuestKey, HostKey},
    metrics::MetricsSampler,
};
use qudata_host::{
    causes::chain,
    process::{ExitReport, Process, ProcessError, Signal},
};
use qudata_qemu::{qmp::RunState, vm::Vm};
use tokio::time::Instant;

use super::{
    guest_access::GuestAccess,
    provision::{self, ProvisionError, Started},
    record::Phase,
    task::{Adopted, BootOutcome, InstanceTask, Running},
    vm_watch::{self, VmNews, VmOrder},
};

/// How often a running guest is asked what it uses: as often as the control plane is told.
const SAMPLE_PERIOD: Duration = Duration::from_secs(5);

impl InstanceTask {
    /// Brings the instance up, for the first time or again.
    pub(super) fn start_boot(&mut self, host_key: Option<HostKey>) {
        if let Some(key) = &host_key {
            self.record.host_key = key.public().to_line();
        }
        self.enter(InstanceState::Provisioning, None);
        let (site, record, events) = (self.site.clone(), self.record.clone(), self.events.clone());
        self.boot = Some(Box::pin(async move {
            let started = provision::bring_up(&site, record, host_key, &events).await;
            BootOutcome::Started(started.map(Box::new))
        }));
    }

    pub(super) async fn started(&mut self, result: Result<Box<Started>, ProvisionError>) {
        match result {
            Ok(started) => {
                let Started { vm, passt, record } = *started;
                self.record = record;
                if !self.accompany(vm, Some(passt)) {
                    return self.fail("the guest's host key is damaged".to_owned()).await;
                }
                self.expect_ready();
                self.enter(InstanceState::Booting, None);
            }
            Err(error) => self.fail(chain(&error)).await,
        }
    }

    /// Takes over a VM of an earlier agent.
    pub(super) async fn adopt(&mut self, adopted: Adopted) {
        let id = self.record.id;
        self.events.add("adopted", None);
        let state = adopted.vm.run_state().await;
        // Killed between starting QEMU and letting the guest run.
        if matches!(state, Ok(RunState::Prelaunch)) && adopted.vm.resume().await.is_err() {
            tracing::warn!(instance = %id, "an adopted VM could not be continued");
        }
        let paused = matches!(state, Ok(RunState::Paused | RunState::IoError));
        let network = adopted.passt.is_some();
        if !self.accompany(adopted.vm, adopted.passt) {
            return self.watch_lost();
        }
        if !network {
            self.network_lost();
        }
        self.freeze_network(paused);
        match (&self.record.phase, state) {
            (_, Err(_)) => self.unresponsive(),
            (Phase::Up, Ok(_)) => {
                self.enter(if paused { InstanceState::Paused } else { InstanceState::Running }, None);
                self.open_ports().await;
                if !paused {
                    self.start_sampling();
                }
            }
            (_, Ok(_)) => {
                self.expect_ready();
                self.enter(InstanceState::Booting, None);
            }
        }
        tracing::info!(instance = %id, state = ?self.state, "adopted");
    }

    /// Starts watching a VM. `false` when the record's host key is unusable.
    fn accompany(&mut self, vm: Vm, passt: Option<Process>) -> bool {
        let Ok(host_key) = GuestKey::parse(&self.record.host_key) else { return false };
        let access =
            GuestAccess::new(self.record.leases.management_port, host_key, self.site.management_key.clone());
        let (link, news) = vm_watch::watch(vm, self.site.instance(&self.record).console());
        self.running = Some(Running {
            link,
            news,
            passt,
            access,
            deadline: None,
            before_silence: self.state,
            sampling: None,
        });
        true
    }

    pub(super) async fn news(&mut self, news: VmNews) {
        match news {
            VmNews::GuestUp(boot) => self.guest_up(boot),
            VmNews::Reset => self.rebooting().await,
            VmNews::Stopped => self.stopped_unasked(),
            VmNews::Resumed => {}
            VmNews::Panicked => self.problem(
                "guest_panicked",
                "the guest's kernel has crashed",
                "restart the instance; its console log tells more",
            ),
            VmNews::DiskError(error) => {
                let full = if error.nospace { ": the host's file system is full" } else { "" };
                self.problem(
                    "disk_error",
                    format!("a disk {} of the guest failed{full}", error.operation),
                    "free space or repair the disk of the host, then start the instance: it goes on where it stood",
                );
            }
            VmNews::Unresponsive => self.unresponsive(),
            VmNews::Responsive(state) => self.responsive(&state),
            VmNews::Ended { report, powered_off } => self.vm_ended(report, powered_off).await,
        }
    }

    fn guest_up(&mut self, boot: uuid::Uuid) {
        if !matches!(self.state, InstanceState::Booting | InstanceState::Rebooting) || self.boot.is_some() {
            return;
        }
        let Some(running) = &self.running else { return };
        tracing::info!(instance = %self.record.id, %boot, "the guest says it is up");
        self.events.add("guest_up", None);
        let access = running.access.clone();
        self.boot = Some(Box::pin(async move {
            access.prove().await;
            BootOutcome::Proven
        }));
    }

    /// The guest let the agent log in: it is ready.
    pub(super) async fn proven(&mut self) {
        let Some(running) = &mut self.running else { return };
        running.deadline = None;
        self.open_ports().await;
        if self.record.ready_at.is_none() {
            self.record.ready_at = Some(Timestamp::now());
        }
        for code in ["guest_not_ready", "guest_panicked", "disk_error"] {
            self.solved(code);
        }
        self.commit(Phase::Up).await;
        self.enter(InstanceState::Running, None);
        self.events.add("ready", None);
        self.start_sampling();
    }

    async fn open_ports(&mut self) {
        let ports: Vec<u16> = self.record.leases.ports.values().copied().collect();
        if let Err(error) = self.site.egress.open(&ports).await {
            tracing::error!(instance = %self.record.id, error = %chain(&error), "ports stay closed");
            let message = "the published ports could not be opened";
            self.problem(
                "ports_closed",
                message,
                "check nftables on the host (nft list ruleset), then restart the instance",
            );
        } else {
            self.solved("ports_closed");
        }
    }

    /// While the guest boots, nobody may reach its ports: connections would wait in passt, and Debian 12's passt burns
    /// a whole core for each.
    async fn close_ports(&mut self) {
        let ports: Vec<u16> = self.record.leases.ports.values().copied().collect();
        if let Err(error) = self.site.egress.gate(&ports).await {
            tracing::warn!(instance = %self.record.id, error = %chain(&error), "ports stay open during a boot");
        }
    }

    async fn rebooting(&mut self) {
        self.boot = None;
        self.stop_sampling();
        if let Some(running) = &self.running {
            running.access.forget();
        }
        if self.state != InstanceState::Booting {
            self.enter(InstanceState::Rebooting, None);
            self.events.add("rebooting", None);
        }
        self.expect_ready();
        self.close_ports().await;
    }

    fn expect_ready(&mut self) {
        let deadline = Instant::now().checked_add(self.site.settings.ready_timeout);
        if let Some(running) = &mut self.running {
            running.deadline = deadline;
        }
    }

    /// The boot took too long. The first one is given up: nobody's work is in it. Later ones are the tenant's own
    /// machine, which is never killed for being slow.
    pub(super) async fn boot_too_long(&mut self) {
        if let Some(running) = &mut self.running {
            running.deadline = None;
        }
        let seconds = self.site.settings.ready_timeout.as_secs();
        if self.record.ready_at.is_none() {
            let reason = format!(
                "the guest did not become ready within {seconds} s (QUDATA_READY_TIMEOUT); its console log tells how far it got"
            );
            return self.fail(reason).await;
        }
        let message = format!("the guest has not become ready {seconds} s after its restart");
        self.problem("guest_not_ready", message, "look at its console; restart it, or delete the instance");
    }

    fn stopped_unasked(&mut self) {
        // An ordered pause enters its state when the order is done, and this news comes with it.
        if self.call.is_none() && matches!(self.state, InstanceState::Running) {
            self.enter(InstanceState::Paused, Some("QEMU stopped the machine by itself".to_owned()));
            self.events.add("paused", None);
        }
    }

    fn unresponsive(&mut self) {
        if self.state == InstanceState::Unresponsive {
            return;
        }
        let before = self.state;
        if let Some(running) = &mut self.running {
            running.before_silence = before;
        }
        self.stop_sampling();
        let reason = "QEMU does not answer; it is left alone, and watched".to_owned();
        self.enter(InstanceState::Unresponsive, Some(reason));
        self.events.add("unresponsive", None);
    }

    fn responsive(&mut self, state: &RunState) {
        if self.state != InstanceState::Unresponsive {
            return;
        }
        if matches!(state, RunState::Prelaunch) {
            // Adopted while it was still pinning the guest's memory: nobody else lets the guest run.
            let orders = self.running.as_ref().map(|running| running.link.orders());
            let (reply, _) = tokio::sync::oneshot::channel();
            if orders.is_none_or(|orders| orders.try_send(VmOrder::Resume(reply)).is_err()) {
                tracing::warn!(instance = %self.record.id, "an adopted VM could not be continued");
            }
        }
        let before = self.running.as_ref().map_or(InstanceState::Running, |running| running.before_silence);
        let now = match (before, state) {
            (InstanceState::Running | InstanceState::Paused, RunState::Paused | RunState::IoError) => {
                InstanceState::Paused
            }
            (InstanceState::Running | InstanceState::Paused, _) => InstanceState::Running,
            (other, _) => other,
        };
        let expected = self.running.as_ref().is_some_and(|running| running.deadline.is_some());
        if now == InstanceState::Booting && !expected {
            self.expect_ready();
        }
        self.enter(now, None);
        self.events.add("responsive", None);
        if now == InstanceState::Running {
            self.start_sampling();
        }
    }

    /// The watch is gone though the VM may live: it can be adopted again by the next agent.
    pub(super) fn watch_lost(&mut self) {
        (self.boot, self.running) = (None, None);
        let reason =
            "the agent cannot watch this VM any more; restart the agent, the VM is not affected".to_owned();
        self.enter(InstanceState::Unresponsive, Some(reason));
    }

    pub(super) fn network_ended(&mut self, report: Result<ExitReport, ProcessError>) {
        tracing::warn!(instance = %self.record.id, ?report, "passt has ended");
        if let Some(running) = &mut self.running {
            running.passt = None;
        }
        self.network_lost();
    }

    fn network_lost(&mut self) {
        self.problem(
            "network_lost",
            "the network process of this instance has ended; the guest runs without a network",
            "power the guest off and start the instance again; QEMU 7.2 cannot reconnect a network while it runs",
        );
    }

    /// Freezes or thaws the network: while the VM stands still, connections would keep passt spinning.
    pub(super) fn freeze_network(&self, frozen: bool) {
        let Some(passt) = self.running.as_ref().and_then(|running| running.passt.as_ref()) else { return };
        if let Err(error) = passt.signal(if frozen { Signal::Stop } else { Signal::Cont }) {
            tracing::warn!(instance = %self.record.id, error = %chain(&error), "the network could not be frozen or thawed");
        }
    }

    pub(super) fn start_sampling(&mut self) {
        let samples = self.samples.0.clone();
        let Some(running) = &mut self.running else { return };
        let access = running.access.clone();
        let sampling = tokio::spawn(async move {
            let mut sampler = MetricsSampler::default();
            let mut clock = tokio::time::interval(SAMPLE_PERIOD);
            clock.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            loop {
                clock.tick().await;
                let _turn = access.turn().await;
                let Ok(session) = access.session().await else { continue };
                match sampler.sample(&session).await {
                    Ok(metrics) => _ = samples.send(super::calls::sample_view(&metrics)).await,
                    Err(error) => tracing::debug!(error = %chain(&error), "no sample"),
                }
            }
        });
        if let Some(former) = running.sampling.replace(sampling) {
            former.abort();
        }
    }

    pub(super) fn stop_sampling(&mut self) {
        self.sample = None;
        if let Some(sampling) = self.running.as_mut().and_then(|running| running.sampling.take()) {
            sampling.abort();
        }
    }
}
