//! What dpkg reads: the control file from its template, and the maintainer scripts. Called by the parent module.
use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::{Release, elf};
use crate::{cargo, tool};

/// Files of packaging/deb that go into the package's control area, and their modes.
const CONTROL: &[(&str, u32)] =
    &[("postinst", 0o755), ("prerm", 0o755), ("postrm", 0o755), ("config", 0o755), ("templates", 0o644)];
/// Programs in the tree that the linker loads.
const PROGRAMS: &[&str] = &["usr/bin/qudata-agent", "usr/lib/qudata/frpc"];
/// Libraries and the packages that bring them; those of glibc apart.
const LIBRARIES: &[(&str, &str)] = &[("libgcc_s.so.1", "libgcc-s1 (>= 4.2)")];
/// What glibc brings.
const OF_GLIBC: &[&str] =
    &["libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "librt.so.1", "ld-linux-x86-64.so.2"];

/// Writes the control area of a finished tree.
pub(super) fn write(root: &Path, release: &Release) -> Result<()> {
    let sources = cargo::root().join("packaging").join("deb");
    let area = root.join("DEBIAN");
    let size = installed_kib(root)?;
    let libraries = libraries(root)?;
    fs::create_dir(&area).with_context(|| format!("cannot make {}", area.display()))?;
    fs::set_permissions(&area, fs::Permissions::from_mode(0o755))?;
    let template =
        fs::read_to_string(sources.join("control")).context("cannot read packaging/deb/control")?;
    let (fields, description) =
        template.split_once("\nDescription:").context("packaging/deb/control describes nothing")?;
    let fields = fields
        .replace("@VERSION@", &release.version)
        .replace("@SIZE@", &size.to_string())
        .replace("@LIBRARIES@", &libraries)
        // One dependency a line is for people.
        .replace(",\n ", ", ");
    let control = format!("{fields}\nDescription:{description}");
    put(&area.join("control"), control.as_bytes(), 0o644)?;
    put(&area.join("md5sums"), sums(root)?.as_bytes(), 0o644)?;
    let settings = settings(root)?;
    if !settings.is_empty() {
        put(&area.join("conffiles"), settings.as_bytes(), 0o644)?;
    }
    for (name, mode) in CONTROL {
        let text =
            fs::read(sources.join(name)).with_context(|| format!("cannot read packaging/deb/{name}"))?;
        put(&area.join(name), &text, *mode)?;
    }
    Ok(())
}

/// Who looks after the package, from the template of the control file.
pub(super) fn maintainer(packaging: &Path) -> Result<String> {
    let template = fs::read_to_string(packaging.join("deb").join("control"))
        .context("cannot read packaging/deb/control")?;
    let line = template.lines().find_map(|line| line.strip_prefix("Maintainer: "));
    line.map(str::to_owned).context("packaging/deb/control names no maintainer")
}

fn put(path: &Path, bytes: &[u8], mode: u32) -> Result<()> {
    fs::write(path, bytes)
        .and_then(|()| fs::set_permissions(path, fs::Permissions::from_mode(mode)))
        .with_context(|| format!("cannot write {}", path.display()))
}

/// Packages that bring the shared libraries of all programs, as Depends has them.
fn libraries(root: &Path) -> Result<String> {
    let mut packages = BTreeSet::new();
    let mut floor = None;
    for program in PROGRAMS {
        let needs = elf::needs(&root.join(program))?;
        floor = floor.max(needs.glibc);
        for library in needs.libraries.iter().filter(|library| !OF_GLIBC.contains(&library.as_str())) {
            match LIBRARIES.iter().find(|(name, _)| name == library) {
                Some((_, package)) => packages.insert((*package).to_owned()),
                None => bail!("{program} needs {library}; say in {} which package brings it", file!()),
            };
        }
    }
    if let Some(floor) = floor {
        packages.insert(format!("libc6 (>= {floor})"));
    }
    Ok(packages.into_iter().collect::<Vec<_>>().join(", "))
}

/// Every file below `root`, in order, as paths from there.
fn files(root: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).with_context(|| format!("cannot list {}", folder.display()))? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
            } else {
                found.push(path.strip_prefix(root).context("outside the tree")?.to_owned());
            }
        }
    }
    found.sort();
    Ok(found)
}

/// As dpkg-gencontrol counts: each file in whole KiB.
fn installed_kib(root: &Path) -> Result<u64> {
    files(root)?.iter().try_fold(0, |sum, file| Ok(sum + fs::metadata(root.join(file))?.len().div_ceil(1024)))
}

/// The files that are an owner's to change: an upgrade does not overwrite what was changed there.
fn settings(root: &Path) -> Result<String> {
    let files = files(root)?.into_iter().filter(|file| file.starts_with("etc"));
    Ok(files.map(|file| format!("/{}\n", file.display())).collect())
}

/// The checksums that `dpkg --verify` compares with.
fn sums(root: &Path) -> Result<String> {
    let files: Vec<_> = files(root)?.into_iter().filter(|file| !file.starts_with("DEBIAN")).collect();
    tool::output(Command::new("md5sum").args(files).current_dir(root))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_template_has_a_place_for_everything_and_says_whose_it_is() {
        let packaging = cargo::root().join("packaging");
        let template = fs::read_to_string(packaging.join("deb").join("control")).unwrap();
        for place in ["@VERSION@", "@SIZE@", "@LIBRARIES@"] {
            assert_eq!(template.matches(place).count(), 1, "{place}");
        }
        assert!(maintainer(&packaging).unwrap().contains('@'));
    }

    #[test]
    fn files_are_found_below_folders_and_counted_in_whole_kib() {
        let home = tempfile::tempdir().unwrap();
        fs::create_dir_all(home.path().join("a/b")).unwrap();
        fs::write(home.path().join("a/b/two"), [0; 1025]).unwrap();
        fs::write(home.path().join("one"), "1").unwrap();
        assert_eq!(files(home.path()).unwrap(), [PathBuf::from("a/b/two"), PathBuf::from("one")]);
        assert_eq!(installed_kib(home.path()).unwrap(), 3);
        assert!(sums(home.path()).unwrap().contains("  a/b/two\n"));
        assert_eq!(settings(home.path()).unwrap(), "");
        fs::create_dir_all(home.path().join("etc/x")).unwrap();
        fs::write(home.path().join("etc/x/one.conf"), "1").unwrap();
        assert_eq!(settings(home.path()).unwrap(), "/etc/x/one.conf\n");
    }
}
