//! One virtual machine: hardware description, command line, disk, firmware, network, process, console.
//!
//! Knows no instances and no guests; the agent joins it with those. The `plan_*` functions only describe; the rest acts,
//! through `qudata-host`.

pub mod argv;
pub mod disk;
pub mod egress;
pub mod firmware;
pub mod machine;
pub mod memory;
pub mod mmio;
pub mod passt;
pub mod passthrough;
pub mod pinning;
pub mod version;

#[cfg(test)]
mod golden;
mod owned;

pub mod console;
pub mod probe;
pub mod qmp;
pub mod shutdown;
pub mod vm;
