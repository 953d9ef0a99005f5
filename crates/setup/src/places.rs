//! Where everything is on the host. Owns every path that an installation writes.

/// Folder of what an installation remembers.
pub const STATE: &str = "/var/lib/qudata/setup";
/// Everything that was changed.
pub const MANIFEST: &str = "/var/lib/qudata/setup/manifest.json";
/// Files as they were.
pub const BACKUP: &str = "/var/lib/qudata/setup/backup";
/// The options.
pub const WISH: &str = "/var/lib/qudata/setup/wish.json";
/// How far it got.
pub const PROGRESS: &str = "/var/lib/qudata/setup/progress.json";
/// What the host was like at the beginning.
pub const BEFORE: &str = "/var/lib/qudata/setup/before.json";
/// The program itself while a removal takes its package away, for the case that it is cut off there.
pub const PROGRAM: &str = "/var/lib/qudata/setup/qudata-agent";
/// Where the program is once the package is installed.
pub const INSTALLED: &str = "/usr/bin/qudata-agent";
/// Held while an installation or removal runs.
pub const LOCK: &str = "/var/lib/qudata/setup/lock";
/// Logs of the agent and of installations.
pub const LOGS: &str = "/var/log/qudata";
/// What happened, for people.
pub const LOG: &str = "/var/log/qudata/install.log";
/// The agent's settings.
pub const SETTINGS: &str = "/etc/qudata/agent.toml";
/// What they are made from.
pub const TEMPLATE: &str = "/usr/share/qudata/agent.toml";
/// The owner's key.
pub const API_KEY: &str = "/etc/qudata/api_key";
/// Gives it to the agent.
pub const KEY_DROP_IN: &str = "/etc/systemd/system/qudata-agent.service.d/50-api-key.conf";
/// Folder for the self-test's.
pub const SELFTEST_DIR: &str = "/run/systemd/system/qudata-agent.service.d";
/// Takes the control plane away for a self-test.
pub const SELFTEST_DROP_IN: &str = "/run/systemd/system/qudata-agent.service.d/selftest.conf";
/// The agent's unit.
pub const AGENT_UNIT: &str = "qudata-agent.service";
/// The unit that goes on after a reboot.
pub const CONTINUE_UNIT: &str = "qudata-install.service";
/// Its file.
pub const CONTINUE_FILE: &str = "/etc/systemd/system/qudata-install.service";
/// Kernel parameters for GRUB.
pub const GRUB_DROP_IN: &str = "/etc/default/grub.d/90-qudata.cfg";
/// GRUB's settings.
pub const GRUB_DEFAULT: &str = "/etc/default/grub";
/// Drop-ins of them.
pub const GRUB_DROP_INS: &str = "/etc/default/grub.d";
/// What GRUB reads.
pub const GRUB_CFG: &str = "/boot/grub/grub.cfg";
/// Kernel parameters for systemd-boot.
pub const KERNEL_CMDLINE: &str = "/etc/kernel/cmdline";
/// Keeps nouveau off GPUs, by address.
pub const UDEV_RULE: &str = "/etc/udev/rules.d/70-qudata.rules";
/// The tunnel client of the package.
pub const FRPC: &str = "/usr/lib/qudata/frpc";
/// Where the agent looks for it by itself.
pub const FRPC_DEFAULT: &str = "/usr/local/bin/frpc";
/// Files of groups, with the copies that their tools keep.
pub const GROUP_FILES: [&str; 4] = ["/etc/group", "/etc/gshadow", "/etc/group-", "/etc/gshadow-"];
/// Where systemd-boot's entries may be.
pub const ENTRIES: [&str; 4] =
    ["/boot/efi/loader/entries", "/efi/loader/entries", "/boot/loader/entries", "/boot/EFI/loader/entries"];
/// Name of the package and of the group.
pub const PACKAGE: &str = "qudata-agent";
/// Group of those who may talk to the agent.
pub const GROUP: &str = "qudata";

/// The unit that goes on after a reboot. It is wanted by a target that it comes after, so that no boot waits for it.
pub const CONTINUE_TEXT: &str = "\
# Written by `qudata-agent install`, which goes on after a reboot; gone when the installation is done.
[Unit]
Description=Continues the installation of the Qudata agent
Wants=network-online.target
After=network-online.target multi-user.target
ConditionPathExists=/var/lib/qudata/setup/wish.json

[Service]
Type=oneshot
# KVM's module is loaded by udev, and on a busy host later than this starts.
ExecStartPre=-/usr/bin/udevadm settle --timeout=120
ExecStart=/usr/bin/qudata-agent install --continue
TimeoutStartSec=infinity
StandardInput=null

[Install]
WantedBy=multi-user.target
";

/// The drop-in with the key's place; the key is in no unit.
pub const KEY_TEXT: &str = "\
# Written by `qudata-agent install`: the API key reaches the agent as a credential of systemd.
[Service]
LoadCredential=api_key:/etc/qudata/api_key
";

/// The drop-in of a self-test: the same unit, and nobody outside can order anything meanwhile.
pub const SELFTEST_TEXT: &str = "\
# Written by `qudata-agent install` for its self-test; gone when that is over.
[Service]
Environment=QUDATA_STANDALONE=true QUDATA_TUNNEL=none
";
