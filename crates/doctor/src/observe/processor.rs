//! The processor and KVM, which is tried out with a tiny guest.

use std::{fs::OpenOptions, io, path::Path};

use qudata_agent_core::probe::{KvmProbe, ProbeError};
use qudata_host::{causes::chain, command::ToolError};
use qudata_qemu::{machine::Accel, mmio::AddressWidth};

use super::{Look, text};
use crate::observed::{KvmNode, Processor, Seen, Unseen};

/// What is here.
pub(super) struct ProcessorLook {
    pub(super) processor: Seen<Processor>,
    pub(super) kvm: KvmNode,
    pub(super) guest_code: Seen<KvmProbe>,
}

pub(super) async fn observe(look: &Look) -> ProcessorLook {
    let processor = look.read(|look| Ok(parse(&text(&look.root.join("proc/cpuinfo"))?)));
    let kvm = look.read(|look| Ok(node(&look.root.join("dev/kvm"))));
    let processor = processor.await;
    let kvm = kvm.await.unwrap_or_else(KvmNode::Unseen);
    let guest_code = match &kvm {
        _ if look.settings.accel == Accel::Tcg => {
            Err(Unseen::Needs("guests are emulated (QUDATA_ACCEL=tcg)"))
        }
        KvmNode::Open => look.by_end(probe(look)).await,
        KvmNode::Absent => Err(Unseen::Needs("there is no /dev/kvm")),
        KvmNode::Denied => Err(Unseen::Denied("cannot open /dev/kvm".to_owned())),
        KvmNode::Broken(_) => Err(Unseen::Needs("/dev/kvm cannot be opened")),
        KvmNode::Unseen(_) => Err(Unseen::Needs("/dev/kvm was not looked at")),
    };
    ProcessorLook { processor, kvm, guest_code }
}

fn node(path: &Path) -> KvmNode {
    match OpenOptions::new().read(true).write(true).open(path) {
        Ok(_) => KvmNode::Open,
        Err(error) => match error.kind() {
            io::ErrorKind::NotFound => KvmNode::Absent,
            io::ErrorKind::PermissionDenied => KvmNode::Denied,
            _ => KvmNode::Broken(error.to_string()),
        },
    }
}

async fn probe(look: &Look) -> Seen<KvmProbe> {
    let scratch = tempfile::Builder::new().prefix("qudata-doctor-").tempdir();
    let scratch =
        scratch.map_err(|error| Unseen::Failed(format!("cannot make a folder for the try: {error}")))?;
    match KvmProbe::run(&look.settings.qemu_binary, scratch.path()).await {
        Ok(verdict) => Ok(verdict),
        Err(ProbeError::Run(ToolError::Start { source, .. })) if source.kind() == io::ErrorKind::NotFound => {
            Err(Unseen::Needs("QEMU is not installed"))
        }
        Err(error) => Err(Unseen::Failed(chain(&error))),
    }
}

fn parse(cpuinfo: &str) -> Processor {
    let field = |name: &str| {
        let value = cpuinfo.lines().find_map(|line| line.strip_prefix(name));
        value.and_then(|rest| rest.trim_start().strip_prefix(':')).unwrap_or_default().trim()
    };
    let flags: Vec<&str> = field("flags").split(' ').collect();
    let shows = |flag: &&str| flags.contains(flag);
    Processor {
        intel: field("vendor_id") == "GenuineIntel",
        virtualization: ["vmx", "svm"].into_iter().find(shows),
        in_a_vm: shows(&"hypervisor"),
        threads: cpuinfo.lines().filter(|line| line.starts_with("processor")).count(),
        width: AddressWidth::of_host(cpuinfo).ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processors_are_told_apart() {
        let text = |vendor: &str, flags: &str| {
            format!(
                "processor\t: 0\nvendor_id\t: {vendor}\nflags\t\t: fpu {flags} lm\naddress sizes\t: 46 bits physical\n\n\
                 processor\t: 1\nvendor_id\t: {vendor}\n"
            )
        };
        let intel = parse(&text("GenuineIntel", "vmx pdpe1gb"));
        assert_eq!((intel.intel, intel.virtualization, intel.threads), (true, Some("vmx"), 2));
        assert_eq!((intel.width.unwrap().bits(), intel.in_a_vm), (46, false));
        let amd = parse(&text("AuthenticAMD", "svm hypervisor"));
        assert_eq!((amd.intel, amd.virtualization, amd.in_a_vm), (false, Some("svm"), true));
        // `svm_lock` is no `svm`.
        assert_eq!(parse(&text("AuthenticAMD", "svm_lock vmxnet")).virtualization, None);
        assert_eq!(parse("").threads, 0);
    }
}
