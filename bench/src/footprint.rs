//! What the agent takes of the host, without VMs and with running guests, beside the QEMU processes it looks after;
//! and the size of its binary.

use std::{fs, path::Path, thread, time::Duration};

use anyhow::{Context, Result};
use qudata_testkit::agent::{Image, Setup, TestAgent};

use crate::{
    fleet::{self, Lab},
    report::{Row, Unit},
};

const NAME: &str = "footprint";
/// Threads that were needed for a moment end after ten seconds.
const SETTLE: Duration = Duration::from_secs(12);
const KIB_IN_MIB: f64 = 1024.0;
/// What the binary is compared with: everything else that has to be on the host is larger still.
const QEMU: &str = "/usr/bin/qemu-system-x86_64";

/// One process.
#[derive(Debug, Clone, Copy, Default)]
struct Taken {
    /// Resident memory, MiB.
    rss: f64,
    /// Its fair share of it: pages that others have as well are divided.
    pss: f64,
    threads: f64,
    files: f64,
}

pub(crate) fn run(lab: &mut Lab) -> Result<Vec<Row>> {
    let idle = {
        let agent = Setup::new(Image::Blank).start();
        settled(&agent)?
    };
    let size = lab.size();
    let fleet = lab.fleet()?;
    let busy = settled(&fleet.agent)?;
    let qemus =
        fleet.instances.iter().map(|vm| taken(fleet.agent.qemu(vm).pid)).collect::<Result<Vec<_>>>()?;
    let guests = f64::from(u32::try_from(size)?);
    let sum = |pick: fn(&Taken) -> f64| qemus.iter().map(pick).sum::<f64>();
    let whose = format!("its {size} QEMU processes");
    let idle_note = format!(
        "with {size} running guests; without any: RSS {:.1} MiB, PSS {:.1} MiB, {:.0} threads, {:.0} files",
        idle.rss, idle.pss, idle.threads, idle.files
    );
    Ok(vec![
        Row::new(NAME, "RSS", Unit::Mebibytes, busy.rss)
            .at_most(25.0)
            .beside(sum(|t| t.rss), whose.clone())
            .note(idle_note),
        Row::new(NAME, "PSS", Unit::Mebibytes, busy.pss).beside(sum(|t| t.pss), whose.clone()),
        Row::new(NAME, "RSS of each guest", Unit::Mebibytes, (busy.rss - idle.rss) / guests)
            .beside(sum(|t| t.rss) / guests, "one of the QEMU processes"),
        Row::new(NAME, "threads", Unit::Count, busy.threads).beside(sum(|t| t.threads), whose.clone()),
        Row::new(NAME, "open files", Unit::Count, busy.files).beside(sum(|t| t.files), whose),
        binary()?,
    ])
}

/// After some use, and a while without.
fn settled(agent: &TestAgent) -> Result<Taken> {
    for _ in 0..100 {
        agent.ids();
    }
    thread::sleep(SETTLE);
    taken(agent.pid())
}

fn taken(pid: u32) -> Result<Taken> {
    let file = |name: &str| {
        let path = format!("/proc/{pid}/{name}");
        fs::read_to_string(&path).with_context(|| format!("reading {path}"))
    };
    let (status, rollup) = (file("status")?, file("smaps_rollup")?);
    let files = fs::read_dir(format!("/proc/{pid}/fd")).context("listing open files")?.count();
    Ok(Taken {
        rss: number(&status, "VmRSS:")? / KIB_IN_MIB,
        pss: number(&rollup, "Pss:")? / KIB_IN_MIB,
        threads: number(&status, "Threads:")?,
        files: f64::from(u32::try_from(files)?),
    })
}

/// The number after a label of /proc.
fn number(text: &str, label: &str) -> Result<f64> {
    let line = text.lines().find_map(|line| line.strip_prefix(label));
    let word = line.and_then(|line| line.split_whitespace().next());
    word.and_then(|word| word.parse().ok()).with_context(|| format!("no number after {label}"))
}

fn binary() -> Result<Row> {
    let path = fleet::binary()?;
    let row = Row::new(NAME, "binary", Unit::Megabytes, megabytes(&path)?)
        .at_most(25.0)
        .beside(megabytes(Path::new(QEMU))?, "qemu-system-x86_64 without its libraries");
    Ok(if path.components().any(|part| part.as_os_str() == "debug") {
        row.note("this is a debug build with its symbols: it says nothing")
    } else {
        row
    })
}

fn megabytes(path: &Path) -> Result<f64> {
    let bytes = fs::metadata(path).with_context(|| format!("looking at {}", path.display()))?.len();
    Ok(f64::from(u32::try_from(bytes)?) / 1e6)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_takes_something() {
        let me = taken(std::process::id()).unwrap();
        assert!(me.rss > 1.0 && me.pss > 0.1 && me.pss <= me.rss + 1.0, "{me:?}");
        assert!(me.threads >= 1.0 && me.files >= 3.0, "{me:?}");
    }

    #[test]
    fn labels_are_whole() {
        let text = "VmRSS:\t  2048 kB\nPss_Anon: 7 kB\nPss:  512 kB\n";
        assert_eq!((number(text, "VmRSS:").unwrap(), number(text, "Pss:").unwrap()), (2048.0, 512.0));
        assert!(number(text, "Rss:").is_err());
    }
}
