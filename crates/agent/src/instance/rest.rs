//! How an instance comes to rest: its VM has ended, or was given up. Part of the instance's task.

use std::time::Duration;

use qudata_api::InstanceState;
use qudata_host::{causes::chain, launch::Launcher, process::ExitReport};
use tokio::{sync::oneshot, time::timeout};

use super::{
    record::Phase,
    task::InstanceTask,
    teardown,
    vm_watch::{PowerOff, VmOrder},
};

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

    /// Ends what is left of the VM; its disk stays.
    pub(super) async fn end_runtime(&mut self) {
        let residues = teardown::end_runtime(&self.site, &self.record).await;
        if residues.is_empty() {
            return;
        }
        tracing::error!(instance = %self.record.id, ?residues, "not everything could be ended");
        let text = self.site.without_paths(&residues.join("; "));
        let message = format!("not everything of the VM could be ended: {text}");
        self.problem("residue", message, "delete the instance");
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
