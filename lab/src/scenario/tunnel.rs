//! The tunnel under systemd: frpc as a confined unit of its own, on a host that was registered before and whose control
//! plane is down. Called through the table.
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::agent::{self, Baseline, Guest, Setting};
use crate::machine::Machine;
use crate::tenant::{Order, Tenant};
use crate::voice::say;

const QUICK: Duration = Duration::from_secs(60);
/// From the start of frpc to a route, in emulation.
const ROUTED: Duration = Duration::from_secs(60);

/// A tunnel server on the host itself, and a registration as an earlier agent left it.
const PREPARE: &str = "set -e
test -x /lab/frps || { echo 'this lab has no frp: cargo xtask frp says why' >&2; exit 1; }
install -m 755 /lab/frpc /usr/local/bin/frpc
printf 'bindPort = 7000\\nvhostHTTPPort = 8080\\nauth.token = \"lab-token\"\\n' >/run/lab-frps.toml
systemd-run --quiet --collect --unit=lab-frps /lab/frps -c /run/lab-frps.toml
systemctl stop qudata-agent
install -d -m 711 /var/lib/qudata
printf %s 01890a5d-ac96-774b-bcce-b302099a8057 >/var/lib/qudata/agent_id
printf %s lab-secret-0123456789 >/var/lib/qudata/agent_secret
printf %s lab-host >/var/lib/qudata/tunnel_token";

const SETTINGS: &str = "debug = true\ntunnel = \"frp\"\nfrp_server = \"127.0.0.1\"\n\
     frp_token = \"lab-token\"\nservice_url = \"http://127.0.0.1:9\"\nagent_port = 15001\n";

/// What the API says through the tunnel server.
const THROUGH: &str = "curl -s -m 5 -H 'Host: lab-host-15001' -H 'X-Agent-Secret: lab-secret-0123456789' http://127.0.0.1:8080/instances";

pub(super) fn run(machine: &mut Machine) -> Result<()> {
    let machine = &*machine;
    machine.remote.must(PREPARE, QUICK).context("preparing the tunnel server")?;
    agent::start(machine, &Setting { guest: Guest::Quick, more: SETTINGS.to_owned() })?;
    wait_for(machine, THROUGH, "\"ok\":true")?;
    let before = Baseline::take(machine)?;
    let tenant =
        Tenant::order(machine, &Order { name: "far", tunnel_token: Some("renter"), ..Order::default() })?;
    tenant.wait_until_ready()?;
    let port = public_port(&tenant)?;
    // The client speaks first: this passt forwards nothing before it has.
    let banner = format!(
        "timeout 5 bash -c 'exec 3<>/dev/tcp/127.0.0.1/{port}; printf \"SSH-2.0-lab\\r\\n\" >&3; head -c 7 <&3'"
    );
    wait_for(machine, &banner, "SSH-2.0")?;

    let unit = machine.remote.must("systemctl list-units --no-legend --plain 'qudata*frpc*'", QUICK)?;
    let unit = unit.split_whitespace().next().context("frpc is no unit of systemd")?.to_owned();
    let exposure =
        machine.remote.must(&format!("systemd-analyze security --no-pager {unit} | tail -1"), QUICK)?;
    say(format!("{unit}: {}", exposure.trim()));
    let user =
        machine.remote.must(&format!("ps -o uid= -p $(systemctl show --value -p MainPID {unit})"), QUICK)?;
    ensure!(user.trim() == "719999", "frpc runs as user {}", user.trim());

    // The control plane is down: said, and nothing else is the matter.
    let status = machine.remote.run("qudata-agent status --json", QUICK)?.stdout;
    ensure!(
        status.contains("control_plane_unreachable"),
        "status does not tell of the control plane: {status}"
    );

    let pid = format!("systemctl show --value -p MainPID {unit}");
    let frpc = machine.remote.must(&pid, QUICK)?;
    agent::kill(machine)?;
    ensure!(machine.remote.must(&pid, QUICK)? == frpc, "frpc did not outlive the agent");
    wait_for(machine, &banner, "SSH-2.0")?;
    wait_for(machine, THROUGH, "\"ok\":true")?;
    tenant.delete()?;
    before.assert_clean(machine)?;
    // The server as it was.
    let script = format!(
        "systemctl stop qudata-agent {unit} lab-frps; cd /var/lib/qudata && rm -f agent_id agent_secret tunnel_token; \
         rm -rf /run/qudata/tunnel* /etc/qudata/frpc.* /usr/local/bin/frpc"
    );
    machine.remote.must(&script, QUICK).map(drop)
}

fn public_port(tenant: &Tenant<'_>) -> Result<u16> {
    let view = tenant.view()?;
    let text = view.pointer("/ports/22").and_then(Value::as_str).context("port 22 is not published")?;
    text.parse().with_context(|| format!("the public port is {text:?}"))
}

fn wait_for(machine: &Machine, script: &str, wanted: &str) -> Result<()> {
    let until = Instant::now() + ROUTED;
    loop {
        let said = machine.remote.run(script, QUICK)?.stdout;
        if said.contains(wanted) {
            return Ok(());
        }
        if Instant::now() > until {
            let status = machine.remote.run("qudata-agent status; cat /run/qudata/tunnel/*.log", QUICK)?;
            bail!("`{script}` says {said:?}; the agent: {}", status.stdout);
        }
        std::thread::sleep(Duration::from_secs(1));
    }
}
