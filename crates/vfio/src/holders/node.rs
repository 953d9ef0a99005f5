//! Device nodes through which a GPU is held, told by the path of an open file. Pure; called by `observe`.

use std::path::PathBuf;

/// A device node that belongs to a GPU, or may.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Node {
    /// `/dev/nvidiaN`.
    Nvidia(u32),
    /// `/dev/dri/cardN` or `/dev/dri/renderDN`, by name.
    Dri(String),
    /// `/dev/fbN`.
    Framebuffer(u32),
    /// Anything of sound card N, with its name: `/dev/snd/pcmC1D3p`.
    Sound(u32, String),
    /// `/dev/vfio/N`: an IOMMU group.
    VfioGroup(u32),
    /// `/dev/vfio/devices/vfioN`, by name.
    VfioDevice(String),
    /// A device opened through VFIO; which one its name does not tell.
    VfioUnnamed,
}

impl Node {
    /// Understands the path behind a descriptor in `/proc/PID/fd`. In a container the node may be mounted elsewhere, but
    /// below a `dev` or at the root.
    pub(super) fn parse(path: &str) -> Option<Self> {
        let path = path.strip_suffix(" (deleted)").unwrap_or(path);
        if path.starts_with("anon_inode:") {
            return path.contains("vfio-device").then_some(Self::VfioUnnamed);
        }
        let name = path.rsplit_once("/dev/").map(|(_, name)| name).or_else(|| path.strip_prefix('/'))?;
        let numbered = |name: &str, prefix: &str| number(name.strip_prefix(prefix)?);
        match name.split_once('/') {
            None => numbered(name, "nvidia")
                .map(Self::Nvidia)
                .or_else(|| numbered(name, "fb").map(Self::Framebuffer)),
            Some(("dri", name)) => numbered(name, "card")
                .or_else(|| numbered(name, "renderD"))
                .map(|_| Self::Dri(name.to_owned())),
            Some(("snd", name)) => sound_card(name).map(|card| Self::Sound(card, name.to_owned())),
            Some(("vfio", name)) => match name.strip_prefix("devices/") {
                Some(name) => numbered(name, "vfio").map(|_| Self::VfioDevice(name.to_owned())),
                None => number(name).map(Self::VfioGroup),
            },
            Some(_) => None,
        }
    }

    /// Its usual path.
    pub(super) fn path(&self) -> PathBuf {
        match self {
            Self::Nvidia(minor) => format!("/dev/nvidia{minor}"),
            Self::Dri(name) => format!("/dev/dri/{name}"),
            Self::Framebuffer(number) => format!("/dev/fb{number}"),
            Self::Sound(_, name) => format!("/dev/snd/{name}"),
            Self::VfioGroup(group) => format!("/dev/vfio/{group}"),
            Self::VfioDevice(name) => format!("/dev/vfio/devices/{name}"),
            Self::VfioUnnamed => "/dev/vfio".to_owned(),
        }
        .into()
    }
}

fn number(text: &str) -> Option<u32> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok())?
}

/// The card of `controlC0`, `pcmC0D3p`, `hwC0D0`.
fn sound_card(name: &str) -> Option<u32> {
    let (_, rest) = name.split_once('C')?;
    let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
    number(rest.get(..digits)?)
}

/// The systemd unit that a `/proc/PID/cgroup` names: the outermost, which is the one that the system's systemd can stop.
pub(super) fn unit(cgroup: &str) -> Option<String> {
    let of_line = |wanted: &str| {
        cgroup.lines().find_map(|line| {
            let (_, rest) = line.split_once(':')?;
            let (controllers, path) = rest.split_once(':')?;
            (controllers == wanted).then_some(path)
        })
    };
    // Version 2, where the line has content; else systemd's own hierarchy of version 1.
    let candidates = [of_line(""), of_line("name=systemd")];
    let unit = candidates.into_iter().flatten().find_map(|path| {
        path.split('/').find(|part| part.ends_with(".service") || part.ends_with(".scope"))
    })?;
    Some(tidy(unit))
}

/// Nothing that a process chose reaches a terminal that it could steer.
pub(super) fn tidy(text: &str) -> String {
    text.trim().chars().filter(|c| !c.is_control()).take(256).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn nodes_by_their_paths() {
        for (path, expected) in [
            ("/dev/nvidia0", Some(Node::Nvidia(0))),
            ("/dev/nvidia12 (deleted)", Some(Node::Nvidia(12))),
            ("/nvidia3", Some(Node::Nvidia(3))),
            ("/var/lib/machines/a/dev/nvidia1", Some(Node::Nvidia(1))),
            ("/dev/dri/card1", Some(Node::Dri("card1".into()))),
            ("/dev/dri/renderD128", Some(Node::Dri("renderD128".into()))),
            ("/dev/fb0", Some(Node::Framebuffer(0))),
            ("/dev/snd/controlC0", Some(Node::Sound(0, "controlC0".into()))),
            ("/dev/snd/pcmC12D3p", Some(Node::Sound(12, "pcmC12D3p".into()))),
            ("/dev/vfio/27", Some(Node::VfioGroup(27))),
            ("/dev/vfio/devices/vfio3", Some(Node::VfioDevice("vfio3".into()))),
            ("anon_inode:[vfio-device]", Some(Node::VfioUnnamed)),
            ("anon_inode:kvm-vfio", None),
            ("/dev/vfio/vfio", None),
            ("/dev/nvidiactl", None),
            ("/dev/nvidia-uvm", None),
            ("/dev/nvidia", None),
            ("/dev/nvidia-caps/nvidia-cap1", None),
            ("/dev/dri/by-path/pci-0000:01:00.0-card", None),
            ("/dev/snd/timer", None),
            ("/home/nvidia0", None),
            ("/home/vfio/27", None),
            ("socket:[12345]", None),
            ("", None),
        ] {
            let node = Node::parse(path);
            assert_eq!(node, expected, "{path}");
        }
    }

    #[test]
    fn units_of_both_versions_of_cgroups() {
        for (cgroup, expected) in [
            ("0::/system.slice/nvidia-persistenced.service\n", Some("nvidia-persistenced.service")),
            ("0::/user.slice/user-0.slice/user@0.service/app.slice/x.service\n", Some("user@0.service")),
            ("0::/system.slice/docker-abc.scope/sub\n", Some("docker-abc.scope")),
            ("12:cpu:/system.slice/a.service\n1:name=systemd:/system.slice/b.service\n", Some("b.service")),
            ("1:name=systemd:/system.slice/b.service\n0::/\n", Some("b.service")),
            ("0::/\n", None),
            ("garbage", None),
            ("", None),
        ] {
            assert_eq!(unit(cgroup).as_deref(), expected, "{cgroup}");
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_a_parser_panic(
            text in "\\PC{0,40}", path in "(/dev)?/(nvidia|dri/card|snd/pcmC|vfio/|vfio/devices/vfio|fb)[0-9a-zC/é]{0,12}"
        ) {
            let _ = (Node::parse(&text), unit(&text), unit(&path));
            if let Some(node) = Node::parse(&path) {
                let usual = node.path();
                prop_assert_eq!(Node::parse(usual.to_str().unwrap()), Some(node));
            }
        }
    }
}
