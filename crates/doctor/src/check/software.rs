//! `qemu.version`, `ovmf`, `passt`, `nftables`, `frpc`: is everything there that a VM is made of?

use qudata_agent_core::settings::{FirmwareKind, TunnelKind};
use qudata_qemu::qmp::VersionNumber;

use super::{fail, pass, unseen};
use crate::{
    Finding,
    observed::{Observed, Program, Unseen},
};

const QEMU: &str = "qemu.version";
const OVMF: &str = "ovmf";
const PASST: &str = "passt";
const NFTABLES: &str = "nftables";
const FRPC: &str = "frpc";

/// Ubuntu 22.04's: the oldest that is tried.
const OLDEST_QEMU: VersionNumber = VersionNumber { major: 6, minor: 2, micro: 0 };

pub(super) fn check(seen: &Observed) -> Vec<Finding> {
    vec![qemu(seen), ovmf(seen), passt(seen), nftables(seen), frpc(seen)]
}

/// Missing, broken, or not known.
fn unusable(id: &'static str, name: &str, program: &Program, package: &str) -> Option<Finding> {
    let install = format!("run `qudata-agent install`, or `apt install {package}`");
    match program {
        Program::Runs(_) => None,
        Program::Missing => Some(fail(id, format!("{name} is not installed"), install)),
        Program::Fails(why) => Some(fail(
            id,
            format!("{name} does not run: {why}"),
            format!("install it again: `apt install --reinstall {package}`"),
        )),
        Program::Unseen(why) => Some(unseen(id, why)),
    }
}

fn first_line(program: &Program) -> &str {
    match program {
        Program::Runs(line) => line,
        Program::Missing | Program::Fails(_) | Program::Unseen(_) => "",
    }
}

fn qemu(seen: &Observed) -> Finding {
    let programs = &seen.programs;
    let qemu = unusable(QEMU, "QEMU", &programs.qemu, "qemu-system-x86");
    let qemu_img = unusable(QEMU, "qemu-img", &programs.qemu_img, "qemu-utils");
    // The worse of the two; QEMU where both are as bad, because the last is taken.
    let wrong = qemu_img.into_iter().chain(qemu).max_by_key(|finding| finding.verdict);
    match (wrong, programs.qemu_version) {
        (Some(wrong), _) => wrong,
        (None, Some(version)) if version < OLDEST_QEMU => fail(
            QEMU,
            format!("QEMU {version} is too old: {OLDEST_QEMU} or newer is needed"),
            "update the distribution; Ubuntu 22.04 and Debian 12 have what is needed",
        ),
        (None, _) => pass(QEMU, first_line(&programs.qemu)),
    }
}

fn ovmf(seen: &Observed) -> Finding {
    let settings = &seen.settings;
    if settings.firmware != FirmwareKind::Uefi {
        return pass(OVMF, format!("not needed: QUDATA_FIRMWARE={}", settings.firmware));
    }
    let missing = |path: &std::path::Path| {
        let line = format!("the UEFI firmware of VMs is missing: {}", path.display());
        fail(OVMF, line, "run `qudata-agent install`, or `apt install ovmf`")
    };
    match (&seen.files.ovmf_code, &seen.files.ovmf_vars) {
        (Ok(true), Ok(true)) => pass(OVMF, settings.ovmf_code.display().to_string()),
        (Ok(false), _) => missing(&settings.ovmf_code),
        (_, Ok(false)) => missing(&settings.ovmf_vars),
        (Err(why), _) | (_, Err(why)) => unseen(OVMF, why),
    }
}

fn passt(seen: &Observed) -> Finding {
    let program = &seen.programs.passt;
    let version = || {
        let line = first_line(program);
        if line.is_empty() { "it runs" } else { line }
    };
    unusable(PASST, "passt, the network of VMs,", program, "passt").unwrap_or_else(|| pass(PASST, version()))
}

fn nftables(seen: &Observed) -> Finding {
    if let Some(wrong) =
        unusable(NFTABLES, "nft, which keeps guests away from the host,", &seen.programs.nft, "nftables")
    {
        return wrong;
    }
    match &seen.programs.nft_works {
        Ok(()) => pass(NFTABLES, first_line(&seen.programs.nft)),
        Err(why @ (Unseen::Denied(_) | Unseen::Late(_))) => unseen(NFTABLES, why),
        Err(why) => fail(
            NFTABLES,
            format!("the kernel does not answer nft: {why}"),
            "run `modprobe nf_tables`; a kernel without it cannot keep guests away from the host",
        ),
    }
}

fn frpc(seen: &Observed) -> Finding {
    let settings = &seen.settings;
    if settings.tunnel != TunnelKind::Frp {
        return pass(FRPC, "not needed: no tunnel");
    }
    match &seen.programs.frpc {
        Program::Runs(version) => pass(FRPC, format!("frpc {version}")),
        Program::Missing => fail(
            FRPC,
            format!("frpc, the tunnel client, is missing: {}", settings.frpc_binary.display()),
            "run `qudata-agent install`, or set frpc_binary to where it is",
        ),
        Program::Fails(why) => {
            fail(FRPC, format!("frpc does not run: {why}"), "install it again: run `qudata-agent install`")
        }
        Program::Unseen(why) => unseen(FRPC, why),
    }
}
