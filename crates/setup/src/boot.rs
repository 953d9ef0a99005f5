//! The boot loader: which one it is, what it says now, and making it say something else. Owns the loaders' own tools;
//! called by `observe`, by step `boot` and by `uninstall`.

use std::time::Duration;

use crate::{
    cmdline::{self, Word},
    error::{Code, SetupError, UNINSTALL},
    files::Files,
    hands::{must, order},
    ledger::{Ledger, Undone, checksum},
    manifest::{Backup, Entry},
    outside::Means,
    places,
};

/// Looking for other systems may take a while on hosts with many disks.
const DEADLINE: Duration = Duration::from_secs(300);

/// All parameters that an installation may add.
pub const ADDED: [&str; 2] = ["intel_iommu=on", "iommu=pt"];

/// The boot loader as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Loader {
    /// GRUB with Debian's settings.
    Grub {
        /// What the owner's files say, ours apart.
        owner: Vec<Word>,
        /// Our drop-in, if there is one.
        drop_in: Option<String>,
        /// What the first entry of its configuration says.
        generated: Option<Vec<String>>,
    },
    /// systemd-boot with entries made by kernel-install.
    SystemdBoot {
        /// `/etc/kernel/cmdline`, if there is one.
        cmdline: Option<String>,
        /// The entries, with what they say.
        entries: Vec<(String, Vec<String>)>,
    },
    /// Something else.
    Unknown,
}

impl Loader {
    /// Whether every kernel that may be started next gets these parameters.
    #[must_use]
    pub fn says(&self, params: &[String]) -> bool {
        let all = |words: &[String]| params.iter().all(|param| words.contains(param));
        match self {
            Self::Grub { generated, .. } => generated.as_deref().is_some_and(all),
            Self::SystemdBoot { entries, .. } => {
                !entries.is_empty() && entries.iter().all(|(_, words)| all(words))
            }
            Self::Unknown => false,
        }
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Grub { .. } => "GRUB",
            Self::SystemdBoot { .. } => "systemd-boot",
            Self::Unknown => "a boot loader that this program does not know",
        }
    }
}

/// Looks at the boot loader.
///
/// # Errors
/// When a file of it is there and cannot be read.
pub fn observe(files: &Files) -> Result<Loader, SetupError> {
    if files.exists(places::GRUB_DEFAULT) && files.exists(places::GRUB_CFG) {
        let mut texts = Vec::new();
        let mut paths = vec![places::GRUB_DEFAULT.to_owned()];
        let drop_ins = files.names(places::GRUB_DROP_INS)?.into_iter().filter(|name| name.ends_with(".cfg"));
        paths.extend(drop_ins.map(|name| format!("{}/{name}", places::GRUB_DROP_INS)));
        for path in paths.into_iter().filter(|path| path != places::GRUB_DROP_IN) {
            if let Some(text) = files.text(&path)? {
                texts.push((path, text));
            }
        }
        return Ok(Loader::Grub {
            owner: cmdline::grub_words(&texts),
            drop_in: files.text(places::GRUB_DROP_IN)?,
            generated: files.text(places::GRUB_CFG)?.as_deref().and_then(cmdline::grub_cfg_words),
        });
    }
    let entries = entries(files)?;
    let cmdline = files.text(places::KERNEL_CMDLINE)?;
    if entries.is_empty() {
        return Ok(Loader::Unknown);
    }
    let mut read = Vec::new();
    for path in entries {
        let text = files.text(&path)?.unwrap_or_default();
        read.push((path, cmdline::entry_words(&text)));
    }
    Ok(Loader::SystemdBoot { cmdline, entries: read })
}

/// Entries of systemd-boot that start a kernel of this host.
fn entries(files: &Files) -> Result<Vec<String>, SetupError> {
    let mut found = Vec::new();
    for dir in places::ENTRIES {
        for name in files.names(dir)?.into_iter().filter(|name| name.ends_with(".conf")) {
            let path = format!("{dir}/{name}");
            let text = files.text(&path)?.unwrap_or_default();
            if text.lines().any(|line| line.trim_start().starts_with("linux")) {
                found.push(path);
            }
        }
    }
    Ok(found)
}

/// Lets the loader's tools make its configuration anew, and looks whether it says `params` then.
///
/// # Errors
/// When they fail, or it does not.
pub fn regenerate(means: Means<'_>, ledger: &mut Ledger<'_>, params: &[String]) -> Result<(), SetupError> {
    let loader = observe(means.files)?;
    for path in outputs(means.files, &loader)? {
        let known = ledger
            .manifest
            .entries
            .iter()
            .any(|e| matches!(e, Entry::Generated { path: p, .. } if *p == path));
        if !known {
            let before = ledger.back_up(&path, false)?;
            ledger.note(Entry::Generated { path, before, after: None })?;
        }
    }
    run(means, &loader)?;
    for entry in &mut ledger.manifest.entries {
        if let Entry::Generated { path, after, .. } = entry {
            *after = means.files.read(path)?.as_deref().map(checksum);
        }
    }
    ledger.save()?;
    let says = observe(means.files)?;
    if says.says(params) {
        return Ok(());
    }
    let what =
        format!("{} was set up anew and does not pass `{}` to the kernel", says.name(), params.join(" "));
    let remedy = match says {
        Loader::Grub { .. } => format!(
            "Look for a file in {} that sets GRUB_CMDLINE_LINUX_DEFAULT after 90-qudata.cfg, or a first entry in \
             /etc/grub.d that is not GRUB's own; add the parameters there.",
            places::GRUB_DROP_INS
        ),
        Loader::SystemdBoot { .. } | Loader::Unknown => {
            "Add the parameters to the entries of the boot loader by hand.".to_owned()
        }
    };
    Err(SetupError::new(Code::BootloaderFailed, what, remedy))
}

