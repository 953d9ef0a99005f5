//! The programs and files that the settings name.

use std::{io, path::Path, time::Duration};

use qudata_host::causes::chain;
use qudata_host::command::{Tool, ToolError};
use qudata_qemu::version::{QemuVersionError, observe_qemu};

use super::{Look, image, is_file};
use crate::observed::{Files, Program, Programs, Seen, Unseen};

/// Where the installation keeps the key of the control plane; systemd gives it to the agent alone.
const KEY_FILE: &str = "/etc/qudata/api_key";
/// By these two files an agent knows that it was registered.
const REGISTERED: [&str; 2] = ["agent_id", "agent_secret"];

pub(super) async fn programs(look: &Look) -> Programs {
    let settings = &look.settings;
    let (qemu, qemu_img, passt, nft, frpc, nft_works) = tokio::join!(
        look.by_end(async { Ok(observe_qemu(&settings.qemu_binary).await) }),
        program(look, &settings.qemu_img),
        program(look, &settings.passt_binary),
        program(look, Path::new("nft")),
        program(look, &settings.frpc_binary),
        nft_works(look),
    );
    let (qemu, qemu_version) = match qemu {
        Ok(Ok(found)) => (Program::Runs(format!("QEMU {} {}", found.qemu, found.package)), Some(found.qemu)),
        Ok(Err(QemuVersionError::Run(error))) => (failed(look, &error), None),
        Ok(Err(error)) => (Program::Fails(error.to_string()), None),
        Err(unseen) => (Program::Unseen(unseen), None),
    };
    Programs { qemu, qemu_version, qemu_img, passt, nft, nft_works, frpc }
}

/// Runs `program --version`.
async fn program(look: &Look, program: &Path) -> Program {
    let run = Tool::new(program).arg("--version").deadline(left(look)).run().await;
    match run {
        Ok(output) => {
            let text = if output.stdout.is_empty() { output.stderr } else { output.stdout };
            let text = String::from_utf8_lossy(&text);
            Program::Runs(text.lines().next().unwrap_or_default().trim().chars().take(80).collect())
        }
        Err(error) => failed(look, &error),
    }
}

fn failed(look: &Look, error: &ToolError) -> Program {
    match error {
        ToolError::Start { source, .. } if source.kind() == io::ErrorKind::NotFound => Program::Missing,
        ToolError::TimedOut { .. } => Program::Unseen(look.untold(error)),
        error => Program::Fails(chain(error)),
    }
}

/// Whether the kernel's half of nftables answers.
async fn nft_works(look: &Look) -> Result<(), Unseen> {
    let run = Tool::new("nft").args(["list", "tables"]).deadline(left(look)).run().await;
    match run {
        Ok(_) => Ok(()),
        Err(error @ ToolError::TimedOut { .. }) => Err(look.untold(&error)),
        Err(_) if !rustix::process::geteuid().is_root() => {
            Err(Unseen::Denied("the kernel's tables cannot be listed".to_owned()))
        }
        Err(error) => Err(look.untold(&error)),
    }
}

fn left(look: &Look) -> Duration {
    look.end.saturating_duration_since(tokio::time::Instant::now())
}

pub(super) async fn files(look: &Look) -> Files {
    // Each on its own: a file system that does not answer costs what lies on it, and nothing else.
    let there = |path: &Path| {
        let path = look.under(path);
        look.read(move |_| is_file(&path))
    };
    let (code, vars) = (there(&look.settings.ovmf_code), there(&look.settings.ovmf_vars));
    let key = look.read(has_key);
    let (ovmf_code, ovmf_vars, has_key, image) = tokio::join!(code, vars, key, image::observe(look));
    Files { ovmf_code, ovmf_vars, image, has_key }
}

fn has_key(look: &Look) -> Seen<bool> {
    if look.settings.api_key.is_some() {
        return Ok(true);
    }
    let kept = is_file(&look.under(Path::new(KEY_FILE)));
    if kept == Ok(true) {
        return kept;
    }
    let data_dir = look.under(&look.settings.data_dir);
    let registered: Seen<Vec<bool>> = REGISTERED.iter().map(|name| is_file(&data_dir.join(name))).collect();
    if registered?.iter().all(|there| *there) { Ok(true) } else { kept }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;
    use crate::observe::tests::look;

    /// A program that says nothing for a minute.
    fn silent(dir: &Path) -> std::path::PathBuf {
        let path = dir.join("program");
        std::fs::write(&path, "#!/bin/sh\nexec sleep 60\n").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    #[tokio::test]
    async fn a_program_that_is_slow_is_not_told_as_broken() {
        let dir = tempfile::tempdir().unwrap();
        let mut look = look(Duration::from_millis(300));
        let path = silent(dir.path());
        look.settings.qemu_binary.clone_from(&path);
        look.settings.frpc_binary = path;
        look.settings.passt_binary = "/nonexistent/passt".into();
        let seen = programs(&look).await;
        let late = Program::Unseen(Unseen::Late(Duration::from_millis(300)));
        assert_eq!((&seen.qemu, &seen.frpc), (&late, &late));
        assert_eq!(seen.passt, Program::Missing);
    }

    #[test]
    fn a_key_that_cannot_be_looked_for_is_not_missing() {
        let dir = tempfile::tempdir().unwrap();
        let mut look = look(Duration::from_secs(10));
        look.root = dir.path().to_owned();
        look.settings.api_key = None;
        assert_eq!(has_key(&look), Ok(false));
        let data = look.under(&look.settings.data_dir);
        std::fs::create_dir_all(&data).unwrap();
        symlink("agent_id", data.join("agent_id")).unwrap();
        assert!(has_key(&look).is_err());
        std::fs::create_dir_all(dir.path().join("etc/qudata")).unwrap();
        std::fs::write(dir.path().join("etc/qudata/api_key"), "").unwrap();
        assert_eq!(has_key(&look), Ok(true), "it is kept; more is not asked");
    }
}
