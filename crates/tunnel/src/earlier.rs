//! What the frpc of an earlier agent was told to route, as the disk tells it, and its end where there is to be no tunnel
//! any more. Called by `tunnel` before anything else happens, and by the agent.
//!
//! ```text
//! <dir>/state              made for every frpc, gone once it was ended for good
//! <dir>/state/routes.json  frpc ≥ 0.68: its store, written by its user and therefore read with care
//! the configuration        before: its tables of routes
//! ```

use std::{
    fs::{self, File},
    io::{self, Read},
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

use qudata_host::{causes::chain, durable, launch::Launcher};
use rustix::fs::OFlags;
use serde::Deserialize;

use crate::{definition::Proxy, frpc, route::Route, setup, tunnel::StopError};

/// A thousand routes have 300 KiB.
const FILE_MAX: u64 = 4 << 20;

/// The routes that an earlier frpc was told to have, and may still have: what their local ports lead to is reachable
/// until a [`Tunnel`](crate::Tunnel) says otherwise. Takes the directory and the configuration of the
/// [`TunnelSetup`](crate::TunnelSetup). Files that cannot be read are logged and hold nothing.
pub fn earlier_routes(dir: &Path, config: &Path) -> Vec<Route> {
    let absent = |error: &io::Error| error.kind() == io::ErrorKind::NotFound;
    if fs::symlink_metadata(setup::state_dir(dir)).is_err_and(|error| absent(&error)) {
        return Vec::new();
    }
    let store = setup::store_in(dir);
    let mut routes = Vec::new();
    for (path, read) in [(store.as_path(), in_store as fn(&str) -> _), (config, in_config)] {
        match read_plain(path).and_then(|text| read(&text)) {
            Ok(found) => routes.extend(found.iter().filter_map(Proxy::read).map(|defined| defined.route)),
            Err(error) if absent(&error) => {}
            Err(error) => tracing::warn!(
                path = %path.display(), %error,
                "what an earlier frpc routes cannot be read; it is asked itself once it is taken over"
            ),
        }
    }
    routes
}

/// Ends the frpc that an earlier agent has left in `dir`, and forgets its routes; that there is none is success, at once.
///
/// # Errors
/// When frpc is still there.
pub async fn end_earlier(launcher: &Launcher, dir: &Path) -> Result<(), StopError> {
    frpc::end_in(launcher, dir).await.map_err(StopError)?;
    // Nothing reads it but a new agent with a tunnel, which finds no frpc and goes by that.
    if let Err(error) = durable::remove_tree(&setup::state_dir(dir)) {
        tracing::warn!(error = chain(&error), "the routes of an earlier frpc cannot be removed");
    }
    Ok(())
}

/// A route that is none of ours is left out, and does not hold up the others.
fn in_store(text: &str) -> io::Result<Vec<Proxy>> {
    #[derive(Deserialize)]
    struct Store {
        #[serde(default)]
        proxies: Vec<serde_json::Value>,
    }
    let store: Store = serde_json::from_str(text)?;
    Ok(store.proxies.into_iter().filter_map(|proxy| serde_json::from_value(proxy).ok()).collect())
}

fn in_config(text: &str) -> io::Result<Vec<Proxy>> {
    #[derive(Deserialize)]
    struct Tables {
        #[serde(default)]
        proxies: Vec<toml::Value>,
    }
    // The error would show a piece of the text, and a token may stand there.
    let tables: Tables = toml::from_str(text).map_err(|_| io::Error::other("it is no TOML with routes"))?;
    Ok(tables.proxies.into_iter().filter_map(|proxy| proxy.try_into().ok()).collect())
}

/// The text of a plain file: frpc's user may put a link to a file of the host there, or a pipe that blocks for ever.
fn read_plain(path: &Path) -> io::Result<String> {
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = File::options().read(true).custom_flags(flags.bits().cast_signed()).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a plain file"));
    }
    let mut text = String::new();
    file.take(FILE_MAX).read_to_string(&mut text)?;
    Ok(text)
}

#[cfg(test)]
mod tests;
