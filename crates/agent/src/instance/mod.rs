//! One instance: its wish, its durable record, its life.
//!
//! ```text
//!            create                       guest proven
//!   (none) ────────▶ Provisioning ─▶ Booting ─────────▶ Running ◀─resume/stop─▶ Paused
//!                         │             │                │  ▲ │
//!                         │ failed      │ deadline       │  │ └─ reset or reboot from inside ─▶ Rebooting ─┐
//!                         ▼             ▼                │  └───────────── guest proven ──────────────────┘
//!                       Failed ◀─── QEMU ended ──────────┤
//!                         │                              ├─ power-off from inside ─▶ Stopped
//!                         └────────── start ─────────────┴──▶ Booting         (start boots it again)
//!   any ── QEMU silent ─▶ Unresponsive ── it answers ─▶ what it was before
//!   any ── DELETE ─▶ Deleting ─▶ (none)                      only this way the disk goes
//! ```
//! Files: `spec` the validated wish · `record` the durable truth · `admission` which request is allowed when ·
//! `provision` forward · `teardown` backward · `vm_watch` keeps one VM company · `guest_access` SSH into it ·
//! `task` the owner of it all, with `life` (what happens to the VM), `rest` (how it ends), `calls` (what is asked) and
//! `snapshot` (what is shown) · `handle` what everyone else holds · `events` its history.

pub mod admission;
mod calls;
pub mod events;
pub mod guest_access;
pub mod handle;
mod hardware;
mod life;
pub mod provision;
pub mod record;
mod rest;
mod snapshot;
pub mod spec;
pub mod task;
pub mod teardown;
pub mod vm_watch;
