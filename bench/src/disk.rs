//! Making an instance's disk, and the first writes to it: they copy from the base image, which is what a fresh guest
//! does most. Beside the original's three runs of qemu-img and its default overlay. Without a guest, so that emulation
//! is not in the way; the runtime of the agent's own code is part of its figure.

use std::{
    env, fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use qudata_host::size::ByteSize;
use qudata_qemu::disk::{self, Owner};
use qudata_testkit::tool;
use rustix::process::{getgid, getuid};

use crate::{
    original,
    report::{Row, Unit},
    samples::{Samples, millis},
};

const NAME: &str = "disk";
const DEADLINE: Duration = Duration::from_secs(300);
/// Distance of the writes: each hits a cluster of its own.
const STRIDE: &str = "131072";

/// One overlay, made and written to.
#[derive(Debug, Clone, Copy)]
struct Round {
    created: f64,
    writes_per_second: f64,
    growth: f64,
}

pub(crate) fn run(quick: bool) -> Result<Vec<Row>> {
    let (rounds, writes) = if quick { (1, 2000) } else { (5, 8000) };
    let base = PathBuf::from(env::var_os("QUDATA_TEST_IMAGE").context("QUDATA_TEST_IMAGE is not set")?);
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        ours.push(round(writes, |overlay| agents_overlay(&base, overlay))?);
        theirs.push(round(writes, |overlay| original::make_overlay(&base, overlay, "3G"))?);
    }
    let median = |rounds: &[Round], pick: fn(&Round) -> f64| {
        Samples::new(rounds.iter().map(pick).collect()).map(|s| s.p50()).context("no rounds")
    };
    let row = |figure: &str, unit, pick: fn(&Round) -> f64, what: &str| {
        Ok::<_, anyhow::Error>(
            Row::new(NAME, figure, unit, median(&ours, pick)?).beside(median(&theirs, pick)?, what),
        )
    };
    Ok(vec![
        row("create", Unit::Millis, |r| r.created, "three qemu-img runs")?,
        row(
            "first writes of 4 KiB",
            Unit::PerSecond,
            |r| r.writes_per_second,
            "default overlay; more is better",
        )?,
        row("growth", Unit::Mebibytes, |r| r.growth, "default overlay")?
            .note(format!("{writes} writes, one to each 128 KiB; medians of {rounds}")),
    ])
}

/// By the agent's own code.
fn agents_overlay(base: &Path, overlay: &Path) -> Result<()> {
    let owner = Owner { uid: getuid().as_raw(), gid: getgid().as_raw() };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let plan = disk::plan_overlay(overlay, base, disk::inspect_base(base)?, ByteSize::from_gib(3), owner)?;
    runtime.block_on(disk::create_overlay(&plan, Path::new("/usr/bin/qemu-img")))?;
    Ok(())
}

fn round(writes: u32, make: impl FnOnce(&Path) -> Result<()>) -> Result<Round> {
    let place = original::place()?;
    let overlay = place.path().join("disk.qcow2");
    let start = Instant::now();
    make(&overlay)?;
    let created = millis(start.elapsed());
    let before = allocated(&overlay)?;
    let mut bench = Command::new("qemu-img");
    bench
        .args(["bench", "-w", "-t", "none", "-n", "-f", "qcow2", "-d", "32", "-s", "4096", "-S", STRIDE])
        .args(["-c", &writes.to_string()])
        .arg(&overlay);
    let start = Instant::now();
    let output = tool::run(&mut bench, DEADLINE)?;
    let elapsed = start.elapsed();
    anyhow::ensure!(output.status.success(), "qemu-img bench: {}", output.stderr);
    let writes_per_second = f64::from(writes) / elapsed.as_secs_f64();
    Ok(Round { created, writes_per_second, growth: allocated(&overlay)? - before })
}

/// MiB that the file takes on the disk.
fn allocated(path: &Path) -> Result<f64> {
    let kib = fs::metadata(path)?.blocks() / 2;
    Ok(f64::from(u32::try_from(kib)?) / 1024.0)
}
