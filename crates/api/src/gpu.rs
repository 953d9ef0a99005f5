//! GPUs as `GET /gpus`, `GET /gpus/{address}` and `GET /gpus/topology` show them, and what can be ordered for one.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

/// Where a GPU is in its life: `free → leased → bound → in_use → draining → sanitizing → free | quarantined`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum GpuState {
    /// Nobody's; may be leased, unless the view has a `refusal`.
    Free,
    /// Promised to an instance, still with its host driver.
    Leased,
    /// Bound to `vfio-pci` for an instance.
    Bound,
    /// A VM has it.
    InUse,
    /// Its VM is ending, or whoever has it open is waited for.
    Draining,
    /// Being reset and checked.
    Sanitizing,
    /// Not proven healthy and clean; never leased until an operator, or a reboot plus a passed check, clears it.
    Quarantined,
}

/// One GPU: all PCI functions of its slot, which travel together.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct GpuView {
    /// PCI address of the function that computes, `0000:65:00.0`: what `gpu_addrs` and the paths take.
    pub address: String,
    /// Vendor and model from the system's pci.ids; absent where it does not know them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// PCI vendor id, four hex digits, `10de`; absent where the GPU is configured or known and not there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vendor_id: Option<String>,
    /// PCI device id, four hex digits, `2330`; absent where the GPU is configured or known and not there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device_id: Option<String>,
    /// Where it is in its life.
    pub state: GpuState,
    /// Since when, RFC 3339.
    #[schema(value_type = String, format = DateTime)]
    pub since: Timestamp,
    /// What is wrong with it, one sentence; always for `quarantined`. In other states it will be quarantined when its
    /// instance gives it back.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
    /// What to do about `why`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
    /// Whose it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub instance: Option<Uuid>,
    /// Whether the host lets it be rented, leases apart. `false` comes with `refusal`, or with state `quarantined`.
    pub rentable: bool,
    /// Why the host does not let it be rented; only ever for state `free`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub refusal: Option<GpuRefusal>,
    /// The driver of `address` now; absent when it has none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub driver: Option<String>,
    /// The driver it had before it was first lent; absent when it had none or was never lent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub original_driver: Option<String>,
    /// PCI addresses of all its functions, `address` among them.
    pub functions: Vec<String>,
    /// Its IOMMU group; absent without an IOMMU.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iommu_group: Option<u32>,
    /// Its NUMA node; absent where the kernel knows none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub numa_node: Option<u32>,
    /// Its PCI Express link; absent where it has none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub link: Option<GpuLink>,
    /// Memory regions (BARs) of all functions together, in bytes.
    pub bar_bytes: u64,
    /// Ways the kernel can reset it, best first; empty when it cannot.
    pub reset_methods: Vec<String>,
    /// Who holds it on the host.
    pub holders: Vec<GpuHolder>,
}

/// Why the host does not let a GPU be rented.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct GpuRefusal {
    /// Stable code, for example `foreign_device`.
    pub code: String,
    /// One sentence: what is in the way and where.
    pub message: String,
    /// What to do about it.
    pub remedy: String,
    /// Since when, as far as this agent has seen it, RFC 3339.
    #[schema(value_type = String, format = DateTime)]
    pub since: Timestamp,
    /// The owner's choice, or what the agent leaves alone unless told otherwise (the host's own console): nothing is
    /// wrong. `false`: it could be rented if the host were in order.
    pub by_choice: bool,
}

/// A PCI Express link. An idle GPU may lower its speed; fewer lanes than it can have are worth a look.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct GpuLink {
    /// Transfer rate now, in GT/s (8 is PCIe 3).
    pub speed: f64,
    /// Lanes now.
    pub width: u8,
    /// The most it can do, in GT/s.
    pub max_speed: f64,
    /// The most lanes it can have.
    pub max_width: u8,
}

/// What kind of thing holds a GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum GpuHolderKind {
    /// A process has a device file of it open.
    Process,
    /// A framebuffer is on it.
    Framebuffer,
    /// A virtual console of the host is shown by it.
    Console,
    /// A kernel module uses it.
    Module,
}

