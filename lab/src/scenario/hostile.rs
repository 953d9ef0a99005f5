//! What a guest can reach. Called through the table.
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::agent::{self, Baseline, Guest, Setting};
use crate::machine::Machine;
use crate::tenant::{Order, Tenant};

const QUICK: Duration = Duration::from_secs(60);
/// A public address, in a network namespace behind a router.
const PUBLIC: &str = "198.51.100.1";
/// That router, with a public address too, but on a network that the server is attached to.
const NEIGHBOUR: &str = "203.0.113.2";
/// A private network beside the server.
const LAN: &str = "192.168.77.1";

/// Somebody to be attacked (on every address, and on the loopback alone) and somebody outside to be visited.
const VICTIMS: &str = "set -e
ip link add lan type dummy && ip address add 192.168.77.1/24 dev lan && ip link set lan up
ip netns add out && ip link add near type veth peer name far netns out
ip address add 203.0.113.1/30 dev near && ip link set near up
ip -n out address add 203.0.113.2/30 dev far && ip -n out address add 198.51.100.1/32 dev far
ip -n out link set far up && ip -n out link set lo up && ip route add 198.51.100.1 via 203.0.113.2
systemd-run --quiet --unit lab-victim python3 -m http.server 8088
systemd-run --quiet --unit lab-loopback python3 -m http.server --bind 127.0.0.1 8089
systemd-run --quiet --unit lab-outside ip netns exec out python3 -m http.server 8088
for url in 192.168.77.1:8088 127.0.0.1:8089 203.0.113.2:8088 198.51.100.1:8088; do
  for i in $(seq 60); do curl -s -o /dev/null http://$url/ && continue 2; sleep 0.5; done; echo $url is silent >&2; exit 1
done";

const NO_VICTIMS: &str =
    "systemctl stop lab-victim lab-loopback lab-outside; ip link delete lan; ip netns delete out";

/// Which of these targets accept a connection from inside the guest; what answers nothing is given five seconds.
fn reached(tenant: &Tenant<'_>, targets: &[(String, u16)]) -> Result<Vec<String>> {
    let mut script = String::new();
    for (host, port) in targets {
        script.push_str(&format!(
            "timeout 5 bash -c 'exec 3<>/dev/tcp/{host}/{port}' 2>/dev/null && echo {host}:{port}; "
        ));
    }
    Ok(tenant.inside(&format!("{script} true"))?.lines().map(str::to_owned).collect())
}

/// The port of the server that leads to the SSH of an instance.
fn published(tenant: &Tenant<'_>) -> Result<u16> {
    let view = tenant.view()?;
    let port = view.pointer("/ports/22").and_then(Value::as_str).context("no port is published")?;
    port.parse().with_context(|| format!("the published port is {port:?}"))
}

pub(super) fn run(machine: &mut Machine) -> Result<()> {
    let machine = &*machine;
    agent::start(machine, &Setting::without_gpus(Guest::Quick))?;
    let before = Baseline::take(machine)?;
    machine.remote.must(VICTIMS, Duration::from_secs(120)).context("starting the victims")?;
    let attacker = Tenant::order(machine, &Order { name: "attacker", ..Order::default() })?;
    let neighbour = Tenant::order(machine, &Order { name: "neighbour", ..Order::default() })?;
    attacker.wait_until_ready()?;
    neighbour.wait_until_ready()?;
    let port = published(&neighbour)?;
    let mut targets: Vec<(String, u16)> =
        vec![(LAN.to_owned(), 8088), (NEIGHBOUR.to_owned(), 8088), ("169.254.169.254".to_owned(), 80)];
    // The server's own address is the guest's as well (both stand behind user-mode networking), so only ports on which
    // the guest itself listens nowhere are tried there.
    for host in ["127.0.0.1", "10.0.2.2", "10.0.2.15", "203.0.113.1"] {
        targets.extend([8088, 8089, 15_001, port].map(|port| (host.to_owned(), port)));
    }
    let harm = reached(&attacker, &targets)?;
    ensure!(harm.is_empty(), "the guest reaches {}", harm.join(", "));
    // Otherwise the refusals would prove nothing.
    let outside = reached(&attacker, &[(PUBLIC.to_owned(), 8088)])?;
    ensure!(outside.len() == 1, "the guest does not reach the public address {PUBLIC}");
    attacker.delete()?;
    neighbour.delete()?;
    machine.remote.must(NO_VICTIMS, QUICK)?;
    before.assert_clean(machine)
}
