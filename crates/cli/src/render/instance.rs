//! One instance: `instance show`, and what `instance create` ends with.

use jiff::Timestamp;
use qudata_api::{GpuState, GpuView, InstanceState, InstanceView, RouteState, RouteView, Sample};

use super::{fields, folded, gpu, line, table::sorted_ports};
use crate::{
    screen::{Look, Tone},
    units::{age, ago, duration, milliseconds, size},
};

/// Column at which values begin in [`show`]; what is longer than the terminal is folded there.
const INDENT: usize = 10;

/// `instance show`, with what is known of its GPUs.
pub(crate) fn show(look: &Look, instance: &InstanceView, known: &[GpuView]) -> String {
    let i = instance;
    let mut state = look.paint(state_tone(i.state), state_word(i.state));
    state.push_str(&format!(" {}", since(look, i.since)));
    if let Some(reason) = &i.reason {
        state.push_str(&format!("\n{}", folded(look, INDENT, reason).join("\n")));
    }
    let mut rows = vec![
        ("name", look.paint(Tone::Strong, &line(&i.name))),
        ("id", i.id.to_string()),
        ("state", state),
        ("created", created(look, i)),
        ("size", format!("{}, {} memory, {} disk", cpus(i.cpus), size(i.memory), size(i.storage))),
    ];
    if !i.gpus.is_empty() {
        rows.push(("GPUs", i.gpus.iter().map(|address| gpu_line(look, address, known)).collect()));
    }
    rows.extend(access(i));
    rows.push(("host key", line(&i.ssh_host_key)));
    rows.push((
        "keys",
        if i.ssh_keys.is_empty() {
            "none".to_owned()
        } else {
            i.ssh_keys.iter().map(|k| line(k) + "\n").collect()
        },
    ));
    if let Some(sample) = &i.sample {
        rows.push(("use", usage(look, sample)));
    }
    let mut text = fields(look, &rows);
    if !i.problems.is_empty() {
        text.push('\n');
        text.push_str(&super::status::problems(look, i.problems.iter().map(|p| (None, p))));
    }
    text
}

/// Address, name and, while it is not yet or no longer simply in use, state of a GPU.
fn gpu_line(look: &Look, address: &str, known: &[GpuView]) -> String {
    let Some(view) = known.iter().find(|g| g.address == address) else {
        return format!("{}\n", line(address));
    };
    let (word, tone) = gpu::word(view);
    let state = match view.state {
        GpuState::InUse => String::new(),
        _ => format!("  {}", look.paint(tone, word)),
    };
    format!("{}  {}{state}\n", line(address), gpu::name(look, view))
}

/// How to get in, line by line: for [`show`] and the end of `create`.
pub(crate) fn access(instance: &InstanceView) -> Vec<(&'static str, String)> {
    let mut rows = Vec::new();
    if let Some(command) = ssh_command(instance) {
        rows.push(("ssh", format!("qudata-agent instance ssh {}\n{command}", line(&instance.name))));
    }
    if !instance.routes.is_empty() {
        rows.push(("ports", instance.routes.iter().map(route_line).collect()));
        return rows;
    }
    let host = instance.ssh.as_ref().map(|s| host_text(&s.host));
    let port = |(guest, public): (String, String)| match &host {
        Some(host) => format!("{guest} → {host}:{public}\n"),
        None => format!("{guest} → {public}\n"),
    };
    let ports: String = sorted_ports(instance).into_iter().map(port).collect();
    if !ports.is_empty() {
        rows.push(("ports", ports));
    }
    rows
}

/// `8888 → token-20001 (http, refused: …)`; what is simply up needs no word.
fn route_line(route: &RouteView) -> String {
    let state = match route.state {
        RouteState::Up => String::new(),
        RouteState::Adding => ", being published".to_owned(),
        RouteState::Waiting => ", waits for the tunnel".to_owned(),
        RouteState::Refused => {
            format!(", not published: {}", line(route.reason.as_deref().unwrap_or("no reason is known")))
        }
    };
    format!("{} → {} ({}{state})\n", route.guest_port, line(&route.address), line(&route.kind))
}

/// The ssh command for any client.
pub(crate) fn ssh_command(instance: &InstanceView) -> Option<String> {
    let ssh = instance.ssh.as_ref()?;
    Some(format!("ssh -p {} {}@{}", ssh.port, line(&ssh.user), line(&ssh.host)))
}