/// Who holds a GPU on the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct GpuHolder {
    /// What kind of thing it is.
    pub kind: GpuHolderKind,
    /// Its name: of the program, the framebuffer, the console or the module.
    pub name: String,
    /// Process id, of a process.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    /// The systemd unit it belongs to, of a process that belongs to one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unit: Option<String>,
}

/// How far two GPUs are from each other, in the letters of `nvidia-smi topo`; best first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "UPPERCASE")]
pub enum GpuDistance {
    /// The same GPU.
    X,
    /// At most one PCIe bridge between them.
    Pix,
    /// Several PCIe bridges, but not the host bridge.
    Pxb,
    /// A PCIe host bridge.
    Phb,
    /// Different host bridges of one NUMA node.
    Node,
    /// Different NUMA nodes.
    Sys,
}

/// `data` of `GET /gpus/topology`: where the GPUs sit, and how far from each other.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct GpuTopology {
    /// The GPUs, by address.
    pub gpus: Vec<GpuPlace>,
    /// One row for each of `gpus`, in it one distance to each of `gpus`, both in their order.
    pub matrix: Vec<Vec<GpuDistance>>,
    /// What the letters mean, best first.
    pub legend: Vec<GpuDistanceMeaning>,
}

/// Where one GPU sits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct GpuPlace {
    /// PCI address, as in [`GpuView`].
    pub address: String,
    /// Vendor and model, as in [`GpuView`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Its IOMMU group; absent without an IOMMU.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iommu_group: Option<u32>,
    /// Its NUMA node; absent where the kernel knows none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub numa_node: Option<u32>,
}

/// A line of the legend.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct GpuDistanceMeaning {
    /// The letters.
    pub distance: GpuDistance,
    /// What lies between two GPUs that have them.
    pub meaning: String,
}

/// `POST /gpus/{address}/quarantine`; answered with the GPU as it is then. A GPU that an instance has is not taken away
/// from it: it is quarantined when it comes back, and `why` says so meanwhile.
///
/// `POST /gpus/{address}/release` has no body and the same kind of answer: `draining` or `sanitizing` while the GPU is
/// being reset and checked, then `free` or `quarantined` again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct QuarantineBody {
    /// Why, for whoever looks at it later: one sentence, 1 to 500 characters.
    pub reason: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quarantine_has_a_reason_and_nothing_else() {
        let body: QuarantineBody = serde_json::from_str(r#"{"reason":"fan is loud"}"#).unwrap();
        assert_eq!(body.reason, "fan is loud");
        for (text, named) in
            [("{}", "`reason`"), (r#"{"reason":"a","force":true}"#, "`force`"), (r#"{"reason":1}"#, "string")]
        {
            let error = serde_json::from_str::<QuarantineBody>(text).unwrap_err().to_string();
            assert!(error.contains(named), "{text}: {error}");
        }
    }

    #[test]
    fn distances_are_ordered_and_have_the_known_letters() {
        use GpuDistance::{Node, Phb, Pix, Pxb, Sys, X};
        let all = [X, Pix, Pxb, Phb, Node, Sys];
        assert!(all.is_sorted());
        assert_eq!(serde_json::to_string(&all).unwrap(), r#"["X","PIX","PXB","PHB","NODE","SYS"]"#);
    }

    #[test]
    fn a_gpu_that_is_configured_and_not_there_is_said_with_what_is_known() {
        let text = r#"{"address":"0000:65:00.0","state":"free","since":"2026-01-02T12:00:00Z","rentable":false,
            "refusal":{"code":"no_such_device","message":"m","remedy":"r","since":"2026-01-02T12:00:00Z","by_choice":false},
            "functions":["0000:65:00.0"],"bar_bytes":0,"reset_methods":[],"holders":[]}"#;
        let view: GpuView = serde_json::from_str(text).unwrap();
        let expected: serde_json::Value = serde_json::from_str(text).unwrap();
        assert_eq!(serde_json::to_value(&view).unwrap(), expected);
    }
}
