//! What changes a host for good: look at it (`observe`), decide (`plan`, pure), change it (`install`), take it back byte
//! for byte (`uninstall`). Called by the CLI's commands of the same names.
//!
//! ```text
//! observe ─▶ plan ─▶ preflight ─ package ─ settings ─ boot ─ image ─ reboot ─ selftest ─ agent ─ verify
//!               │        each change: backup ▶ manifest ▶ do ▶ look ▶ manifest "done"       (`ledger`)
//!               └▶ text of --plan                                 └── uninstall: the same list backwards
//! ```
//! Killed anywhere, the same command goes on: every step looks at the host first and does what is missing.

pub mod boot;
pub mod choose;
pub mod cmdline;
pub mod error;
pub mod files;
pub mod hands;
pub mod install;
pub mod ledger;
pub mod manifest;
pub mod observe;
pub mod outside;
pub mod packages;
pub mod places;
pub mod plan;
pub mod progress;
pub mod settings_file;
pub mod text;
pub mod uninstall;
pub mod wish;

/// Secrets are handed over in these.
pub use secrecy::{ExposeSecret, SecretString};

#[cfg(test)]
mod tests;
