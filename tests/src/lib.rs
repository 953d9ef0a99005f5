//! What the product tests' stories share: agents with the usual settings, wishes for small instances, deadlines. The
//! stories are in `tests/product`; `cargo xtask test` runs them, `--quick` without those whose name starts with `slow_`.

use std::{
    io,
    net::TcpStream,
    time::{Duration, Instant},
};

use qudata_testkit::agent::{Image, Setup, TestAgent};
use serde_json::{Value, json};

/// A boot of a guest in emulation, on two cores that other guests use too: with UEFI firmware and three neighbours it took
/// 240 s. It ends what hangs; how fast a boot is, benchmarks say.
pub const BOOT: Duration = Duration::from_secs(600);
/// Anything the agent does by itself, without waiting for a guest.
pub const SOON: Duration = Duration::from_secs(30);
/// "At once" with a margin for a busy machine; benchmarks measure the real figure.
pub const AT_ONCE: Duration = Duration::from_secs(2);

/// An agent whose VMs find no system to start: they are cheap and never get ready.
pub fn blank_agent() -> TestAgent {
    Setup::new(Image::Blank).start()
}

/// An agent whose VMs are Debian guests, started the fastest way.
pub fn guest_agent() -> TestAgent {
    Setup::new(Image::Direct).start()
}

/// The smallest wish, for a VM without a guest.
pub fn small() -> Value {
    json!({ "cpus": "1", "memory": "256M", "storage_gb": "1", "ports": ["22", "8000"] })
}

/// A wish for a Debian guest that `key` may log in to.
pub fn guest(key: &str) -> Value {
    json!({
        "cpus": "1", "memory": "640M", "storage_gb": "3", "ports": ["22", "8000"], "ssh_pubkeys": [key],
    })
}

/// Connects to a published port as a renter does, and reports how it went and how long it took.
pub fn knock(port: u16) -> (io::Result<TcpStream>, Duration) {
    let start = Instant::now();
    let stream = TcpStream::connect_timeout(&([127, 0, 0, 1], port).into(), SOON);
    (stream, start.elapsed())
}
