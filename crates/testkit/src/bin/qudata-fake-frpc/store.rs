//! The two files it writes: the store of proxies and the log. Called by `proxies`.

use std::{
    fs::{self, File},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

use serde::{Deserialize, Serialize};

use crate::config::Definition;

/// What the store's file holds.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Stored {
    #[serde(default)]
    proxies: Vec<Definition>,
}

/// The proxies in the store's file; none when there is no file yet.
pub(crate) fn load(file: &Path) -> Result<Vec<Definition>, String> {
    match fs::read(file) {
        Ok(bytes) => serde_json::from_slice::<Stored>(&bytes)
            .map(|stored| stored.proxies)
            .map_err(|e| format!("failed to create store source: failed to load existing data: {e}")),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(e) => Err(format!("failed to create store source: failed to load existing data: {e}")),
    }
}

/// Replaces the store's file.
pub(crate) fn save(file: &Path, proxies: Vec<Definition>) -> Result<(), String> {
    let write = || -> io::Result<()> {
        let mut name = file.as_os_str().to_owned();
        name.push(".tmp");
        let mut temporary =
            File::options().create(true).truncate(true).write(true).mode(0o600).open(&name)?;
        temporary.write_all(&serde_json::to_vec_pretty(&Stored { proxies })?)?;
        temporary.sync_all()?;
        fs::rename(&name, file)
    };
    write().map_err(|e| format!("failed to persist: {e}"))
}

/// Where the log goes, and what for.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Log {
    to: String,
    level: String,
}

impl Log {
    pub(crate) fn check(&self) -> Result<(), String> {
        if ["", "trace", "debug", "info", "warn", "error"].contains(&self.level.as_str()) {
            return Ok(());
        }
        Err("invalid log level, optional values are [trace debug info warn error]".to_owned())
    }

    pub(crate) fn open(&self) -> Result<Logger, String> {
        if matches!(self.to.as_str(), "" | "console") {
            return Ok(Logger(None));
        }
        let file = File::options().create(true).append(true).open(&self.to);
        file.map(|file| Logger(Some(file))).map_err(|e| format!("open {}: {e}", self.to))
    }
}

/// The log.
#[derive(Debug)]
pub(crate) struct Logger(Option<File>);

impl Logger {
    /// One line.
    pub(crate) fn say(&self, words: &str) {
        // Nobody is left to be told that the log cannot be written.
        let _ = match self.0.as_ref() {
            Some(file) => {
                let mut file = file;
                writeln!(file, "[I] {words}")
            }
            None => writeln!(io::stdout(), "[I] {words}"),
        };
    }
}
