//! Explanations: the processor, the kernel, systemd, and what the host has of memory and disk.

use super::Explanation;

const PROCESSOR: &str = "Processor";
const SYSTEM: &str = "System";
const ROOM: &str = "Room";

pub(super) const CPU_VIRTUALIZATION: Explanation = Explanation {
    id: "cpu.virtualization",
    topic: PROCESSOR,
    title: "the processor can run guests",
    text: "Intel calls it VT-x (flag vmx), AMD calls it AMD-V or SVM (flag svm). Every server processor of the last ten \
           years has it; where the flag is missing in /proc/cpuinfo, it is switched off in the firmware setup.\n\n\
           On a server that is itself a virtual machine the flag has to be passed on by whoever runs that machine \
           (nested virtualisation). GPUs of such a server can rarely be passed on a second time.",
};

pub(super) const KVM_DEVICE: Explanation = Explanation {
    id: "kvm.device",
    topic: PROCESSOR,
    title: "/dev/kvm can be opened",
    text: "The kernel offers virtualisation as /dev/kvm once the module kvm_intel or kvm_amd is loaded, which happens by \
           itself at boot when the processor shows the flag.\n\n\
           Load it by hand with modprobe and look at dmesg: \"disabled by bios\" means that the firmware has it off; \
           another hypervisor that has the processor (VirtualBox, VMware) keeps KVM out as well.",
};

pub(super) const KVM_RUNS_GUESTS: Explanation = Explanation {
    id: "kvm.runs_guests",
    topic: PROCESSOR,
    title: "KVM executes a guest to its end",
    text: "/dev/kvm may be there, open, and create machines that never execute an instruction; seen inside virtual \
           machines and with firmware bugs. So a guest of some hundred instructions is run by QEMU: real, protected and \
           long mode, paging, an exception. It takes a tenth of a second.\n\n\
           The agent makes the same try at every start and refuses to start when it fails. Without QEMU it cannot be made; \
           the check then says so and does not pass.",
};

pub(super) const KERNEL_VERSION: Explanation = Explanation {
    id: "kernel.version",
    topic: SYSTEM,
    title: "the kernel is new enough",
    text: "Linux 5.4 is the least that the agent can work with, 5.15 (Ubuntu 22.04) the oldest that is tried. GPUs with \
           large memory start much faster from 6.12 on, see qemu.large_bars.",
};

pub(super) const SECURE_BOOT: Explanation = Explanation {
    id: "secure_boot",
    topic: SYSTEM,
    title: "Secure Boot and the kernel's lockdown let VMs have GPUs",
    text: "With Secure Boot, distributions lock the kernel down (\"integrity\"): it loads signed modules only, and programs \
           may not write the configuration space of devices. vfio-pci is signed and works. NVIDIA's driver on the host has \
           to be signed with a key that is enrolled; the driver inside VMs is not concerned.\n\n\
           A card without a reset of its own is reset through the bridge above it, which lockdown forbids: gpu.reset tells \
           when that is so.",
};

pub(super) const CGROUP: Explanation = Explanation {
    id: "cgroup",
    topic: SYSTEM,
    title: "control groups are version 2",
    text: "systemd bounds each VM by its control group: memory, CPU time, number of processes, devices. With version 1 some \
           of these bounds are kept less strictly or not at all. Every distribution since 2021 boots with version 2 unless \
           systemd.unified_cgroup_hierarchy=0 is on the kernel's command line.",
};

pub(super) const SYSTEMD_VERSION: Explanation = Explanation {
    id: "systemd.version",
    topic: SYSTEM,
    title: "systemd runs the host and is new enough",
    text: "VMs run as transient units of systemd, outside the agent: they live on when the agent is stopped, updated or \
           killed, and each has a user and a sandbox of its own. That takes systemd 249 or newer (Ubuntu 22.04, Debian 12).\n\n\
           Without systemd, for example in a container, the agent starts VMs itself. They outlive it as well, but without \
           the sandbox.",
};

pub(super) const SYSTEMD_HARDENING: Explanation = Explanation {
    id: "systemd.hardening",
    topic: SYSTEM,
    title: "systemd confines VMs",
    text: "Asks systemd over the system bus whether it can start VMs the way the agent wants them: as users without an entry \
           in /etc/passwd, with a closed list of devices, a filter of system calls (seccomp), a file system of which they \
           see little, and a bound on their memory. A guest that breaks out of QEMU finds itself in there.",
};

pub(super) const NSS_SYSTEMD: Explanation = Explanation {
    id: "nss_systemd",
    topic: SYSTEM,
    title: "VMs can have users of their own",
    text: "Each VM runs as two users that exist only as long as it does (one for QEMU, one for its network). systemd knows \
           such users through the library libnss_systemd.so.2 and the word systemd in the line passwd: of \
           /etc/nsswitch.conf. The Debian and Ubuntu package libnss-systemd brings the library and adds the word.",
};

pub(super) const MEMLOCK: Explanation = Explanation {
    id: "memlock",
    topic: SYSTEM,
    title: "a VM may lock its memory",
    text: "A VM with a GPU locks all its RAM, because the GPU writes there by itself. As a unit of systemd, or started by an \
           agent that is root, each VM is given the limit that its RAM needs; nothing has to be set for the host.",
};

pub(super) const MEMORY: Explanation = Explanation {
    id: "memory",
    topic: ROOM,
    title: "there is RAM for an instance",
    text: "What is available by the kernel's estimate (MemAvailable), less host_reserve_memory, has to be enough for one \
           instance. Less than the default size (vm_memory) is a warning: instances that name no size get what there is. \
           Huge pages that are reserved count beside it. With instances running, what they have is theirs and the rest may \
           be small.",
};

pub(super) const HUGEPAGES: Explanation = Explanation {
    id: "hugepages",
    topic: ROOM,
    title: "huge pages, if the owner reserves some",
    text: "Optional. RAM of a VM with a GPU is pinned page by page before the guest starts; in pages of 4 KiB that takes \
           seconds to minutes for hundreds of GiB, in reserved pages of 1 GiB much less. The agent takes reserved pages \
           where they suffice for a whole instance.\n\n\
           Reserve them at boot, for example with default_hugepagesz=1G hugepagesz=1G hugepages=200 on the kernel's command \
           line. Reserved pages are of no use to other programs.",
};

pub(super) const DISK: Explanation = Explanation {
    id: "disk",
    topic: ROOM,
    title: "there is disk space for an instance",
    text: "Free space of the file system of data_dir, less host_reserve_disk. Disks of instances grow as their guests write; \
           the agent promises no more than there is. Less than the default size (vm_storage_gb) is a warning.",
};
