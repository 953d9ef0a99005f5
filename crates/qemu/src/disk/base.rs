//! What a base image is, read from its first bytes by this program. No tool runs on an image from elsewhere: a header
//! can point at any file of the host, and qemu-img would follow it. Called by `plan_overlay`'s callers.

use std::fmt;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use qudata_host::size::ByteSize;

/// Format of a base image, as QEMU names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum BaseFormat {
    /// The bytes of the disk.
    Raw,
    /// QEMU's own format, versions 2 and 3.
    Qcow2,
}

impl BaseFormat {
    /// QEMU's name of the format.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

impl fmt::Display for BaseFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A base image that may be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BaseImage {
    /// How its bytes are to be read.
    pub format: BaseFormat,
    /// Size of the disk it holds.
    pub virtual_size: ByteSize,
}

/// Why a base image is not used.
#[derive(Debug, thiserror::Error)]
pub enum InspectBaseError {
    /// It cannot be read.
    #[error("cannot read the base image {}", path.display())]
    Read {
        /// The image.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// It is not what a base image may be.
    #[error("the base image {} cannot be used", path.display())]
    Unfit {
        /// The image.
        path: PathBuf,
        /// The cause.
        #[source]
        source: Unfit,
    },
}

/// What is wrong with an image, and what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unfit {
    /// No regular file.
    #[error("it is no regular file")]
    NotAFile,
    /// No content.
    #[error("it holds no disk: its size is 0")]
    Empty,
    /// A format that is no disk as it stands.
    #[error(
        "it is {0}, and only raw and qcow2 are allowed: unpack it, or convert it with `qemu-img convert -O qcow2`"
    )]
    Foreign(&'static str),
    /// The file ends inside the header.
    #[error("its qcow2 header is cut off: copy it again")]
    Truncated,
    /// Another version of qcow.
    #[error("it is qcow version {0}, and 2 and 3 are allowed: convert it with `qemu-img convert -O qcow2`")]
    Version(u32),
    /// A header that contradicts itself.
    #[error("its qcow2 header is damaged ({0}): copy it again")]
    Damaged(&'static str),
    /// It needs another file.
    #[error("it depends on another file ({0}): flatten it with `qemu-img convert -O qcow2`")]
    Dependent(&'static str),
    /// It is encrypted.
    #[error("it is encrypted: decrypt it with `qemu-img convert -O qcow2`")]
    Encrypted,
    /// Somebody writes it, or did not finish.
    #[error("it is in use or was not closed ({0}): close it, then run `qemu-img check -r all`")]
    Unclean(&'static str),
    /// A feature this program does not know.
    #[error("it uses unknown qcow2 features (bits {0:#x}): convert it with `qemu-img convert -O qcow2`")]
    Features(u64),
}

/// Enough for every field of a version 3 header that is looked at.
const HEADER_READ: u64 = 112;
const QCOW_MAGIC: &[u8] = b"QFI\xfb";
/// Length of a version 2 header, and of the shortest version 3 header.
const HEADER_V2: usize = 72;
const HEADER_V3: u32 = 104;

const DIRTY: u64 = 1;
const CORRUPT: u64 = 1 << 1;
const EXTERNAL_DATA: u64 = 1 << 2;
const COMPRESSION: u64 = 1 << 3;
const EXTENDED_L2: u64 = 1 << 4;

/// Leading bytes of what people take for a disk image. A raw disk starts with a boot sector and is none of these.
const FOREIGN: [(&[u8], &str); 9] = [
    (b"KDMV", "a VMDK image"),
    (b"# Disk DescriptorFile", "a VMDK descriptor"),
    (b"vhdxfile", "a VHDX image"),
    (b"conectix", "a VHD image"),
    (b"QED\0", "a QED image"),
    (b"\x1f\x8b", "compressed with gzip"),
    (b"\xfd7zXZ\0", "compressed with xz"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd"),
    (b"PK\x03\x04", "a ZIP archive"),
];

/// Reads what `path` is. Touches the first bytes only.
///
/// # Errors
/// When it cannot be read, or is nothing a machine may be built on.
pub fn inspect_base(path: &Path) -> Result<BaseImage, InspectBaseError> {
    let unreadable = |source| InspectBaseError::Read { path: path.into(), source };
    let unfit = |source| InspectBaseError::Unfit { path: path.into(), source };
    // Opening a pipe would wait for its writer.
    if !std::fs::metadata(path).map_err(unreadable)?.is_file() {
        return Err(unfit(Unfit::NotAFile));
    }
    let mut file = File::open(path).map_err(unreadable)?;
    let mut header = Vec::new();
    file.by_ref().take(HEADER_READ).read_to_end(&mut header).map_err(unreadable)?;
    let length = file.seek(SeekFrom::End(0)).map_err(unreadable)?;
    parse(&header, length).map_err(unfit)
}

/// Decides from the first bytes of a file and its length.
fn parse(header: &[u8], length: u64) -> Result<BaseImage, Unfit> {
    if header.starts_with(QCOW_MAGIC) {
        let virtual_size = ByteSize::from_bytes(parse_qcow2(header)?);
        return Ok(BaseImage { format: BaseFormat::Qcow2, virtual_size });
    }
    if let Some((_, name)) = FOREIGN.iter().find(|(magic, _)| header.starts_with(magic)) {
        return Err(Unfit::Foreign(name));
    }
    if length == 0 {
        return Err(Unfit::Empty);
    }
    // QEMU shows a raw file in whole sectors, rounded up.
    let virtual_size = ByteSize::from_bytes(length.next_multiple_of(512));
    Ok(BaseImage { format: BaseFormat::Raw, virtual_size })
}

/// The virtual size, when nothing speaks against the image.
fn parse_qcow2(header: &[u8]) -> Result<u64, Unfit> {
    let version = be32(header, 4)?;
    if !(2..=3).contains(&version) {
        return Err(Unfit::Version(version));
    }
    if header.len() < HEADER_V2 {
        return Err(Unfit::Truncated);
    }
    if be64(header, 8)? != 0 || be32(header, 16)? != 0 {
        return Err(Unfit::Dependent("a backing file"));
    }
    let cluster_bits = be32(header, 20)?;
    if !(9..=21).contains(&cluster_bits) {
        return Err(Unfit::Damaged("cluster size"));
    }
    if be32(header, 32)? != 0 {
        return Err(Unfit::Encrypted);
    }
    if version == 3 {
        check_version_3(header)?;
    }
    match be64(header, 24)? {
        0 => Err(Unfit::Empty),
        size if i64::try_from(size).is_err() => Err(Unfit::Damaged("disk size")),
        size => Ok(size.next_multiple_of(512)),
    }
}

fn check_version_3(header: &[u8]) -> Result<(), Unfit> {
    let header_length = be32(header, 100)?;
    if header_length < HEADER_V3 || header_length % 8 != 0 {
        return Err(Unfit::Damaged("header length"));
    }
    let features = be64(header, 72)?;
    let unknown = features & !(DIRTY | CORRUPT | EXTERNAL_DATA | COMPRESSION | EXTENDED_L2);
    if unknown != 0 {
        return Err(Unfit::Features(unknown));
    }
    if features & EXTERNAL_DATA != 0 {
        return Err(Unfit::Dependent("an external data file"));
    }
    if features & DIRTY != 0 {
        return Err(Unfit::Unclean("dirty mark"));
    }
    if features & CORRUPT != 0 {
        return Err(Unfit::Unclean("corrupt mark"));
    }
    if features & COMPRESSION != 0 {
        let kind = if header_length > HEADER_V3 { header.get(104) } else { None };
        // 0 is deflate, for which the feature bit must be clear; 1 is zstd.
        return if kind == Some(&1) { Ok(()) } else { Err(Unfit::Damaged("compression type")) };
    }
    Ok(())
}

fn be32(bytes: &[u8], at: usize) -> Result<u32, Unfit> {
    field(bytes, at).map(u32::from_be_bytes)
}

fn be64(bytes: &[u8], at: usize) -> Result<u64, Unfit> {
    field(bytes, at).map(u64::from_be_bytes)
}

fn field<const N: usize>(bytes: &[u8], at: usize) -> Result<[u8; N], Unfit> {
    bytes.get(at..).and_then(|rest| rest.first_chunk::<N>()).copied().ok_or(Unfit::Truncated)
}

#[cfg(test)]
mod tests;
