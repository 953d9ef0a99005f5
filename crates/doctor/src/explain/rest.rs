//! Explanations: settings, software, the world, the agent.

use super::Explanation;

const SETTINGS_TOPIC: &str = "Settings";
const SOFTWARE: &str = "Software";
const OUTSIDE: &str = "Outside";
const AGENT_TOPIC: &str = "Agent";

pub(super) const SETTINGS: Explanation = Explanation {
    id: "settings",
    topic: SETTINGS_TOPIC,
    title: "the settings are understood",
    text: "Read like the agent reads them: /etc/qudata/agent.toml (or --config), then variables QUDATA_… of the environment, \
           which win. An unknown key or a value that is not allowed keeps the agent from starting. `qudata-agent settings` \
           lists all keys with what is allowed.\n\n\
           Variables that only the agent's unit has are not seen from a shell.",
};

pub(super) const QEMU_VERSION: Explanation = Explanation {
    id: "qemu.version",
    topic: SOFTWARE,
    title: "QEMU is there and new enough",
    text: "QEMU 6.2 (Ubuntu 22.04) is the oldest that is tried. Debian and Ubuntu have it in qemu-system-x86; qemu-img, which \
           makes disks, is in qemu-utils. Another build can be named with qemu_binary and qemu_img.",
};

pub(super) const OVMF: Explanation = Explanation {
    id: "ovmf",
    topic: SOFTWARE,
    title: "UEFI firmware for guests is there",
    text: "Guests boot by UEFI unless firmware says otherwise: OVMF, in the package ovmf, a code file and a template of the \
           variables that fit each other. ovmf_code and ovmf_vars name other builds; both have to be of one build.",
};

pub(super) const PASST: Explanation = Explanation {
    id: "passt",
    topic: SOFTWARE,
    title: "the network of guests is there",
    text: "passt connects each guest to the network as an ordinary process with a user of its own: no bridge, no root. It is in \
           the package passt of Debian 12 and Ubuntu 24.04 and newer; for Ubuntu 22.04 `qudata-agent install` says where to \
           get it.",
};

pub(super) const NFTABLES: Explanation = Explanation {
    id: "nftables",
    topic: SOFTWARE,
    title: "guests can be kept away from the host's network",
    text: "One table of nftables per agent confines what comes from guests: the public internet and the host's resolvers pass, \
           everything private, local or on the host itself is rejected. Without it the agent does not start. The owner's own \
           rules are not touched, and a firewall that is reloaded loses nothing: the table is put back.",
};

pub(super) const FRPC: Explanation = Explanation {
    id: "frpc",
    topic: SOFTWARE,
    title: "the tunnel client is there",
    text: "frpc publishes the agent's API and the ports of instances through the tunnel server. A host whose ports are reached \
           directly, or that only its owner uses, needs none: tunnel = \"none\", or standalone = true.",
};

pub(super) const IMAGE: Explanation = Explanation {
    id: "image",
    topic: SOFTWARE,
    title: "there is a base image for disks",
    text: "Disks of instances are layers over a base image that nobody writes: base_image, by default a link in image_dir to the \
           current one. `qudata-agent image build` makes one from a cloud image, with the GPU driver in it, and proves what \
           it downloads. An image that depends on other files, is encrypted or was not closed is refused.\n\n\
           Each VM runs as a user of its own, so others must be able to read the image (mode o+r; with firmware = \"direct\" \
           also its .vmlinuz and .initrd, which lie beside the file that a link leads to) and to pass the folders above it \
           (o+x). Folders below /home, /root and /tmp may stay closed where VMs are units of systemd.",
};

pub(super) const TIME_SYNC: Explanation = Explanation {
    id: "time.sync",
    topic: OUTSIDE,
    title: "the clock is right",
    text: "Certificates are checked against the clock, and what happened when is told by it. Whoever keeps it (timesyncd, chrony, \
           ntpd), the kernel knows whether it is kept; that is asked through timedatectl.",
};

pub(super) const DNS: Explanation = Explanation {
    id: "dns",
    topic: OUTSIDE,
    title: "names are found, by the host and by guests",
    text: "The name of the control plane, or of the tunnel server, is looked up. Guests ask the host's IPv4 resolvers, those of \
           /etc/resolv.conf, or the ones behind systemd-resolved; servers on the loopback are of no use to them.",
};

pub(super) const CONTROL_PLANE: Explanation = Explanation {
    id: "control_plane",
    topic: OUTSIDE,
    title: "the service that orders is reached",
    text: "Connects to service_url, checks its certificate against the authorities of the system, and asks /ping without a key: \
           any answer shows that it is reached. Whether the key is right shows when the agent registers: `qudata-agent \
           status`.\n\n\
           The host only calls out; no port has to be opened to it. A host without a control plane is standalone.",
};

pub(super) const FRPS: Explanation = Explanation {
    id: "frps",
    topic: OUTSIDE,
    title: "the tunnel server takes connections",
    text: "A TCP connection to frp_server (by default that of the region) at frp_port. The token is tried by frpc alone: \
           `qudata-agent status` shows whether the tunnel is up. While an agent runs whose tunnel is up, that counts.",
};

pub(super) const AGENT: Explanation = Explanation {
    id: "agent",
    topic: AGENT_TOPIC,
    title: "the agent runs and has no problems",
    text: "Asks the agent over its socket. What it calls a problem is repeated here, each GPU that is quarantined is a failure: \
           it is not rented before it is released. An agent that does not run is a warning, because this command is of use \
           before the installation; one that its unit could not start is a failure. VMs do not need the agent to run on.",
};

pub(super) const SELFTEST: Explanation = Explanation {
    id: "selftest",
    topic: "Self-test",
    title: "a VM with each GPU, looked at from inside",
    text: "Not part of `doctor`: `qudata-agent doctor selftest` orders an instance with each free GPU, waits until it is ready \
           (selftest.create, selftest.ready), logs in with a key made for it, looks for the GPU from inside \
           (selftest.gpu_seen, selftest.nvidia_smi where the image has the tool), deletes the instance (selftest.deleted) \
           and waits until the GPU was reset, checked and is free again (selftest.gpu_back). GPUs that renters have are left \
           alone.",
};
