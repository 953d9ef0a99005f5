//! Figures for Prometheus: counters of calls, and a reading of host and instances made at each scrape, so that what is
//! gone leaves no series behind. Asked by `GET /metrics`.

use std::{collections::BTreeMap, fmt, time::Duration};

use axum::http::{Method, StatusCode};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric, text},
    metrics::{counter::Counter, family::Family, gauge::ConstGauge, histogram::Histogram},
    registry::Registry,
};
use qudata_api::{ErrorCode, InstanceView};
use serde::Serialize;

use crate::instances::Instances;

/// What the answer to a scrape is.
pub(super) const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
/// From a snapshot read to a call that waits for a guest.
const SECONDS: [f64; 8] = [0.0005, 0.001, 0.005, 0.025, 0.1, 0.5, 2.5, 10.0];

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CallLabels {
    method: &'static str,
    route: String,
    status: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CodeLabel {
    code: String,
}

/// Counters of this agent process; clones share them.
#[derive(Clone)]
pub(super) struct Counters {
    calls: Family<CallLabels, Counter>,
    seconds: Histogram,
    refused: Family<CodeLabel, Counter>,
}

impl Default for Counters {
    fn default() -> Self {
        Self { calls: Family::default(), seconds: Histogram::new(SECONDS), refused: Family::default() }
    }
}

impl Counters {
    /// Counts an answered request. Labels are bounded: routes are ours, other methods are one.
    pub(super) fn answered(&self, method: &Method, route: &str, status: StatusCode, took: Duration) {
        let method = match method.as_str() {
            "GET" => "GET",
            "POST" => "POST",
            "PUT" => "PUT",
            "DELETE" => "DELETE",
            _ => "other",
        };
        let labels = CallLabels { method, route: route.to_owned(), status: status.as_u16().into() };
        self.calls.get_or_create(&labels).inc();
        self.seconds.observe(took.as_secs_f64());
    }

    /// Counts a connection that never got as far as a request.
    pub(super) fn refused(&self, code: ErrorCode) {
        self.refused.get_or_create(&CodeLabel { code: word(code) }).inc();
    }
}

/// The word the wire has for a value of one of our enumerations.
fn word(value: impl Serialize) -> String {
    serde_json::to_value(value).ok().and_then(|v| v.as_str().map(str::to_owned)).unwrap_or_default()
}

/// One scrape.
pub(super) fn scrape(instances: Instances, counters: &Counters) -> Result<String, fmt::Error> {
    let mut registry = Registry::with_prefix("qudata");
    registry.register("http_requests", "Answered requests", counters.calls.clone());
    registry.register("http_request_seconds", "Time from head to answer", counters.seconds.clone());
    registry.register(
        "http_connections_refused",
        "Connections refused before a request",
        counters.refused.clone(),
    );
    registry.register_collector(Box::new(Reading { instances }));
    let mut text = String::new();
    text::encode(&mut text, &registry)?;
    Ok(text)
}

struct Reading {
    instances: Instances,
}

impl fmt::Debug for Reading {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Reading")
    }
}

type Labels = Vec<(&'static str, String)>;

/// One metric with its points.
struct Metric {
    name: &'static str,
    help: &'static str,
    points: Vec<(Labels, f64)>,
}

impl Metric {
    fn write(&self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let kind = ConstGauge::new(0.0).metric_type();
        let mut metric = encoder.encode_descriptor(self.name, self.help, None, kind)?;
        for (labels, value) in &self.points {
            let gauge = ConstGauge::new(*value);
            if labels.is_empty() {
                gauge.encode(metric.encode_family(&Labels::new())?)?;
            } else {
                gauge.encode(metric.encode_family(labels)?)?;
            }
        }
        Ok(())
    }
}

impl Collector for Reading {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let mut metrics = host(&self.instances);
        metrics.extend(instances(&self.instances.list()));
        metrics
            .iter()
            .filter(|metric| !metric.points.is_empty())
            .try_for_each(|metric| metric.write(&mut encoder))
    }
}

