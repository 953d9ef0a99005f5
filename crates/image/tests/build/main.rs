//! Images built for real: from a local HTTP server with real signed checksums, with real curl, gpgv, qemu-img, and, in the
//! stories named `slow_…`, a real guest in emulation that `cargo xtask test` provides.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::too_many_lines,
    reason = "tests: what is not as expected stops the story"
)]

mod download;
mod frugal;
mod guest;
mod killed;
mod kit;
mod server;
