//! `cpu.*` and `kvm.*`: does this processor run guests?

use qudata_agent_core::probe::KvmProbe;
use qudata_qemu::machine::Accel;

use super::{fail, pass, unseen, warn};
use crate::{
    Finding,
    observed::{KvmNode, Observed, Processor, Unseen},
};

const VIRTUALIZATION: &str = "cpu.virtualization";
const DEVICE: &str = "kvm.device";
const RUNS: &str = "kvm.runs_guests";

pub(super) fn check(seen: &Observed) -> Vec<Finding> {
    let emulated = seen.settings.accel == Accel::Tcg;
    let virtualization = match &seen.processor {
        Err(why) => unseen(VIRTUALIZATION, why),
        Ok(processor) => virtualization(processor, emulated),
    };
    vec![virtualization, device(seen, emulated), runs(seen, emulated)]
}

fn virtualization(processor: &Processor, emulated: bool) -> Finding {
    let threads = processor.threads;
    match processor.virtualization {
        Some("vmx") => pass(VIRTUALIZATION, format!("Intel VT-x, {threads} threads")),
        Some(_) => pass(VIRTUALIZATION, format!("AMD-V, {threads} threads")),
        None if emulated => pass(VIRTUALIZATION, "none, and none is needed: QUDATA_ACCEL=tcg"),
        None if processor.in_a_vm => fail(
            VIRTUALIZATION,
            "this host is a virtual machine whose processor offers no virtualisation",
            "use a physical server, or turn on nested virtualisation on the machine that runs this one",
        ),
        None => fail(
            VIRTUALIZATION,
            "the processor shows neither vmx nor svm",
            format!("turn on {} in the firmware setup and boot again", technology(processor)),
        ),
    }
}

fn technology(processor: &Processor) -> &'static str {
    if processor.intel { "\"Intel Virtualization Technology (VT-x)\"" } else { "\"SVM Mode\" (AMD-V)" }
}

fn device(seen: &Observed, emulated: bool) -> Finding {
    if emulated {
        return pass(DEVICE, "not needed: QUDATA_ACCEL=tcg");
    }
    let module = match &seen.processor {
        Ok(processor) if processor.intel => "kvm_intel",
        Ok(_) | Err(_) => "kvm_amd",
    };
    match &seen.kvm {
        KvmNode::Open => pass(DEVICE, "/dev/kvm can be opened"),
        KvmNode::Denied => unseen(DEVICE, &Unseen::Denied("cannot open /dev/kvm".to_owned())),
        KvmNode::Unseen(why) => unseen(DEVICE, why),
        KvmNode::Absent => fail(
            DEVICE,
            "there is no /dev/kvm",
            format!("run `modprobe {module}`; if it refuses, `dmesg | grep -i kvm` says why"),
        ),
        KvmNode::Broken(why) => fail(
            DEVICE,
            format!("/dev/kvm cannot be opened: {why}"),
            format!("run `modprobe {module}`; if it refuses, `dmesg | grep -i kvm` says why"),
        ),
    }
}

fn runs(seen: &Observed, emulated: bool) -> Finding {
    let broken = |why: String| {
        fail(
            RUNS,
            format!("/dev/kvm is there and does not run guests: {why}"),
            "on a physical server update firmware and kernel; inside a virtual machine nested virtualisation has to work",
        )
    };
    match &seen.guest_code {
        _ if emulated => warn(
            RUNS,
            "guests are emulated (QUDATA_ACCEL=tcg): slow, and no protection against hostile ones",
            "take QUDATA_ACCEL away on a host that rents out",
        ),
        Ok(KvmProbe::Usable) => pass(RUNS, "KVM ran a guest to its end"),
        Ok(KvmProbe::Broken { reason, output }) if output.is_empty() => broken(reason.clone()),
        Ok(KvmProbe::Broken { reason, output }) => {
            broken(format!("{reason} ({})", output.lines().last().unwrap_or_default()))
        }
        // The node was there a moment ago.
        Ok(KvmProbe::NoDevice | KvmProbe::NotPermitted) => {
            unseen(RUNS, &Unseen::Failed("/dev/kvm went away".to_owned()))
        }
        // It takes a tenth of a second. The agent waits longer at its start, and then refuses.
        Err(Unseen::Late(after)) => fail(
            RUNS,
            format!("a guest of some instructions was not done after {after:?}"),
            "look again when the host is less busy; if it stays so, update firmware and kernel, or inside a virtual \
             machine have nested virtualisation mended",
        ),
        Err(why) => unseen(RUNS, why),
    }
}
