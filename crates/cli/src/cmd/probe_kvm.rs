//! `probe-kvm`: whether KVM runs guests on this host, for installers and tests.

use std::path::Path;

use anyhow::Context as _;
use qudata_agent_core::probe::KvmProbe;

use crate::{
    exit::{Exit, Failure},
    screen::Screen,
};

/// Prints the verdict; done when KVM is usable, failed when not.
pub(super) async fn run(screen: &Screen, qemu: &Path) -> Result<Exit, Failure> {
    let scratch = tempfile::tempdir().context("cannot make a folder for the probe")?;
    let probe = KvmProbe::run(qemu, scratch.path()).await.map_err(anyhow::Error::new)?;
    let usable = probe.is_usable();
    if screen.json {
        screen.print_json(&serde_json::json!({ "usable": usable, "reason": probe.to_string() }))?;
    } else {
        screen.print(&format!("{probe}\n"))?;
    }
    Ok(if usable { Exit::Done } else { Exit::Failed })
}
