//! `status`: the host, its instances, what is wrong and what to do about it.

use std::collections::BTreeMap;

use qudata_api::{GpuView, HostView, InstanceState, InstanceView, LinkView, Problem};
use serde::Serialize;

use super::{fields, fold, gpu, line, table};
use crate::{
    screen::{Look, Tone},
    units::{ago, size},
};

/// All that `status` shows, and its JSON form.
#[derive(Debug, Serialize)]
pub(crate) struct Overview {
    /// `GET /host`.
    pub(crate) host: HostView,
    /// `GET /instances`.
    pub(crate) instances: Vec<InstanceView>,
    /// `GET /gpus`.
    pub(crate) gpus: Vec<GpuView>,
}

impl Overview {
    /// What is wrong with the host, its GPUs and the instances, with the instance's name. A GPU that the host's own
    /// list names is not told twice.
    pub(crate) fn problems(&self) -> Vec<(Option<&str>, Problem)> {
        let host = self.host.problems.iter().map(|p| (None, p.clone()));
        let instances = self.instances.iter().flat_map(|i| {
            let name = Some(i.name.as_str());
            i.problems.iter().cloned().chain(unsaid(i)).map(move |p| (name, p))
        });
        let told = |gpu: &&GpuView| self.host.problems.iter().any(|p| p.message.contains(&gpu.address));
        let gpus = gpu::problems(self.gpus.iter().filter(|gpu| !told(gpu))).into_iter().map(|p| (None, p));
        host.chain(gpus).chain(instances).collect()
    }
}

/// A bad state is a problem even if the agent lists none for it.
fn unsaid(instance: &InstanceView) -> Option<Problem> {
    let bad = matches!(instance.state, InstanceState::Failed | InstanceState::Unresponsive);
    (bad && instance.problems.is_empty()).then(|| Problem {
        code: super::instance::state_word(instance.state).to_owned(),
        message: instance
            .reason
            .clone()
            .unwrap_or_else(|| "it needs somebody, and no reason is known".to_owned()),
        remedy: format!(
            "look at `qudata-agent instance events {0}` and `qudata-agent instance console {0}`",
            instance.name
        ),
        since: instance.since,
    })
}

/// `status` for people.
pub(crate) fn overview(look: &Look, all: &Overview) -> String {
    let problems = all.problems();
    let (dot, verdict) = match problems.len() {
        0 => (look.paint(Tone::Good, "●"), look.paint(Tone::Good, "fine")),
        1 => (look.paint(Tone::Bad, "●"), look.paint(Tone::Bad, "1 problem")),
        n => (look.paint(Tone::Bad, "●"), look.paint(Tone::Bad, &format!("{n} problems"))),
    };
    let mut text = format!("{dot} qudata-agent {}: {verdict}\n", line(&all.host.version));
    text.push_str(&fields(look, &host_rows(look, all)));
    if !all.instances.is_empty() {
        text.push('\n');
        text.push_str(&table::instances(look, &all.instances));
    }
    if !problems.is_empty() {
        text.push('\n');
        text.push_str(&self::problems(look, problems.iter().map(|(name, p)| (*name, p))));
    }
    text
}

fn host_rows(look: &Look, all: &Overview) -> Vec<(&'static str, String)> {
    let host = &all.host;
    let mode = if host.standalone { "standalone" } else { "with a control plane" };
    let started = host.started_at.strftime("%Y-%m-%d %H:%M:%S UTC");
    let of = |free: u64, total: u64| format!("{} free for instances, {} in all", size(free), size(total));
    let mut rows = vec![
        ("running", format!("since {started}, {}", ago(host.started_at, look.now))),
        (
            "mode",
            line(&format!("{mode}, {}, firmware {}, tunnel {}", host.accel, host.firmware, host.tunnel)),
        ),
        ("API", line(&format!("{}:{}", host.listen, host.port))),
    ];
    rows.extend(host.control_plane.as_ref().map(|link| ("platform", link_text(look, link))));
    rows.extend(host.tunnel_link.as_ref().map(|link| ("tunnel", link_text(look, link))));
    rows.extend([
        ("CPUs", host.cpus.to_string()),
        ("memory", of(host.memory_free, host.memory_total)),
        ("disk", of(host.disk_free, host.disk_total)),
    ]);
    if !all.gpus.is_empty() {
        rows.push(("GPUs", gpus(&all.gpus)));
    }
    rows.push(("instances", all.instances.len().to_string()));
    rows
}

/// `up for 3 h, agent.ru1.qudata.ai, frpc 0.70.1`.
fn link_text(look: &Look, link: &LinkView) -> String {
    let tone = if link.state == "up" { Tone::Good } else { Tone::Bad };
    let version = link.version.as_ref().map_or_else(String::new, |version| format!(", {version}"));
    let state = look.paint(tone, &line(&link.state));
    format!("{state} {}, {}{}", super::instance::since(look, link.since), line(&link.peer), line(&version))
}

