//! How a machine starts: UEFI with variables of its own, BIOS, or a kernel given directly. Owns the per-machine copy of
//! the variables and the search for boot files; called by the agent's bring-up and teardown.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use qudata_host::durable::{self, DurableError};

use crate::owned::{self, Owner};

/// Kernel command line when no file beside the image says otherwise.
pub const DEFAULT_CMDLINE: &str = "root=LABEL=root ro console=ttyS0 quiet";

/// Longest command line that x86 Linux reads.
const CMDLINE_MAX: usize = 2047;
/// Largest variable store accepted: real ones are 132 to 528 KiB.
const VARS_MAX: u64 = 4 << 20;

/// What runs first in the machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Firmware {
    /// OVMF, as cloud images expect.
    Uefi {
        /// The shared, read-only firmware.
        code: PathBuf,
        /// This machine's variables, see [`create_variables`].
        vars: PathBuf,
    },
    /// SeaBIOS, built into QEMU.
    Bios,
    /// No boot loader: the fastest start.
    Direct {
        /// Linux kernel image.
        kernel: PathBuf,
        /// Its initial RAM disk.
        initrd: PathBuf,
        /// Its command line.
        cmdline: String,
    },
}

/// Why a machine got no UEFI variables of its own.
#[derive(Debug, thiserror::Error)]
pub enum CreateVariablesError {
    /// The template is absent or unreadable.
    #[error(
        "cannot read the UEFI variable template {}: install the package ovmf, or set QUDATA_OVMF_VARS",
        template.display()
    )]
    Template {
        /// What was read.
        template: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The template cannot be a variable store.
    #[error(
        "the UEFI variable template {} has {bytes} bytes; 1 to {VARS_MAX} are allowed: set QUDATA_OVMF_VARS",
        template.display()
    )]
    TemplateSize {
        /// What was read.
        template: PathBuf,
        /// Its size.
        bytes: u64,
    },
    /// Variables exist already: they may belong to a machine that runs.
    #[error("the UEFI variables {} exist already and are left alone", target.display())]
    Exists {
        /// The existing file.
        target: PathBuf,
    },
    /// The copy could not be written.
    #[error("cannot write the UEFI variables {}", target.display())]
    Write {
        /// What was written.
        target: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// Copies the variable template for one machine: readable and writable by `owner` only.
///
/// # Errors
/// When the template is unusable, when `target` exists, or when it cannot be written.
pub fn create_variables(template: &Path, target: &Path, owner: Owner) -> Result<(), CreateVariablesError> {
    let unreadable = |source| CreateVariablesError::Template { template: template.into(), source };
    let bytes = fs::metadata(template).map_err(unreadable)?.len();
    if bytes == 0 || bytes > VARS_MAX {
        return Err(CreateVariablesError::TemplateSize { template: template.into(), bytes });
    }
    let content = fs::read(template).map_err(unreadable)?;
    let unwritten = |source| CreateVariablesError::Write { target: target.into(), source };
    let mut copy = owned::create_new(target, owner).map_err(|source| match source.kind() {
        io::ErrorKind::AlreadyExists => CreateVariablesError::Exists { target: target.into() },
        _ => unwritten(source),
    })?;
    copy.write_all(&content).map_err(|source| {
        // A half-written store is worse than none.
        let _ = fs::remove_file(target);
        unwritten(source)
    })
}

/// Removes a machine's variables; `false` when there were none.
///
/// # Errors
/// When the file exists and cannot be removed.
pub fn remove_variables(target: &Path) -> Result<bool, DurableError> {
    durable::remove_file(target)
}

/// Why an image cannot be started directly.
#[derive(Debug, thiserror::Error)]
pub enum BootFilesError {
    /// A boot file is not there.
    #[error(
        "firmware \"direct\" needs {} beside the image: put the image's kernel (.vmlinuz) and initial RAM disk (.initrd) there, or set the firmware to uefi",
        file.display()
    )]
    Missing {
        /// What was looked for.
        file: PathBuf,
    },
    /// A boot file is there and cannot be read.
    #[error("cannot read the boot file {}", file.display())]
    Unreadable {
        /// What was read.
        file: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The command line file holds something else.
    #[error("{} is no kernel command line: one line of printable text, at most {CMDLINE_MAX} bytes", file.display())]
    Cmdline {
        /// What was read.
        file: PathBuf,
    },
}

