//! Product tests: stories told to the real agent binary with real QEMU in emulation. A story named `orig_<row>_…` provokes
//! a defect of the original agent; `slow_…` is left out by `--quick`. Each ends with a leak check.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests: what is not as expected stops the story"
)]

mod again;
mod crash;
mod delete;
mod early;
mod front;
mod full_disk;
mod hostile;
mod image;
mod kills;
mod life;
mod limits;
mod power;
mod qemu;
mod secrets;
mod settings;
mod tunnel;
mod tunnel_real;
