//! GPUs as `GET /gpus` shows them.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

/// Where a GPU is in its life: `free → leased → bound → in_use → draining → sanitizing → free | quarantined`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum GpuState {
    /// Nobody's; may be leased.
    Free,
    /// Promised to an instance, still with its host driver.
    Leased,
    /// Bound to `vfio-pci` for an instance.
    Bound,
    /// A VM has it.
    InUse,
    /// Its VM is ending.
    Draining,
    /// Being reset and checked.
    Sanitizing,
    /// Not proven healthy and clean; never leased until an operator, or a reboot plus a passed check, clears it.
    Quarantined,
}

/// One GPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct GpuView {
    /// PCI address, `0000:65:00.0`.
    pub address: String,
    /// Where it is in its life.
    pub state: GpuState,
    /// Since when.
    #[schema(value_type = String, format = DateTime)]
    pub since: Timestamp,
    /// Whose it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub instance: Option<Uuid>,
}
