//! How an instance comes to rest, because its VM has ended or was given up, and how it leaves it. Part of the instance's
//! task.

use std::time::Duration;

use qudata_api::{ErrorCode, InstanceState};
use qudata_host::{causes::chain, launch::Launcher, process::ExitReport};
use tokio::{sync::oneshot, time::timeout};

use super::{
    record::Phase,
    task::InstanceTask,
    teardown,
    vm_watch::{PowerOff, VmOrder},
};
use crate::{paths::taken_away, refusal::Refusal};

const CONSOLE_DEADLINE: Duration = Duration::from_secs(3);

impl InstanceTask {
    pub(super) async fn vm_ended(&mut self, report: ExitReport, powered_off: Option<PowerOff>) {
        let reason = match powered_off {
            Some(PowerOff::Guest) => "the guest powered itself off",
            Some(PowerOff::Host) => "the VM's unit was stopped on the host, and the guest was shut down",
            None => {
                let reason =
                    format!("QEMU ended by itself ({report}); the disk is kept, start boots it again");
                return self.fail(reason).await;
            }
        };
        if self.record.ready_at.is_none() {
            return self.fail(format!("{reason} before it was ready")).await;
        }
        let reason = reason.to_owned();
        self.rest(Phase::Stopped { reason: reason.clone() }, InstanceState::Stopped, reason).await;
    }

    /// Gives the bring-up or the VM up. The disk stays until DELETE.
    pub(super) async fn fail(&mut self, reason: String) {
        tracing::error!(instance = %self.record.id, reason, "failed");
        let reason = self.site.without_paths(&reason);
        self.rest(Phase::Failed { reason: reason.clone() }, InstanceState::Failed, reason).await;
    }

    async fn rest(&mut self, phase: Phase, state: InstanceState, reason: String) {
        match Launcher::host_is_going_down().await {
            Ok(true) => return self.rest_until_reboot(),
            Ok(false) => {}
            Err(error) => {
                tracing::warn!(error = %chain(&error), "is the host going down? systemd does not tell")
            }
        }
        self.drain_console().await;
        (self.boot, self.running) = (None, None);
        self.problems.clear();
        self.commit(phase).await;
        self.end_runtime().await;
        let event = if state == InstanceState::Stopped { "stopped" } else { "failed" };
        self.enter(state, Some(reason.clone()));
        self.events.add(event, Some(reason));
    }

    /// Begins to boot an instance that rests. Nothing of an earlier VM may be left: two on one disk would destroy it.
    ///
    /// # Errors
    /// When something is left, or when the start cannot be written down: an agent that knows of no VM would end it.
    pub(super) async fn boot_again(&mut self) -> Result<(), Refusal> {
        // An end that was decided and did not come to its end: something resisted, or the host was going down and did
        // not, or it would not be this agent that is asked.
        let unfinished = taken_away(&self.site.instance(&self.record).run).exists();
        if (unfinished || matches!(self.record.phase, Phase::Up | Phase::Starting))
            && !self.end_runtime().await
        {
            let sentence = "something of the earlier VM could not be ended, see the problems of the instance; \
                            start it again when that is solved, or delete it";
            return Err(Refusal::new(ErrorCode::HostFault, sentence));
        }
        // One that nobody decided to end is left alone.
        match teardown::find_alive(&self.site, &self.record).await {
            Ok(alive) if alive.is_empty() => {}
            Ok(alive) => {
                let sentence =
                    format!("{} of an earlier start still runs; delete the instance", alive.join(" and "));
                return Err(Refusal::new(ErrorCode::WrongState, sentence));
            }
            Err(error) => {
                tracing::error!(instance = %self.record.id, error, "is a VM of it alive? that cannot be told");
                let sentence = "whether its VM still runs cannot be told; the agent's log tells why";
                return Err(Refusal::new(ErrorCode::HostFault, sentence));
            }
        }
        if !self.write_a_start_down().await {
            self.publish();
            let sentence = "the start could not be written down; is the host's disk full?";
            return Err(Refusal::new(ErrorCode::HostFault, sentence));
        }
        self.solved("residue");
        self.events.add("starting", None);
        self.start_boot(None);
        Ok(())
    }

    /// Begins what an earlier agent did not finish, or what its host's reboot ended. Beside something of an earlier VM none
    /// may run.
    pub(super) async fn bring_up(&mut self) {
        self.publish();
        let why = if !self.end_runtime().await {
            "something of its earlier VM could not be ended"
        } else if !self.write_a_start_down().await {
            "its start could not be written down"
        } else {
            self.events.add("accepted", None);
            return self.start_boot(None);
        };
        // Not written down: the next agent tries again.
        let reason = format!("{why}; the disk is kept, start boots it again");
        self.record.phase = Phase::Failed { reason: reason.clone() };
        self.enter(InstanceState::Failed, Some(reason.clone()));
        self.events.add("failed", Some(reason));
    }

    /// A VM that is not written down would be ended by the next agent. False: the record is as before.
    async fn write_a_start_down(&mut self) -> bool {
        let resting = self.record.clone();
        self.record.incarnation = self.record.incarnation.saturating_add(1);
        self.record.boot_id.clone_from(&self.site.boot_id);
        let written = self.commit(Phase::Starting).await;
        if !written {
            self.record = resting;
        }
        written
    }

    /// Ends what is left of the VM; its disk stays. False when something resists, which is shown then.
    pub(super) async fn end_runtime(&mut self) -> bool {
        let residues = teardown::end_runtime(&self.site, &self.record).await;
        if residues.is_empty() {
            return true;
        }
        tracing::error!(instance = %self.record.id, ?residues, "not everything could be ended");
        let text = self.site.without_paths(&residues.join("; "));
        let message = format!("not everything of the VM could be ended: {text}");
        self.problem("residue", message, "delete the instance");
        false
    }

    /// The VM ended, or could not be started, because the host goes down. The record keeps what it says, so that the next
    /// agent does with the instance what the owner wants after a reboot.
    fn rest_until_reboot(&mut self) {
        (self.boot, self.running) = (None, None);
        self.problems.clear();
        self.enter(InstanceState::Stopped, Some("the host is going down".to_owned()));
    }

    /// The last words of the guest, before QEMU's memory of them goes.
    async fn drain_console(&mut self) {
        let Some(running) = &self.running else { return };
        let (reply, drained) = oneshot::channel();
        if running.link.orders().try_send(VmOrder::DrainConsole(reply)).is_ok() {
            let _ = timeout(CONSOLE_DEADLINE, drained).await;
        }
    }
}
