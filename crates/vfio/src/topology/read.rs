//! Reading small kernel files with a bound. Called by everything in this crate that reads sysfs or procfs.

use std::{
    fs::File,
    io::{self, Read},
    path::Path,
};

/// No attribute of sysfs is longer than a page; the longest file read whole is the kernel's command line.
const MOST: u64 = 64 << 10;

/// The content of a small file, without white space around it.
pub(crate) fn read_small(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    File::open(path)?.take(MOST).read_to_string(&mut text)?;
    text.truncate(text.trim_end().len());
    Ok(text)
}

/// The last component of where a link points to, which is the name of a driver, a group, a module.
pub(crate) fn link_name(path: &Path) -> io::Result<String> {
    let target = path.read_link()?;
    let name = target.file_name().and_then(|name| name.to_str());
    name.map(str::to_owned).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "a link without a name"))
}

/// Whether an error says that the thing is not there, or not there any more: removed devices answer `ENODEV`, files of a
/// process that has ended `ESRCH`.
pub(crate) fn is_gone(error: &io::Error) -> bool {
    const ENODEV: i32 = 19;
    const ESRCH: i32 = 3;
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
        || matches!(error.raw_os_error(), Some(ENODEV | ESRCH))
}
