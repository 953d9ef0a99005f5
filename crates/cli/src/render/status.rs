//! `status`: the host, its instances, what is wrong and what to do about it.

use std::collections::BTreeMap;

use qudata_api::{GpuState, GpuView, HostView, InstanceState, InstanceView, Problem};
use serde::Serialize;

use super::{fields, fold, line, table};
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
    /// What is wrong with the host and the instances, with the instance's name.
    pub(crate) fn problems(&self) -> Vec<(Option<&str>, Problem)> {
        let host = self.host.problems.iter().map(|p| (None, p.clone()));
        let instances = self.instances.iter().flat_map(|i| {
            let name = Some(i.name.as_str());
            i.problems.iter().cloned().chain(unsaid(i)).map(move |p| (name, p))
        });
        host.chain(instances).collect()
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
        ("CPUs", host.cpus.to_string()),
        ("memory", of(host.memory_free, host.memory_total)),
        ("disk", of(host.disk_free, host.disk_total)),
    ];
    if !all.gpus.is_empty() {
        rows.push(("GPUs", gpus(&all.gpus)));
    }
    rows.push(("instances", all.instances.len().to_string()));
    rows
}

/// `8: 6 free, 2 in use`.
fn gpus(gpus: &[GpuView]) -> String {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for gpu in gpus {
        *counts.entry(table::gpu_state(gpu.state).0).or_default() += 1;
    }
    // In the order of a GPU's life.
    let life = [
        GpuState::Free,
        GpuState::Leased,
        GpuState::Bound,
        GpuState::InUse,
        GpuState::Draining,
        GpuState::Sanitizing,
        GpuState::Quarantined,
    ];
    let words = life.map(|s| table::gpu_state(s).0);
    let parts: Vec<_> = words.iter().filter_map(|w| counts.get(w).map(|n| format!("{n} {w}"))).collect();
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
    fn a_failed_instance_is_a_problem_even_if_none_is_listed() {
        let mut all = busy();
        all.host.problems.clear();
        assert_eq!(all.problems().len(), 1);
        all.instances.last_mut().unwrap().problems.clear();
        let problems = all.problems();
        assert_eq!(problems.len(), 1);
        assert!(
            problems[0].1.message.contains("signal 9") && problems[0].1.remedy.contains("console broken")
        );
    }
}
