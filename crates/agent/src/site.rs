//! What all instances of one agent share: settings, paths, store, launcher, egress policy, keys. Built once by `daemon`,
//! read by every instance's task; holds no state that changes.

use std::path::{Path, PathBuf};

use qudata_guest::keys::ManagementKey;
use qudata_host::{launch::Launcher, size::ByteSize};
use qudata_qemu::{
    disk::Owner,
    egress::{Admission, Egress},
    firmware::{self, BootFilesError, Firmware},
    qmp::VersionNumber,
};
use tokio::sync::watch;

use crate::{
    gpus::Gpus,
    instance::record::{InstanceRecord, Leases},
    inventory::{Defaults, Limits},
    pages::Pages,
    paths::{InstancePaths, Paths},
    settings::{FirmwareKind, Settings, TunnelKind},
    store::Store,
};

/// Shared by all instances.
#[derive(Debug)]
pub struct Site {
    /// The owner's settings.
    pub settings: Settings,
    /// Where everything is.
    pub paths: Paths,
    /// What must survive.
    pub store: Store,
    /// Starts processes that outlive the agent.
    pub launcher: Launcher,
    /// The GPUs and where each is in its life.
    pub gpus: Gpus,
    /// Reserved huge pages that starting VMs were promised.
    pub pages: Pages,
    /// Keeps guests away from the host and its network.
    pub egress: Egress,
    /// Logs in to guests.
    pub management_key: ManagementKey,
    /// Groups QEMU needs beside its own, for example `kvm`.
    pub vm_groups: Vec<u32>,
    /// Which QEMU it is, where it tells.
    pub qemu_version: Option<VersionNumber>,
    /// The agent's own program, for what it starts of itself.
    pub program: PathBuf,
    /// This boot of the host.
    pub boot_id: String,
    /// Told whenever an instance changes or is gone.
    pub changes: watch::Sender<()>,
}

/// The two users of an instance's processes.
#[derive(Debug, Clone, Copy)]
pub struct Users {
    /// Runs QEMU.
    pub qemu: Owner,
    /// Runs passt.
    pub passt: Owner,
}

impl Site {
    /// The paths of an instance.
    pub fn instance(&self, record: &InstanceRecord) -> InstancePaths {
        self.paths.instance(record.id, record.incarnation)
    }

    /// The users of the processes of an instance with these leases. Two per slot, so that neither process can touch the
    /// other or those of another instance.
    pub fn users(&self, leases: &Leases) -> Users {
        let qemu = self.settings.vm_uid_base.saturating_add(leases.slot.saturating_mul(2));
        let owner = |id| Owner { uid: id, gid: id };
        Users { qemu: owner(qemu), passt: owner(qemu.saturating_add(1)) }
    }

    /// What the egress policy knows of an instance.
    pub fn admission(&self, leases: &Leases) -> Admission {
        Admission {
            uid: self.users(leases).passt.uid,
            ports: leases.ports.values().copied().collect(),
            management: leases.management_port,
        }
    }

    /// The image that the instance's disk lies over.
    pub fn base<'a>(&'a self, record: &'a InstanceRecord) -> &'a Path {
        record.base.as_deref().unwrap_or(&self.settings.base_image)
    }

    /// How an instance's machine starts here.
    ///
    /// # Errors
    /// When direct boot is wanted and the image has no boot files.
    pub fn firmware(
        &self,
        instance: &InstancePaths,
        record: &InstanceRecord,
    ) -> Result<Firmware, BootFilesError> {
        match self.settings.firmware {
            FirmwareKind::Bios => Ok(Firmware::Bios),
            FirmwareKind::Direct => firmware::find_boot_files(self.base(record)),
            FirmwareKind::Uefi => {
                Ok(Firmware::Uefi { code: self.settings.ovmf_code.clone(), vars: instance.variables() })
            }
        }
    }

    /// Name or address at which the instances' public TCP ports are.
    pub fn public_host(&self) -> String {
        match self.settings.tunnel {
            TunnelKind::Frp => self.settings.frp_server(),
            TunnelKind::None => self.local_host(),
        }
    }

    /// Address at which the instances' ports are on this host.
    pub fn local_host(&self) -> String {
        match self.settings.listen {
            // Bound everywhere: from the host itself, this is where it is.
            any if any.is_unspecified() => "127.0.0.1".to_owned(),
            address => address.to_string(),
        }
    }

    /// Where the tunnel client is started from. Part of the name of its unit, which two agents of one host must not share.
    pub fn tunnel_dir(&self) -> std::path::PathBuf {
        let name = match self.egress.table() {
            "qudata" => "tunnel".to_owned(),
            other => format!("tunnel-{other}"),
        };
        self.paths.run().join(name)
    }

    /// What the owner allows.
    pub fn limits(&self) -> Limits {
        let s = &self.settings;
        Limits {
            ssh_ports: s.ssh_ports.first..=s.ssh_ports.last,
            app_ports: s.app_ports.first..=s.app_ports.last,
            management_ports: s.management_ports.first..=s.management_ports.last,
            tunneled: s.tunnel == TunnelKind::Frp,
            cpu_overcommit: s.cpu_overcommit,
            reserve_memory: s.host_reserve_memory,
            reserve_disk: s.host_reserve_disk,
            defaults: Defaults {
                cpus: s.vm_cpus,
                memory: s.vm_memory,
                storage: ByteSize::from_gib(s.vm_storage_gb),
            },
        }
    }

    /// A text for callers of the API: the host's own directories are named by their role.
    pub fn without_paths(&self, text: &str) -> String {
        let roots = [
            (&self.settings.image_dir, "<images>"),
            (&self.settings.data_dir, "<data>"),
            (&self.settings.vm_run_dir, "<run>"),
        ];
        let mut text = text.to_owned();
        for (root, name) in roots {
            text = text.replace(&*root.to_string_lossy(), name);
        }
        text
    }
}
