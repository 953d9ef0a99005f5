//! The OS inside a VM, as the agent meets it: the seed it boots with, its keys, its SSH session, its readiness,
//! its metrics. Knows no instances and no QEMU. Whatever a guest says is hostile: every read has a size and a
//! deadline.

pub mod authorize;
pub mod keys;
pub mod metrics;
pub mod ready;
pub mod seed;
pub mod session;