fn outputs(files: &Files, loader: &Loader) -> Result<Vec<String>, SetupError> {
    match loader {
        Loader::Grub { .. } => Ok(vec![places::GRUB_CFG.to_owned()]),
        Loader::SystemdBoot { .. } => entries(files),
        Loader::Unknown => Ok(Vec::new()),
    }
}

fn run(means: Means<'_>, loader: &Loader) -> Result<(), SetupError> {
    let failed = |cause: crate::hands::OrderError| {
        let what = format!("the tools of {} failed", loader.name());
        let remedy = "Do what they say; the host starts as before until then.";
        SetupError::new(Code::BootloaderFailed, what, remedy).because(cause)
    };
    match loader {
        Loader::Grub { .. } => {
            let update = ["/usr/sbin/update-grub", "/sbin/update-grub"];
            let order = if update.iter().any(|path| means.files.exists(path)) {
                order("update-grub")
            } else {
                order("grub-mkconfig").args(["-o", places::GRUB_CFG])
            };
            must(means.hands, &order.within(DEADLINE)).map_err(failed)?;
        }
        Loader::SystemdBoot { .. } => {
            for release in means.files.names("/lib/modules")? {
                let kernel = format!("/boot/vmlinuz-{release}");
                if means.files.exists(&kernel) {
                    let order = order("kernel-install").args(["add", &release, &kernel]).within(DEADLINE);
                    must(means.hands, &order).map_err(failed)?;
                }
            }
        }
        Loader::Unknown => {}
    }
    // The tools do not wait until it is on disk, and an EFI system partition keeps no journal.
    outputs(means.files, loader)?.iter().try_for_each(|path| means.files.settle_around(path))
}

/// The kernel's parameters that came into entries of systemd-boot with the installation: of those that it may add, what its
/// file says and said neither before nor, where there was none, in any entry.
///
/// # Errors
/// When a file is there and cannot be read.
pub fn ours(ledger: &Ledger<'_>, files: &Files) -> Result<Vec<String>, SetupError> {
    let Some(line) =
        files.text(places::KERNEL_CMDLINE)?.filter(|_| ledger.manifest.has_file(places::KERNEL_CMDLINE))
    else {
        return Ok(Vec::new());
    };
    let mut before = Vec::new();
    for entry in &ledger.manifest.entries {
        let (Entry::File { path, before: Some(backup), .. }
        | Entry::Generated { path, before: Some(backup), .. }) = entry
        else {
            continue;
        };
        let text = files.text(&format!("{}/{}", places::BACKUP, backup.name))?.unwrap_or_default();
        if path == places::KERNEL_CMDLINE {
            before.extend(cmdline::words(&text));
        } else if matches!(entry, Entry::Generated { .. }) {
            before.extend(cmdline::entry_words(&text));
        }
    }
    let added = |word: &String| ADDED.contains(&word.as_str()) && !before.contains(word);
    Ok(cmdline::words(&line).into_iter().filter(added).collect())
}

/// Takes `params` out of the entries of systemd-boot that still say them: of kernels that came after the installation.
/// Those entries. What the file says that they are made of is the owner's by now.
///
/// # Errors
/// When one cannot be read or written.
pub fn forget(files: &Files, params: &[String]) -> Result<Vec<String>, SetupError> {
    let said = cmdline::words(&files.text(places::KERNEL_CMDLINE)?.unwrap_or_default());
    let params: Vec<String> = params.iter().filter(|param| !said.contains(param)).cloned().collect();
    let mut changed = Vec::new();
    if params.is_empty() {
        return Ok(changed);
    }
    for path in entries(files)? {
        let (Some(text), Some(look)) = (files.text(&path)?, files.look(&path)?) else { continue };
        let without = cmdline::entry_without(&text, &params);
        if without != text {
            files.write(&path, without.as_bytes(), crate::files::Look { mtime: None, ..look })?;
            changed.push(path);
        }
    }
    Ok(changed)
}

/// Takes one generated file back: as it was, where nothing was made anew since; otherwise it is made anew, because it
/// holds kernels that were not there before. True: it has to be.
///
/// # Errors
/// When it cannot be written.
pub fn restore(
    ledger: &Ledger<'_>,
    files: &Files,
    (path, before, after): (&str, Option<&Backup>, Option<&str>),
) -> Result<bool, SetupError> {
    let found = files.read(path)?.as_deref().map(checksum);
    let as_it_was = before.map(|backup| backup.sha256.as_str());
    if found.as_deref() == as_it_was {
        // Made anew by a removal that was cut off: the age is not as it was yet.
        ledger.copy_back(path, before)?;
        return Ok(false);
    }
    if found.as_deref() != after || after.is_none() {
        return Ok(true);
    }
    let after: Vec<String> = after.into_iter().map(str::to_owned).collect();
    Ok(matches!(ledger.restore(path, before, &after, false)?, Undone::Kept(_)))
}

/// Makes a file anew after its settings have been taken back. Where that gives what it was before, it is the old one again,
/// with its age.
///
/// # Errors
/// When the tools fail.
pub fn refresh(
    means: Means<'_>,
    ledger: &Ledger<'_>,
    (path, before): (&str, Option<&Backup>),
) -> Result<(), SetupError> {
    run(means, &observe(means.files)?).map_err(|error| error.next(UNINSTALL))?;
    let found = means.files.read(path)?.as_deref().map(checksum);
    if found.is_some() && found.as_ref() == before.map(|backup| &backup.sha256) {
        ledger.copy_back(path, before)?;
    }
    Ok(())
}