fn host(instances: &Instances) -> Vec<Metric> {
    let host = instances.host();
    let one = |name, help, value| Metric { name, help, points: vec![(Labels::new(), value)] };
    let agent = vec![
        ("version", host.version),
        ("accel", host.accel),
        ("firmware", host.firmware),
        ("tunnel", host.tunnel),
    ];
    let mut gpus: BTreeMap<String, f64> = BTreeMap::new();
    for gpu in instances.gpus() {
        *gpus.entry(word(gpu.state)).or_default() += 1.0;
    }
    vec![
        Metric { name: "agent_info", help: "This agent; always 1", points: vec![(agent, 1.0)] },
        one("agent_start_time_seconds", "When this agent process started", {
            host.started_at.as_duration().as_secs_f64()
        }),
        one("host_cpus", "Logical CPUs", f64::from(host.cpus)),
        one("host_memory_bytes", "RAM", float(host.memory_total)),
        one("host_memory_free_bytes", "RAM that a new instance may take", float(host.memory_free)),
        one("host_disk_bytes", "Size of the file system with the disks", float(host.disk_total)),
        one("host_disk_free_bytes", "Space that a new disk may take", float(host.disk_free)),
        Metric { name: "host_problems", help: "What is wrong, by code", points: by_code(&host.problems) },
        Metric { name: "gpus", help: "GPUs by state", points: by("state", gpus) },
    ]
}

fn by(label: &'static str, counts: BTreeMap<String, f64>) -> Vec<(Labels, f64)> {
    counts.into_iter().map(|(word, count)| (vec![(label, word)], count)).collect()
}

fn by_code(problems: &[qudata_api::Problem]) -> Vec<(Labels, f64)> {
    let mut counts: BTreeMap<String, f64> = BTreeMap::new();
    for problem in problems {
        *counts.entry(problem.code.clone()).or_default() += 1.0;
    }
    by("code", counts)
}

fn instances(list: &[InstanceView]) -> Vec<Metric> {
    let mut states: BTreeMap<String, f64> = BTreeMap::new();
    for view in list {
        *states.entry(word(view.state)).or_default() += 1.0;
    }
    let of_each = |name, help, value: &dyn Fn(&InstanceView) -> Option<f64>| {
        let point = |view: &InstanceView| Some((vec![("instance", view.id.to_string())], value(view)?));
        Metric { name, help, points: list.iter().filter_map(point).collect() }
    };
    vec![
        Metric { name: "instances", help: "Instances by state", points: by("state", states) },
        of_each("instance_cpus", "vCPUs of an instance", &|v| Some(f64::from(v.cpus))),
        of_each("instance_memory_bytes", "RAM of an instance", &|v| Some(float(v.memory))),
        of_each("instance_storage_bytes", "Disk of an instance", &|v| Some(float(v.storage))),
        of_each("instance_cpu_percent", "CPU use as the guest says", &|v| v.sample.as_ref()?.cpu_percent),
        of_each("instance_ram_percent", "RAM use as the guest says", &|v| {
            Some(v.sample.as_ref()?.ram_percent)
        }),
        of_each("instance_received_bytes", "Received since boot as the guest says", &|v| {
            Some(float(v.sample.as_ref()?.net_rx_bytes))
        }),
        of_each("instance_sent_bytes", "Sent since boot as the guest says", &|v| {
            Some(float(v.sample.as_ref()?.net_tx_bytes))
        }),
        of_each("instance_gpu_percent", "GPU use as the guest says", &|v| v.sample.as_ref()?.gpu_percent),
        of_each("instance_gpu_celsius", "GPU temperature as the guest says", &|v| {
            v.sample.as_ref()?.gpu_celsius
        }),
        of_each("instance_problems", "What is wrong with an instance", &|v| {
            u32::try_from(v.problems.len()).ok().map(f64::from)
        }),
    ]
}

/// Prometheus has nothing but floats; beyond 2^53 bytes the last digits are lost.
#[allow(clippy::cast_precision_loss, reason = "the format has nothing but floats")]
fn float(bytes: u64) -> f64 {
    bytes as f64
}
