//! How much memory the machine that customises an image gets. Pure; called by `build` before anything is fetched, and by
//! `customise` when the machine is started.

use qudata_host::size::ByteSize;

use crate::error::BuildError;

/// What a package manager needs.
const LEAST: u64 = 768;
/// More helps nobody.
const MOST: u64 = 4096;
/// What QEMU itself takes beside the machine's memory.
const QEMU: u64 = 256;

/// Half of what is left to the host's reserve, between what a package manager needs and what a compiler can use. A host
/// whose memory is rented out has none left for this: the kernel would end something for it, and that could be a renter's
/// machine.
pub(crate) fn plan_memory(available: ByteSize, reserve: ByteSize) -> Result<ByteSize, BuildError> {
    let needed = ByteSize::from_mib(LEAST + QEMU);
    let left = available.saturating_sub(reserve);
    if left < needed {
        return Err(BuildError::Memory { needed, available, reserve });
    }
    Ok(ByteSize::from_mib((left.mib() / 2).clamp(LEAST, MOST)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_leaves_memory_to_the_host() {
        let gib = ByteSize::from_gib;
        let table = [
            (gib(512), gib(1), Some(4096)),
            (gib(4), gib(1), Some(1536)),
            (gib(2), gib(1), Some(768)),
            (ByteSize::from_mib(2047), gib(1), None),
            (gib(512), gib(512), None),
            (gib(1), gib(4), None),
        ];
        for (available, reserve, expected) in table {
            let planned = plan_memory(available, reserve);
            let mib = planned.as_ref().ok().map(|memory| memory.mib());
            assert_eq!(mib, expected, "{available} of which {reserve}");
            if let Err(error) = planned {
                assert_eq!(error.code(), "memory_too_small");
                assert!(error.to_string().contains("1024 MiB"), "{error}");
            }
        }
    }
}
