//! Services of the host that a bind stops: those that an earlier agent did not live to start again. Part of `gpus`.

use std::time::Duration;

use qudata_host::causes::chain;
use qudata_vfio::nvidia::{self, Quieting, Tools};

use tokio::time::timeout;

use super::{Gpus, record::GpuRecord};

/// Recovery waits for them, and with it everybody: a service that hangs must not keep the agent from its tenants.
const PATIENCE: Duration = Duration::from_secs(60);

impl Gpus {
    /// Starts them again, before any GPU is touched: what comes back later could open one in the middle of its unbind.
    /// Not those of a wedged GPU, which would open it and hang with it.
    pub async fn resume_services(&self) {
        let tools = Tools::default();
        let all = async {
            for record in self.records() {
                self.resume(&tools, record).await;
            }
        };
        if timeout(PATIENCE, all).await.is_err() {
            tracing::error!("services of the host do not start; the next agent tries again");
        }
    }

    pub(super) async fn resume(&self, tools: &Tools, record: GpuRecord) {
        let GpuRecord { address, life, stopped_services: services, wedged, boot_id, .. } = record;
        if services.is_empty() || (wedged && boot_id == self.inner.setup.boot_id) {
            return;
        }
        let _quiet = self.inner.quiet.lock().await;
        let quieting = Quieting { gpu: address, services };
        if let Err(error) = nvidia::resume(tools, &quieting).await {
            tracing::error!(gpu = %address, error = %chain(&error), "a service of the host stays stopped");
            return;
        }
        // In which boot the rest was written stays: a quarantine of an earlier one is still to be checked.
        let noted = self.advance(address, life, |record| {
            record.stopped_services.clear();
            record.boot_id = boot_id;
        });
        if let Err(error) = noted.await {
            tracing::error!(gpu = %address, error = %chain(&error), "that its services run again was not written down");
        }
    }
}
