//! `kernel.version`, `secure_boot`, `cgroup`, `systemd.*`, `nss_systemd`, `memlock`: can the host keep VMs confined?

use qudata_agent_core::settings::LauncherKind;
use qudata_host::size::ByteSize;
use qudata_qemu::version::KernelVersion;

use super::{fail, pass, unseen, warn};
use crate::{
    Finding,
    observed::{Cgroup, Kernel, Observed, Systemd, SystemdLook, Unseen},
};

const KERNEL: &str = "kernel.version";
const SECURE_BOOT: &str = "secure_boot";
const CGROUP: &str = "cgroup";
const SYSTEMD: &str = "systemd.version";
const HARDENING: &str = "systemd.hardening";
const NSS: &str = "nss_systemd";
const MEMLOCK: &str = "memlock";

/// The agent keeps processes by pidfd: waiting on one is 5.4.
const OLDEST_KERNEL: KernelVersion = KernelVersion { major: 5, minor: 4 };
/// Ubuntu 22.04's: the oldest that is tried.
const TRIED_KERNEL: KernelVersion = KernelVersion { major: 5, minor: 15 };
/// Ubuntu 22.04's; the launcher refuses older ones.
const OLDEST_SYSTEMD: u32 = 249;
/// What a VM's unit is bounded by.
const CONTROLLERS: [&str; 3] = ["cpu", "memory", "pids"];
/// What QEMU locks beside the RAM of the guest.
const BESIDE_RAM: ByteSize = ByteSize::from_gib(1);

pub(super) fn check(seen: &Observed) -> Vec<Finding> {
    let units = match &seen.systemd {
        Systemd::NotBooted => without(seen.settings.launcher),
        Systemd::Booted(look) => vec![systemd(look), hardening(seen, look)],
        Systemd::Unseen(why) => [SYSTEMD, HARDENING].map(|id| unseen(id, why)).into(),
    };
    let mut findings =
        vec![kernel(&seen.kernel), secure_boot(&seen.kernel), cgroup(seen), nss(seen), memlock(seen)];
    findings.extend(units);
    findings
}

fn kernel(kernel: &Kernel) -> Finding {
    let release = &kernel.release;
    match &kernel.version {
        Err(why) => unseen(KERNEL, why),
        Ok(version) if *version < OLDEST_KERNEL => fail(
            KERNEL,
            format!("Linux {release} is too old: {OLDEST_KERNEL} or newer is needed"),
            "update the distribution; Ubuntu 22.04 and Debian 12 have what is needed",
        ),
        Ok(version) if *version < TRIED_KERNEL => warn(
            KERNEL,
            format!("Linux {release}: older than {TRIED_KERNEL}, the oldest that is tried"),
            "update the distribution; Ubuntu 22.04 and Debian 12 have what is needed",
        ),
        Ok(_) => pass(KERNEL, format!("Linux {release}")),
    }
}

fn secure_boot(kernel: &Kernel) -> Finding {
    let (secure_boot, lockdown) = match (&kernel.secure_boot, &kernel.lockdown) {
        (Ok(secure_boot), Ok(lockdown)) => (*secure_boot, lockdown),
        (Err(why), _) | (_, Err(why)) => return unseen(SECURE_BOOT, why),
    };
    let boot = if secure_boot { "Secure Boot is on" } else { "Secure Boot is off" };
    match lockdown.as_str() {
        "none" => pass(SECURE_BOOT, format!("{boot}, the kernel is not locked down")),
        // What a reset through a bridge needs is checked for each GPU.
        "integrity" => pass(
            SECURE_BOOT,
            format!("{boot}, lockdown is integrity: drivers must be signed, VMs and GPUs work"),
        ),
        other => warn(
            SECURE_BOOT,
            format!("{boot}, lockdown is {other}: not tried, and tools that look into the kernel fail"),
            "boot with lockdown=integrity, or turn Secure Boot off in the firmware setup",
        ),
    }
}

fn cgroup(seen: &Observed) -> Finding {
    let confines = seen.has_units().unwrap_or(true);
    let remedy = "boot with systemd.unified_cgroup_hierarchy=1";
    let cgroup = match &seen.cgroup {
        Ok(cgroup) => cgroup,
        Err(why) => return unseen(CGROUP, why),
    };
    match cgroup {
        Cgroup::V2(has) => {
            let missing: Vec<&str> =
                CONTROLLERS.into_iter().filter(|name| !has.iter().any(|c| c == name)).collect();
            if missing.is_empty() {
                return pass(CGROUP, "version 2");
            }
            let list = missing.join(", ");
            let remedy = format!(
                "take cgroup_disable= off the kernel's command line, or use a kernel that has {list}"
            );
            warn(CGROUP, format!("version 2 without {list}: VMs are not bounded in that"), remedy)
        }
        Cgroup::V1 if confines => {
            warn(CGROUP, "version 1: the bounds of VMs on memory and devices are not all kept", remedy)
        }
        Cgroup::V1 => warn(CGROUP, "version 1, and VMs run without it", remedy),
        Cgroup::Absent => warn(CGROUP, "/sys/fs/cgroup is not there: VMs are not bounded", remedy),
    }
}

