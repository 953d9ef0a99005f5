//! What an image consists of: packages, files, layout. Its hash names the place in the cache, so a change here is a new
//! image. Read by `rootfs`, `disk` and `host`, hashed by the parent module.
use sha2::{Digest, Sha256};

/// Everything that decides what an image is.
#[derive(Debug)]
pub(super) struct Recipe {
    /// Packages on top of mmdebstrap's minbase.
    pub packages: &'static [&'static str],
    /// Placed before the kernel package is installed, so that the initramfs is built right the first time.
    pub files: &'static [GuestFile],
    /// The code that lays the image out is part of the recipe as well.
    code: &'static [&'static str],
}

/// The development guest image.
pub(super) const GUEST: Recipe = Recipe {
    packages: PACKAGES,
    files: FILES,
    code: &[include_str!("guest/grub.cfg"), CMDLINE, include_str!("rootfs.rs"), include_str!("disk.rs")],
};

/// A server as its owner has it before the product is installed.
pub(super) const FRESH: Recipe = Recipe {
    packages: FRESH_PACKAGES,
    files: FRESH_FILES,
    code: &[FRESH_GRUB, include_str!("rootfs.rs"), include_str!("disk.rs"), include_str!("fresh.rs")],
};

/// What the boot loader of [`FRESH`] does first: find the configuration that the server itself generates.
pub(super) const FRESH_GRUB: &str = include_str!("fresh/grub.cfg");

/// The lab's GPU server.
pub(super) const HOST: Recipe = Recipe {
    packages: HOST_PACKAGES,
    files: HOST_FILES,
    code: &[include_str!("rootfs.rs"), include_str!("host.rs")],
};

const PACKAGES: &[&str] = &[
    "linux-image-cloud-amd64",
    "systemd-sysv",
    "systemd-resolved",
    "udev",
    "dbus",
    "openssh-server",
    "cloud-init",
    // growpart and what it and resizefs call.
    "cloud-guest-utils",
    "fdisk",
    "e2fsprogs",
    "python3",
    "iproute2",
    "netbase",
    "ca-certificates",
    // Decompresses the initramfs when the kernel is updated inside the guest.
    "lz4",
];

/// What the agent needs on a server, and what the scenarios ask it with.
const HOST_PACKAGES: &[&str] = &[
    // Not the cloud kernel: it has neither VFIO nor display drivers.
    "linux-image-amd64",
    "systemd-sysv",
    // Users that exist as long as one of their units runs; every installed Debian has it.
    "libnss-systemd",
    "udev",
    "dbus",
    "kmod",
    "openssh-server",
    "openssh-client",
    "qemu-system-x86",
    "qemu-utils",
    "ovmf",
    "passt",
    "nftables",
    "pciutils",
    "iproute2",
    "procps",
    "strace",
    "python3",
    "curl",
    "netbase",
    "ca-certificates",
    "e2fsprogs",
    "lz4",
];

/// What a server has after the distribution's installer, with its SSH server.
const FRESH_PACKAGES: &[&str] = &[
    "linux-image-amd64",
    "initramfs-tools",
    "grub-efi-amd64-bin",
    "grub2-common",
    "systemd-sysv",
    "systemd-timesyncd",
    "libpam-systemd",
    "udev",
    "dbus",
    "kmod",
    "openssh-server",
    "sudo",
    "curl",
    "ca-certificates",
    "iproute2",
    "procps",
    "pciutils",
    "netbase",
    "e2fsprogs",
    "zstd",
];

/// Kernel command line of both ways to boot. Emulated on a busy machine, the kernel's check of the timer's interrupt comes
/// too early and it panics; in KVM it leaves the check out by itself.
pub(super) const CMDLINE: &str = "root=LABEL=root rw console=ttyS0 quiet no_timer_check";

/// One file of an image that no package brings.
#[derive(Debug)]
pub(super) struct GuestFile {
    /// Where it lies, without the leading slash.
    pub path: &'static str,
    pub mode: u32,
    pub content: &'static str,
}

