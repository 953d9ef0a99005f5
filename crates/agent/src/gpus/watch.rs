//! What happens to GPUs without an instance's doing: what an earlier agent left, a device that falls off the bus while a
//! tenant has it, an operator's word. Part of `gpus`.

use std::{collections::BTreeSet, io::Read, time::Duration};

use qudata_host::{causes::chain, pci::PciAddress};
use qudata_vfio::health::Baseline;
use tokio::{
    sync::oneshot,
    time::{MissedTickBehavior, interval, timeout},
};

use super::{
    AdvanceError, Card, Gpus,
    record::{GpuRecord, Life},
};

/// How often GPUs in use are looked at, and how often all are.
const WATCH_PERIOD: Duration = Duration::from_secs(10);
const READ_DEADLINE: Duration = Duration::from_secs(3);
pub(super) const OFF_THE_BUS: &str =
    "it fell off the bus while an instance had it (its config space reads as ones)";

/// An operator's wish was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum OperatorError {
    /// There is no such GPU.
    #[error("there is no GPU {0} on this host")]
    Unknown(PciAddress),
    /// The state does not allow it.
    #[error("GPU {address} is {life:?}: {remedy}")]
    WrongState {
        /// The GPU.
        address: PciAddress,
        /// Where it is in its life.
        life: Life,
        /// What to do instead.
        remedy: &'static str,
    },
    /// It could not be written down.
    #[error("the store refused")]
    Advance(#[source] AdvanceError),
}

impl Gpus {
    /// Goes on where an earlier agent stopped, for the GPUs that no instance holds: those are nobody's business but
    /// ours. `held` are the others; of these only the quarantined ones are, which no VM can have. Does not wait: what is
    /// being cleansed is not lent meanwhile.
    pub fn recover(&self, held: &BTreeSet<PciAddress>) {
        for record in self.records() {
            let business = record.life == Life::Quarantined || !held.contains(&record.address);
            if !business || !self.needs_cleansing(&record) {
                continue;
            }
            tracing::info!(gpu = %record.address, life = ?record.life, "cleansing what an earlier agent left");
            self.cleanse_apart(record.address);
        }
        self.prove();
    }

    /// Cleanses free GPUs that nobody can vouch for, as soon as the host leaves them.
    pub(super) fn prove(&self) {
        let due = |card: &Card| {
            card.record.life == Life::Free && card.unproven && card.meant && card.refused.is_none()
        };
        let due: Vec<PciAddress> =
            self.cards().values().filter(|card| due(card)).map(|card| card.record.address).collect();
        due.into_iter().for_each(|address| self.cleanse_apart(address));
    }

    fn needs_cleansing(&self, record: &GpuRecord) -> bool {
        match record.life {
            // A reboot ends whatever hung or was held; what then passes is clean.
            Life::Quarantined => record.boot_id != self.inner.setup.boot_id,
            Life::Free => false,
            Life::Bound | Life::InUse | Life::Draining | Life::Sanitizing => true,
        }
    }

