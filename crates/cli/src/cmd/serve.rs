//! `serve`: the daemon's process. Owns logging, settings and the runtime; everything else is `qudata-agent-core`.

use std::io::IsTerminal;

use anyhow::Context as _;
use qudata_agent_core::{
    daemon,
    settings::{LoadFrom, Settings},
};
use tracing_subscriber::{EnvFilter, fmt, util::SubscriberInitExt};

use crate::{
    args::Serve,
    exit::{Exit, Failure},
};

/// The daemon waits far more than it works; every thread costs memory that renters could have.
const WORKERS: usize = 2;
/// File systems may block some threads for a while, but never hundreds.
const BLOCKING_THREADS: usize = 16;
/// Variable for the form of the log.
pub(super) const LOG_FORMAT: &str = "QUDATA_LOG_FORMAT";
/// Variable for what is logged.
pub(super) const LOG_FILTER: &str = "QUDATA_LOG";
/// The same in the words of the Rust world.
const LOG_FILTER_FALLBACK: &str = "RUST_LOG";

/// Runs the daemon until it is told to end.
pub(super) fn run(wish: Serve) -> Result<Exit, Failure> {
    let settings = settings(wish)?;
    start_log(&settings)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .max_blocking_threads(BLOCKING_THREADS)
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    runtime.block_on(daemon::run(settings)).map_err(anyhow::Error::new)?;
    Ok(Exit::Done)
}

fn settings(wish: Serve) -> Result<Settings, Failure> {
    let flags = if wish.standalone { vec![("standalone", "true".to_owned())] } else { Vec::new() };
    let mut from = LoadFrom::host(wish.config.as_deref(), flags).map_err(anyhow::Error::new)?;
    // Logging must work before the settings are known, so these two are not settings.
    from.env.retain(|(name, _)| name != LOG_FORMAT && name != LOG_FILTER);
    Ok(from.load().map_err(anyhow::Error::new)?)
}

/// Text for people, JSON for collectors, unless `QUDATA_LOG_FORMAT` says otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    Text,
    Json,
}

fn start_log(settings: &Settings) -> Result<(), Failure> {
    let terminal = std::io::stderr().is_terminal();
    let format = format(std::env::var(LOG_FORMAT).ok().as_deref(), terminal)?;
    let wish = [LOG_FILTER, LOG_FILTER_FALLBACK]
        .into_iter()
        .find_map(|name| Some((name, std::env::var(name).ok()?)));
    let filter = filter(wish, settings.debug)?;
    let log = fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let started = match format {
        Format::Text => log.with_ansi(terminal).with_target(false).finish().try_init(),
        Format::Json => {
            log.json().flatten_event(true).with_current_span(true).with_span_list(false).finish().try_init()
        }
    };
    started.context("cannot start logging").map_err(Failure::from)
}

fn format(wish: Option<&str>, terminal: bool) -> Result<Format, Failure> {
    match wish {
        Some("text") => Ok(Format::Text),
        Some("json") => Ok(Format::Json),
        None | Some("") => Ok(if terminal { Format::Text } else { Format::Json }),
        Some(other) => {
            Err(Failure::new(Exit::Failed, format!("{LOG_FORMAT}={other:?} is not allowed: text or json is")))
        }
    }
}

fn filter(wish: Option<(&str, String)>, debug: bool) -> Result<EnvFilter, Failure> {
    match wish {
        Some((name, text)) if !text.is_empty() => EnvFilter::try_new(&text).map_err(|e| {
            Failure::new(
                Exit::Failed,
                format!("{name}={text:?} is not allowed ({e}): write a level such as debug, or module=level"),
            )
        }),
        _ if debug => Ok(EnvFilter::new(
            "info,qudata_agent_core=debug,qudata_qemu=debug,qudata_guest=debug,qudata_host=debug",
        )),
        _ => Ok(EnvFilter::new("info")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn people_get_text_and_collectors_json() {
        let table = [
            (None, true, Some(Format::Text)),
            (None, false, Some(Format::Json)),
            (Some(""), false, Some(Format::Json)),
            (Some("text"), false, Some(Format::Text)),
            (Some("json"), true, Some(Format::Json)),
            (Some("xml"), true, None),
        ];
        for (wish, terminal, expected) in table {
            assert_eq!(format(wish, terminal).ok(), expected, "{wish:?}");
        }
    }

    #[test]
    fn filters_are_checked() {
        assert_eq!(filter(None, false).unwrap().to_string(), "info");
        assert_eq!(filter(Some(("QUDATA_LOG", "warn".to_owned())), true).unwrap().to_string(), "warn");
        let failure = filter(Some(("QUDATA_LOG", "a=b=c".to_owned())), false).unwrap_err();
        assert!(failure.sentence.contains("QUDATA_LOG=\"a=b=c\""), "{failure}");
    }
}
