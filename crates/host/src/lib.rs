//! The only door to the operating system: one-shot tools, long-lived processes that outlive the agent,
//! durable files, capacity of the host. Knows nothing of VMs or instances.

pub mod capacity;
pub mod causes;
pub mod command;
pub mod durable;
pub mod iso;
pub mod launch;
pub mod pci;
pub mod port;
pub mod process;
pub mod shim;
pub mod size;
