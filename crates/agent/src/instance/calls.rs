//! What is asked of an instance: start, stop, restart, keys, console. Part of the instance's task.

use std::time::Duration;

use jiff::Timestamp;
use qudata_api::{Command, ErrorCode, InstanceState, Sample, StatusOf};
use qudata_guest::{
    authorize::{authorize, revoke},
    keys::GuestKey,
    metrics::{GpuMetrics, GuestMetrics},
};
use qudata_host::causes::chain;
use qudata_qemu::{console::Console, vm::VmError};
use tokio::{
    sync::{mpsc, oneshot},
    time::timeout,
};

use super::{
    admission::{Verdict, plan_command},
    guest_access::GuestAccess,
    handle::{PortMove, Request},
    task::InstanceTask,
    vm_watch::VmOrder,
};
use crate::refusal::Refusal;

const CONSOLE_DEADLINE: Duration = Duration::from_secs(3);
/// The API never returns more of a serial log.
const CONSOLE_MAX: u64 = 1 << 20;
/// QMP's own deadline is shorter; this one covers the queue in front of it.
const ORDER_DEADLINE: Duration = Duration::from_secs(15);

type Reply<T> = oneshot::Sender<Result<T, Refusal>>;

/// A finished call.
pub(super) enum CallOutcome {
    Commanded { verdict: Verdict, result: Result<(), Refusal>, reply: Reply<StatusOf> },
    Key { change: KeyChange, key: GuestKey, result: Result<(), Refusal>, reply: Reply<()> },
}

/// What is done with a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum KeyChange {
    Add,
    Remove,
}

impl InstanceTask {
    pub(super) async fn asked(&mut self, request: Request) {
        match request {
            Request::Command(command, reply) => self.command(command, reply).await,
            Request::AddKey(key, reply) => self.change_key(KeyChange::Add, key, reply),
            Request::RemoveKey(key, reply) => self.change_key(KeyChange::Remove, key, reply),
            Request::Console(reply) => self.console(reply),
            Request::MovePort(change, reply) => self.move_port(change, reply).await,
        }
    }

    /// The tunnel server gave the port to somebody else. Written down before it is shown: what a renter was told must
    /// hold after a restart of the agent too.
    async fn move_port(&mut self, change: PortMove, reply: Reply<()>) {
        let PortMove { guest, from, to } = change;
        if self.state == InstanceState::Provisioning {
            // The bring-up has a copy of the record, writes it down and gives it back.
            return answer(reply, Err(Refusal::busy("the instance is being brought up")));
        }
        if self.record.leases.public.get(&guest) != Some(&from) {
            return answer(reply, Ok(()));
        }
        self.record.leases.public.insert(guest, to);
        self.write_down().await;
        let message = format!(
            "port {guest} of the guest is public as {to} now: the tunnel server does not give {from}"
        );
        tracing::info!(instance = %self.record.id, guest, from, to, "public port moved");
        self.events.add("port_moved", Some(message));
        self.publish();
        answer(reply, Ok(()));
    }

    async fn command(&mut self, command: Command, reply: Reply<StatusOf>) {
        let verdict = match plan_command(self.state, command) {
            Ok(verdict) => verdict,
            Err(refusal) => return answer(reply, Err(refusal)),
        };
        match verdict {
            Verdict::AlreadySo => answer(reply, Ok(self.status())),
            Verdict::Boot => {
                let begun = self.boot_again().await;
                answer(reply, begun.map(|()| self.status()));
            }
            Verdict::Pause | Verdict::Resume | Verdict::Reset | Verdict::ResetAndResume => {
                self.order_vm(verdict, reply);
            }
        }
    }

    fn order_vm(&mut self, verdict: Verdict, reply: Reply<StatusOf>) {
        let Some(running) = &self.running else {
            return answer(
                reply,
                Err(Refusal::new(ErrorCode::WrongState, "the instance has no running VM; start it")),
            );
        };
        let orders = running.link.orders();
        if verdict == Verdict::Pause {
            // Its connection would hang while the machine stands still.
            running.access.forget();
            self.stop_sampling();
        } else {
            self.freeze_network(false);
        }
        self.call = Some(Box::pin(async move {
            let result = match verdict {
                Verdict::Pause => order(&orders, VmOrder::Pause).await,
                Verdict::Resume => order(&orders, VmOrder::Resume).await,
                Verdict::Reset => order(&orders, VmOrder::Reset).await,
                Verdict::ResetAndResume => match order(&orders, VmOrder::Reset).await {
                    Ok(()) => order(&orders, VmOrder::Resume).await,
                    refused => refused,
                },
                Verdict::AlreadySo | Verdict::Boot => Ok(()),
            };
            CallOutcome::Commanded { verdict, result, reply }
        }));
    }

    pub(super) async fn called(&mut self, outcome: CallOutcome) {
        match outcome {
            CallOutcome::Commanded { verdict, result, reply } => {
                if let Err(refusal) = result {
                    self.freeze_network(self.state == InstanceState::Paused);
                    return answer(reply, Err(refusal));
                }
                self.commanded(verdict);
                answer(reply, Ok(self.status()));
            }
            CallOutcome::Key { change, key, result, reply } => {
                if result.is_ok() {
                    self.note_key(change, &key).await;
                }
                answer(reply, result);
            }
        }
    }

