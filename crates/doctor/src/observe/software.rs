//! The programs and files that the settings name.

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use qudata_agent_core::settings::FirmwareKind;
use qudata_host::causes::chain;
use qudata_host::command::{Tool, ToolError};
use qudata_qemu::{
    disk::inspect_base,
    firmware,
    version::{QemuVersionError, observe_qemu},
};

use super::{Look, unreadable};
use crate::observed::{Files, ImageFault, Program, Programs, Unseen};

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
        Ok(Err(QemuVersionError::Run(error))) => (failed(&error), None),
        Ok(Err(error)) => (Program::Fails(error.to_string()), None),
        Err(unseen) => (Program::Fails(unseen.to_string()), None),
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
        Err(error) => failed(&error),
    }
}

fn failed(error: &ToolError) -> Program {
    match error {
        ToolError::Start { source, .. } if source.kind() == io::ErrorKind::NotFound => Program::Missing,
        error => Program::Fails(chain(error)),
    }
}

/// Whether the kernel's half of nftables answers.
async fn nft_works(look: &Look) -> Result<(), Unseen> {
    let run = Tool::new("nft").args(["list", "tables"]).deadline(left(look)).run().await;
    match run {
        Ok(_) => Ok(()),
        Err(_) if !rustix::process::geteuid().is_root() => {
            Err(Unseen::Denied("the kernel's tables cannot be listed".to_owned()))
        }
        Err(error) => Err(Unseen::Failed(chain(&error))),
    }
}

fn left(look: &Look) -> Duration {
    look.end.saturating_duration_since(tokio::time::Instant::now())
}

pub(super) async fn files(look: &Look) -> Files {
    let unseen = |unseen: Unseen| Files {
        ovmf_code: false,
        ovmf_vars: false,
        image: Err(ImageFault::Unseen(unseen)),
        has_key: false,
    };
    look.read(|look| Ok(read_files(look))).await.unwrap_or_else(unseen)
}

fn read_files(look: &Look) -> Files {
    let settings = &look.settings;
    let there = |path: &Path| look.under(path).is_file();
    let registered = REGISTERED.iter().all(|name| there(&settings.data_dir.join(name)));
    Files {
        ovmf_code: there(&settings.ovmf_code),
        ovmf_vars: there(&settings.ovmf_vars),
        image: image(&look.under(&settings.base_image), settings.firmware),
        has_key: settings.api_key.is_some() || registered || there(Path::new(KEY_FILE)),
    }
}

fn image(path: &Path, firmware: FirmwareKind) -> Result<String, ImageFault> {
    // Behind the link that names the current one.
    let real: PathBuf = match std::fs::canonicalize(path) {
        Ok(real) => real,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(ImageFault::Missing),
        Err(error) => return Err(ImageFault::Unseen(unreadable(path, &error))),
    };
    let unusable = |error: &dyn std::error::Error| ImageFault::Unusable(chain(error));
    if let Err(error) = std::fs::File::open(&real) {
        return Err(ImageFault::Unseen(unreadable(&real, &error)));
    }
    let base = inspect_base(&real).map_err(|error| unusable(&error))?;
    if firmware == FirmwareKind::Direct {
        let found = firmware::find_boot_files(&real).or_else(|_| firmware::find_boot_files(path));
        found.map_err(|error| unusable(&error))?;
    }
    Ok(format!("{}, {} with a disk of {}", real.display(), base.format, base.virtual_size))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_are_looked_at_behind_their_link() {
        let dir = tempfile::tempdir().unwrap();
        let (link, disk) = (dir.path().join("qudata-base.qcow2"), dir.path().join("disk.raw"));
        assert_eq!(image(&link, FirmwareKind::Uefi), Err(ImageFault::Missing));
        std::os::unix::fs::symlink(&disk, &link).unwrap();
        assert_eq!(image(&link, FirmwareKind::Uefi), Err(ImageFault::Missing), "a link to nothing");
        std::fs::write(&disk, [0; 1024]).unwrap();
        let seen = image(&link, FirmwareKind::Uefi).unwrap();
        assert!(seen.ends_with("disk.raw, raw with a disk of 1K"), "{seen}");
        let fault = image(&link, FirmwareKind::Direct).unwrap_err();
        assert!(matches!(&fault, ImageFault::Unusable(why) if why.contains("vmlinuz")), "{fault:?}");
        std::fs::write(&disk, b"KDMV").unwrap();
        let fault = image(&link, FirmwareKind::Uefi).unwrap_err();
        assert!(matches!(&fault, ImageFault::Unusable(why) if why.contains("VMDK")), "{fault:?}");
    }
}
