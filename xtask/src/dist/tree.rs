//! The files of the package, laid out as they will lie on the server. Called by the parent module.
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::Value;

use super::{NAME, Release, changelog, control, licences};
use crate::cargo;
use crate::tool;

/// Where the package puts frpc: not among the programs that people run.
const FRPC: &str = "/usr/lib/qudata/frpc";
/// Folders of packaging/ and where in the tree they belong.
const COPIED: &[(&str, &str)] = &[
    ("systemd", "usr/lib/systemd/system"),
    ("sysusers.d", "usr/lib/sysusers.d"),
    ("tmpfiles.d", "usr/lib/tmpfiles.d"),
    ("needrestart", "etc/needrestart/conf.d"),
];
/// Completions: shell, folder, file.
const COMPLETIONS: &[(&str, &str)] = &[
    ("bash", "usr/share/bash-completion/completions/qudata-agent"),
    ("zsh", "usr/share/zsh/vendor-completions/_qudata-agent"),
    ("fish", "usr/share/fish/vendor_completions.d/qudata-agent.fish"),
];

/// What goes in.
#[derive(Debug)]
pub(super) struct Parts<'a> {
    pub release: &'a Release,
    pub binary: &'a Path,
    pub frpc: &'a Path,
}

/// Makes the tree, which must not exist yet.
pub(super) fn lay_out(root: &Path, parts: &Parts<'_>) -> Result<()> {
    let packaging = cargo::root().join("packaging");
    fs::create_dir(root).with_context(|| format!("cannot make {}", root.display()))?;
    let tree = Tree { root };
    tree.put("usr/bin/qudata-agent", &read(parts.binary)?, 0o755)?;
    tree.put(FRPC.trim_start_matches('/'), &read(parts.frpc)?, 0o755)?;
    for (folder, place) in COPIED {
        for file in files(&packaging.join(folder))? {
            let name = file.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            tree.put(&format!("{place}/{name}"), &read(&file)?, 0o644)?;
        }
    }
    for (shell, place) in COMPLETIONS {
        let script = tool::output(Command::new(parts.binary).args(["completions", shell]))?;
        tree.put(place, script.as_bytes(), 0o644)?;
    }
    let settings = settings(&packaging, parts.binary)?;
    tree.put("usr/share/qudata/agent.toml", settings.as_bytes(), 0o644)?;
    let overrides = packaging.join("deb").join("lintian-overrides");
    tree.put(&format!("usr/share/lintian/overrides/{NAME}"), &read(&overrides)?, 0o644)?;
    documents(&tree, parts, &packaging)
}

fn documents(tree: &Tree<'_>, parts: &Parts<'_>, packaging: &Path) -> Result<()> {
    let docs = format!("usr/share/doc/{NAME}");
    tree.put(&format!("{docs}/copyright"), &read(&packaging.join("deb").join("copyright"))?, 0o644)?;
    let history =
        fs::read_to_string(cargo::root().join("CHANGELOG.md")).context("cannot read CHANGELOG.md")?;
    let history = changelog::render(&history, parts.release, &control::maintainer(packaging)?)?;
    tree.put(&format!("{docs}/changelog"), history.as_bytes(), 0o644)?;
    tree.put(&format!("{docs}/third-party"), licences::gather(&read(parts.frpc)?)?.as_bytes(), 0o644)?;
    for name in ["changelog", "third-party"] {
        tree.compress(&format!("{docs}/{name}"))?;
    }
    let pages = "usr/share/man/man1";
    let folder = tree.folder(pages)?;
    tool::run(Command::new(parts.binary).arg("man").arg(&folder))?;
    for page in files(&folder)? {
        fs::set_permissions(&page, fs::Permissions::from_mode(0o644))?;
        let name = page.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        tree.compress(&format!("{pages}/{name}"))?;
    }
    Ok(())
}

/// The settings file that an owner starts from: the head from packaging/, then every setting the program knows.
fn settings(packaging: &Path, binary: &Path) -> Result<String> {
    let head =
        fs::read_to_string(packaging.join("agent.toml")).context("cannot read packaging/agent.toml")?;
    let known = tool::output(Command::new(binary).args(["settings", "--json"]))?;
    describe(head, &serde_json::from_str(&known).context("`settings --json` answered no JSON")?)
}

