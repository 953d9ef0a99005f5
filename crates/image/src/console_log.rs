//! What a building machine printed: a bounded file for people, and its last lines for an error. Owned by `boot`.

use std::{
    collections::VecDeque,
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

/// Bytes of one file; there are at most two.
const LIMIT: u64 = 4 << 20;
/// Lines that are kept for an error.
const LINES: usize = 25;
/// Characters of such a line.
const WIDTH: usize = 300;

/// The log.
#[derive(Debug)]
pub(crate) struct ConsoleLog {
    path: PathBuf,
    file: File,
    written: u64,
    lines: VecDeque<String>,
    line: Vec<u8>,
}

impl ConsoleLog {
    /// Starts an empty file at `path`, readable by its owner only.
    pub(crate) fn create(path: &Path) -> io::Result<Self> {
        let file = open(path)?;
        Ok(Self { path: path.to_owned(), file, written: 0, lines: VecDeque::new(), line: Vec::new() })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Takes the next bytes. When the file is full it becomes the old one, and a new one begins.
    pub(crate) fn add(&mut self, bytes: &[u8]) -> io::Result<()> {
        for byte in bytes {
            match byte {
                b'\n' => self.end_line(),
                _ if self.line.len() < WIDTH => self.line.push(*byte),
                _ => {}
            }
        }
        let length = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        if self.written.saturating_add(length) > LIMIT {
            let mut old = self.path.clone().into_os_string();
            old.push(".old");
            fs::rename(&self.path, old)?;
            self.file = open(&self.path)?;
            self.written = 0;
        }
        self.file.write_all(bytes)?;
        self.written = self.written.saturating_add(length);
        Ok(())
    }

    fn end_line(&mut self) {
        let text = String::from_utf8_lossy(&self.line);
        let text: String = text.chars().filter(|c| !c.is_control()).collect();
        self.line.clear();
        if text.trim().is_empty() {
            return;
        }
        if self.lines.len() == LINES {
            self.lines.pop_front();
        }
        self.lines.push_back(text);
    }

    /// The last lines, oldest first.
    pub(crate) fn tail(&self) -> Vec<String> {
        self.lines.iter().cloned().collect()
    }
}

fn open(path: &Path) -> io::Result<File> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    // New, so that a link that somebody left there is not followed.
    OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_lines_are_kept_and_the_files_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("build.log");
        fs::write(&path, "of another build").unwrap();
        let mut log = ConsoleLog::create(&path).unwrap();
        for number in 0..40 {
            log.add(format!("line {number}\r\n\n").as_bytes()).unwrap();
        }
        log.add(b"\x1b[31mun").unwrap();
        log.add(b"finished").unwrap();
        assert_eq!(log.tail().len(), LINES);
        assert_eq!(log.tail().last().unwrap(), "line 39");
        let block = vec![b'x'; 1 << 20];
        for _ in 0..20 {
            log.add(&block).unwrap();
        }
        let sizes: Vec<u64> =
            fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().metadata().unwrap().len()).collect();
        assert!(sizes.len() == 2 && sizes.iter().all(|size| *size <= LIMIT), "{sizes:?}");
    }
}
