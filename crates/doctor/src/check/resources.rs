//! `memory`, `hugepages`, `disk`: is there room for an instance?

use qudata_host::{capacity::HostCapacity, size::ByteSize};

use super::{fail, pass, unseen, warn};
use crate::{
    Finding,
    observed::{AgentLook, Hugepages, Observed},
};

const MEMORY: &str = "memory";
const HUGEPAGES: &str = "hugepages";
const DISK: &str = "disk";

/// The smallest instance that is of use.
const LEAST_MEMORY: ByteSize = ByteSize::from_gib(2);
const LEAST_DISK: ByteSize = ByteSize::from_gib(10);

pub(super) fn check(seen: &Observed) -> Vec<Finding> {
    let (memory, disk) = match &seen.capacity {
        Ok(capacity) => (memory(seen, capacity), disk(seen, capacity)),
        Err(why) => (unseen(MEMORY, why), unseen(DISK, why)),
    };
    let hugepages = match &seen.hugepages {
        Ok(pages) => hugepages(*pages),
        Err(why) => unseen(HUGEPAGES, why),
    };
    vec![memory, hugepages, disk]
}

/// Instances that run have their share; what is left need not be enough for another.
fn rented(seen: &Observed) -> bool {
    matches!(&seen.agent, AgentLook::Answers(view) if view.instances > 0)
}

fn gib(size: ByteSize) -> String {
    let tenths = size.bytes().saturating_mul(10) >> 30;
    format!("{}.{} GiB", tenths / 10, tenths % 10)
}

fn memory(seen: &Observed, capacity: &HostCapacity) -> Finding {
    let settings = &seen.settings;
    let reserve = settings.host_reserve_memory;
    let huge = seen.hugepages.as_ref().map(|pages| pages.free).unwrap_or_default();
    let (total, now) = (capacity.memory_total, capacity.memory_available);
    let free = now.saturating_sub(reserve).max(huge);
    let state = format!("{} of {} available, {} kept for the host", gib(now), gib(total), gib(reserve));
    let needed = settings.vm_memory.min(LEAST_MEMORY);
    if total.saturating_sub(reserve).max(huge) < needed {
        let line = format!("{state}: not enough for an instance of {}", gib(needed));
        return fail(MEMORY, line, "use a host with more RAM; 16 GiB and more are of use for GPU work");
    }
    if rented(seen) {
        return pass(MEMORY, format!("{state}; instances run"));
    }
    if free < needed {
        let line = format!("{state}: other programs leave less than an instance of {} needs", gib(needed));
        return fail(MEMORY, line, "end what uses it: `ps aux --sort=-rss | head`");
    }
    if free < settings.vm_memory {
        let line = format!("{state}: less than an instance gets by default ({})", gib(settings.vm_memory));
        return warn(
            MEMORY,
            line,
            "end what uses it, or set vm_memory to what there is; until then instances get less",
        );
    }
    pass(MEMORY, state)
}

/// Optional: RAM in large pages is pinned in a moment, other RAM at a second for some GiB.
fn hugepages(pages: Hugepages) -> Finding {
    if pages.reserved == ByteSize::default() {
        return pass(HUGEPAGES, "none reserved; with some, instances with much RAM and GPUs start faster");
    }
    pass(HUGEPAGES, format!("{} reserved, {} free", gib(pages.reserved), gib(pages.free)))
}

fn disk(seen: &Observed, capacity: &HostCapacity) -> Finding {
    let settings = &seen.settings;
    let reserve = settings.host_reserve_disk;
    let free = capacity.disk_free.saturating_sub(reserve);
    let dir = settings.data_dir.display();
    let state = format!(
        "{} free of {} for {dir}, {} kept for the host",
        gib(capacity.disk_free),
        gib(capacity.disk_total),
        gib(reserve)
    );
    let usual = ByteSize::from_gib(settings.vm_storage_gb);
    let needed = usual.min(LEAST_DISK);
    let remedy = "free some space, or set data_dir to a file system that has it";
    if free < needed && !rented(seen) {
        return fail(DISK, format!("{state}: not enough for an instance of {}", gib(needed)), remedy);
    }
    if free < usual {
        return warn(
            DISK,
            format!("{state}: less than an instance gets by default ({})", gib(usual)),
            remedy,
        );
    }
    pass(DISK, state)
}
