//! Every check on made-up hosts: one thing is spoiled, and exactly the findings that tell of it change.

use std::{collections::BTreeSet, time::Duration};

use qudata_agent_core::{control_plane::Answer, probe::KvmProbe};
use qudata_host::size::ByteSize;
use qudata_vfio::holders::{Holder, HoldingProcess};

use super::{
    check,
    made_up::{
        CONSOLE, FIRST, SECOND, add, bus, capacity, host, of, pci, settings, state, systemd, view,
        without_iommu,
    },
};
use crate::{
    Finding, Report, SettingsRead, Verdict,
    Verdict::{Fail, Pass, Warn},
    explain,
    observed::*,
};

fn text(findings: &[Finding]) -> String {
    let line = |f: &Finding| {
        let subject = f.subject.as_ref().map_or_else(String::new, |subject| format!("{subject}: "));
        let remedy = f.remedy.as_ref().map_or_else(String::new, |remedy| format!("\n    → {remedy}"));
        format!("{:?} {} {subject}{}{remedy}\n", f.verdict, f.id, f.line)
    };
    findings.iter().map(line).collect()
}

/// What is spoiled; id, verdict, words of the line, words of the remedy (empty: none is wanted).
type Case = (fn(&mut Observed), &'static str, Verdict, &'static str, &'static str);

fn holder(name: &str, unit: Option<&str>, pid: u32) -> Holder {
    let node = "/dev/nvidia0".into();
    Holder::Process(HoldingProcess {
        pid,
        name: name.to_owned(),
        unit: unit.map(str::to_owned),
        node,
        certain: true,
    })
}

fn late() -> Unseen {
    Unseen::Late(Duration::from_millis(2500))
}

/// Each spoils a healthy host and changes one finding for the worse.
const CASES: &[Case] = &[
    (
        |h| h.settings_read = SettingsRead::Refused("vm_cpu is unknown".into()),
        "settings",
        Fail,
        "vm_cpu",
        "qudata-agent settings",
    ),
    (|h| h.settings_read = SettingsRead::Unreadable("no".into()), "settings", Warn, "defaults", "root"),
    (|h| h.processor.as_mut().unwrap().virtualization = None, "cpu.virtualization", Fail, "neither", "SVM"),
    (|h| h.kvm = KvmNode::Absent, "kvm.device", Fail, "no /dev/kvm", "modprobe kvm_amd"),
    (|h| h.kvm = KvmNode::Denied, "kvm.device", Warn, "this user may not", "sudo"),
    (|h| h.kvm = KvmNode::Broken("ENXIO".into()), "kvm.device", Fail, "ENXIO", "dmesg"),
    (
        |h| h.guest_code = Ok(KvmProbe::Broken { reason: "it died".into(), output: "a\nb".into() }),
        "kvm.runs_guests",
        Fail,
        "it died (b)",
        "firmware",
    ),
    (
        |h| h.guest_code = Err(Unseen::Late(Duration::from_millis(2500))),
        "kvm.runs_guests",
        Fail,
        "2.5s",
        "nested",
    ),
    (
        |h| h.guest_code = Err(Unseen::Needs("QEMU is not installed")),
        "kvm.runs_guests",
        Warn,
        "QEMU is not",
        "",
    ),
    (
        |h| bus(h).topology.isolation.interrupt_remapping = false,
        "iommu.interrupt_remapping",
        Fail,
        "forge",
        "x2APIC",
    ),
    (
        |h| bus(h).topology.isolation.unsafe_interrupts = true,
        "iommu.unsafe_interrupts",
        Fail,
        "forge",
        "modprobe.d",
    ),
    (
        |h| bus(h).topology.isolation.acs_override = true,
        "iommu.acs_override",
        Fail,
        "pcie_acs_override",
        "reboot",
    ),
    (
        |h| h.settings.gpu_pci_addrs = ["0000:99:00.0", FIRST, SECOND].map(pci).into(),
        "gpu.present",
        Fail,
        "no such device",
        "lspci",
    ),
    (
        |h| {
            h.settings.gpu_pci_addrs = [CONSOLE, FIRST].map(pci).into();
            of(h, CONSOLE).reset_methods = vec!["flr".into()];
        },
        "gpu.display",
        Warn,
        "goes dark",
        "BMC",
    ),
    (|h| state(h).dead = vec![pci(FIRST)], "gpu.power", Fail, "fallen off the bus", "off and on"),
    (|h| add(h, "0000:41:00.1", 0x01_0802, 11), "gpu.group", Fail, "group 11 with 0000:41:00.1", "slot"),
    (|h| of(h, FIRST).group = None, "gpu.group", Fail, "no IOMMU group", "VT-d"),
    (|h| of(h, FIRST).driver = Some("nouveau".into()), "gpu.driver", Fail, "nouveau", "blacklist"),
    (
        |h| state(h).holders = vec![holder("python3", None, 77)],
        "gpu.holders",
        Fail,
        "python3 (pid 77)",
        "stop python3",
    ),
    (
        |h| {
            h.is_root = false;
            state(h).holders = vec![Holder::Unseen { why: "cannot look at process 1".into() }];
        },
        "gpu.holders",
        Warn,
        "process 1",
        "root",
    ),
    (
        |h| state(h).unplaced = vec![(pci(FIRST), 2, ByteSize::from_gib(128))],
        "gpu.bars",
        Fail,
        "BAR 2 (128G)",
        "Above 4G",
    ),
    (|h| of(h, FIRST).link.as_mut().unwrap().width = 4, "gpu.link", Warn, "4 of 16 lanes", "riser"),
    (
        |h| h.programs.qemu_version = "9.1.0".parse().ok(),
        "qemu.large_bars",
        Warn,
        "60 s later",
        "gpu_no_mmap",
    ),
    (
        |h| {
            h.settings.gpu_no_mmap = true;
            h.kernel.version = Ok("5.10.0".parse().unwrap());
        },
        "kernel.version",
        Warn,
        "older",
        "update",
    ),
    (
        |h| h.kernel.lockdown = Ok("confidentiality".into()),
        "secure_boot",
        Warn,
        "confidentiality",
        "integrity",
    ),
    (|h| h.cgroup = Ok(Cgroup::V1), "cgroup", Warn, "version 1", "unified_cgroup_hierarchy"),
    (
        |h| h.cgroup = Ok(Cgroup::V2(vec!["cpu".into(), "pids".into()])),
        "cgroup",
        Warn,
        "without memory",
        "cgroup_disable",
    ),
    (|h| systemd(h).version = Ok(245), "systemd.version", Fail, "245 is too old", "update"),
    (
        |h| systemd(h).launches = Err(Unseen::Failed("no bus".into())),
        "systemd.hardening",
        Fail,
        "no bus",
        "dbus",
    ),
    (|h| systemd(h).features = "-SECCOMP".into(), "systemd.hardening", Warn, "seccomp", "systemd"),
    (|h| h.nss.as_mut().unwrap().consulted = false, "nss_systemd", Fail, "nsswitch", "passwd:"),
    (|h| capacity(h).memory_total = ByteSize::from_gib(2), "memory", Fail, "not enough", "more RAM"),
    (|h| capacity(h).memory_available = ByteSize::from_gib(2), "memory", Fail, "other programs", "ps aux"),
    (
        |h| capacity(h).memory_available = ByteSize::from_gib(6),
        "memory",
        Warn,
        "by default (8.0 GiB)",
        "vm_memory",
    ),
    (|h| capacity(h).disk_free = ByteSize::from_gib(5), "disk", Fail, "not enough", "data_dir"),
    (
        |h| capacity(h).disk_free = ByteSize::from_gib(40),
        "disk",
        Warn,
        "by default (50.0 GiB)",
        "free some space",
    ),
    (|h| h.hugepages = Err(Unseen::Failed("odd".into())), "hugepages", Warn, "odd", "look again"),
    (|h| h.programs.qemu = Program::Missing, "qemu.version", Fail, "not installed", "qemu-system-x86"),
    (|h| h.programs.qemu_img = Program::Missing, "qemu.version", Fail, "qemu-img", "qemu-utils"),
    (|h| h.files.ovmf_vars = Ok(false), "ovmf", Fail, "VARS", "apt install ovmf"),
    (|h| h.programs.passt = Program::Fails("libc".into()), "passt", Fail, "libc", "--reinstall passt"),
    (|h| h.programs.passt = Program::Unseen(late()), "passt", Warn, "no answer", "look again"),
    (|h| h.programs.qemu_img = Program::Unseen(late()), "qemu.version", Warn, "no answer", "look again"),
    (|h| h.programs.frpc = Program::Unseen(late()), "frpc", Warn, "no answer", "look again"),
    (|h| h.files.ovmf_code = Err(late()), "ovmf", Warn, "no answer", "look again"),
    (|h| h.nss = Err(late()), "nss_systemd", Warn, "no answer", "look again"),
    (|h| h.cgroup = Err(late()), "cgroup", Warn, "no answer", "look again"),
    (|h| h.kvm = KvmNode::Unseen(late()), "kvm.device", Warn, "no answer", "look again"),
    (|h| h.kernel.secure_boot = Err(late()), "secure_boot", Warn, "no answer", "look again"),
    (|h| h.kernel.lockdown = Err(late()), "secure_boot", Warn, "no answer", "look again"),
    (|h| h.programs.nft = Program::Missing, "nftables", Fail, "not installed", "nftables"),
    (
        |h| h.programs.nft_works = Err(Unseen::Failed("EPROTONOSUPPORT".into())),
        "nftables",
        Fail,
        "EPROTO",
        "nf_tables",
    ),
    (|h| h.programs.nft_works = Err(Unseen::Denied("x".into())), "nftables", Warn, "may not", "root"),
    (|h| h.programs.frpc = Program::Missing, "frpc", Fail, "missing", "qudata-agent install"),
    (|h| h.files.image = Err(ImageFault::Missing), "image", Fail, "no base image", "image build"),
    (
        |h| h.files.image = Err(ImageFault::Unusable("it is VMDK".into())),
        "image",
        Fail,
        "VMDK",
        "image build",
    ),
    (
        |h| h.files.image = Err(ImageFault::Unseen(Unseen::Failed("cannot read it: EIO".into()))),
        "image",
        Warn,
        "qudata-base.qcow2 was not looked at: cannot read it: EIO",
        "qemu-img info /var/lib/qudata/images/qudata-base.qcow2",
    ),
    (|h| h.outside.synchronized = Ok(false), "time.sync", Warn, "not kept", "set-ntp"),
    (
        |h| h.outside.names[0].1 = Err(Unseen::Failed("x.ai is not found: EAI".into())),
        "dns",
        Fail,
        "x.ai is not",
        "nameserver",
    ),
    (|h| h.outside.resolvers = Ok(Vec::new()), "dns", Warn, "no resolver", "IPv4"),
    (
        |h| view(h).gpus[0].state = "quarantined".into(),
        "agent",
        Fail,
        "quarantined",
        "gpu release 0000:41:00.0",
    ),
    (
        |h| view(h).problems = vec![("frps is away".into(), "wait".into())],
        "agent",
        Warn,
        "frps is away",
        "wait",
    ),
    (
        |h| h.agent = AgentLook::Unseen(Unseen::Late(Duration::from_secs(2))),
        "agent",
        Fail,
        "no answer within 2.0 s",
        "systemctl",
    ),
];

#[test]
fn each_fault_is_one_finding_with_a_remedy_and_changes_no_other() {
    let well = check(&host());
    for (spoil, id, verdict, line, remedy) in CASES {
        let mut spoiled = host();
        spoil(&mut spoiled);
        let findings = check(&spoiled);
        let worse: Vec<&Finding> = findings.iter().filter(|f| f.verdict != Pass).collect();
        let [found] = worse.as_slice() else { panic!("{id}, {line}:\n{}", text(&findings)) };
        assert_eq!((found.id, found.verdict), (*id, *verdict), "{}", text(&findings));
        assert!(found.line.contains(line), "{id}: {}", found.line);
        let told = found.remedy.as_deref().unwrap_or_default();
        assert!(told.contains(remedy) && (told.is_empty() == remedy.is_empty()), "{id}: {told}");
        assert!(well.iter().any(|f| f.id == *id && f.verdict == Pass), "{id} never passes");
    }
}

#[test]
fn a_host_where_all_is_well() {
    let findings = check(&host());
    insta::assert_snapshot!("well", text(&findings));
    assert!(findings.iter().all(|finding| finding.verdict == Pass && finding.remedy.is_none()));
}

/// Every kind of check is made on every host, and failures say what to do.
fn complete(findings: &[Finding], each_gpu: bool) {
    let told: BTreeSet<&str> = findings.iter().map(|finding| finding.id).collect();
    for check in explain::ALL.iter().filter(|check| check.id != "selftest") {
        let of_each = ["power", "group", "driver", "holders", "reset", "bars", "link"];
        let of_each = check.id.strip_prefix("gpu.").is_some_and(|name| of_each.contains(&name));
        assert!(told.contains(check.id) || (of_each && !each_gpu), "{} is not told", check.id);
    }
    for finding in findings {
        assert!(explain::explain(finding.id).is_some(), "{}", finding.id);
        assert!(finding.verdict != Fail || finding.remedy.is_some(), "{finding:?}");
        assert!(!finding.line.is_empty() && !finding.line.contains('\n'), "{finding:?}");
    }
    let place = |finding: &Finding| explain::ALL.iter().position(|check| check.id == finding.id);
    assert!(findings.is_sorted_by_key(place));
}

/// Nothing is known, or nothing is there.
fn bare() -> Observed {
    let failed = || Unseen::Failed("nothing to see".into());
    let mut bare = host();
    bare.processor = Err(failed());
    bare.guest_code = Err(failed());
    bare.pci = Err(failed());
    bare.kernel.version = Err(failed());
    bare.capacity = Err(failed());
    bare.hugepages = Err(failed());
    bare.systemd = Systemd::NotBooted;
    bare.agent = AgentLook::NoSocket;
    let Programs { qemu, qemu_version, qemu_img, passt, nft, nft_works, frpc } = &mut bare.programs;
    [qemu, qemu_img, passt, nft, frpc].into_iter().for_each(|program| *program = Program::Missing);
    (*qemu_version, *nft_works) = (None, Err(failed()));
    bare.outside.synchronized = Err(failed());
    bare.outside.resolvers = Err(failed());
    bare.outside.control_plane = Some(Err(failed()));
    bare.outside.frps = Some(Err(failed()));
    bare
}

#[test]
fn all_checks_are_told_whatever_can_be_seen() {
    complete(&check(&host()), true);
    complete(&check(&bare()), true);
    let mut no_gpu = host();
    bus(&mut no_gpu).gpus.clear();
    complete(&check(&no_gpu), false);
    let mut hung = host();
    for look in &mut bus(&mut hung).gpus {
        look.state = Err(Unseen::Late(Duration::from_secs(2)));
    }
    let findings = check(&hung);
    complete(&findings, true);
    let late = findings.iter().filter(|f| f.id == "gpu.power" && f.verdict == Warn).count();
    assert_eq!(late, 2, "{}", text(&findings));
}

fn verdicts(host: &Observed, id: &str) -> Vec<Verdict> {
    check(host).iter().filter(|finding| finding.id == id).map(|finding| finding.verdict).collect()
}

#[test]
fn who_has_the_iommu_off_is_told_and_nothing_is_told_twice() {
    let table = [
        (Some(Iommu::Amd), "kernel", "amd_iommu=off"),
        (Some(Iommu::Intel), "kernel", "intel_iommu=on"),
        (None, "firmware", "firmware setup"),
    ];
    for (firmware, subject, remedy) in table {
        let mut off = host();
        without_iommu(&mut off);
        off.firmware_iommu = Ok(firmware);
        let findings = check(&off);
        let failed: Vec<&Finding> = findings.iter().filter(|f| f.verdict == Fail).collect();
        let [cause] = failed.as_slice() else { panic!("{}", text(&findings)) };
        assert_eq!((cause.id, cause.subject.as_deref()), ("iommu.enabled", Some(subject)));
        assert!(cause.remedy.as_ref().unwrap().contains(remedy), "{cause:?}");
        assert_eq!(verdicts(&off, "gpu.group"), [Warn, Warn]);
    }
}

#[test]
fn all_faults_of_a_gpu_are_told_at_once() {
    let mut bad = host();
    let card = of(&mut bad, FIRST);
    card.driver = Some("nouveau".into());
    card.reset_methods.clear();
    add(&mut bad, "0000:41:00.1", 0x02_0000, 11);
    // With a neighbour the bridge is no way either.
    of(&mut bad, "0000:41:00.1").upstream = vec![pci("0000:40:01.0")];
    state(&mut bad).holders = vec![holder("Xorg", None, 9)];
    let findings = check(&bad);
    let failed: Vec<&str> = findings.iter().filter(|f| f.verdict == Fail).map(|f| f.id).collect();
    assert_eq!(failed, ["gpu.group", "gpu.driver", "gpu.holders", "gpu.reset"], "{}", text(&findings));
    assert!(findings.iter().filter(|f| f.verdict == Fail).all(|f| f.subject.as_deref() == Some(FIRST)));
}

#[test]
fn a_gpu_that_an_instance_has_is_no_fault() {
    let spoils: [fn(&mut Observed); 3] = [
        |h| {
            view(h).gpus[0].state = "in_use".into();
            view(h).gpus[0].instance = Some("019b".into());
        },
        |h| {
            h.agent = AgentLook::NoSocket;
            state(h).holders = vec![holder("qemu-system-x86", Some("qudata-vm-019b-1-qemu.service"), 4711)];
        },
        |h| {
            h.agent = AgentLook::NoSocket;
            bus(h).own = [4711].into();
        },
    ];
    for spoil in spoils {
        let mut lent = host();
        state(&mut lent).holders = vec![holder("qemu-system-x86", None, 4711)];
        of(&mut lent, FIRST).driver = Some("vfio-pci".into());
        assert_eq!(verdicts(&lent, "gpu.holders"), [Fail, Pass]);
        spoil(&mut lent);
        assert_eq!(verdicts(&lent, "gpu.holders"), [Pass, Pass], "{}", text(&check(&lent)));
    }
}

#[test]
fn a_reset_through_the_bridge_needs_an_open_kernel() {
    let mut bridge = host();
    of(&mut bridge, FIRST).reset_methods.clear();
    let by_bridge = |host: &Observed| check(host).into_iter().find(|f| f.id == "gpu.reset").unwrap();
    assert!(by_bridge(&bridge).line.contains("bus reset by bridge 0000:40:01.0"), "{:?}", by_bridge(&bridge));
    bridge.kernel.lockdown = Ok("integrity".into());
    assert_eq!(by_bridge(&bridge).verdict, Fail);
    bridge.kernel.lockdown = Err(Unseen::Failed("odd".into()));
    assert_eq!(by_bridge(&bridge).verdict, Warn);
    let mut power = host();
    of(&mut power, FIRST).reset_methods = vec!["pm".into()];
    of(&mut power, FIRST).upstream.clear();
    assert_eq!(by_bridge(&power).verdict, Warn, "{:?}", by_bridge(&power));
}

/// An image folder on a file system that does not answer, a kernel that is slow to tell: no failure follows from what was
/// not seen, however much leans on it.
#[test]
fn what_was_not_looked_at_fails_nothing() {
    let mut slow = host();
    slow.kernel = Kernel {
        version: Err(late()),
        release: String::new(),
        has_vfio_pci: Err(late()),
        lockdown: Err(late()),
        secure_boot: Err(late()),
    };
    bus(&mut slow).topology.isolation.vfio_pci = false;
    slow.firmware_iommu = Err(late());
    slow.cgroup = Err(late());
    slow.nss = Err(late());
    slow.systemd = Systemd::Unseen(late());
    slow.kvm = KvmNode::Unseen(late());
    slow.files = Files {
        ovmf_code: Err(late()),
        ovmf_vars: Err(late()),
        image: Err(ImageFault::Unseen(late())),
        has_key: Err(late()),
    };
    let Programs { qemu, qemu_img, passt, nft, frpc, .. } = &mut slow.programs;
    [qemu, qemu_img, passt, nft, frpc].into_iter().for_each(|program| *program = Program::Unseen(late()));
    // An agent that is connected would have a key.
    view(&mut slow).control_plane = None;
    slow.is_root = false;
    let findings = check(&slow);
    complete(&findings, true);
    assert!(findings.iter().all(|finding| finding.verdict != Fail), "{}", text(&findings));
    for id in [
        "kvm.device",
        "gpu.driver",
        "kernel.version",
        "secure_boot",
        "cgroup",
        "systemd.version",
        "systemd.hardening",
        "nss_systemd",
        "memlock",
        "qemu.version",
        "ovmf",
        "passt",
        "nftables",
        "frpc",
        "image",
        "control_plane",
    ] {
        assert!(verdicts(&slow, id).contains(&Warn), "{id}: {}", text(&findings));
    }
}

#[test]
fn an_iommu_that_is_off_fails_also_when_nobody_knows_who_has_it_off() {
    let mut off = host();
    without_iommu(&mut off);
    off.firmware_iommu = Err(late());
    let findings = check(&off);
    let found = findings.iter().find(|finding| finding.id == "iommu.enabled").unwrap();
    assert_eq!((found.verdict, found.subject.as_deref()), (Fail, None), "{found:?}");
}

#[test]
fn a_console_card_alone_is_a_fault_until_it_is_named() {
    let mut alone = host();
    bus(&mut alone).gpus.retain(|look| look.gpu.address == pci(CONSOLE));
    let found = check(&alone).into_iter().find(|f| f.id == "gpu.present").unwrap();
    assert_eq!(found.verdict, Fail);
    assert!(found.remedy.unwrap().contains("gpu_pci_addrs = [\"0000:02:00.0\"]"));
    alone.settings.gpu_pci_addrs = vec![pci(CONSOLE)];
    assert_eq!(verdicts(&alone, "gpu.present"), [Pass]);
    assert_eq!(verdicts(&alone, "gpu.display"), [Warn]);
}

#[test]
fn what_is_not_needed_does_not_fail() {
    let mut alone = bare();
    alone.settings =
        settings(&[("QUDATA_STANDALONE", "true"), ("QUDATA_ACCEL", "tcg"), ("QUDATA_FIRMWARE", "bios")]);
    alone.files.ovmf_code = Ok(false);
    alone.outside.control_plane = None;
    alone.outside.frps = None;
    alone.kvm = KvmNode::Absent;
    for id in ["frpc", "frps", "control_plane", "ovmf", "kvm.device"] {
        assert_eq!(verdicts(&alone, id), [Pass], "{id}");
    }
    assert_eq!(verdicts(&alone, "kvm.runs_guests"), [Warn], "emulation is for tests");
}

#[test]
fn a_host_without_a_key_is_told_before_the_agent_refuses_to_start() {
    let mut keyless = host();
    keyless.files.has_key = Ok(false);
    assert_eq!(verdicts(&keyless, "control_plane"), [Pass], "an agent that is connected has one");
    view(&mut keyless).control_plane = Some("down".into());
    assert_eq!(verdicts(&keyless, "control_plane"), [Fail]);
    keyless.settings = settings(&[("QUDATA_TUNNEL", "none")]);
    assert_eq!(verdicts(&keyless, "control_plane"), [Pass], "then the host is its owner's alone");
    keyless.outside.control_plane = Some(Ok(Answer::Refused(503)));
    assert_eq!(verdicts(&keyless, "control_plane"), [Warn]);
}

#[test]
fn an_agent_that_does_not_run() {
    let unit = |load: &str, active: &str| Unit {
        load: load.into(),
        active: active.into(),
        result: "exit-code".into(),
    };
    let table = [
        (unit("loaded", "failed"), Fail, "exit-code"),
        (unit("loaded", "activating"), Warn, "again"),
        (unit("loaded", "inactive"), Warn, "installed"),
        (unit("not-found", "inactive"), Warn, "not installed"),
    ];
    for (unit, verdict, words) in table {
        let mut absent = host();
        absent.agent = AgentLook::NoSocket;
        systemd(&mut absent).unit = Ok(unit);
        let findings = check(&absent);
        let found = findings.iter().find(|finding| finding.id == "agent").unwrap();
        assert_eq!(found.verdict, verdict, "{found:?}");
        assert!(found.line.contains(words) && found.remedy.is_some(), "{found:?}");
    }
}

#[test]
fn the_next_step_is_the_first_cause() {
    let report = |host: &Observed| Report { findings: check(host), took: Duration::ZERO };
    let mut bad = host();
    assert!(report(&bad).next().is_none() && report(&bad).verdict() == Pass);
    bad.outside.synchronized = Ok(false);
    assert_eq!(report(&bad).next().unwrap().id, "time.sync");
    bad.programs.frpc = Program::Missing;
    bad.kvm = KvmNode::Absent;
    assert_eq!((report(&bad).next().unwrap().id, report(&bad).verdict()), ("kvm.device", Fail));
    let json = serde_json::to_value(report(&bad)).unwrap();
    assert_eq!((&json["verdict"], &json["fail"], &json["took_ms"]), (&"fail".into(), &2.into(), &0.into()));
    assert!(json["next"].as_str().unwrap().contains("modprobe"), "{json}");
    assert_eq!(json["findings"][0]["id"], "settings");
}
