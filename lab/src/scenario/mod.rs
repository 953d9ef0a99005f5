//! The table of scenarios. Called by `run`.
//!
//! A scenario starts the agent with the settings it needs, takes a baseline, tells a story, and ends with the same server
//! it was given: the leak check is its last step.
mod agent_life;
mod binding;
mod boot;
mod fault;
mod gpu;
mod hostile;
mod install;
mod pinning;
mod plain;
mod reset;
mod strike;
mod tunnel;
mod units;

use anyhow::Result;

use crate::machine::Machine;
use crate::shape::L1;

/// One story.
#[derive(Debug)]
pub(crate) struct Scenario {
    /// Its name on the command line.
    pub(crate) name: &'static str,
    /// What it proves, in a line.
    pub(crate) about: &'static str,
    /// Left out, with a line, by `--brief`: long, or told by another scenario as well.
    pub(crate) long: bool,
    /// The server it needs.
    pub(crate) shape: fn() -> L1,
    /// The story; an error fails it.
    pub(crate) run: fn(&mut Machine) -> Result<()>,
}

/// All of them; neighbours that need the same server share it.
pub(crate) const ALL: &[Scenario] = &[
    Scenario {
        name: "boot",
        about: "the server is what its description says: IOMMU groups, drivers, KVM, systemd",
        long: false,
        shape: L1::gpus,
        run: boot::groups,
    },
    Scenario {
        name: "systemd",
        about: "units as the agent starts them: confined, found again whenever the agent is killed, asked to end",
        long: false,
        shape: L1::gpus,
        run: units::run,
    },
    Scenario {
        name: "plain",
        about: "an instance without GPUs, as a renter gets it: create, ready, log in, delete",
        long: true,
        shape: L1::gpus,
        run: plain::run,
    },
    Scenario {
        name: "agent_killed",
        about: "SIGKILL of the agent under a running VM: the next one adopts it, the guest notices nothing",
        long: true,
        shape: L1::gpus,
        run: agent_life::killed,
    },
    Scenario {
        name: "upgrade",
        about: "another binary and a restart under a running VM: adopted, the guest notices nothing",
        long: false,
        shape: L1::gpus,
        run: agent_life::upgraded,
    },
    Scenario {
        name: "hostile_guest",
        about: "a guest reaches the internet, and neither the server, its network nor other instances",
        long: false,
        shape: L1::gpus,
        run: hostile::run,
    },
    Scenario {
        name: "tunnel",
        about: "frpc as a confined unit, on a registered host whose control plane is down; it outlives the agent",
        long: true,
        shape: L1::gpus,
        run: tunnel::run,
    },
    Scenario {
        name: "reset_running",
        about: "the server loses power under a running VM: its disk is intact",
        long: true,
        shape: L1::gpus,
        run: reset::while_running,
    },
    Scenario {
        name: "reset_creating",
        about: "the server loses power while an instance is made",
        long: true,
        shape: L1::gpus,
        run: reset::while_creating,
    },
    Scenario {
        name: "reset_deleting",
        about: "the server loses power while an instance is deleted: the next agent finishes it",
        long: true,
        shape: L1::gpus,
        run: reset::while_deleting,
    },
    Scenario {
        name: "gpu_one",
        about: "a GPU is given and taken back: the guest sees its class, the host's driver returns",
        long: false,
        shape: L1::gpus,
        run: gpu::one,
    },
    Scenario {
        name: "gpu_two_tenants",
        about: "two instances with a GPU each, at once; a third is refused",
        long: false,
        shape: L1::gpus,
        run: gpu::two_tenants,
    },
    Scenario {
        name: "gpu_both",
        about: "both GPUs in one instance",
        long: true,
        shape: L1::gpus,
        run: gpu::both,
    },
    Scenario {
        name: "gpu_two_functions",
        about: "a GPU of two functions travels whole",
        long: false,
        shape: L1::gpus,
        run: gpu::two_functions,
    },
    Scenario {
        name: "gpu_foreign_device",
        about: "a foreign device in the group: refused with the reason, nothing touched",
        long: false,
        shape: L1::gpus,
        run: gpu::foreign_device,
    },
    Scenario {
        name: "gpu_qemu_killed",
        about: "SIGKILL of QEMU: the GPU is cleaned and returns",
        long: false,
        shape: L1::gpus,
        run: gpu::qemu_killed,
    },
    Scenario {
        name: "gpu_off_the_bus",
        about: "a GPU lost during a tenancy: quarantined, given to nobody before a reboot and a check",
        long: true,
        shape: L1::gpus,
        run: fault::off_the_bus,
    },
    Scenario {
        name: "gpu_agent_killed",
        about: "SIGKILL of the agent at many moments of create and delete with a GPU",
        long: true,
        shape: L1::gpus,
        run: gpu::agent_killed,
    },
    Scenario {
        name: "gpu_struck_creating",
        about: "SIGKILL of the agent at every step boundary of create with a GPU",
        long: true,
        shape: L1::gpus,
        run: strike::create,
    },
    Scenario {
        name: "gpu_struck_deleting",
        about: "SIGKILL of the agent at every step boundary of delete with a GPU",
        long: true,
        shape: L1::gpus,
        run: strike::delete,
    },
    Scenario {
        name: "gpu_binding",
        about: "what it takes to bring a GPU to vfio-pci, beside the bare writes",
        long: true,
        shape: L1::gpus,
        run: binding::run,
    },
    Scenario {
        name: "gpu_pinning",
        about: "what VFIO takes to pin the RAM: huge pages against cold pages of 4 KiB",
        long: true,
        shape: L1::gpus,
        run: pinning::run,
    },
    Scenario {
        name: "gpu_reset_running",
        about: "the server loses power under a VM with a GPU",
        long: true,
        shape: L1::gpus,
        run: reset::while_running_with_gpu,
    },
    Scenario {
        name: "gpu_reboot",
        about: "the owner restarts the server under a VM with a GPU: its guest is shut down in good order, and comes back",
        long: true,
        shape: L1::gpus,
        run: reset::restarted_by_its_owner,
    },
    Scenario {
        name: "gpu_reset_creating",
        about: "the server loses power while an instance with a GPU is made",
        long: true,
        shape: L1::gpus,
        run: reset::while_creating_with_gpu,
    },
    Scenario {
        name: "gpu_reset_deleting",
        about: "the server loses power while an instance with a GPU is deleted",
        long: true,
        shape: L1::gpus,
        run: reset::while_deleting_with_gpu,
    },
    Scenario {
        name: "gpu_cycles",
        about: "a hundred tenancies of one GPU: nothing grows",
        long: true,
        shape: L1::gpus,
        run: gpu::cycles,
    },
    Scenario {
        name: "gpu_no_remapping",
        about: "no interrupt remapping: refused with the reason, nothing touched",
        long: false,
        shape: L1::without_interrupt_remapping,
        run: gpu::no_remapping,
    },
    Scenario {
        name: "gpu_hung_unbind",
        about: "a driver that does not let go: quarantine; the API and the other GPU go on",
        long: true,
        shape: L1::hanging,
        run: fault::hung_unbind,
    },
    Scenario {
        name: "two_nodes",
        about: "a server of two sockets: each GPU on its NUMA node",
        long: true,
        shape: L1::two_nodes,
        run: boot::nodes,
    },
    Scenario {
        name: "install_fresh",
        about: "one line on a fresh server whose IOMMU is off: it restarts, continues, tests itself, rents; and back",
        long: true,
        shape: L1::fresh,
        run: install::fresh,
    },
    Scenario {
        name: "install_from_a_folder",
        about: "without a network or a control plane, as the README says: install, doctor, self-test, and back with the data kept",
        long: true,
        shape: L1::fresh,
        run: install::from_a_folder,
    },
    Scenario {
        name: "install_power_cuts",
        about: "the power fails in every step of the installation; the same line finishes it",
        long: true,
        shape: L1::fresh,
        run: install::power_cuts,
    },
    Scenario {
        name: "install_owners_own",
        about: "an owner's own boot parameters and VFIO settings are kept",
        long: true,
        shape: L1::fresh,
        run: install::owners_own,
    },
    Scenario {
        name: "install_refusals",
        about: "a damaged release, a wrong key, a full disk: each its own sentence, nothing half-done",
        long: true,
        shape: L1::fresh,
        run: install::refusals,
    },
    Scenario {
        name: "install_upgrade",
        about: "a new package under a running instance",
        long: true,
        shape: L1::fresh,
        run: install::upgrade,
    },
    Scenario {
        name: "install_no_gpu",
        about: "a server without a GPU is refused",
        long: true,
        shape: L1::fresh_without_gpu,
        run: install::no_gpu,
    },
    Scenario {
        name: "install_no_iommu",
        about: "a server whose firmware has the IOMMU off is refused",
        long: true,
        shape: L1::fresh_without_iommu,
        run: install::no_iommu,
    },
    Scenario {
        name: "install_shared_group",
        about: "a server whose GPU shares its group is refused",
        long: true,
        shape: L1::fresh_shared_group,
        run: install::shared_group,
    },
];
