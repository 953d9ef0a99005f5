//! The host's GPUs as callers see and steer them.

use qudata_api::{ErrorCode, GpuTopology, GpuView};
use qudata_host::{causes::chain, pci::PciAddress};

use super::Instances;
use crate::{gpus::OperatorError, refusal::Refusal};

impl Instances {
    /// The GPUs of this host.
    pub fn gpus(&self) -> Vec<GpuView> {
        let held = self.handles().into_iter().flat_map(|handle| {
            let id = handle.id();
            handle.holds().leases.gpus.clone().into_iter().map(move |address| (address, id))
        });
        self.inner.site.gpus.views(&held.collect())
    }

    /// One GPU.
    ///
    /// # Errors
    /// 404 when this host has none there.
    pub fn gpu(&self, address: PciAddress) -> Result<GpuView, Refusal> {
        let text = address.to_string();
        self.gpus().into_iter().find(|gpu| gpu.address == text).ok_or_else(|| no_such_gpu(address))
    }

    /// Where the GPUs sit.
    pub fn gpu_places(&self) -> GpuTopology {
        self.inner.site.gpus.places()
    }

    /// Takes a GPU out of business.
    ///
    /// # Errors
    /// 404, or 409 in a state that does not allow it.
    pub async fn quarantine(&self, address: PciAddress, reason: &str) -> Result<GpuView, Refusal> {
        let done = self.inner.site.gpus.quarantine(address, reason).await;
        done.map_err(|error| operator_refusal(address, &error))?;
        self.gpu(address)
    }

    /// Begins to reset and check a quarantined GPU, which frees it if it passes.
    ///
    /// # Errors
    /// 404, or 409 in a state that does not allow it.
    pub async fn release_gpu(&self, address: PciAddress) -> Result<GpuView, Refusal> {
        let done = self.inner.site.gpus.acquit(address).await;
        done.map_err(|error| operator_refusal(address, &error))?;
        self.gpu(address)
    }
}

fn no_such_gpu(address: PciAddress) -> Refusal {
    Refusal::new(
        ErrorCode::NoSuchGpu,
        format!("this host has no GPU {address}; GET /gpus lists those it has"),
    )
}

fn operator_refusal(address: PciAddress, error: &OperatorError) -> Refusal {
    match error {
        OperatorError::Unknown(_) => no_such_gpu(address),
        OperatorError::WrongState { .. } => Refusal::new(ErrorCode::WrongState, error.to_string()),
        OperatorError::Advance(_) => {
            tracing::error!(gpu = %address, error = %chain(error), "an operator's wish was not written down");
            Refusal::new(
                ErrorCode::HostFault,
                "the change could not be written down; is the host's disk full?",
            )
        }
    }
}
