//! A stand-in for frpc where there is no frp, and where frp must do what the real one never does: the same flags, the
//! same strict settings, the same admin API, real TCP forwarding, but no frps: it publishes by itself, at the address
//! where the server should be. Started by tests in place of frpc; `tests/frpc.rs` holds it against the real one.
//!
//! ```text
//! settings ─┐
//! store ────┴▶ wanted ──▶ Proxies (ports bound, streams copied) ──▶ /api/status
//! faults: <this executable>.json, read again before every step
//! ```
mod admin;
mod config;
mod faults;
mod forward;
mod proxies;
mod store;
mod vhost;

use std::{env, path::PathBuf, process::ExitCode, sync::Arc, thread, time::Duration};

use self::{
    config::{Config, Strictness},
    faults::Faults,
    proxies::Proxies,
};

/// Time between two looks at what should be.
const STEP: Duration = Duration::from_millis(25);

fn main() -> ExitCode {
    match run() {
        Ok(code) => code,
        Err(words) => {
            // frpc tells its errors on stdout.
            println!("{words}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<ExitCode, String> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["--version" | "-v"] => {
            println!("{}", Faults::read()?.version());
            Ok(ExitCode::SUCCESS)
        }
        ["verify", "-c" | "--config", file] | ["-c" | "--config", file, "verify"] => {
            Config::load(file.as_ref(), Strictness::Strict, Faults::read()?.version())?;
            println!("frpc: the configuration file {file} syntax is ok");
            Ok(ExitCode::SUCCESS)
        }
        ["-c" | "--config", file] => serve(PathBuf::from(file)),
        _ => Err(format!("unknown arguments: {}", words.join(" "))),
    }
}

/// Runs until `/api/stop`, a fault or a signal.
fn serve(file: PathBuf) -> Result<ExitCode, String> {
    let faults = Faults::read()?;
    let config = Config::load(&file, Strictness::Strict, faults.version())?;
    if faults.crash_at_start {
        return Err("crashed at the start, as ordered".to_owned());
    }
    let log = config.log.open()?;
    log.say(&format!(
        "start frpc service for config file [{}] with aggregated configuration",
        file.display()
    ));
    let proxies = Arc::new(Proxies::new(&config, log)?);
    let _server = admin::start(file, &config, &proxies)?;
    if let Err(e) = vhost::start(proxies.address(), &proxies) {
        proxies.say(&format!("no HTTP by virtual host: {e}"));
    }
    loop {
        let faults = Faults::read()?;
        if config.login_fail_exit && !proxies.was_up() && faults.session != faults::Session::Up {
            return Err(format!("login to the server failed: {}", faults.session.words(&config)));
        }
        proxies.step(&faults);
        if let Some(code) = proxies.ending() {
            return Ok(ExitCode::from(code));
        }
        thread::sleep(STEP);
    }
}