    fn commanded(&mut self, verdict: Verdict) {
        // The VM may have ended between its answer and this moment; that was told already.
        if self.running.is_none() {
            return;
        }
        match verdict {
            Verdict::Pause => {
                self.freeze_network(true);
                self.enter(InstanceState::Paused, None);
                self.events.add("paused", None);
            }
            Verdict::Resume => {
                self.solved("disk_error");
                self.enter(InstanceState::Running, None);
                self.events.add("resumed", None);
                self.start_sampling();
            }
            // The reset itself is told by QEMU's event, which enters the state.
            Verdict::Reset | Verdict::ResetAndResume | Verdict::AlreadySo | Verdict::Boot => {}
        }
    }

    fn change_key(&mut self, change: KeyChange, key: GuestKey, reply: Reply<()>) {
        if self.state != InstanceState::Running {
            let sentence =
                "keys can be changed while the instance is running; start it, or wait until it is ready";
            return answer(reply, Err(Refusal::new(ErrorCode::WrongState, sentence)));
        }
        let Some(running) = &self.running else {
            return answer(
                reply,
                Err(Refusal::new(ErrorCode::WrongState, "the instance has no running VM; start it")),
            );
        };
        let access = running.access.clone();
        self.call = Some(Box::pin(async move {
            let result = apply_key(&access, change, &key).await;
            CallOutcome::Key { change, key, result, reply }
        }));
    }

    async fn note_key(&mut self, change: KeyChange, key: &GuestKey) {
        let keys = &mut self.record.spec.ssh_keys;
        keys.retain(|line| GuestKey::parse(line).is_ok_and(|known| known != *key));
        if change == KeyChange::Add {
            keys.push(key.to_line());
        }
        let phase = self.record.phase.clone();
        self.commit(phase).await;
        let event = if change == KeyChange::Add { "key_added" } else { "key_removed" };
        self.events.add(event, Some(key.fingerprint()));
        self.publish();
    }

    /// Reading the log may take a moment and changes nothing, so it does not occupy the task.
    fn console(&self, reply: Reply<Vec<u8>>) {
        let orders = self.running.as_ref().map(|running| running.link.orders());
        let file = Console::new(self.site.instance(&self.record).console());
        tokio::spawn(async move {
            if let Some(orders) = orders {
                let (drained_reply, drained) = oneshot::channel();
                if orders.try_send(VmOrder::DrainConsole(drained_reply)).is_ok() {
                    let _ = timeout(CONSOLE_DEADLINE, drained).await;
                }
            }
            let text = file.tail(CONSOLE_MAX).await.map_err(|error| {
                tracing::error!(error = %chain(&error), "the serial log cannot be read");
                Refusal::new(ErrorCode::HostFault, "the serial log cannot be read; the agent's log tells why")
            });
            answer(reply, text);
        });
    }

    fn status(&self) -> StatusOf {
        StatusOf { id: self.record.id, state: self.state }
    }
}

fn answer<T>(reply: Reply<T>, result: Result<T, Refusal>) {
    // The caller may have hung up.
    let _ = reply.send(result);
}

async fn order(
    orders: &mpsc::Sender<VmOrder>,
    make: impl FnOnce(oneshot::Sender<Result<(), VmError>>) -> VmOrder,
) -> Result<(), Refusal> {
    let silent = || Refusal::new(ErrorCode::HostFault, "the VM did not answer in time; its state is watched");
    let (reply, done) = oneshot::channel();
    let obeyed = async {
        orders.send(make(reply)).await.map_err(|_| silent())?;
        done.await.map_err(|_| silent())
    };
    let result = timeout(ORDER_DEADLINE, obeyed).await.map_err(|_| silent())??;
    result.map_err(|error| {
        tracing::error!(error = %chain(&error), "the VM did not obey");
        Refusal::new(ErrorCode::HostFault, "the VM did not do what was asked; the agent's log tells why")
    })
}

async fn apply_key(access: &GuestAccess, change: KeyChange, key: &GuestKey) -> Result<(), Refusal> {
    let fault = |error: &(dyn std::error::Error + 'static)| {
        tracing::warn!(error = %chain(error), "a key could not be changed");
        Refusal::new(
            ErrorCode::GuestFault,
            "the guest did not take the change of its keys; try again, or look at its console",
        )
    };
    let _turn = access.turn().await;
    let session = access.session().await.map_err(|error| fault(&error))?;
    match change {
        KeyChange::Add => authorize(&session, key).await.map(|_| ()).map_err(|error| fault(&error)),
        KeyChange::Remove if key == access.management_key() => {
            Err(Refusal::field("ssh_pubkey", "the agent's own key", "keys of the renter are"))
        }
        KeyChange::Remove => {
            revoke(&session, access.management_key(), key).await.map(|_| ()).map_err(|error| fault(&error))
        }
    }
}

/// A reading as the API shows it: of several GPUs the busiest, the hottest and the fullest.
pub(super) fn sample_view(metrics: &GuestMetrics) -> Sample {
    let most = |value: fn(&GpuMetrics) -> Option<f64>| metrics.gpus.iter().filter_map(value).reduce(f64::max);
    Sample {
        at: Timestamp::now(),
        cpu_percent: metrics.cpu_util,
        ram_percent: metrics.ram_util,
        net_rx_bytes: metrics.inet_in,
        net_tx_bytes: metrics.inet_out,
        gpu_percent: most(|gpu| gpu.util.map(f64::from)),
        gpu_celsius: most(|gpu| gpu.temp.map(f64::from)),
        gpu_memory_percent: most(|gpu| gpu.mem_util),
    }
}
