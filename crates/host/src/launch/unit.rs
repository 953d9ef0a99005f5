//! One launch as a transient unit of systemd: its name and its properties. Pure; called by `systemd`.
//!
//! Properties are in the form of `StartTransientUnit` (org.freedesktop.systemd1(5)), which refuses a unit for one
//! property it does not know: everything here is known to systemd 249, and what is newer asks for the version.
//! What is forbidden fails with EPERM instead of ending the process: a filter that is too tight must not kill a tenant.

use std::{ffi::OsString, path::Path, time::Duration};

use super::Launch;

/// The oldest systemd whose properties and user records this file relies on.
pub(super) const OLDEST_SYSTEMD: u32 = 249;
/// The slice of everything that outlives the agent.
const SLICE: &str = "qudata.slice";
/// How long each phase of a stop may take (the question, SIGTERM, SIGKILL, and both once more for the whole group), also
/// at the shutdown of the host. The patience of an [`super::Ending`] comes on top of it, for systemd has but one number.
const STOP_PATIENCE: Duration = Duration::from_secs(10);
/// What must be there for as long as a program uses the network. At a shutdown it is stopped after the program:
/// `nftables.service` flushes the policy that confines guests when it stops.
const NETWORK: [&str; 4] = ["network.target", "nftables.service", "firewalld.service", "ufw.service"];
/// `MS_REC`, mount(2): what is mounted below a bound path comes along.
const RECURSIVE: u64 = 0x4000;
const EPERM: i32 = 1;
const AF_INET: i32 = 2;
const AF_INET6: i32 = 10;
/// `CLONE_NEWNS | NEWUTS | NEWIPC | NEWUSER | NEWPID`, clone(2): what passt makes.
const OWN_SANDBOX: u64 = 0x0002_0000 | 0x0400_0000 | 0x0800_0000 | 0x1000_0000 | 0x2000_0000;
/// Directories of people, hidden from every unit.
const HOMES: [&str; 3] = ["/home", "/root", "/run/user"];
/// Directories of which every unit has its own.
const TEMPORARY: [&str; 2] = ["/tmp", "/var/tmp"];

/// A value as D-Bus takes it; the comment is its signature.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Property {
    /// `s`
    Text(String),
    /// `as`
    Texts(Vec<String>),
    /// `b`
    Flag(bool),
    /// `i`
    Signed(i32),
    /// `u`
    Short(u32),
    /// `t`
    Number(u64),
    /// `a(ss)`
    Pairs(Vec<(String, String)>),
    /// `(bas)`: whether the list allows or denies.
    Listed(bool, Vec<String>),
    /// `a(iayu)`: family, address, prefix length.
    Networks(Vec<(i32, Vec<u8>, u32)>),
    /// `a(ssbt)`: source, target, absence is fine, mount flags.
    Binds(Vec<(String, String, bool, u64)>),
    /// `a(sbbs)`: name, trigger, negated, parameter.
    Checks(Vec<(String, bool, bool, String)>),
    /// `a(sasb)`: program, arguments with the zeroth, failure is fine.
    Commands(Vec<(String, Vec<String>, bool)>),
}