const FILES: &[GuestFile] = &[
    GuestFile {
        path: "etc/initramfs-tools/conf.d/qudata",
        mode: 0o644,
        content: include_str!("guest/initramfs.conf"),
    },
    GuestFile {
        path: "etc/initramfs-tools/hooks/qudata",
        mode: 0o755,
        content: include_str!("guest/initramfs-hook"),
    },
    GuestFile {
        path: "etc/cloud/cloud.cfg.d/90_qudata.cfg",
        mode: 0o644,
        content: include_str!("guest/cloud.cfg"),
    },
    GuestFile {
        path: "etc/cloud/ds-identify.cfg",
        mode: 0o644,
        content: include_str!("guest/ds-identify.cfg"),
    },
    GuestFile { path: "etc/fstab", mode: 0o644, content: include_str!("guest/fstab") },
    GuestFile {
        path: "etc/ssh/sshd_config.d/10-qudata.conf",
        mode: 0o644,
        content: include_str!("guest/sshd.conf"),
    },
    GuestFile { path: "var/tmp/finish.sh", mode: 0o755, content: include_str!("guest/finish.sh") },
];

const HOST_FILES: &[GuestFile] = &[
    GuestFile {
        path: "etc/initramfs-tools/conf.d/qudata",
        mode: 0o644,
        content: include_str!("guest/initramfs.conf"),
    },
    GuestFile {
        path: "etc/initramfs-tools/hooks/qudata",
        mode: 0o755,
        content: include_str!("guest/initramfs-hook"),
    },
    GuestFile { path: "etc/fstab", mode: 0o644, content: include_str!("host/fstab") },
    GuestFile {
        path: "etc/systemd/network/10-lab.network",
        mode: 0o644,
        content: include_str!("host/lab.network"),
    },
    GuestFile {
        path: "etc/ssh/sshd_config.d/10-lab.conf",
        mode: 0o644,
        content: include_str!("host/sshd.conf"),
    },
    GuestFile { path: "var/tmp/finish.sh", mode: 0o755, content: include_str!("host/finish.sh") },
];

const FRESH_FILES: &[GuestFile] = &[
    GuestFile { path: "etc/default/grub", mode: 0o644, content: include_str!("fresh/default-grub") },
    GuestFile { path: "etc/fstab", mode: 0o644, content: include_str!("host/fstab") },
    GuestFile {
        path: "etc/systemd/network/10-lab.network",
        mode: 0o644,
        content: include_str!("host/lab.network"),
    },
    GuestFile {
        path: "etc/ssh/sshd_config.d/10-lab.conf",
        mode: 0o644,
        content: include_str!("host/sshd.conf"),
    },
    GuestFile { path: "var/tmp/finish.sh", mode: 0o755, content: include_str!("fresh/finish.sh") },
    GuestFile { path: "var/tmp/first-boot.sh", mode: 0o755, content: include_str!("fresh/first-boot.sh") },
];

/// Documentation and translations nobody reads in a rented machine; licences stay.
pub(super) const LEFT_OUT: &[&str] = &[
    "path-exclude=/usr/share/man/*",
    "path-exclude=/usr/share/info/*",
    "path-exclude=/usr/share/doc/*",
    "path-include=/usr/share/doc/*/copyright",
    "path-exclude=/usr/share/locale/*",
    "path-include=/usr/share/locale/locale.alias",
];

/// The boot loader's embedded configuration.
pub(super) fn grub_config() -> String {
    include_str!("guest/grub.cfg").replace("@CMDLINE@", CMDLINE)
}

impl Recipe {
    /// Name of this recipe for one Debian release: the same text gives the same name.
    pub(super) fn hash(&self, release: &str) -> String {
        let mut sha = Sha256::new();
        let mut add = |part: &str| {
            // The length keeps two different lists from hashing alike.
            sha.update(part.len().to_le_bytes());
            sha.update(part.as_bytes());
        };
        add(release);
        for part in self.code.iter().chain(self.packages).chain(LEFT_OUT) {
            add(part);
        }
        for file in self.files {
            add(file.path);
            add(&file.mode.to_string());
            add(file.content);
        }
        sha.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_follows_the_release_and_nothing_random() {
        assert_eq!(GUEST.hash("bookworm"), GUEST.hash("bookworm"));
        assert_ne!(GUEST.hash("bookworm"), GUEST.hash("trixie"));
        assert_ne!(GUEST.hash("bookworm"), HOST.hash("bookworm"));
        assert_eq!(GUEST.hash("bookworm").len(), 16);
    }

    #[test]
    fn no_file_of_an_image_sets_a_password() {
        for file in FILES.iter().chain(HOST_FILES).chain(FRESH_FILES) {
            assert!(!file.content.contains("chpasswd"), "{}", file.path);
        }
    }

    #[test]
    fn the_boot_loader_gets_the_command_line() {
        assert!(grub_config().contains("root=LABEL=root") && !grub_config().contains('@'));
    }
}
