//! Makes an image's root directory from packages with mmdebstrap. Called once per build by the parent module.
use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Context, Result};

use super::recipe::{LEFT_OUT, Recipe};
use super::sources::{self, Sources};
use crate::tool;

/// Names inside the build directory; mmdebstrap runs there, so its hooks need no quoting of paths.
const ROOT: &str = "root";
const OVERLAY: &str = "overlay";

/// Builds `<build>/root`, owned by root.
pub(super) fn build(build: &Path, release: &str, recipe: &Recipe) -> Result<()> {
    let sources: Sources = sources::read(release)?;
    stage_files(recipe, &build.join(OVERLAY))?;
    let mut command = tool::privileged("env");
    command.current_dir(build);
    // A build does the same whoever runs it and wherever.
    command.args(["-i", "LC_ALL=C.UTF-8", "PATH=/usr/sbin:/usr/bin:/sbin:/bin"]);
    command.args(sources.proxies.iter().map(|(name, value)| format!("{name}={value}")));
    command.args(["mmdebstrap", "--quiet", "--variant=minbase", "--format=directory"]);
    command.arg(format!("--include={}", recipe.packages.join(",")));
    command.args(LEFT_OUT.iter().map(|rule| format!("--dpkgopt={rule}")));
    command.args(sources.options.iter().map(|option| format!("--aptopt={option}")));
    command.arg(format!("--essential-hook=sync-in {OVERLAY} /"));
    command.arg(format!("--customize-hook=chroot \"$1\" chown -R root:root {}", placed(recipe)));
    command.arg("--customize-hook=chroot \"$1\" sh /var/tmp/finish.sh");
    command.args([release, ROOT]);
    for (name, text) in [("machine.list", &sources.lines), ("machine.sources", &sources.stanzas)] {
        if !text.is_empty() {
            fs::write(build.join(name), text).with_context(|| format!("cannot write {name}"))?;
            command.arg(format!("./{name}"));
        }
    }
    tool::run_visibly(&mut command).context("the image's root file system could not be built")
}

/// What came with the builder's user id: the recipe's places below /etc.
fn placed(recipe: &Recipe) -> String {
    let second = |path: &str| Some(format!("/etc/{}", path.strip_prefix("etc/")?.split('/').next()?));
    let places: BTreeSet<String> = recipe.files.iter().filter_map(|file| second(file.path)).collect();
    places.into_iter().collect::<Vec<_>>().join(" ")
}

fn stage_files(recipe: &Recipe, overlay: &Path) -> Result<()> {
    for file in recipe.files {
        let path = overlay.join(file.path);
        let dir = path.parent().unwrap_or(overlay);
        fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
        fs::write(&path, file.content).with_context(|| format!("cannot write {}", path.display()))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(file.mode))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::recipe::GUEST;
    use super::*;

    #[test]
    fn what_the_builder_placed_is_named_once() {
        assert_eq!(placed(&GUEST), "/etc/cloud /etc/fstab /etc/initramfs-tools /etc/ssh");
    }
}
