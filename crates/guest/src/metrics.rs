//! One sample of a guest's load, taken over its session by a constant command. Called by the instance's task.
//!
//! The guest may answer anything: every number is parsed as an unsigned integer and checked, so that no NaN, no
//! infinity and no negative value can exist; percentages are computed here and lie within 0 and 100.

use crate::session::{ExecError, Session};
use std::time::Duration;

/// The most that a sample may take to say.
const MAX_ANSWER_BYTES: usize = 16 * 1024;
const DEADLINE: Duration = Duration::from_secs(5);
/// More lines of a kind than any machine has.
const MAX_GPUS: usize = 32;

/// The answer starts after this line: a login shell's start-up files may print before it.
const START: &str = "qudata-metrics";

/// Shell built-ins only, so that a sample costs the guest one process. Interfaces without a device (bridges,
/// containers) would count the same bytes twice. `nvidia-smi` gets less than the whole deadline: it can hang.
const COMMAND: &str = "/bin/sh -c 'echo qudata-metrics; read -r l </proc/stat; echo $l; \
while read -r l; do case $l in MemTotal:*|MemAvailable:*) echo $l;; esac; done </proc/meminfo; \
for d in /sys/class/net/*; do if [ -e $d/device ]; then read -r r <$d/statistics/rx_bytes; \
read -r t <$d/statistics/tx_bytes; echo net $r $t; fi; done; \
if command -v nvidia-smi >/dev/null && g=$(timeout 3 nvidia-smi --format=csv,noheader,nounits \
--query-gpu=utilization.gpu,temperature.gpu,memory.used,memory.total 2>/dev/null); \
then echo \"$g\" | while read -r l; do echo gpu $l; done; fi; exit 0'";

/// A guest's load at one moment.
#[derive(Clone, Debug, PartialEq)]
pub struct GuestMetrics {
    /// Percent of all processors since the previous sample; none for the first one and after a reboot.
    pub cpu_util: Option<f64>,
    /// Percent of memory that is not available.
    pub ram_util: f64,
    /// Bytes received since boot, over all interfaces that have a device.
    pub inet_in: u64,
    /// Bytes sent since boot.
    pub inet_out: u64,
    /// In the order of `nvidia-smi`; empty without GPUs or driver.
    pub gpus: Vec<GpuMetrics>,
}

/// One GPU's load; a value that the driver does not know is none.
#[derive(Clone, Debug, PartialEq)]
pub struct GpuMetrics {
    /// Percent.
    pub util: Option<u8>,
    /// Degrees Celsius.
    pub temp: Option<u8>,
    /// Percent of its memory.
    pub mem_util: Option<f64>,
}

/// No sample.
#[derive(Debug, thiserror::Error)]
pub enum MetricsError {
    /// The guest could not be asked.
    #[error("cannot ask the guest for its metrics")]
    Ask {
        /// Why.
        #[source]
        source: ExecError,
    },
    /// The answer is too large.
    #[error("the guest's metrics have {bytes} bytes; at most {MAX_ANSWER_BYTES} are read")]
    TooLarge {
        /// Size of the answer.
        bytes: usize,
    },
    /// The answer is not what the command prints.
    #[error("the guest's metrics have a bad {field}: '{found}'")]
    Field {
        /// Which value.
        field: &'static str,
        /// What stands there, cut and made printable.
        found: String,
    },
}

fn bad(field: &'static str, found: &str) -> MetricsError {
    let found = found.chars().take(60).map(|c| if c.is_ascii_graphic() { c } else { ' ' }).collect();
    MetricsError::Field { field, found }
}

/// Samples one guest. Remembers the processors' counters: two readings make a percentage, and the guest need not
/// sleep between them.
#[derive(Debug, Default)]
pub struct MetricsSampler {
    previous: Option<CpuTime>,
}

impl MetricsSampler {
    /// Takes a sample.
    ///
    /// # Errors
    /// When the guest cannot be asked or answers nonsense; the next sample is independent of that.
    pub async fn sample(&mut self, session: &Session) -> Result<GuestMetrics, MetricsError> {
        let answer =
            session.exec(COMMAND, &[], DEADLINE).await.map_err(|source| MetricsError::Ask { source })?;
        Ok(self.take(parse(&answer.stdout)?))
    }

    fn take(&mut self, reading: Reading) -> GuestMetrics {
        let cpu_util = self.previous.and_then(|previous| reading.cpu.busy_since(previous));
        self.previous = Some(reading.cpu);
        GuestMetrics {
            cpu_util,
            ram_util: reading.ram_util,
            inet_in: reading.inet_in,
            inet_out: reading.inet_out,
            gpus: reading.gpus,
        }
    }
}

/// Clock ticks since boot, over all processors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct CpuTime {
    idle: u64,
    total: u64,
}

impl CpuTime {
    /// None when a counter went backwards (reboot) or no time passed.
    fn busy_since(self, previous: CpuTime) -> Option<f64> {
        let total = self.total.checked_sub(previous.total)?;
        let idle = self.idle.checked_sub(previous.idle)?;
        percent(total.checked_sub(idle)?, total)
    }
}

/// None unless 0 <= part <= whole and whole > 0.
fn percent(part: u64, whole: u64) -> Option<f64> {
    (whole > 0 && part <= whole).then(|| part as f64 / whole as f64 * 100.0)
}

