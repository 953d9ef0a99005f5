//! Makes the guest's root directory from packages with mmdebstrap. Called once per build by the parent module.
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Context, Result};

use super::recipe::{FILES, LEFT_OUT, PACKAGES};
use super::sources::Sources;
use crate::tool;

/// Names inside the build directory; mmdebstrap runs there, so its hooks need no quoting of paths.
const ROOT: &str = "root";
const OVERLAY: &str = "overlay";

/// Builds `<build>/root`, owned by root.
pub(super) fn build(build: &Path, release: &str, sources: &Sources) -> Result<()> {
    stage_files(&build.join(OVERLAY))?;
    let mut command = tool::privileged("env");
    command.current_dir(build);
    // A build does the same whoever runs it and wherever.
    command.args(["-i", "LC_ALL=C.UTF-8", "PATH=/usr/sbin:/usr/bin:/sbin:/bin"]);
    command.args(sources.proxies.iter().map(|(name, value)| format!("{name}={value}")));
    command.args(["mmdebstrap", "--quiet", "--variant=minbase", "--format=directory"]);
    command.arg(format!("--include={}", PACKAGES.join(",")));
    command.args(LEFT_OUT.iter().map(|rule| format!("--dpkgopt={rule}")));
    command.args(sources.options.iter().map(|option| format!("--aptopt={option}")));
    command.arg(format!("--essential-hook=sync-in {OVERLAY} /"));
    command.arg("--customize-hook=chroot \"$1\" chown -R root:root /etc/fstab /etc/cloud /etc/initramfs-tools /etc/ssh");
    command.arg("--customize-hook=chroot \"$1\" sh /var/tmp/finish.sh");
    command.args([release, ROOT]);
    for (name, text) in [("machine.list", &sources.lines), ("machine.sources", &sources.stanzas)] {
        if !text.is_empty() {
            fs::write(build.join(name), text).with_context(|| format!("cannot write {name}"))?;
            command.arg(format!("./{name}"));
        }
    }
    tool::run_visibly(&mut command).context("the guest's root file system could not be built")
}

fn stage_files(overlay: &Path) -> Result<()> {
    for file in FILES {
        let path = overlay.join(file.path);
        let dir = path.parent().unwrap_or(overlay);
        fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
        fs::write(&path, file.content).with_context(|| format!("cannot write {}", path.display()))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(file.mode))?;
    }
    Ok(())
}