/// Comments only, but for frpc where the program would look for it elsewhere than the package puts it.
fn describe(mut text: String, settings: &Value) -> Result<String> {
    let settings = settings.as_array().context("`settings --json` answered no list")?;
    for setting in settings {
        let field = |name: &str| setting.get(name).and_then(Value::as_str);
        let Some(key) = field("key") else { continue };
        let (meaning, allowed, default) =
            (field("meaning"), field("allowed"), field("default").unwrap_or_default());
        let (meaning, allowed) =
            meaning.zip(allowed).with_context(|| format!("nothing is said about {key}"))?;
        let default = if default.is_empty() { String::new() } else { format!("; default: {default}") };
        text.push_str(&format!("\n# {key}: {meaning}\n#   {allowed}{default}\n"));
        if key == "frpc_binary" && field("default") != Some(FRPC) {
            text.push_str(&format!("{key} = \"{FRPC}\"\n"));
        }
    }
    Ok(text)
}

struct Tree<'a> {
    root: &'a Path,
}

impl Tree<'_> {
    /// A folder with the mode that folders of packages have, whatever this process's umask is.
    fn folder(&self, place: &str) -> Result<PathBuf> {
        let mut path = self.root.to_owned();
        for part in Path::new(place) {
            path.push(part);
            if !path.exists() {
                fs::create_dir(&path).with_context(|| format!("cannot make {}", path.display()))?;
            }
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        }
        fs::set_permissions(self.root, fs::Permissions::from_mode(0o755))?;
        Ok(path)
    }

    fn put(&self, place: &str, bytes: &[u8], mode: u32) -> Result<()> {
        let (folder, name) = place.rsplit_once('/').with_context(|| format!("{place} has no folder"))?;
        let path = self.folder(folder)?.join(name);
        fs::write(&path, bytes).with_context(|| format!("cannot write {}", path.display()))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(mode))
            .with_context(|| format!("cannot set the mode of {}", path.display()))
    }

    /// `place` becomes `place.gz`, without a name and a time in it.
    fn compress(&self, place: &str) -> Result<()> {
        tool::run(Command::new("gzip").args(["-9", "--no-name"]).arg(self.root.join(place)))
    }
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

/// Files of a folder, in order.
fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))?;
    let mut files = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    files.sort();
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_told_and_only_frpc_is_set() {
        let known = serde_json::json!([
            {"key": "debug", "variable": "QUDATA_DEBUG", "default": "false", "allowed": "true or false", "meaning": "More."},
            {"key": null, "variable": "QUDATA_LOG", "default": "", "allowed": "x", "meaning": "Log."},
            {"key": "frpc_binary", "variable": "QUDATA_FRPC_BINARY", "default": "/usr/local/bin/frpc", "allowed": "a path", "meaning": "Tunnel."},
        ]);
        let text = describe("# Head.\n".into(), &known).unwrap();
        assert!(text.contains("\n# debug: More.\n#   true or false; default: false\n"), "{text}");
        assert!(!text.contains("QUDATA_LOG"), "{text}");
        let set: Vec<_> = text.lines().filter(|line| !line.is_empty() && !line.starts_with('#')).collect();
        assert_eq!(set, ["frpc_binary = \"/usr/lib/qudata/frpc\""]);
        let moved = known.to_string().replace("/usr/local/bin/frpc", FRPC);
        let text = describe(String::new(), &serde_json::from_str(&moved).unwrap()).unwrap();
        assert!(text.lines().all(|line| line.is_empty() || line.starts_with('#')), "{text}");
        assert!(describe(String::new(), &serde_json::json!([{"key": "debug"}])).is_err());
    }

    #[test]
    fn modes_do_not_follow_the_umask() {
        let home = tempfile::tempdir().unwrap();
        let tree = Tree { root: home.path() };
        tree.put("usr/lib/x/file", b"x", 0o755).unwrap();
        let mode = |place: &str| fs::metadata(home.path().join(place)).unwrap().permissions().mode() & 0o777;
        assert_eq!(
            (mode("usr"), mode("usr/lib/x"), mode("usr/lib/x/file"), mode("")),
            (0o755, 0o755, 0o755, 0o755)
        );
    }
}