/// What one answer says.
#[derive(Debug)]
struct Reading {
    cpu: CpuTime,
    ram_util: f64,
    inet_in: u64,
    inet_out: u64,
    gpus: Vec<GpuMetrics>,
}

fn parse(answer: &[u8]) -> Result<Reading, MetricsError> {
    if answer.len() > MAX_ANSWER_BYTES {
        return Err(MetricsError::TooLarge { bytes: answer.len() });
    }
    let text = std::str::from_utf8(answer).map_err(|_| bad("encoding", "not UTF-8"))?;
    let mut lines = text.lines().skip_while(|line| *line != START);
    lines.next().ok_or_else(|| bad("start", text))?;
    let (mut cpu, mut total, mut available) = (None, None, None);
    let (mut inet_in, mut inet_out, mut gpus) = (0_u64, 0_u64, Vec::new());
    for line in lines {
        let (tag, rest) = line.split_once([' ', '\t']).unwrap_or((line, ""));
        match tag {
            "cpu" => once("cpu", line, &mut cpu, cpu_time(rest)?)?,
            "MemTotal:" => once("memory total", line, &mut total, kibibytes("memory total", rest)?)?,
            "MemAvailable:" => {
                once("memory available", line, &mut available, kibibytes("memory available", rest)?)?;
            }
            "net" => {
                let [received, sent] = words(rest).ok_or_else(|| bad("network counters", rest))?;
                inet_in = sum("network bytes in", inet_in, received)?;
                inet_out = sum("network bytes out", inet_out, sent)?;
            }
            "gpu" if gpus.len() < MAX_GPUS => gpus.push(gpu(rest)?),
            _ => return Err(bad("line", line)),
        }
    }
    let cpu = cpu.ok_or_else(|| bad("cpu", "missing"))?;
    let total = total.ok_or_else(|| bad("memory total", "missing"))?;
    let available = available.ok_or_else(|| bad("memory available", "missing"))?;
    let ram_util = total
        .checked_sub(available)
        .and_then(|used| percent(used, total))
        .ok_or_else(|| bad("memory", &format!("{available} of {total} available")))?;
    Ok(Reading { cpu, ram_util, inet_in, inet_out, gpus })
}

fn once<T>(field: &'static str, line: &str, place: &mut Option<T>, value: T) -> Result<(), MetricsError> {
    if place.replace(value).is_some() { Err(bad(field, line)) } else { Ok(()) }
}

fn number(field: &'static str, text: &str) -> Result<u64, MetricsError> {
    text.parse().map_err(|_| bad(field, text))
}

fn sum(field: &'static str, so_far: u64, text: &str) -> Result<u64, MetricsError> {
    so_far.checked_add(number(field, text)?).ok_or_else(|| bad(field, text))
}

fn words<const N: usize>(text: &str) -> Option<[&str; N]> {
    text.split_whitespace().collect::<Vec<_>>().try_into().ok()
}

/// user nice system idle iowait irq softirq steal; the guest columns after them are part of the first two.
fn cpu_time(text: &str) -> Result<CpuTime, MetricsError> {
    let (mut idle, mut total) = (0_u64, 0_u64);
    let mut columns = 0;
    for (column, word) in text.split_whitespace().enumerate() {
        columns += 1;
        if column < 8 {
            total = sum("cpu", total, word)?;
        }
        if column == 3 || column == 4 {
            idle = sum("cpu", idle, word)?;
        }
    }
    if (8..=16).contains(&columns) { Ok(CpuTime { idle, total }) } else { Err(bad("cpu", text)) }
}

fn kibibytes(field: &'static str, text: &str) -> Result<u64, MetricsError> {
    match words(text) {
        Some([count, "kB"]) => number(field, count),
        _ => Err(bad(field, text)),
    }
}

fn gpu(text: &str) -> Result<GpuMetrics, MetricsError> {
    let fields: Vec<&str> = text.split(',').map(str::trim).collect();
    let [util, temp, used, total] = fields.as_slice() else { return Err(bad("gpu", text)) };
    let used = known("gpu memory used", used)?;
    let total = known("gpu memory total", total)?;
    let mem_util = match (used, total) {
        (Some(used), Some(total)) => {
            let share = percent(used, total);
            Some(share.ok_or_else(|| bad("gpu memory", &format!("{used} of {total}")))?)
        }
        (Some(_) | None, None) | (None, Some(_)) => None,
    };
    Ok(GpuMetrics {
        util: at_most("gpu utilisation", util, 100)?,
        temp: at_most("gpu temperature", temp, 200)?,
        mem_util,
    })
}

/// `[N/A]`, `[Not Supported]` and the like are none.
fn known(field: &'static str, text: &str) -> Result<Option<u64>, MetricsError> {
    if text.starts_with('[') { Ok(None) } else { number(field, text).map(Some) }
}

fn at_most(field: &'static str, text: &str, most: u8) -> Result<Option<u8>, MetricsError> {
    let value = known(field, text)?.map(u8::try_from).transpose().map_err(|_| bad(field, text))?;
    if value.is_some_and(|value| value > most) { Err(bad(field, text)) } else { Ok(value) }
}

#[cfg(test)]
mod tests;
