//! Whether this host can be a host at all. Pure; called by `plan`.

use qudata_host::size::ByteSize;

use crate::{
    error::{Code, SetupError},
    observe::{Maker, Observed},
    wish::Wish,
};

/// Room for the host and one small instance. What the kernel keeps for itself is not counted by it.
const LEAST_MEMORY: ByteSize = ByteSize::from_mib(1900);
/// Never rented out, and a small instance's disk.
const DISK_BESIDE_IMAGE: ByteSize = ByteSize::from_gib(3);
/// An image with a driver, while it is being built.
const DISK_FOR_BUILDING: ByteSize = ByteSize::from_gib(8);

pub(super) fn check(observed: &Observed, wish: &Wish, builds: bool) -> Result<(), SetupError> {
    distribution(observed)?;
    kvm(observed)?;
    if !observed.vfio {
        let what = format!("kernel {} comes without vfio-pci, which hands a GPU to a VM", observed.kernel);
        let remedy = "Install the distribution's full kernel and start it; kernels for clouds leave it out.";
        return Err(SetupError::new(Code::NoVfio, what, remedy).next(full_kernel(observed)));
    }
    if observed.memory < LEAST_MEMORY {
        let what = format!("this host has {} MiB of memory", observed.memory.mib());
        let remedy = format!("The host and one instance need {} MiB at least.", LEAST_MEMORY.mib());
        return Err(SetupError::new(Code::MemoryTooSmall, what, remedy).next("free -m"));
    }
    // A host that has its image is judged by the agent, which knows what the instances' disks may still grow.
    if builds {
        disk(observed, wish)?;
    }
    iommu(observed)
}

fn distribution(observed: &Observed) -> Result<(), SetupError> {
    let remedy = "Debian 12 or newer and Ubuntu 22.04 or newer, started by systemd, are supported.";
    let next = "cat /etc/os-release";
    if !observed.distribution.is_supported() {
        let name = &observed.distribution.name;
        let name = if name.is_empty() { "without a name in /etc/os-release" } else { name };
        let what = format!("this host runs a distribution that nobody has tried: {name}");
        return Err(SetupError::new(Code::UnsupportedDistribution, what, remedy).next(next));
    }
    if !observed.systemd {
        let what = "systemd does not run this host";
        return Err(SetupError::new(Code::UnsupportedDistribution, what, remedy).next(next));
    }
    Ok(())
}

fn kvm(observed: &Observed) -> Result<(), SetupError> {
    if observed.settings.emulated || observed.kvm {
        return Ok(());
    }
    let (what, remedy) = if observed.virtualization {
        (
            "there is no /dev/kvm",
            "Load KVM's module: modprobe kvm_intel, or kvm_amd; `dmesg` says why it is not loaded.",
        )
    } else {
        (
            "the processor does not offer virtualisation",
            "Switch it on in the firmware: VT-x (Intel) or SVM (AMD). Inside a VM: switch nested virtualisation on outside.",
        )
    };
    Err(SetupError::new(Code::NoKvm, what, remedy).next("qudata-agent doctor"))
}

fn full_kernel(observed: &Observed) -> &'static str {
    match observed.distribution.id.as_str() {
        "ubuntu" => "sudo apt-get install linux-generic && sudo reboot",
        _ => "sudo apt-get install linux-image-amd64 && sudo reboot",
    }
}

fn disk(observed: &Observed, wish: &Wish) -> Result<(), SetupError> {
    if let Some(file) = wish.image.as_deref().filter(|image| image.starts_with('/'))
        && observed.settings.image_source.is_none()
    {
        let what = format!("there is no file {file} to make the base image from");
        let remedy =
            "Give a file that is there, an address, or the name of a distribution such as debian-12.";
        return Err(SetupError::new(Code::Image("image_failed"), what, remedy)
            .next("qudata-agent install --image debian-12"));
    }
    // Of a file a copy, and what a boot of it adds.
    let twice = |size: ByteSize| ByteSize::from_bytes(size.bytes().saturating_mul(2));
    let image = observed.settings.image_source.map_or(DISK_FOR_BUILDING, twice);
    let needed = DISK_BESIDE_IMAGE.saturating_add(image);
    if observed.disk_free >= needed {
        return Ok(());
    }
    let dir = &observed.settings.data_dir;
    let mib = |size: ByteSize| size.mib();
    let what = format!("{dir} has {} MiB free, and {} MiB are needed", mib(observed.disk_free), mib(needed));
    let remedy = "Make room, or put the data on another disk: --set data_dir=/path (with a drop-in of ReadWritePaths= for \
                  the agent's unit).";
    Err(SetupError::new(Code::DiskTooSmall, what, remedy).next(format!("df -h {dir}")))
}

/// What the firmware and the kernel say about the IOMMU; what a reboot can mend is no refusal.
fn iommu(observed: &Observed) -> Result<(), SetupError> {
    if observed.settings.debug && observed.topology.gpus(&[]).is_empty() {
        return Ok(());
    }
    if !observed.iommu_works() {
        return if observed.firmware == Some(None) { Err(off_in_firmware(observed.maker)) } else { Ok(()) };
    }
    if observed.topology.isolation.interrupt_remapping {
        return Ok(());
    }
    let what = "interrupt remapping is off: a guest's device could forge interrupts of this host";
    let remedy = "Switch it (or x2APIC) on in the firmware, and take intremap=off, nox2apic and noapic off the kernel's \
                  command line.";
    Err(SetupError::new(Code::NoInterruptRemapping, what, remedy)
        .next("cat /proc/cmdline; dmesg | grep -i remap"))
}

/// The firmware has no table of an IOMMU.
pub(crate) fn off_in_firmware(maker: Maker) -> SetupError {
    let switch = match maker {
        Maker::Intel => "VT-d (\"Intel Virtualization Technology for Directed I/O\")",
        Maker::Amd => "IOMMU (AMD-Vi) and SVM",
        Maker::Other => "the IOMMU (VT-d or AMD-Vi)",
    };
    let what = "the firmware offers no IOMMU: it is switched off there, or this machine has none";
    let remedy = format!("Restart into the firmware's setup, switch {switch} on, and start again.");
    SetupError::new(Code::IommuOffInFirmware, what, remedy).next("sudo systemctl reboot --firmware-setup")
}
