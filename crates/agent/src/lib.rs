//! The daemon as a library: the only crate that joins passthrough, QEMU, guest and tunnel. See ARCHITECTURE.md for the
//! tasks, their channels and the way of a request.

pub mod control_plane;
pub mod daemon;
pub mod gpus;
pub mod http;
pub mod images;
pub mod instance;
pub mod instances;
pub mod inventory;
pub mod launching;
pub mod outside;
pub mod pages;
pub mod paths;
pub mod publishing;
pub mod recovery;
pub mod refusal;
pub mod secret;
pub mod settings;
pub mod site;
pub mod store;
pub mod supervision;

// The CLI asks the same question as `serve` before it starts (`probe-kvm`), and only this crate joins it with `qemu`.
pub use qudata_qemu::probe;
