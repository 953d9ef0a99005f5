//! The real frp for the tests and the demo, found or made: `cargo xtask frp` prints frps and frpc. Called by main, test
//! and demo. Nothing of frp is in the repository.
//!
//! ```text
//! FRPS_BIN and FRPC_BIN ──▶ PATH ──▶ cache ──▶ the pinned release ──▶ the Go toolchain
//! <cache>/frp/.lock                                    one at a time
//! <cache>/frp/<version>-<hash>/{frps,frpc}             published by rename, named by the hash of what they came from
//! ```
mod build;
mod release;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use qudata_testkit::frp::{self, Frp};

use crate::image::cache;
use crate::tool::say;

/// What is downloaded or built when the machine has none. The newest that was tested.
const VERSION: &str = "0.70.1";
/// Names of what is in the making.
const WORK_PREFIX: &str = ".making-";

/// How a search for frp ended.
#[derive(Debug)]
pub(crate) enum Search {
    Found(Frp),
    /// There is none and none can be made; why, as the end of a sentence.
    Nowhere(String),
}

impl Search {
    /// The pair, if there is one.
    pub(crate) fn found(&self) -> Option<&Frp> {
        match self {
            Self::Found(frp) => Some(frp),
            Self::Nowhere(_) => None,
        }
    }
}

/// frps and frpc, or why there are none. A pair that the environment names and that does not work is an error: nobody
/// wants to test with another by accident.
pub(crate) fn search() -> Result<Search> {
    if let Some(named) = frp::named() {
        return named.map(Search::Found).map_err(|why| anyhow!(why));
    }
    let mut reasons = match frp::on_path() {
        Ok(frp) => return Ok(Search::Found(frp)),
        Err(why) => vec![why],
    };
    let cache = cache::open("frp")?;
    let makers = [release::maker(), build::maker()];
    // What an earlier run has made is as good as what a way before it would give, and costs nothing.
    if let Some(made) = makers.iter().flatten().find(|maker| maker.home(&cache).exists()) {
        return made.ensure(&cache).map(Search::Found);
    }
    for maker in makers {
        match maker.and_then(|maker| maker.ensure(&cache)) {
            Ok(frp) => return Ok(Search::Found(frp)),
            Err(why) => {
                say(format!("no frp this way: {why:#}"));
                reasons.push(format!("{why:#}"));
            }
        }
    }
    // One line, whatever the programs printed.
    Ok(Search::Nowhere(reasons.join("; ").replace('\n', ", ")))
}

/// frps and frpc for somebody who cannot do without.
pub(crate) fn need() -> Result<Frp> {
    match search()? {
        Search::Found(frp) => Ok(frp),
        Search::Nowhere(why) => bail!("there is no frp on this machine and none can be had: {why}"),
    }
}

/// Puts `frps` and `frpc` into an empty directory.
type Make = Box<dyn Fn(&Path) -> Result<()>>;

/// One way to make the pair.
struct Maker {
    /// Where the pair comes from, as the end of a sentence.
    source: String,
    /// Name of its directory in the cache; says everything that decides what is in it.
    name: String,
    make: Make,
}

impl Maker {
    /// Where in the cache its pair is, once made.
    fn home(&self, cache: &Path) -> PathBuf {
        cache.join(&self.name)
    }

    /// The pair from the cache, made first if it is not there.
    fn ensure(&self, cache: &Path) -> Result<Frp> {
        let home = self.home(cache);
        if !home.exists() {
            let _lock = cache::lock(cache)?;
            if !home.exists() {
                self.publish(cache, &home)?;
            }
        }
        Frp::probe(&home.join("frps"), &home.join("frpc"), &self.source).map_err(|why| anyhow!(why))
    }

    fn publish(&self, cache: &Path, home: &Path) -> Result<()> {
        sweep(cache)?;
        let work = cache.join(format!("{WORK_PREFIX}{}-{}", self.name, std::process::id()));
        fs::create_dir(&work).with_context(|| format!("cannot create {}", work.display()))?;
        let made = (self.make)(&work).and_then(|()| settle(&work, home));
        if made.is_err() {
            fs::remove_dir_all(&work).with_context(|| format!("cannot remove {}", work.display()))?;
        }
        made
    }
}

/// Gives the pair its final name in one step, readable and executable by every user, because frpc runs as one of its own.
fn settle(work: &Path, home: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    for name in ["frps", "frpc"] {
        let file = work.join(name);
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755))
            .and_then(|()| fs::File::open(&file)?.sync_all())
            .with_context(|| format!("no usable {name} came out"))?;
    }
    fs::set_permissions(work, fs::Permissions::from_mode(0o755))?;
    fs::rename(work, home).with_context(|| format!("cannot publish {}", home.display()))?;
    say(format!("frp is in {}", home.display()));
    Ok(())
}

/// Removes what crashed runs left. Only under the lock: then nobody is at it.
fn sweep(cache: &Path) -> Result<()> {
    for entry in fs::read_dir(cache).with_context(|| format!("cannot list {}", cache.display()))? {
        let path: PathBuf = entry?.path();
        if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(WORK_PREFIX)) {
            fs::remove_dir_all(&path).with_context(|| format!("cannot remove {}", path.display()))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn maker(make: impl Fn(&Path) -> Result<()> + 'static) -> Maker {
        Maker { source: "made here".into(), name: "0.0.1-test".into(), make: Box::new(make) }
    }

    #[test]
    fn what_was_not_made_whole_is_not_published() {
        let cache = std::env::temp_dir().join(format!("xtask-frp-{}", std::process::id()));
        fs::create_dir_all(cache.join(".making-left-by-a-crash")).unwrap();
        let home = cache.join("0.0.1-test");
        let half = maker(|work| Ok(fs::write(work.join("frps"), "x")?));
        let error = format!("{:#}", half.publish(&cache, &home).unwrap_err());
        assert!(error.contains("no usable frpc"), "{error}");
        assert_eq!(fs::read_dir(&cache).unwrap().count(), 0);

        let whole = maker(|work| {
            fs::write(work.join("frps"), "x")?;
            Ok(fs::write(work.join("frpc"), "x")?)
        });
        whole.publish(&cache, &home).unwrap();
        let names: Vec<_> = fs::read_dir(&cache).unwrap().map(|e| e.unwrap().file_name()).collect();
        fs::remove_dir_all(&cache).unwrap();
        assert_eq!(names, ["0.0.1-test"]);
    }
}