/// A host as it stands before a colon and a port.
fn host_text(host: &str) -> String {
    if host.contains(':') { format!("[{}]", line(host)) } else { line(host) }
}

fn cpus(n: u32) -> String {
    if n == 1 { "1 vCPU".to_owned() } else { format!("{n} vCPUs") }
}

/// `just now`, or `for 13 min`.
pub(crate) fn since(look: &Look, then: Timestamp) -> String {
    match age(then, look.now).as_str() {
        "now" => "just now".to_owned(),
        age => format!("for {age}"),
    }
}

fn created(look: &Look, instance: &InstanceView) -> String {
    let created = ago(instance.created_at, look.now);
    match instance.ready_at {
        Some(ready) => {
            format!("{created}, ready after {}", duration(milliseconds(instance.created_at, ready)))
        }
        None => created,
    }
}

fn usage(look: &Look, sample: &Sample) -> String {
    let mut parts = Vec::new();
    let mut percent = |name: &str, value: Option<f64>| {
        parts.extend(value.map(|v| format!("{name} {v:.0} %")));
    };
    percent("CPU", sample.cpu_percent);
    percent("RAM", Some(sample.ram_percent));
    percent("GPU", sample.gpu_percent);
    percent("GPU memory", sample.gpu_memory_percent);
    parts.extend(sample.gpu_celsius.map(|v| format!("GPU {v:.0} °C")));
    parts.push(format!("received {}, sent {}", size(sample.net_rx_bytes), size(sample.net_tx_bytes)));
    let text = format!("{} ({})", parts.join(", "), ago(sample.at, look.now));
    folded(look, INDENT, &text).join("\n")
}

/// The word for a state.
pub(crate) fn state_word(state: InstanceState) -> &'static str {
    match state {
        InstanceState::Provisioning => "provisioning",
        InstanceState::Booting => "booting",
        InstanceState::Running => "running",
        InstanceState::Paused => "paused",
        InstanceState::Rebooting => "rebooting",
        InstanceState::Stopped => "stopped",
        InstanceState::Unresponsive => "unresponsive",
        InstanceState::Deleting => "deleting",
        InstanceState::Failed => "failed",
    }
}

/// How a state is to be taken.
pub(crate) fn state_tone(state: InstanceState) -> Tone {
    match state {
        InstanceState::Running => Tone::Good,
        InstanceState::Provisioning | InstanceState::Booting | InstanceState::Rebooting => Tone::Notice,
        InstanceState::Deleting => Tone::Notice,
        InstanceState::Paused | InstanceState::Stopped => Tone::Plain,
        InstanceState::Unresponsive | InstanceState::Failed => Tone::Bad,
    }
}

#[cfg(test)]
mod tests {
    use super::{super::sample, *};

    #[test]
    fn each_kind_of_instance() {
        for (view, name) in sample::instances().iter().zip(["show_busy", "show_booting", "show_failed"]) {
            insta::assert_snapshot!(name, show(&sample::look(Some(80)), view, &sample::gpus()));
        }
    }

    #[test]
    fn a_gpu_that_is_not_simply_in_use_says_so() {
        let mut view = sample::instance("a", "019b7f3a-1b00-7000-8000-000000000001");
        view.gpus = ["0000:b4:00.0", "0000:ff:00.0"].map(ToOwned::to_owned).to_vec();
        let text = show(&sample::look(Some(80)), &view, &sample::gpus());
        let gpus: Vec<_> = text.lines().skip_while(|l| !l.contains("GPUs")).take(2).map(str::trim).collect();
        assert_eq!(gpus, ["GPUs  0000:b4:00.0  H100 SXM5 80GB  quarantined", "0000:ff:00.0"]);
    }

    #[test]
    fn words_of_the_guest_cannot_leave_their_line() {
        let mut view = sample::instance("a", "019b7f3a-1b00-7000-8000-000000000001");
        view.reason = Some("the guest said \x1b[2J\nstate  running".to_owned());
        let text = show(&sample::look(Some(80)), &view, &[]);
        assert!(!text.contains('\x1b') && text.contains("the guest said state running"), "{text}");
    }

    #[test]
    fn an_ipv6_address_is_bracketed_before_its_port() {
        assert_eq!(host_text("::1"), "[::1]");
        assert_eq!(host_text("127.0.0.1"), "127.0.0.1");
    }
}
