//! Kernel parameters, the udev rule, and whether a reboot is needed. Pure; called by `plan`.
//!
//! A parameter is added only when none of its name is there, in a file of our own for GRUB. GPUs are never taken by vendor
//! and device id: another card of the same kind may be the owner's.

use std::{collections::BTreeSet, fmt::Write};

use qudata_host::pci::PciAddress;

use super::{Change, Plan, file};
use crate::{
    boot::{ADDED, Loader},
    cmdline::value,
    error::{Code, SetupError},
    observe::{Maker, Observed},
    places,
    progress::Step,
    wish::Wish,
};

/// Unbinding it from a card can crash the host: it must never get hold of one.
const NOUVEAU: &str = "nouveau";

pub(super) fn plan(observed: &Observed, wish: &Wish, plan: &mut Plan) -> Result<(), SetupError> {
    forbidden(observed, wish)?;
    let params = missing(observed, wish);
    match &observed.loader {
        _ if params.is_empty() => {}
        Loader::Grub { drop_in, .. } => {
            let text = grub_drop_in(&params);
            if drop_in.as_ref() != Some(&text) {
                let change = file(Step::Boot, places::GRUB_DROP_IN, text, drop_in.clone(), 0o644);
                plan.changes.push(change);
            }
        }
        Loader::SystemdBoot { cmdline, .. } => {
            let text = kernel_cmdline(cmdline.as_deref(), &observed.running, &params);
            if cmdline.as_ref() != Some(&text) {
                let change = file(Step::Boot, places::KERNEL_CMDLINE, text, cmdline.clone(), 0o644);
                plan.changes.push(change);
            }
        }
        Loader::Unknown => return Err(unknown(&params)),
    }
    let expected = expected(observed, params);
    if !expected.is_empty() && !observed.loader.says(&expected) {
        let loader = observed.loader.name();
        plan.changes.push((Step::Boot, Change::Regenerate { loader, params: expected.clone() }));
    }
    plan.params = expected;
    keep_nouveau_off(observed, plan);
    reboot(observed, plan);
    Ok(())
}

/// The owner switched it off with parameters of their own, which are not ours to take away.
fn forbidden(observed: &Observed, wish: &Wish) -> Result<(), SetupError> {
    if observed.settings.debug && observed.topology.gpus(&[]).is_empty() {
        return Ok(());
    }
    // The kernel takes the last word about Intel's; about the others "off" is final.
    let last = settings(observed).into_iter().rfind(|word| word.starts_with("intel_iommu="));
    let ours = matches!(&observed.loader, Loader::Grub { drop_in: Some(text), .. } if text.contains("intel_iommu=on"));
    let overruled = wish.iommu_on || ours || last.is_some_and(|word| !switches_off(word));
    let off = |word: &str| switches_off(word) && !(overruled && word.starts_with("intel_iommu="));
    let found: Vec<(String, String)> = match &observed.loader {
        Loader::Grub { owner, .. } => owner.iter().map(|w| (w.text.clone(), w.file.clone())).collect(),
        Loader::SystemdBoot { cmdline, .. } => {
            let words = cmdline.as_deref().map(crate::cmdline::words).unwrap_or_default();
            words.into_iter().map(|word| (word, places::KERNEL_CMDLINE.to_owned())).collect()
        }
        Loader::Unknown => Vec::new(),
    };
    let Some((word, place)) = found.into_iter().find(|(word, _)| off(word)) else { return Ok(()) };
    let what = format!("the IOMMU is switched off by `{word}` in {place}");
    let remedy =
        format!("That is a setting of yours, which is not changed here: take `{word}` out of {place}.");
    if word.starts_with("intel_iommu=") {
        let remedy = format!("{remedy} Or say that a parameter is to be added which has the last word.");
        return Err(SetupError::new(Code::IommuOff, what, remedy).next("qudata-agent install --iommu on"));
    }
    Err(SetupError::new(Code::IommuOff, what, remedy)
        .next(format!("sudo editor {place}; sudo qudata-agent install")))
}

fn switches_off(word: &str) -> bool {
    let (name, value) = word.split_once('=').unwrap_or((word, ""));
    ["iommu", "intel_iommu", "amd_iommu"].contains(&name) && value.split(',').any(|part| part == "off")
}

/// What the boot loader's settings say, ours apart.
fn settings(observed: &Observed) -> Vec<&str> {
    match &observed.loader {
        Loader::Grub { owner, .. } => owner.iter().map(|word| word.text.as_str()).collect(),
        Loader::SystemdBoot { cmdline: Some(line), .. } => line.split_ascii_whitespace().collect(),
        Loader::SystemdBoot { cmdline: None, entries } => {
            entries.iter().flat_map(|(_, words)| words.iter().map(String::as_str)).collect()
        }
        Loader::Unknown => observed.running.iter().map(String::as_str).collect(),
    }
}

/// What the kernel must be told: what is missing, and while the IOMMU is off what the settings say already. They may say
/// it since the loader's tools ran last.
fn expected(observed: &Observed, missing: Vec<String>) -> Vec<String> {
    let names = ["intel_iommu=", "iommu="];
    let about = |word: &&str| names.iter().any(|name| word.starts_with(name)) && !switches_off(word);
    let known = !matches!(observed.loader, Loader::Unknown);
    let looks = known && is_intel(observed) && !observed.iommu_works() && !plan_has_no_gpu(observed);
    let mut all: Vec<String> = Vec::new();
    if looks {
        all.extend(settings(observed).into_iter().filter(about).map(str::to_owned));
    }
    all.extend(missing);
    all
}