fn without(launcher: LauncherKind) -> Vec<Finding> {
    let line = "systemd does not run this host: VMs are started without its confinement";
    let version = match launcher {
        LauncherKind::Detached => pass(SYSTEMD, "not needed: QUDATA_LAUNCHER=detached"),
        LauncherKind::Systemd => fail(
            SYSTEMD,
            "systemd does not run this host, and QUDATA_LAUNCHER=systemd wants it",
            "boot with systemd, or take QUDATA_LAUNCHER away",
        ),
        LauncherKind::Auto => {
            warn(SYSTEMD, line, "rent GPUs out from a host that systemd runs, not from a container")
        }
    };
    vec![version, unseen(HARDENING, &Unseen::Needs("systemd does not run this host"))]
}

fn systemd(look: &SystemdLook) -> Finding {
    match &look.version {
        Err(why) => unseen(SYSTEMD, why),
        Ok(version) if *version < OLDEST_SYSTEMD => fail(
            SYSTEMD,
            format!("systemd {version} is too old: {OLDEST_SYSTEMD} or newer is needed"),
            "update the distribution; Ubuntu 22.04 and Debian 12 have what is needed",
        ),
        Ok(version) => pass(SYSTEMD, format!("systemd {version}")),
    }
}

fn hardening(seen: &Observed, look: &SystemdLook) -> Finding {
    if seen.settings.launcher == LauncherKind::Detached {
        return warn(
            HARDENING,
            "QUDATA_LAUNCHER=detached: VMs run without the confinement of systemd",
            "take QUDATA_LAUNCHER away on a host that rents out",
        );
    }
    match &look.launches {
        // The name service has a check of its own, which knows what is missing.
        Err(_) if seen.nss.as_ref().is_ok_and(|nss| !(nss.library && nss.consulted)) => {
            unseen(HARDENING, &Unseen::Needs("VMs cannot have users of their own"))
        }
        Err(why @ Unseen::Late(_)) => unseen(HARDENING, why),
        Err(why) => fail(
            HARDENING,
            format!("VMs cannot run as units: {why}"),
            "do what the message says; `systemctl status dbus` if systemd does not answer",
        ),
        Ok(()) if look.features.contains("-SECCOMP") => warn(
            HARDENING,
            "systemd was built without seccomp: VMs run without a filter of system calls",
            "use the distribution's systemd",
        ),
        Ok(()) => {
            pass(HARDENING, "VMs run as units with users, devices, memory and system calls of their own")
        }
    }
}

fn nss(seen: &Observed) -> Finding {
    let nss = match (seen.has_units(), &seen.nss) {
        (Ok(false), _) => return pass(NSS, "not needed: VMs are not units of systemd here"),
        (Err(why), _) => return unseen(NSS, &why),
        (Ok(true), Err(why)) => return unseen(NSS, why),
        (Ok(true), Ok(nss)) => nss,
    };
    let install = "install libnss-systemd (Debian and Ubuntu: apt install libnss-systemd)";
    match (nss.library, nss.consulted) {
        (true, true) => pass(NSS, "VMs can have users of their own"),
        (false, _) => fail(NSS, "libnss-systemd is missing: VMs cannot have users of their own", install),
        (true, false) => fail(
            NSS,
            "/etc/nsswitch.conf does not ask systemd for users: VMs cannot have users of their own",
            "add the word systemd to its line `passwd:`, after files",
        ),
    }
}

/// A unit gets a limit of its own, and so does what root starts detached.
fn memlock(seen: &Observed) -> Finding {
    let needed = seen.settings.vm_memory.saturating_add(BESIDE_RAM);
    match (seen.memlock, seen.has_units()) {
        (_, Ok(true)) => pass(MEMLOCK, "each VM's unit gets what its RAM needs"),
        (None, _) => pass(MEMLOCK, "no limit"),
        (Some(limit), _) if limit >= needed => pass(MEMLOCK, format!("{}M may be locked", limit.mib())),
        (Some(limit), _) if seen.is_root => {
            pass(MEMLOCK, format!("{}M here; the agent raises it for each VM as root", limit.mib()))
        }
        (Some(_), Err(why)) => unseen(MEMLOCK, &why),
        (Some(limit), Ok(false)) => warn(
            MEMLOCK,
            format!(
                "{}M may be locked by this user, and a VM with a GPU locks {}M",
                limit.mib(),
                needed.mib()
            ),
            "run the agent as root or as a unit of systemd",
        ),
    }
}