/// `8: 6 free, 2 in use`.
fn gpus(gpus: &[GpuView]) -> String {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for gpu in gpus {
        *counts.entry(gpu::word(gpu).0).or_default() += 1;
    }
    let part = |word: &&str| counts.get(word).map(|n| format!("{n} {word}"));
    let parts: Vec<_> = gpu::WORDS.iter().filter_map(part).collect();
    format!("{}: {}", gpus.len(), parts.join(", "))
}

/// Problems, each with its remedy; the instance's name where the context does not say it.
pub(crate) fn problems<'a>(look: &Look, all: impl Iterator<Item = (Option<&'a str>, &'a Problem)>) -> String {
    let mut text = String::new();
    for (name, problem) in all {
        let place = name.map_or_else(String::new, |n| format!("{}: ", line(n)));
        let message =
            format!("{place}{} ({}, {})", problem.message, problem.code, ago(problem.since, look.now));
        text.push_str(&format!("{} {}\n", look.paint(Tone::Bad, "●"), fold(look, 2, &message)));
        text.push_str(&format!("  → {}\n", fold(look, 4, &problem.remedy)));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::{super::sample, *};

    fn busy() -> Overview {
        let mut host = sample::host();
        host.problems.push(Problem {
            code: "disk_low".to_owned(),
            message: "the file system with the disks has 3 GiB left, which running instances may fill"
                .to_owned(),
            remedy: "delete instances or make the file system of /var/lib/qudata larger".to_owned(),
            since: sample::at("2026-01-02T11:57:00Z"),
        });
        Overview { host, instances: sample::instances(), gpus: sample::gpus() }
    }

    #[test]
    fn at_two_widths() {
        insta::assert_snapshot!("status_80", overview(&sample::look(Some(80)), &busy()));
        insta::assert_snapshot!("status_120", overview(&sample::look(Some(120)), &busy()));
    }

    #[test]
    fn an_idle_host_is_fine() {
        let idle = Overview { host: sample::host(), instances: Vec::new(), gpus: Vec::new() };
        insta::assert_snapshot!("status_idle", overview(&sample::look(Some(80)), &idle));
    }

    #[test]
    fn behind_a_tunnel_that_is_down() {
        let link = |peer: &str, state: &str, version: Option<&str>| LinkView {
            peer: peer.to_owned(),
            state: state.to_owned(),
            since: sample::at("2026-01-02T11:57:00Z"),
            reason: None,
            version: version.map(str::to_owned),
        };
        let mut all = Overview { host: sample::host(), instances: Vec::new(), gpus: Vec::new() };
        all.host.standalone = false;
        all.host.tunnel = "frp".to_owned();
        all.host.control_plane = Some(link("https://internal.qudata.ai/v0", "up", None));
        all.host.tunnel_link = Some(link("agent.ru1.qudata.ai", "down", Some("frpc 0.70.1")));
        all.host.problems.push(Problem {
            code: "frps_unreachable".to_owned(),
            message: "the tunnel is down: agent.ru1.qudata.ai:7000 does not answer".to_owned(),
            remedy: "look whether this host has a way to the internet; VMs go on meanwhile".to_owned(),
            since: sample::at("2026-01-02T11:57:00Z"),
        });
        insta::assert_snapshot!("status_tunnel", overview(&sample::look(Some(100)), &all));
    }

    #[test]
    fn gpus_are_problems_unless_the_host_names_them_or_they_are_left_out_by_choice() {
        let mut all = Overview { host: sample::host(), instances: Vec::new(), gpus: sample::gpus() };
        let codes = |all: &Overview| all.problems().into_iter().map(|(_, p)| p.code).collect::<Vec<_>>();
        assert_eq!(codes(&all), ["gpu_quarantined", "foreign_device", "no_such_device"]);
        all.host.problems.push(Problem {
            code: "gpu_wedged".to_owned(),
            message: "GPU 0000:b4:00.0 hangs".to_owned(),
            remedy: "reboot".to_owned(),
            since: sample::at(sample::NOW),
        });
        assert_eq!(codes(&all), ["gpu_wedged", "foreign_device", "no_such_device"]);
        all.gpus.retain(|gpu| gpu.refusal.as_ref().is_some_and(|r| r.by_choice));
        all.host.problems.clear();
        assert_eq!((all.gpus.len(), codes(&all)), (1, Vec::new()));
        assert_eq!(gpus(&all.gpus), "1: 1 left out");
    }

    #[test]
    fn a_failed_instance_is_a_problem_even_if_none_is_listed() {
        let mut all = busy();
        all.host.problems.clear();
        all.gpus.clear();
        assert_eq!(all.problems().len(), 1);
        all.instances.last_mut().unwrap().problems.clear();
        let problems = all.problems();
        assert_eq!(problems.len(), 1);
        assert!(
            problems[0].1.message.contains("signal 9") && problems[0].1.remedy.contains("console broken")
        );
    }
}