fn is_intel(observed: &Observed) -> bool {
    observed.maker == Maker::Intel || observed.firmware == Some(Some(Maker::Intel))
}

/// What the boot loader's settings lack.
fn missing(observed: &Observed, wish: &Wish) -> Vec<String> {
    let mut owner = settings(observed);
    let last = owner.iter().rfind(|word| word.starts_with("intel_iommu=")).copied();
    if wish.iommu_on && last.is_some_and(switches_off) {
        owner.retain(|word| !word.starts_with("intel_iommu="));
    }
    let ours = matches!(&observed.loader, Loader::Grub { drop_in: Some(_), .. });
    let configured = |name: &str| value(owner.iter().copied(), name).is_some();
    let running = |name: &str| value(observed.running.iter().map(String::as_str), name).is_some();
    // AMD's is on by itself. Intel's is where the distribution built it so, and works without a parameter then.
    let works_by_itself = observed.iommu_works() && !running("intel_iommu") && !ours;
    let no_gpu = plan_has_no_gpu(observed);
    if !is_intel(observed) || works_by_itself || no_gpu || configured("intel_iommu") {
        return Vec::new();
    }
    let [on, pass_through] = ADDED.map(str::to_owned);
    let mut params = vec![on];
    if !configured("iommu") && !configured("iommu.passthrough") {
        params.push(pass_through);
    }
    params
}

fn plan_has_no_gpu(observed: &Observed) -> bool {
    observed.settings.debug && observed.topology.gpus(&observed.settings.gpus).is_empty()
}

/// GRUB reads the files of the folder in order, after the owner's file: this one adds to what they say.
fn grub_drop_in(params: &[String]) -> String {
    format!(
        "# Written by `qudata-agent install`, taken away by `qudata-agent uninstall`. Parameters of your own belong into\n\
         # /etc/default/grub.\n\
         GRUB_CMDLINE_LINUX_DEFAULT=\"$GRUB_CMDLINE_LINUX_DEFAULT {}\"\n",
        params.join(" ")
    )
}

/// kernel-install takes the running kernel's parameters where there is no file; a file has to say them all.
fn kernel_cmdline(file: Option<&str>, running: &[String], params: &[String]) -> String {
    let line = match file {
        Some(text) => text.trim_end().to_owned(),
        None => crate::cmdline::of_running(&running.join(" ")).join(" "),
    };
    format!("{line} {}\n", params.join(" "))
}

fn unknown(params: &[String]) -> SetupError {
    let params = params.join(" ");
    let what =
        "this host's boot loader is neither GRUB with /etc/default/grub nor systemd-boot with kernel-install";
    let remedy = format!("Add `{params}` to the kernel's command line by hand and restart.");
    SetupError::new(Code::BootloaderUnknown, what, remedy)
        .next("sudo reboot, then: sudo qudata-agent install")
}

/// A rule by address for the cards that nouveau has now, or had before the rule.
fn keep_nouveau_off(observed: &Observed, plan: &mut Plan) {
    let before = observed.texts.get(places::UDEV_RULE);
    let known = |address: &PciAddress| before.is_some_and(|text| text.contains(&format!("\"{address}\"")));
    let has_it = |address: &PciAddress| {
        observed.topology.devices.get(address).is_some_and(|d| d.driver.as_deref() == Some(NOUVEAU))
    };
    let functions: BTreeSet<PciAddress> = plan
        .chosen
        .gpus
        .iter()
        .filter(|gpu| has_it(&gpu.address) || known(&gpu.address))
        .map(|gpu| gpu.address)
        .collect();
    if functions.is_empty() {
        return;
    }
    let mut text = String::from(
        "# Written by `qudata-agent install`, taken away by `qudata-agent uninstall`: nouveau stays off these cards, because\n\
         # taking one away from it can crash the host. By address: other cards of the same kind are not meant.\n",
    );
    for address in functions {
        // Writing to a String cannot fail.
        let _ = writeln!(
            text,
            "ACTION==\"add\", SUBSYSTEM==\"pci\", KERNEL==\"{address}\", ATTR{{driver_override}}=\"vfio-pci\""
        );
    }
    if before != Some(&text) {
        plan.changes.push(file(Step::Boot, places::UDEV_RULE, text, before.cloned(), 0o644));
    }
}

fn reboot(observed: &Observed, plan: &mut Plan) {
    let bound = plan.chosen.gpus.iter().find(|gpu| {
        let driver = observed.topology.devices.get(&gpu.address).and_then(|d| d.driver.as_deref());
        driver == Some(NOUVEAU)
    });
    let why = if !observed.iommu_works() && !plan.chosen.gpus.is_empty() {
        "the IOMMU is off in the running kernel".to_owned()
    } else if let Some(gpu) = bound {
        format!("nouveau has GPU {}, and taking a card away from it can crash the host", gpu.address)
    } else {
        return;
    };
    plan.changes.push((Step::Reboot, Change::Reboot { why }));
}
