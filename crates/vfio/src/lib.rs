//! PCI passthrough: what hardware there is (`topology`), what has to be written to move a GPU between its host driver
//! and `vfio-pci` (`plan`, pure), doing it (`rebind`), and proving that a GPU is healthy and clean (`sanitize`).
//! Knows no VMs and no instances; called by the agent and, for `gpu list` and `gpu topo`, through its API.

mod bus_reset;
pub mod choose;
mod config;
pub mod distance;
pub mod door;
pub mod health;
pub mod holders;
pub mod names;
pub mod nvidia;
pub mod op;
pub mod plan;
pub mod rebind;
pub mod reset;
pub mod sanitize;
pub mod sysfs;
pub mod topology;
