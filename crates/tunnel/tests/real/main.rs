//! The tunnel with the real frpc and frps. `FRPC_BIN` and `FRPS_BIN` say where they are, else they are looked for in
//! `PATH`. Run by `cargo xtask test`; by hand: `cargo test -p qudata-tunnel -- --include-ignored`.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests state expectations"
)]

mod changes;
mod earlier;
mod frps;
mod life;
mod local;
mod mending;
mod outages;
mod refusals;
mod routes;
mod site;
mod streams;
mod tls;
