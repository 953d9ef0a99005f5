//! Explanations: the IOMMU and the GPUs.

use super::Explanation;

const ISOLATION: &str = "Isolation";
const GPUS: &str = "GPUs";

pub(super) const IOMMU_ENABLED: Explanation = Explanation {
    id: "iommu.enabled",
    topic: ISOLATION,
    title: "the IOMMU is on",
    text: "A GPU reads and writes memory by itself. The IOMMU (Intel: VT-d, AMD: AMD-Vi) keeps the GPU of a guest to the \
           memory of that guest; without it a renter could read everything on the host, so nothing is rented.\n\n\
           Two have to agree. The firmware announces the IOMMU by an ACPI table (DMAR or IVRS); where it is missing, turn \
           it on in the firmware setup. The kernel then has to use it: on AMD it does by itself, on Intel most kernels want \
           intel_iommu=on, which `qudata-agent install` adds to the boot loader. The field `subject` of a failure (--json) \
           is firmware or kernel.",
};

pub(super) const INTERRUPT_REMAPPING: Explanation = Explanation {
    id: "iommu.interrupt_remapping",
    topic: ISOLATION,
    title: "interrupts are remapped",
    text: "A device raises an interrupt by a write to a special address. Without remapping a guest's device can forge any \
           interrupt of the host and thereby take it over. The kernel shows interrupts that are remapped with IR- in \
           /proc/interrupts.\n\n\
           Old boards have it off for lack of a firmware update; x2APIC in the firmware setup turns it on for most others. \
           intremap=off or nointremap on the kernel's command line turns it off.",
};

pub(super) const UNSAFE_INTERRUPTS: Explanation = Explanation {
    id: "iommu.unsafe_interrupts",
    topic: ISOLATION,
    title: "nobody has allowed devices to forge interrupts",
    text: "allow_unsafe_interrupts=1 of the modules vfio_iommu_type1 and iommufd lets VMs have devices on hosts without \
           interrupt remapping. Guides recommend it for gaming at home; with renters it gives the host away. Look for it in \
           /etc/modprobe.d and on the kernel's command line.",
};

pub(super) const ACS_OVERRIDE: Explanation = Explanation {
    id: "iommu.acs_override",
    topic: ISOLATION,
    title: "groups are what the hardware isolates",
    text: "pcie_acs_override makes a patched kernel believe that devices are isolated which are not: they can still write to \
           each other behind the IOMMU's back. A GPU that needs it belongs into another slot; see gpu.group.",
};

pub(super) const GPU_PRESENT: Explanation = Explanation {
    id: "gpu.present",
    topic: GPUS,
    title: "there are GPUs to be rented",
    text: "Display controllers of any maker on the PCI bus count, and whatever gpu_pci_addrs names. Where gpu_pci_addrs is \
           set, only those are rented; where it is not, all but the card with the firmware's console.\n\n\
           A card that is missing here is missing in `lspci -D` too: power cables, riser, slot, or switched off in the \
           firmware.",
};

pub(super) const GPU_DISPLAY: Explanation = Explanation {
    id: "gpu.display",
    topic: GPUS,
    title: "the host's console is not on a rented card",
    text: "The card that the firmware shows its console on (boot_vga) is left to the host unless gpu_pci_addrs names it. On \
           servers that is the small graphics chip of the management controller, which nobody wants to rent; on a \
           workstation it may be the only card, and naming it means that the screen goes dark while it is rented.",
};

pub(super) const GPU_POWER: Explanation = Explanation {
    id: "gpu.power",
    topic: GPUS,
    title: "the card answers",
    text: "A card that has fallen off the bus reads as all ones, while the kernel goes on showing it as if nothing had \
           happened, and even resets of it seem to work. So its configuration space is read.\n\n\
           The usual reasons are power (cables, supply too weak for all cards at full load), a loose riser, heat, or a \
           crashed firmware of the card. Only taking the power away brings most of them back.",
};

pub(super) const GPU_GROUP: Explanation = Explanation {
    id: "gpu.group",
    topic: GPUS,
    title: "nothing else is in the card's IOMMU group",
    text: "The kernel puts devices that could reach each other into one group, and a group can be given to one owner only. A \
           GPU with its own audio and USB functions is fine; a disk or network card in the group would go to the renter as \
           well, so the GPU is not rented.\n\n\
           `qudata-agent gpu topo` shows the groups. Another slot, usually one of the processor instead of the chip set, or \
           ACS in the firmware setup makes smaller groups. Do not use pcie_acs_override.",
};

pub(super) const GPU_DRIVER: Explanation = Explanation {
    id: "gpu.driver",
    topic: GPUS,
    title: "the card can change to vfio-pci",
    text: "While a VM has the card its driver is vfio-pci; before and after it is the driver it had. The NVIDIA driver lets go \
           of a card cleanly. nouveau does not: unbinding it can crash the host, so a card that nouveau has is refused. \
           `qudata-agent install` keeps it away; by hand, put \"blacklist nouveau\" and \"options nouveau modeset=0\" into \
           a file of /etc/modprobe.d, run update-initramfs -u, and boot again.",
};

pub(super) const GPU_HOLDERS: Explanation = Explanation {
    id: "gpu.holders",
    topic: GPUS,
    title: "nobody on the host uses the card",
    text: "Taking a card away from a program that has it open blocks in the kernel, with some drivers for ever. So whoever has \
           a device file of the card open is looked for, and the card is not rented before that program has ended. NVIDIA's \
           own services are stopped and started again by the agent. An instance that has the card is no fault.\n\n\
           Other users' open files are visible to root only.",
};

pub(super) const GPU_RESET: Explanation = Explanation {
    id: "gpu.reset",
    topic: GPUS,
    title: "the card can be reset between renters",
    text: "After each instance the card is reset as a whole and compared with what it was, and goes to the next only when that \
           passes. Ways, best first: a reset of each function (flr), of the bus or by the device's own method, of everything \
           below the bridge above it when nothing else is there, and last the power state, which may keep memory.\n\n\
           A card without any way must not be rented. Consumer cards sometimes get one by a slot with a port of its own.",
};

pub(super) const GPU_BARS: Explanation = Explanation {
    id: "gpu.bars",
    topic: GPUS,
    title: "the card's memory windows fit, on the host and in a guest",
    text: "A GPU shows its memory through windows (BARs) of up to 256 GiB. On the host the firmware has to find addresses for \
           them: \"Above 4G Decoding\" in its setup. In the guest they have to fit beside RAM into the physical address bits \
           of the processor; the plan that the agent makes for an instance is made here with the default RAM.",
};

pub(super) const GPU_LINK: Explanation = Explanation {
    id: "gpu.link",
    topic: GPUS,
    title: "all lanes of the card are in use",
    text: "A card that should have 16 lanes and has 8 or 4 works, and copies that much slower. The reasons are a card that is \
           not quite in, a bad riser or cable, a slot with fewer lanes than its length promises, or slots that share lanes. \
           The speed of a lane is not judged: an idle card lowers it.",
};

pub(super) const QEMU_LARGE_BARS: Explanation = Explanation {
    id: "qemu.large_bars",
    topic: GPUS,
    title: "large GPU memory is mapped fast",
    text: "Before Linux 6.12 and QEMU 9.2 the windows of a GPU are mapped in pages of 4 KiB: about 30 s for 128 GiB, during \
           which the firmware of the guest stands still. Eight large cards take minutes. It is slow, not wrong.\n\n\
           gpu_no_mmap = true avoids it at a price: the guest reaches GPU memory through QEMU, and GPUs cannot copy to each \
           other directly.",
};
