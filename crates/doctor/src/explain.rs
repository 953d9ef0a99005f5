//! The list of all checks: their ids, in the order of a report, and what there is to know about each. Used by the report
//! for its order and by `doctor --explain`.

mod host;
mod isolation;
mod rest;

/// One check, explained.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Explanation {
    /// Stable id.
    pub id: &'static str,
    /// Heading that the check stands under in a report.
    pub topic: &'static str,
    /// What is checked, in a few words.
    pub title: &'static str,
    /// Why it matters, how it is checked, what to do; paragraphs with an empty line between them.
    pub text: &'static str,
}

/// All checks, in the order of a report: what others lean on comes first.
pub static ALL: [Explanation; 40] = [
    rest::SETTINGS,
    host::CPU_VIRTUALIZATION,
    host::KVM_DEVICE,
    host::KVM_RUNS_GUESTS,
    isolation::IOMMU_ENABLED,
    isolation::INTERRUPT_REMAPPING,
    isolation::UNSAFE_INTERRUPTS,
    isolation::ACS_OVERRIDE,
    isolation::GPU_PRESENT,
    isolation::GPU_DISPLAY,
    isolation::GPU_POWER,
    isolation::GPU_GROUP,
    isolation::GPU_DRIVER,
    isolation::GPU_HOLDERS,
    isolation::GPU_RESET,
    isolation::GPU_BARS,
    isolation::GPU_LINK,
    isolation::QEMU_LARGE_BARS,
    host::KERNEL_VERSION,
    host::SECURE_BOOT,
    host::CGROUP,
    host::SYSTEMD_VERSION,
    host::SYSTEMD_HARDENING,
    host::NSS_SYSTEMD,
    host::MEMLOCK,
    host::MEMORY,
    host::HUGEPAGES,
    host::DISK,
    rest::QEMU_VERSION,
    rest::OVMF,
    rest::PASST,
    rest::NFTABLES,
    rest::FRPC,
    rest::IMAGE,
    rest::TIME_SYNC,
    rest::DNS,
    rest::CONTROL_PLANE,
    rest::FRPS,
    rest::AGENT,
    rest::SELFTEST,
];

/// The explanation of a check; none where there is no such check.
#[must_use]
pub fn explain(id: &str) -> Option<&'static Explanation> {
    ALL.iter().find(|check| check.id == id)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn each_check_is_explained_once_and_topics_are_not_scattered() {
        let ids: BTreeSet<_> = ALL.iter().map(|check| check.id).collect();
        assert_eq!(ids.len(), ALL.len());
        let mut topics: Vec<_> = ALL.iter().map(|check| check.topic).collect();
        topics.dedup();
        assert_eq!(topics.len(), topics.iter().collect::<BTreeSet<_>>().len(), "{topics:?}");
        for check in &ALL {
            let plain = |c: char| c.is_ascii_lowercase() || ".-_".contains(c);
            assert!(check.id.chars().all(plain), "{}", check.id);
            assert!(check.text.len() > 100 && check.text.ends_with('.'), "{}", check.id);
            assert!(!check.title.ends_with('.'), "{}", check.title);
            assert_eq!(explain(check.id), Some(check));
        }
        assert_eq!(explain("gpu"), None);
    }
}
