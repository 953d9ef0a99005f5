//! A cpio archive with one file, to be put before an initramfs: the kernel unpacks both. Called by `kit`.
//! Format: `newc`, Linux Documentation/driver-api/early-userspace/buffer-format.rst. Before and not behind, because the
//! kernel's lz4 decoder takes what follows its archive for one more block.

/// The archive: one executable file, then the end mark, padded so that a compressed archive may follow.
pub(crate) fn archive(name: &str, content: &[u8]) -> Option<Vec<u8>> {
    let mut out = Vec::new();
    entry(&mut out, name, 0o100_755, content)?;
    entry(&mut out, "TRAILER!!!", 0, b"")?;
    // The kernel skips zeros between archives.
    out.resize(out.len().next_multiple_of(512), 0);
    Some(out)
}

fn entry(out: &mut Vec<u8>, name: &str, mode: u32, content: &[u8]) -> Option<()> {
    let (size, named) = (u32::try_from(content.len()).ok()?, u32::try_from(name.len() + 1).ok()?);
    // inode, mode, uid, gid, links, mtime, size, device major and minor, rdev major and minor, name size, checksum.
    let fields = [1, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, named, 0];
    out.extend_from_slice(b"070701");
    for field in fields {
        out.extend_from_slice(format!("{field:08x}").as_bytes());
    }
    out.extend_from_slice(name.as_bytes());
    out.push(0);
    out.resize(out.len().next_multiple_of(4), 0);
    out.extend_from_slice(content);
    out.resize(out.len().next_multiple_of(4), 0);
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_and_contents_are_aligned() {
        let archive = archive("lab-init", b"#!/bin/sh\n").unwrap();
        assert_eq!(archive.len() % 512, 0);
        // 110 bytes of header and 9 of name make 119, so the content starts at 120.
        assert_eq!(&archive[120..130], b"#!/bin/sh\n");
        assert_eq!(&archive[132..138], b"070701");
        assert_eq!(&archive[54..62], b"0000000a");
    }
}
