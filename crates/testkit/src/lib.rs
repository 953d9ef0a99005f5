//! What tests are made of: the leak oracle, a fake GPU server, and a real agent under a test's control. Dev only;
//! nothing here is shipped. Called by the product tests, the benchmarks and `cargo xtask demo`.

pub mod agent;
pub mod http;
pub mod leakcheck;
pub mod pci;
pub mod process;
pub mod ssh;
pub mod tool;
