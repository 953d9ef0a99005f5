//! Runs on the lab's server in the part of the world outside: hands a release out over HTTP, and is the control plane of one
//! host. Called by the lab's stories of an installation, as a unit of the server.
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use qudata_testkit::control_plane::{ControlPlane, Terms};
use qudata_testkit::serve::{Answer, Request, Server};

/// What is read from the folder of the release at each request, so that a story may damage it.
fn answer(dir: &Path, request: &Request) -> Answer {
    let name = request.path.trim_start_matches('/');
    let plain = !name.is_empty() && !name.contains('/') && !name.starts_with('.');
    match fs::read(dir.join(name)) {
        Ok(body) if plain && request.method == "GET" => {
            Answer { status: 200, kind: "application/octet-stream", body }
        }
        _ => Answer::text(404, "no such file"),
    }
}

fn run() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [dir, release, service] = words.as_slice() else {
        bail!("usage: qudata-lab-outside DIR ADDRESS-OF-THE-RELEASE ADDRESS-OF-THE-SERVICE");
    };
    let address = |text: &str| text.parse::<SocketAddr>().with_context(|| format!("{text:?} is no address"));
    let dir = PathBuf::from(dir);
    let _service = ControlPlane::start_at(address(service)?, Terms::default());
    let _release = Server::start(address(release)?, move |request| Some(answer(&dir, request)))
        .context("the release cannot be served")?;
    loop {
        std::thread::park();
    }
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("qudata-lab-outside: error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
