//! What the guest image consists of: packages, files, layout. Its hash names the place in the cache, so a change here is a new image.
//! Read by `rootfs` and `disk`, hashed by the parent module.
use sha2::{Digest, Sha256};

/// Packages on top of mmdebstrap's minbase.
pub(super) const PACKAGES: &[&str] = &[
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

/// Kernel command line of both ways to boot.
pub(super) const CMDLINE: &str = "root=LABEL=root rw console=ttyS0 quiet";

/// One file of the guest that no package brings.
#[derive(Debug)]
pub(super) struct GuestFile {
    /// Where it lies, without the leading slash.
    pub path: &'static str,
    pub mode: u32,
    pub content: &'static str,
}

/// Placed before the kernel package is installed, so that the initramfs is built right the first time.
pub(super) const FILES: &[GuestFile] = &[
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

/// Name of this recipe for one Debian release: the same text gives the same name.
pub(super) fn hash(release: &str) -> String {
    let mut sha = Sha256::new();
    let mut add = |part: &str| {
        // The length keeps two different lists from hashing alike.
        sha.update(part.len().to_le_bytes());
        sha.update(part.as_bytes());
    };
    // The code that lays the image out is part of the recipe as well.
    for part in [release, &grub_config(), include_str!("rootfs.rs"), include_str!("disk.rs")] {
        add(part);
    }
    for part in PACKAGES.iter().chain(LEFT_OUT) {
        add(part);
    }
    for file in FILES {
        add(file.path);
        add(&file.mode.to_string());
        add(file.content);
    }
    sha.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_follows_the_release_and_nothing_random() {
        assert_eq!(hash("bookworm"), hash("bookworm"));
        assert_ne!(hash("bookworm"), hash("trixie"));
        assert_eq!(hash("bookworm").len(), 16);
    }

    #[test]
    fn no_file_of_the_guest_sets_a_password() {
        for file in FILES {
            assert!(!file.content.contains("chpasswd"), "{}", file.path);
        }
    }

    #[test]
    fn the_boot_loader_gets_the_command_line() {
        assert!(grub_config().contains("root=LABEL=root") && !grub_config().contains('@'));
    }
}
