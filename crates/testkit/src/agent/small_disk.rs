//! A file system of its own, small enough to be filled to the last byte: for an agent whose disk is full.

use std::{
    fs::{self, File},
    io::{ErrorKind, Write},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use rustix::fs::{FallocateFlags, fallocate, statvfs};

use crate::tool;

const DEADLINE: Duration = Duration::from_secs(30);
/// What is written byte by byte at the end; the rest is only reserved.
const WRITTEN: u64 = 1 << 20;

/// A mounted file system; dropping it takes it away, from a process that still uses it when that ends.
#[derive(Debug)]
pub struct SmallDisk {
    mount: PathBuf,
}

impl SmallDisk {
    /// Makes one of `bytes` in the file `image` and mounts it at `mount`.
    pub fn mount(image: &Path, mount: &Path, bytes: u64) -> Self {
        // Sparse: the host gives only what is written.
        let made = File::create(image).and_then(|file| file.set_len(bytes));
        made.and_then(|()| fs::create_dir_all(mount)).unwrap_or_else(|e| panic!("{}: {e}", image.display()));
        run(Command::new("mkfs.ext4").args(["-q", "-m", "0"]).arg(image));
        run(Command::new("mount").args(["-o", "loop"]).arg(image).arg(mount));
        Self { mount: mount.to_owned() }
    }

    /// Takes every byte that is left, also for root; [`SmallDisk::relieve`] gives them back.
    pub fn fill(&self) {
        let ballast = self.ballast();
        let mut file = File::options().append(true).create(true).open(&ballast).expect("a file for ballast");
        let free = statvfs(&self.mount).map(|s| s.f_bavail.saturating_mul(s.f_frsize)).unwrap_or_default();
        // Only to be fast: what it leaves is written.
        let _ = fallocate(&file, FallocateFlags::empty(), 0, free.saturating_sub(WRITTEN));
        for size in [64 * 1024, 4096, 1] {
            let block = vec![1; size];
            let error = loop {
                if let Err(error) = file.write_all(&block) {
                    break error;
                }
            };
            assert_eq!(error.kind(), ErrorKind::StorageFull, "{error}");
        }
        file.sync_all().expect("ballast can be synced");
    }

    /// Gives back what [`SmallDisk::fill`] took.
    pub fn relieve(&self) {
        fs::remove_file(self.ballast()).expect("the ballast can be removed");
    }

    fn ballast(&self) -> PathBuf {
        self.mount.join("ballast")
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let unmounted = tool::run(Command::new("umount").arg("--lazy").arg(&self.mount), DEADLINE);
        if !unmounted.is_ok_and(|output| output.status.success()) {
            eprintln!("{} stays mounted", self.mount.display());
        }
    }
}

fn run(command: &mut Command) {
    let output = tool::run(command, DEADLINE).unwrap_or_else(|e| panic!("{command:?}: {e}"));
    assert!(output.status.success(), "{command:?}: {}", output.stderr);
}
