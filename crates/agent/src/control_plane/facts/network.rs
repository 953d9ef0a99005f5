//! The speed of the interface that leads outside. Part of `facts`.

use std::path::Path;

use super::read_text;

/// Hosts with full routing tables have megabytes of routes; the default one is among the first.
const MOST: u64 = 1 << 20;
/// Faster than any link there is, in Mbit/s.
const FASTEST: u32 = 10_000_000;

/// Mbit/s; none where the host has no default route, or the interface (as virtual ones) knows no speed.
pub(super) fn observe(root: &Path) -> Option<u32> {
    let routes = read_text(&root.join("proc/net/route"), MOST).ok()?;
    let interface = default_interface(&routes)?;
    let speed = read_text(&root.join("sys/class/net").join(interface).join("speed"), 64).ok()?;
    speed.trim().parse().ok().filter(|speed| (1..=FASTEST).contains(speed))
}

/// The interface of the default route with the best metric, by the kernel's table: interface, destination, gateway, flags,
/// reference count, use, metric, mask.
fn default_interface(routes: &str) -> Option<&str> {
    let defaults = routes.lines().skip(1).filter_map(|line| {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let [interface, "00000000", _, _, _, _, metric, "00000000", ..] = fields.as_slice() else {
            return None;
        };
        let name = !interface.is_empty() && !interface.contains('/') && !interface.starts_with('.');
        name.then_some((metric.parse::<u32>().ok()?, *interface))
    });
    defaults.min_by_key(|(metric, _)| *metric).map(|(_, interface)| interface)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HEAD: &str =
        "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n";

    #[test]
    fn the_best_default_route_counts() {
        let routes = format!(
            "{HEAD}docker0\t000011AC\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0\n\
             wlan0\t00000000\t0100A8C0\t0003\t0\t0\t600\t00000000\t0\t0\t0\n\
             eno1\t00000000\t0100A8C0\t0003\t0\t0\t100\t00000000\t0\t0\t0\n"
        );
        assert_eq!(default_interface(&routes), Some("eno1"));
        for none in
            ["", HEAD, "x\n../../etc\t00000000\t0\t3\t0\t0\t0\t00000000\n", "x\neth0\t00000000\t0\t3\n"]
        {
            assert_eq!(default_interface(none), None, "{none}");
        }
    }

    #[test]
    fn an_interface_without_a_speed_has_none() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        assert_eq!(observe(root), None);
        std::fs::create_dir_all(root.join("proc/net")).unwrap();
        std::fs::create_dir_all(root.join("sys/class/net/eth0")).unwrap();
        std::fs::write(
            root.join("proc/net/route"),
            format!("{HEAD}eth0\t00000000\t0\t3\t0\t0\t0\t00000000\n"),
        )
        .unwrap();
        for (speed, expected) in
            [("25000\n", Some(25_000)), ("-1\n", None), ("0", None), ("4294967295", None), ("fast", None)]
        {
            std::fs::write(root.join("sys/class/net/eth0/speed"), speed).unwrap();
            assert_eq!(observe(root), expected, "{speed}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_a_table(text in "[a-z0-9./ \t\n]{0,200}") {
            prop_assert!(default_interface(&text).is_none_or(|name| !name.contains('/') && !name.starts_with('.')));
        }
    }
}