    /// Looks after GPUs for ever: those in use must be on the bus; of the others it is worked out again whether they can
    /// be lent.
    pub async fn watch(&self) {
        let mut clock = interval(WATCH_PERIOD);
        clock.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            clock.tick().await;
            for record in self.records() {
                if record.life == Life::InUse
                    && record.why.is_none()
                    && self.is_off_the_bus(record.address).await
                {
                    tracing::error!(gpu = %record.address, OFF_THE_BUS);
                    let suspect = self
                        .advance(record.address, Life::InUse, |record| {
                            record.why = Some(OFF_THE_BUS.to_owned())
                        })
                        .await;
                    if let Err(error) = suspect {
                        tracing::error!(error = %chain(&error), "a suspicion was not written down");
                    }
                }
            }
            self.look().await;
            self.prove();
        }
    }

    pub(super) async fn is_off_the_bus(&self, address: PciAddress) -> bool {
        if self.hung().reads.get(&address).is_some_and(|read| !read.is_finished()) {
            return false;
        }
        // The one file that tells the truth. It does not hang where the others do, but a reset locks it too.
        let path = self.inner.setup.root.join(format!("sys/bus/pci/devices/{address}/config"));
        let (found, told) = oneshot::channel();
        let read = tokio::task::spawn_blocking(move || {
            let read = || {
                let mut ids = [0; 4];
                std::fs::File::open(path)?.read_exact(&mut ids).map(|()| ids)
            };
            // Nobody waits any more after the deadline.
            let _ = found.send(read());
        });
        match timeout(READ_DEADLINE, told).await {
            Ok(Ok(Ok(ids))) => ids == [0xff; 4],
            Ok(Ok(Err(error))) => error.kind() == std::io::ErrorKind::NotFound,
            Ok(Err(_)) => false,
            Err(_) => {
                self.hung().reads.insert(address, read);
                false
            }
        }
    }

    /// Takes a GPU out of business by an operator's word; one that a tenant has, when the tenant has gone.
    ///
    /// # Errors
    /// [`OperatorError`].
    pub async fn quarantine(&self, address: PciAddress, reason: &str) -> Result<(), OperatorError> {
        let card = self.cards().get(&address).map(|card| card.gpu.clone());
        let gpu = card.ok_or(OperatorError::Unknown(address))?;
        let why = format!("an operator said: {reason}");
        let as_it_is = Baseline::of(&self.topology(), &gpu);
        let next = |life| if matches!(life, Life::Bound | Life::InUse) { life } else { Life::Quarantined };
        let done = self.step(address, next, |record| {
            record.why = Some(why);
            // What it was is what it must be when it is checked.
            record.baseline.get_or_insert(as_it_is);
        });
        match done.await {
            Ok(_) => Ok(()),
            Err(AdvanceError::NoSuchStep { from: life, .. }) => {
                let remedy = "wait until it is free, then quarantine it";
                Err(OperatorError::WrongState { address, life, remedy })
            }
            Err(error) => Err(OperatorError::Advance(error)),
        }
    }

    /// Begins to reset and check a quarantined GPU; it is free when it passes, and quarantined again otherwise. One that
    /// is not in the host any more is forgotten.
    ///
    /// # Errors
    /// [`OperatorError`]; then it is as it was.
    pub async fn acquit(&self, address: PciAddress) -> Result<(), OperatorError> {
        let record = self.record(address).ok_or(OperatorError::Unknown(address))?;
        let wrong = |remedy| OperatorError::WrongState { address, life: record.life, remedy };
        if record.life != Life::Quarantined {
            return Err(wrong("only a quarantined GPU can be released"));
        }
        let is_there = || self.cards().get(&address).is_some_and(|card| card.there);
        if !is_there() {
            // Gone at the last look, and still.
            self.look().await;
        }
        if !is_there() && self.bus_hangs().is_none() {
            self.forget(address).await.map_err(|error| match error {
                AdvanceError::NoSuchStep { from: life, .. } => OperatorError::WrongState {
                    address,
                    life,
                    remedy: "only a quarantined GPU can be released",
                },
                error => OperatorError::Advance(error),
            })?;
            self.look().await;
            return Ok(());
        }
        if record.wedged && record.boot_id == self.inner.setup.boot_id {
            return Err(wrong("only a reboot of the host helps; it is checked then"));
        }
        self.advance(address, Life::Draining, |record| (record.why, record.wedged) = (None, false))
            .await
            .map_err(OperatorError::Advance)?;
        self.cleanse_apart(address);
        Ok(())
    }

    /// Cleanses without being waited for: whoever asked may hang up.
    fn cleanse_apart(&self, address: PciAddress) {
        let gpus = self.clone();
        tokio::spawn(async move {
            gpus.cleanse(address).await;
            gpus.look().await;
        });
    }
}
