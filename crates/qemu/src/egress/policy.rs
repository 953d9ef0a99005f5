//! The policy as nft scripts. Pure; each script is one transaction, may be repeated, and knows no names but the table's.

use std::fmt::Display;

use super::{Admission, Cidr, Surroundings, TableName};
use crate::passt::DNS;

/// Networks that are somebody's inside: the host, its LAN, the provider's. Loopback and multicast are here as well as
/// in the kernel's own classification, so that neither alone decides.
const FORBIDDEN: [Cidr; 13] = [
    Cidr::new([0, 0, 0, 0], 8),
    Cidr::new([10, 0, 0, 0], 8),
    Cidr::new([100, 64, 0, 0], 10),
    Cidr::new([127, 0, 0, 0], 8),
    // Azure's word to its machines about themselves, the one such address that looks public.
    Cidr::new([168, 63, 129, 16], 32),
    Cidr::new([169, 254, 0, 0], 16),
    Cidr::new([172, 16, 0, 0], 12),
    Cidr::new([192, 0, 0, 0], 24),
    Cidr::new([192, 88, 99, 0], 24),
    Cidr::new([192, 168, 0, 0], 16),
    Cidr::new([198, 18, 0, 0], 15),
    Cidr::new([224, 0, 0, 0], 4),
    Cidr::new([240, 0, 0, 0], 4),
];

/// Sets that hold machines: kept by `install`.
const MACHINE_SETS: [&str; 3] =
    ["guests { typeof meta skuid; }", "gated { type inet_service; }", "management { type inet_service; }"];
/// Sets that hold the policy: rewritten by `install`.
const POLICY_SETS: [&str; 4] = ["resolvers", "allowed", "forbidden", "attached"];
const CHAINS: [&str; 5] = [
    // Before the filter (-100), so that the filter judges where the question really goes.
    "resolve { type nat hook output priority -100; policy accept; }",
    "refuse",
    "guest",
    "output { type filter hook output priority filter; policy accept; }",
    "input { type filter hook input priority filter; policy accept; }",
];

/// The rules that confine, by chain and in order.
pub(super) const RULES: &[(&str, &str)] = &[
    // A reset at once, so that the guest's program fails instead of waiting.
    ("refuse", "meta l4proto tcp reject with tcp reset"),
    ("refuse", "reject with icmpx admin-prohibited"),
    // Answers to those who connected to the guest's ports, and nothing else: where the guest itself has connected to is
    // judged with each packet, for it may have been while the policy was missing. "related" is ICMP only: a
    // connection-tracking assistant must not open a way into the LAN.
    ("guest", "ct state established ct direction reply accept"),
    ("guest", "ct state related meta l4proto icmp accept"),
    ("guest", "meta nfproto ipv6 goto refuse"),
    ("guest", "ip daddr @resolvers meta l4proto { tcp, udp } th dport 53 accept"),
    ("guest", "ip daddr @allowed accept"),
    ("guest", "fib daddr type { local, broadcast, anycast, multicast } goto refuse"),
    ("guest", "ip daddr @forbidden goto refuse"),
    ("guest", "ip daddr @attached goto refuse"),
    // Mail straight to its receivers is what spam is; it is the owner's address that would be blocked for it. Submission
    // (465, 587) asks for a password.
    ("guest", "tcp dport 25 goto refuse"),
    ("guest", "accept"),
    ("output", "meta skuid @guests goto guest"),
    ("output", "oif \"lo\" tcp dport @management meta skuid != 0 reject with tcp reset"),
    ("input", "tcp dport @gated ct state new reject with tcp reset"),
];

pub(super) fn plan_install(table: &TableName, allow: &[Cidr], around: &Surroundings) -> String {
    let Surroundings { resolvers, attached } = around;
    let mut script = Script::of(table);
    script.say(&format!("add table inet {}", table.0));
    for set in MACHINE_SETS {
        script.add("set", set);
    }
    for set in POLICY_SETS {
        script.add("set", &format!("{set} {{ type ipv4_addr; flags interval; auto-merge; }}"));
    }
    for chain in CHAINS {
        script.add("chain", chain);
    }
    // From here the transaction replaces the rules; the kernel switches from old to new at once.
    for chain in CHAINS {
        script.flush("chain", chain);
    }
    for set in POLICY_SETS {
        script.flush("set", set);
    }
    script.elements("add", "resolvers", resolvers);
    script.elements("add", "allowed", allow);
    script.elements("add", "forbidden", &FORBIDDEN);
    script.elements("add", "attached", &Vec::from_iter(attached));
    if let Some(resolver) = resolvers.first() {
        let question = format!("meta skuid @guests ip daddr {DNS} meta l4proto {{ tcp, udp }} th dport 53");
        script.add("rule", &format!("resolve {question} dnat ip to {resolver}"));
    }
    for (chain, rule) in RULES {
        script.add("rule", &format!("{chain} {rule}"));
    }
    script.text
}

