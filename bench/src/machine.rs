//! On what was measured: processors, QEMU, kernel, date, who else was busy. Called by `report`.

use std::{fs, process::Command, thread, time::Duration};

use jiff::Timestamp;
use qudata_testkit::tool;
use serde_json::{Value, json};

const DEADLINE: Duration = Duration::from_secs(10);

/// The machine as it was when the run began.
#[derive(Debug)]
pub(crate) struct Machine {
    cores: usize,
    processor: String,
    kernel: String,
    qemu: String,
    load: String,
    date: String,
}

impl Machine {
    pub(crate) fn observe() -> Self {
        let file = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let field = |text: &str, name: &str| {
            let line = text.lines().find(|line| line.starts_with(name))?;
            line.split_once(':').map(|(_, value)| value.trim().to_owned())
        };
        Self {
            cores: thread::available_parallelism().map_or(0, usize::from),
            processor: field(&file("/proc/cpuinfo"), "model name").unwrap_or_default(),
            kernel: file("/proc/sys/kernel/osrelease").trim().to_owned(),
            qemu: qemu_version(),
            load: file("/proc/loadavg").split(' ').next().unwrap_or_default().to_owned(),
            date: Timestamp::now().strftime("%Y-%m-%d").to_string(),
        }
    }

    pub(crate) fn line(&self) -> String {
        let Self { cores, processor, kernel, qemu, load, date } = self;
        format!("{cores} cores of {processor}, Linux {kernel}, QEMU {qemu}, {date}; load at the start {load}")
    }

    pub(crate) fn json(&self) -> Value {
        json!({
            "cores": self.cores,
            "processor": self.processor,
            "kernel": self.kernel,
            "qemu": self.qemu,
            "load": self.load,
            "date": self.date,
        })
    }
}

fn qemu_version() -> String {
    let output = tool::run(Command::new("qemu-system-x86_64").arg("--version"), DEADLINE);
    let text = output.map(|output| output.stdout).unwrap_or_default();
    text.split_whitespace().nth(3).unwrap_or("?").to_owned()
}