/// Properties in the order they are sent; a list may come in several parts under one name.
pub(super) type Properties = Vec<(&'static str, Property)>;

/// A path or an argument that is no UTF-8, which D-Bus cannot carry.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not UTF-8, and systemd takes nothing else: rename it")]
pub(super) struct NotText(String);

/// The name of the unit of the launch `name` in `dir`: the last two directories (instance and incarnation) and the name.
pub(super) fn unit_name(dir: &Path, name: &str) -> String {
    let mut parts: Vec<String> =
        dir.iter().rev().take(2).map(|part| plain(&part.to_string_lossy())).collect();
    parts.reverse();
    format!("qudata-vm-{}-{}.service", parts.join("-"), plain(name))
}

/// Letters that unit names may have. Bounded, because a name holds 255 bytes.
fn plain(text: &str) -> String {
    let letter = |c: char| if c.is_ascii_alphanumeric() || c == '-' { c } else { '_' };
    text.chars().take(64).map(letter).collect()
}

/// The properties of the unit that runs `launch` under systemd `version`.
pub(super) fn plan_unit(launch: &Launch, version: u32) -> Result<Properties, NotText> {
    let mut unit = Properties::new();
    lifecycle(launch, &mut unit)?;
    ending(launch, &mut unit)?;
    identity(launch, &mut unit);
    limits(launch, version, &mut unit);
    devices(launch, &mut unit)?;
    file_system(launch, &mut unit)?;
    kernel(launch, &mut unit);
    network(launch, &mut unit);
    Ok(unit)
}

fn text(value: &str) -> Property {
    Property::Text(value.to_owned())
}

fn texts(values: &[&str]) -> Property {
    Property::Texts(values.iter().map(|&value| value.to_owned()).collect())
}

fn listed(allow: bool, values: &[&str]) -> Property {
    Property::Listed(allow, values.iter().map(|&value| value.to_owned()).collect())
}

fn utf8(value: &std::ffi::OsStr) -> Result<String, NotText> {
    value.to_str().map(str::to_owned).ok_or_else(|| NotText(value.to_string_lossy().into_owned()))
}

fn path(value: &Path) -> Result<String, NotText> {
    utf8(value.as_os_str())
}

fn lifecycle(launch: &Launch, unit: &mut Properties) -> Result<(), NotText> {
    let log = path(&super::log_path(&launch.dir, &launch.name))?;
    let description = match launch.confinement.description.as_str() {
        "" => format!("qudata {}", launch.name),
        told => told.to_owned(),
    };
    unit.extend([
        ("Description", Property::Text(description)),
        ("Slice", text(SLICE)),
        // The program was executed before the start counts as done.
        ("Type", text("exec")),
        ("CollectMode", text("inactive-or-failed")),
        // Held by the launcher's connection until it has read what became of the start.
        ("AddRef", Property::Flag(true)),
        ("Restart", text("no")),
        ("KillMode", text("mixed")),
        // `systemctl isolate`, such as into rescue mode, stops everything that its target does not want.
        ("IgnoreOnIsolate", Property::Flag(true)),
        // Whoever renames the directory can be sure that nothing starts in it any more.
        (
            "Asserts",
            Property::Checks(vec![("AssertPathIsDirectory".to_owned(), false, false, path(&launch.dir)?)]),
        ),
        ("StandardOutputFileToAppend", Property::Text(log.clone())),
        ("StandardErrorFileToAppend", Property::Text(log)),
        ("Environment", texts(&["PATH=/usr/bin:/bin", "LC_ALL=C"])),
        (
            "UnsetEnvironment",
            texts(&[
                "HOME",
                "LANG",
                "LOGNAME",
                "SHELL",
                "USER",
                "INVOCATION_ID",
                "SYSTEMD_EXEC_PID",
                "MEMORY_PRESSURE_WATCH",
            ]),
        ),
        ("ExecStart", command(&launch.program, &launch.args)?),
    ]);
    Ok(())
}

fn command(program: &Path, args: &[OsString]) -> Result<Property, NotText> {
    let program = path(program)?;
    let mut argv = vec![program.clone()];
    for arg in args {
        // systemd puts variables in the place of `$…`. The flag that forbids it (ExecStartEx) makes systemd 252 write
        // a unit file that it cannot read back: one `daemon-reload`, and the unit of a running VM is broken.
        argv.push(utf8(arg)?.replace('$', "$$"));
    }
    Ok(Property::Commands(vec![(program, argv, false)]))
}

/// In which order and how patiently it is stopped. Units are stopped in the opposite order of `After`.
fn ending(launch: &Launch, unit: &mut Properties) -> Result<(), NotText> {
    let mut after: Vec<String> = Vec::new();
    let mut patience = STOP_PATIENCE;
    if let Some(ending) = &launch.ending {
        after.extend(ending.before.iter().map(|name| unit_name(&launch.dir, name)));
        patience = patience.saturating_add(ending.patience);
        // Disks on the network are there until then.
        after.push("remote-fs.target".to_owned());
        unit.push(("ExecStop", command(&ending.program, &ending.args)?));
    }
    if !launch.confinement.private_network {
        after.extend(NETWORK.map(str::to_owned));
    }
    if !after.is_empty() {
        unit.push(("After", Property::Texts(after)));
    }
    let patience = u64::try_from(patience.as_micros()).unwrap_or(u64::MAX);
    unit.push(("TimeoutStopUSec", Property::Number(patience)));
    Ok(())
}

fn identity(launch: &Launch, unit: &mut Properties) {
    unit.extend([
        // The group follows from the user's record, see `users`.
        ("User", Property::Text(launch.uid.to_string())),
        ("UMask", Property::Short(0o077)),
        ("NoNewPrivileges", Property::Flag(true)),
        ("CapabilityBoundingSet", Property::Number(0)),
        ("AmbientCapabilities", Property::Number(0)),
        ("KeyringMode", text("private")),
        ("RemoveIPC", Property::Flag(true)),
    ]);
    if !launch.groups.is_empty() {
        let groups = launch.groups.iter().map(u32::to_string).collect();
        unit.push(("SupplementaryGroups", Property::Texts(groups)));
    }
}

fn limits(launch: &Launch, version: u32, unit: &mut Properties) {
    let confinement = &launch.confinement;
    unit.extend([
        // A core file would hold the tenant's memory.
        ("LimitCORE", Property::Number(0)),
        ("LimitNOFILE", Property::Number(launch.no_files)),
        ("Nice", Property::Signed(launch.nice)),
        // Never before the host's own programs, never after the agent.
        ("OOMScoreAdjust", Property::Signed(0)),
        ("MemorySwapMax", Property::Number(0)),
    ]);
    let optional = [
        ("LimitMEMLOCK", confinement.memlock.map(|size| size.bytes())),
        ("MemoryMax", confinement.memory_max.map(|size| size.bytes())),
        ("TasksMax", confinement.tasks_max),
    ];
    unit.extend(optional.into_iter().filter_map(|(name, value)| Some((name, Property::Number(value?)))));
    if version >= 254 {
        // Nobody in there listens to memory pressure.
        unit.push(("MemoryPressureWatch", text("off")));
    }
}

fn devices(launch: &Launch, unit: &mut Properties) -> Result<(), NotText> {
    let devices = &launch.confinement.devices;
    if devices.is_empty() {
        unit.push(("PrivateDevices", Property::Flag(true)));
        return Ok(());
    }
    let allowed: Result<_, _> = devices.iter().map(|device| Ok((path(device)?, "rw".to_owned()))).collect();
    unit.extend([("DevicePolicy", text("closed")), ("DeviceAllow", Property::Pairs(allowed?))]);
    Ok(())
}

fn file_system(launch: &Launch, unit: &mut Properties) -> Result<(), NotText> {
    let confinement = &launch.confinement;
    let below = |roots: &[&str], path: &Path| roots.iter().any(|root| path.starts_with(root));
    let hidden = |path: &Path| below(&HOMES, path) || below(&TEMPORARY, path);
    // An owner may keep images in a home; then that one file is shown, and nothing else of the home.
    let (shown, open): (Vec<_>, Vec<_>) = confinement.writable.iter().partition(|path| hidden(path));
    let read: Vec<_> =
        std::iter::once(&launch.dir).chain(&confinement.readable).filter(|path| hidden(path)).collect();
    let in_a_home = shown.iter().chain(&read).any(|path| below(&HOMES, path));
    let binds = |paths: &[&std::path::PathBuf]| -> Result<_, NotText> {
        let bind = |from: &&std::path::PathBuf| Ok((path(from)?, path(from)?, false, RECURSIVE));
        paths.iter().map(bind).collect::<Result<_, _>>().map(Property::Binds)
    };
    let writable: Result<_, _> = open.iter().map(|writable| path(writable)).collect();
    unit.extend([
        ("ProtectSystem", text("strict")),
        ("ProtectHome", text(if in_a_home { "tmpfs" } else { "yes" })),
        ("PrivateTmp", Property::Flag(true)),
        ("PrivateMounts", Property::Flag(true)),
        ("ReadWritePaths", Property::Texts(writable?)),
    ]);
    if !shown.is_empty() {
        unit.push(("BindPaths", binds(&shown)?));
    }
    if !read.is_empty() {
        unit.push(("BindReadOnlyPaths", binds(&read)?));
    }
    Ok(())
}

fn kernel(launch: &Launch, unit: &mut Properties) {
    let confinement = &launch.confinement;
    let on = |name| (name, Property::Flag(true));
    unit.extend([
        on("ProtectClock"),
        on("ProtectControlGroups"),
        on("ProtectHostname"),
        on("ProtectKernelLogs"),
        on("ProtectKernelModules"),
        on("ProtectKernelTunables"),
        on("RestrictRealtime"),
        on("RestrictSUIDSGID"),
        on("LockPersonality"),
        // An emulator writes the code it executes.
        ("MemoryDenyWriteExecute", Property::Flag(!confinement.writes_code)),
        ("ProtectProc", text("invisible")),
        ("ProcSubset", text("pid")),
        ("SystemCallArchitectures", texts(&["native"])),
        ("SystemCallErrorNumber", Property::Signed(EPERM)),
        ("SystemCallFilter", listed(true, &["@system-service"])),
    ]);
    if confinement.own_sandbox {
        unit.extend([
            ("RestrictNamespaces", Property::Number(OWN_SANDBOX)),
            // Of all users it sees its own and root.
            ("PrivateUsers", Property::Flag(true)),
            ("SystemCallFilter", listed(false, &["@privileged", "@resources"])),
            // What it needs to shut itself in; without privileges outside of its own namespace.
            (
                "SystemCallFilter",
                listed(true, &["@setuid", "capset", "mount", "pivot_root", "seccomp", "umount2", "unshare"]),
            ),
        ]);
    } else {
        unit.extend([
            ("RestrictNamespaces", Property::Number(0)),
            ("SystemCallFilter", listed(false, &["@privileged", "@resources"])),
            // Memory is put on the node of the GPU; QEMU has a filter of its own beside this one.
            ("SystemCallFilter", listed(true, &["mbind", "seccomp", "set_mempolicy"])),
        ]);
    }
}

fn network(launch: &Launch, unit: &mut Properties) {
    if launch.confinement.private_network {
        let everything = vec![(AF_INET, vec![0; 4], 0), (AF_INET6, vec![0; 16], 0)];
        unit.extend([
            ("PrivateNetwork", Property::Flag(true)),
            ("RestrictAddressFamilies", listed(true, &["AF_UNIX"])),
            ("IPAddressDeny", Property::Networks(everything)),
        ]);
    } else {
        let families = ["AF_UNIX", "AF_INET", "AF_INET6", "AF_NETLINK"];
        unit.push(("RestrictAddressFamilies", listed(true, &families)));
    }
}

#[cfg(test)]
mod tests;
