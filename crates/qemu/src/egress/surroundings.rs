//! What the policy must know of the host's own network: whom guests may ask for names, and which networks are the owner's
//! although their addresses are public ones. Called by the agent at start and by its guard.

use std::collections::BTreeSet;
use std::io;
use std::net::Ipv4Addr;
use std::path::Path;

use super::Cidr;
use super::resolver::resolvers;

/// Routes of the main table, as the kernel tells them (proc_net(5), `route`).
const ROUTES: &str = "proc/self/net/route";
/// `RTF_UP`, `RTF_GATEWAY`, `RTF_REJECT` (`linux/route.h`).
const UP: u32 = 1;
const GATEWAY: u32 = 2;
const REJECT: u32 = 0x200;
/// A network as large as this is no place that a host is attached to, but a way to the internet (a VPN's halves of it).
const LARGEST: u8 = 8;

/// The network around a host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Surroundings {
    /// The host's resolvers, in order.
    pub resolvers: Vec<Ipv4Addr>,
    /// Networks that the host reaches without a router.
    pub attached: BTreeSet<Cidr>,
}

impl Surroundings {
    /// Of the host whose root directory is `root`.
    ///
    /// # Errors
    /// When `etc/resolv.conf` exists and cannot be read, or the kernel does not tell its routes.
    pub fn look(root: &Path) -> io::Result<Self> {
        let routes = std::fs::read_to_string(root.join(ROUTES))?;
        Ok(Self { resolvers: resolvers(root)?, attached: attached(&routes) })
    }

    /// Takes over what has changed since and says whether anything has. A network that the host has left stays forbidden:
    /// a cable that was out for a moment must not open it.
    pub fn follow(&mut self, now: Self) -> bool {
        let before = (self.attached.len(), now.resolvers != self.resolvers);
        self.resolvers = now.resolvers;
        self.attached.extend(now.attached);
        before != (self.attached.len(), false)
    }
}

fn attached(routes: &str) -> BTreeSet<Cidr> {
    routes.lines().skip(1).filter_map(network).collect()
}

/// Interface, destination, gateway, flags, three counters, mask: hexadecimal, addresses in the order of this machine.
fn network(line: &str) -> Option<Cidr> {
    let fields: Vec<&str> = line.split_ascii_whitespace().collect();
    let number = |place: usize| u32::from_str_radix(fields.get(place)?, 16).ok();
    let (destination, flags, mask) = (number(1)?, number(3)?, u32::from_be(number(7)?));
    let direct = flags & UP != 0 && flags & (GATEWAY | REJECT) == 0;
    let prefix = u8::try_from(mask.leading_ones()).ok()?;
    (direct && prefix >= LARGEST).then(|| Cidr::new(destination.to_ne_bytes(), prefix))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(networks: &[&str]) -> BTreeSet<Cidr> {
        networks.iter().map(|network| network.parse().unwrap()).collect()
    }

    /// As on the machines that these tests are for.
    #[cfg(target_endian = "little")]
    #[test]
    fn networks_without_a_router_are_attached() {
        let routes = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n\
            eth0\t00000000\t010200C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n\
            eth0\t000200C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n\
            eth1\t006433C6\t010200C0\t0003\t0\t0\t0\t00FFFFFF\t0\t0\t0\n\
            eth1\t017100CB\t00000000\t0005\t0\t0\t0\tFFFFFFFF\t0\t0\t0\n\
            wg0\t00000080\t00000000\t0001\t0\t0\t0\t00000080\t0\t0\t0\n\
            ppp0\t00000000\t00000000\t0001\t0\t0\t0\t00000000\t0\t0\t0\n\
            *\t00002D0A\t00000000\t0200\t0\t0\t0\t0000FFFF\t0\t0\t0\n\
            eth2\tshort\n";
        assert_eq!(attached(routes), set(&["192.0.2.0/24", "203.0.113.1/32"]));
    }

    #[test]
    fn what_was_attached_once_stays_and_resolvers_change() {
        let of = |resolver: [u8; 4], networks: &[&str]| Surroundings {
            resolvers: vec![resolver.into()],
            attached: set(networks),
        };
        let mut known = of([192, 0, 2, 1], &["192.0.2.0/24"]);
        assert!(!known.clone().follow(known.clone()));
        assert!(!known.follow(of([192, 0, 2, 1], &[])), "left, and not forgotten");
        assert!(known.follow(of([192, 0, 2, 1], &["203.0.113.0/24"])));
        assert!(known.follow(of([192, 0, 2, 9], &[])));
        assert_eq!(known, of([192, 0, 2, 9], &["192.0.2.0/24", "203.0.113.0/24"]));
    }

    #[test]
    fn this_host_tells_its_routes() {
        Surroundings::look(Path::new("/")).unwrap();
    }
}
