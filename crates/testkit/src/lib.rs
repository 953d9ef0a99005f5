//! What tests are made of: the leak oracle, a fake GPU server, a real agent under a test's control, and the services it
//! talks to: the control plane, a real frps, a fake frpc. Dev only; nothing here is shipped. Called by the product tests, the benchmarks and `cargo xtask demo`.

pub mod agent;
pub mod control_plane;
pub mod frp;
pub mod http;
pub mod leakcheck;
pub mod pci;
pub mod platform;
pub mod process;
pub mod serve;
pub mod ssh;
pub mod tool;