/// Finds the files for direct boot beside `image`: `<stem>.vmlinuz`, `<stem>.initrd` and, optional, `<stem>.cmdline`.
///
/// # Errors
/// When a file is missing, unreadable, or no command line.
pub fn find_boot_files(image: &Path) -> Result<Firmware, BootFilesError> {
    let kernel = present(image.with_extension("vmlinuz"))?;
    let initrd = present(image.with_extension("initrd"))?;
    let file = image.with_extension("cmdline");
    let cmdline = match fs::read(&file) {
        Ok(bytes) => parse_cmdline(&bytes).ok_or(BootFilesError::Cmdline { file })?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => DEFAULT_CMDLINE.to_owned(),
        Err(source) => return Err(BootFilesError::Unreadable { file, source }),
    };
    Ok(Firmware::Direct { kernel, initrd, cmdline })
}

fn present(file: PathBuf) -> Result<PathBuf, BootFilesError> {
    match fs::metadata(&file) {
        Ok(found) if found.is_file() => Ok(file),
        Ok(_) => Err(BootFilesError::Missing { file }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(BootFilesError::Missing { file }),
        Err(source) => Err(BootFilesError::Unreadable { file, source }),
    }
}

fn parse_cmdline(bytes: &[u8]) -> Option<String> {
    let text = std::str::from_utf8(bytes).ok()?.trim();
    let fits = !text.is_empty() && text.len() <= CMDLINE_MAX && !text.chars().any(char::is_control);
    fits.then(|| text.to_owned())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    use super::*;

    fn me() -> Owner {
        Owner { uid: rustix::process::getuid().as_raw(), gid: rustix::process::getgid().as_raw() }
    }

    #[test]
    fn variables_are_private_to_their_machine() {
        let dir = tempfile::tempdir().unwrap();
        let (template, target) = (dir.path().join("VARS.fd"), dir.path().join("vm.vars"));
        fs::write(&template, b"variables").unwrap();
        create_variables(&template, &target, me()).unwrap();
        let made = fs::metadata(&target).unwrap();
        assert_eq!(
            (fs::read(&target).unwrap().as_slice(), made.permissions().mode() & 0o777),
            (&b"variables"[..], 0o600)
        );
        assert_eq!((made.uid(), made.gid()), (me().uid, me().gid));
        assert!(remove_variables(&target).unwrap());
        assert!(!remove_variables(&target).unwrap(), "a second undo finds nothing to do");
    }

    #[test]
    fn existing_variables_are_never_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let (template, target) = (dir.path().join("VARS.fd"), dir.path().join("vm.vars"));
        fs::write(&template, b"variables").unwrap();
        fs::write(&target, b"a running machine's").unwrap();
        assert!(matches!(
            create_variables(&template, &target, me()),
            Err(CreateVariablesError::Exists { .. })
        ));
        assert_eq!(fs::read(&target).unwrap(), b"a running machine's");
    }

    #[test]
    fn template_errors_say_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let (template, target) = (dir.path().join("VARS.fd"), dir.path().join("vm.vars"));
        let text = create_variables(&template, &target, me()).unwrap_err().to_string();
        assert!(text.contains("install the package ovmf") && text.contains("VARS.fd"), "{text}");
        fs::write(&template, b"").unwrap();
        let text = create_variables(&template, &target, me()).unwrap_err().to_string();
        assert!(text.contains("has 0 bytes"), "{text}");
        assert!(!target.exists());
    }

    #[test]
    fn boot_files_are_found_beside_the_image() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("guest.v2.qcow2");
        let missing = find_boot_files(&image).unwrap_err().to_string();
        assert!(missing.contains("guest.v2.vmlinuz") && missing.contains("uefi"), "{missing}");
        fs::write(dir.path().join("guest.v2.vmlinuz"), b"k").unwrap();
        let missing = find_boot_files(&image).unwrap_err().to_string();
        assert!(missing.contains("guest.v2.initrd"), "{missing}");
        fs::write(dir.path().join("guest.v2.initrd"), b"i").unwrap();
        let Firmware::Direct { kernel, cmdline, .. } = find_boot_files(&image).unwrap() else {
            panic!("direct boot expected");
        };
        assert_eq!((kernel, cmdline.as_str()), (dir.path().join("guest.v2.vmlinuz"), DEFAULT_CMDLINE));
        fs::write(dir.path().join("guest.v2.cmdline"), b"root=/dev/vda1 ro\n").unwrap();
        let Firmware::Direct { cmdline, .. } = find_boot_files(&image).unwrap() else {
            panic!("direct boot expected");
        };
        assert_eq!(cmdline, "root=/dev/vda1 ro");
    }

    #[test]
    fn command_line_files_that_are_no_command_line_are_refused() {
        for bad in [&b""[..], b"  \n", b"root=a\ninit=b", b"\xff", &[b'x'; CMDLINE_MAX + 1]] {
            assert_eq!(parse_cmdline(bad), None, "{bad:?}");
        }
    }
}