pub(super) fn plan_admit(table: &TableName, machine: &Admission) -> String {
    let mut script = Script::of(table);
    script.elements("add", "guests", &[machine.uid]);
    script.elements("add", "gated", &machine.ports);
    script.elements("add", "management", &[machine.management]);
    script.text
}

pub(super) fn plan_open(table: &TableName, ports: &[u16]) -> String {
    let mut script = Script::of(table);
    script.forget("gated", ports);
    script.text
}

pub(super) fn plan_gate(table: &TableName, ports: &[u16]) -> String {
    let mut script = Script::of(table);
    script.elements("add", "gated", ports);
    script.text
}

pub(super) fn plan_withdraw(table: &TableName, machine: &Admission) -> String {
    let mut script = Script::of(table);
    script.forget("guests", &[machine.uid]);
    script.forget("gated", &machine.ports);
    script.forget("management", &[machine.management]);
    script.text
}

pub(super) fn plan_remove(table: &TableName) -> String {
    // Removing what is not there is an error; adding first makes it none.
    format!("add table inet {0}\ndelete table inet {0}\n", table.0)
}

struct Script<'a> {
    table: &'a str,
    text: String,
}

impl<'a> Script<'a> {
    fn of(table: &'a TableName) -> Self {
        Self { table: &table.0, text: String::new() }
    }

    fn say(&mut self, line: &str) {
        self.text.push_str(line);
        self.text.push('\n');
    }

    fn add(&mut self, what: &str, definition: &str) {
        self.say(&format!("add {what} inet {} {definition}", self.table));
    }

    fn flush(&mut self, what: &str, definition: &str) {
        let name = definition.split(' ').next().unwrap_or_default();
        self.say(&format!("flush {what} inet {} {name}", self.table));
    }

    /// An empty list is no statement: nft has no syntax for it.
    fn elements(&mut self, verb: &str, set: &str, elements: &[impl Display]) {
        if !elements.is_empty() {
            let list: Vec<String> = elements.iter().map(ToString::to_string).collect();
            self.say(&format!("{verb} element inet {} {set} {{ {} }}", self.table, list.join(", ")));
        }
    }

    /// Removes elements whether or not they are there: an absent one is added first, in the same transaction.
    fn forget(&mut self, set: &str, elements: &[impl Display]) {
        self.elements("add", set, elements);
        self.elements("delete", set, elements);
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;
    use crate::golden::assert_golden;

    fn table() -> TableName {
        "qudata".parse().unwrap()
    }

    #[test]
    fn goldens() {
        let machine = Admission { uid: 61_001, ports: vec![10_001, 20_000], management: 15_400 };
        let bare = Admission { ports: Vec::new(), ..machine.clone() };
        let allow = ["10.9.0.0/16".parse().unwrap()];
        let around = Surroundings {
            resolvers: vec![Ipv4Addr::new(192, 0, 2, 53)],
            attached: ["192.0.2.0/24", "203.0.113.9/32"].map(|network| network.parse().unwrap()).into(),
        };
        assert_golden("egress-install.nft", &plan_install(&table(), &allow, &around));
        assert_golden("egress-install-bare.nft", &plan_install(&table(), &[], &Surroundings::default()));
        assert_golden("egress-admit.nft", &plan_admit(&table(), &machine));
        assert_golden("egress-admit-no-ports.nft", &plan_admit(&table(), &bare));
        assert_golden("egress-withdraw.nft", &plan_withdraw(&table(), &machine));
        assert_golden("egress-open.nft", &plan_open(&table(), &machine.ports));
        assert_golden("egress-gate.nft", &plan_gate(&table(), &machine.ports));
        assert_golden("egress-remove.nft", &plan_remove(&table()));
    }

    #[test]
    fn no_ports_is_no_script() {
        assert_eq!((plan_open(&table(), &[]), plan_gate(&table(), &[])), (String::new(), String::new()));
    }
}
