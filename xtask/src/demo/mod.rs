//! `cargo xtask demo`: from nothing to a rented machine and back, on this machine. Called by main.
//!
//! ```text
//! as the caller:  packages → build the agent → guest image (→ frp) ──┐
//! as root:        agent → instance → timeline → SSH, HTTP → (Ctrl-C) → delete → leak check → agent stops
//! ```
//! With `--tunnel`, order, SSH and HTTP come from outside: control plane ─▶ agent ◀─ frpc ◀─ frps ◀─ platform, renter.
mod agent;
mod guest;
mod interrupt;
mod site;
mod story;
mod tunnel;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;
use qudata_testkit::frp::Frp;
use qudata_testkit::leakcheck::Baseline;

use self::agent::Agent;
use self::interrupt::Interrupt;
use self::site::Site;
use self::story::{Desk, Proof};
use self::tunnel::World;
use crate::tool::{self, say};
use crate::{cargo, deps, frp, image};

/// Idle threads of the agent's runtime end after ten seconds; what is there after that is a leak.
const SETTLE: Duration = Duration::from_secs(20);

#[derive(Debug, Args)]
pub(crate) struct Demo {
    /// Do not wait: delete at once, look for leaks, print one JSON line last.
    #[arg(long)]
    once: bool,
    /// Rent the machine from outside: a control plane, the real frps and frpc, SSH and HTTP through the server's ports.
    #[arg(long)]
    tunnel: bool,
    /// How the guest starts: uefi as cloud images do, or direct, the fastest.
    #[arg(long, default_value = "uefi", value_parser = ["uefi", "direct"])]
    firmware: String,
}

/// What the part that runs as root needs to know.
#[derive(Debug, Args)]
pub(crate) struct Plan {
    #[arg(long)]
    once: bool,
    #[arg(long)]
    firmware: String,
    #[arg(long)]
    agent: PathBuf,
    #[arg(long)]
    image: PathBuf,
    /// With a tunnel: the server.
    #[arg(long, requires = "frpc")]
    frps: Option<PathBuf>,
    /// And the client.
    #[arg(long, requires = "frps")]
    frpc: Option<PathBuf>,
}

/// Prepares as the caller and goes on as root.
pub(crate) fn prepare(demo: Demo) -> Result<ExitCode> {
    deps::ensure(&[deps::PRODUCT])?;
    let agent = cargo::build_agent(true)?;
    let image = image::ensure()?.guest;
    let found = demo.tunnel.then(frp::need).transpose()?;
    let (frps, frpc) = found.map(|frp| (frp.frps, frp.frpc)).unzip();
    let plan = Plan { once: demo.once, firmware: demo.firmware, agent, image, frps, frpc };
    if tool::is_root() {
        return run(&plan);
    }
    // Ctrl-C reaches this process too; it must not leave before the other one has cleaned up.
    let _interrupt = Interrupt::install()?;
    let mut command = tool::privileged(std::env::current_exe().context("cannot find this program")?);
    command.args(["demo-as-root", "--firmware", &plan.firmware, "--agent"]).arg(&plan.agent);
    command.arg("--image").arg(&plan.image).args(plan.once.then_some("--once"));
    for (flag, program) in [("--frps", &plan.frps), ("--frpc", &plan.frpc)] {
        if let Some(program) = program {
            command.arg(flag).arg(program);
        }
    }
    let status = command.status().context("cannot start sudo")?;
    Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The part that needs root.
pub(crate) fn run(plan: &Plan) -> Result<ExitCode> {
    let interrupt = Interrupt::install()?;
    let site = Site::open()?;
    let outcome = with_agent(plan, &site, &interrupt);
    let cleared = site.clear();
    let (summary, leaks) = outcome?;
    cleared?;
    for leak in &leaks {
        say(format!("left behind: {leak}"));
    }
    if leaks.is_empty() {
        say("deleted; nothing was left behind");
    }
    if plan.once {
        println!("{}", summary.line(leaks.len())?);
    }
    Ok(if leaks.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn with_agent(plan: &Plan, site: &Site, interrupt: &Interrupt) -> Result<(Summary, Leaks)> {
    let before = Baseline::take(&site.scope())?;
    let world = world(plan, site)?;
    say("starting the agent");
    let mut agent = Agent::start(plan, site, world.as_ref(), interrupt)?;
    let shown = with_instance(plan, site, &agent, world.as_ref(), interrupt);
    let stopped = agent.stop().and(World::end_frpc(site));
    let (summary, mut leaks) =
        shown.with_context(|| format!("the agent's last words:\n{}", agent::log_tail(site)))?;
    stopped?;
    leaks.extend(before.settle(SETTLE)?);
    Ok((summary, leaks))
}

/// What is outside of the host, if the plan wants it.
fn world(plan: &Plan, site: &Site) -> Result<Option<World>> {
    let (Some(frps), Some(frpc)) = (&plan.frps, &plan.frpc) else { return Ok(None) };
    let frp = Frp::probe(frps, frpc, "as prepared").map_err(anyhow::Error::msg)?;
    let world = World::start(frp);
    world.lend_frpc(site)?;
    Ok(Some(world))
}

type Leaks = Vec<qudata_testkit::leakcheck::Leak>;

fn with_instance(
    plan: &Plan,
    site: &Site,
    agent: &Agent,
    world: Option<&World>,
    interrupt: &Interrupt,
) -> Result<(Summary, Leaks)> {
    let public_key = guest::make_key(site, "key")?;
    let renter = world.map(|world| world.platform(&world.meet(interrupt)?, interrupt)).transpose()?;
    let before = Baseline::take(&site.scope_with_agent(agent.pid()))?;
    let desk = Desk { agent, renter };
    let created = story::create(&desk, &public_key)?;
    let id = story::text(&created, "id")?.to_owned();
    say(format!("instance {id} accepted"));
    let proof = story::prove(&desk, site, &created, interrupt).and_then(|proof| {
        if let Some(renter) = &desk.renter {
            renter.handle(&id, &guest::make_key(site, "other")?)?;
        }
        Ok(proof)
    });
    if let (Ok(proof), false) = (&proof, plan.once) {
        show(proof);
        interrupt.wait();
        say("cleaning up");
    }
    // Whatever happened before: the instance goes.
    let deleted = story::delete(&desk, &id);
    let proof = proof?;
    deleted?;
    let leaks = before.settle(SETTLE)?;
    world.map(World::verdict).transpose()?;
    Ok((Summary { instance: id, proof }, leaks))
}

fn show(proof: &Proof) {
    println!();
    println!("  log in:      {}", proof.login.command().join(" "));
    let (server, name) = (proof.app.server.address, &proof.app.name);
    match &proof.tunnel {
        Some(_) => println!("  application: curl --header 'Host: {name}' http://{server}/"),
        None => println!("  application: http://{server}/"),
    }
    println!();
    println!("  Ctrl-C deletes the machine and everything that belongs to it.");
}

#[derive(Debug)]
struct Summary {
    instance: String,
    proof: Proof,
}

impl Summary {
    /// The machine-readable last line; written by hand because its order is part of the promise.
    fn line(&self, leaks: usize) -> Result<String> {
        let Proof { post_to_exec_ms, create_to_ready_ms, ssh, app_http_status, tunnel, .. } = &self.proof;
        let (instance, ssh) = (serde_json::to_string(&self.instance)?, serde_json::to_string(ssh)?);
        let tunnel = tunnel.as_ref().map(|part| format!("\"tunnel\":{part},")).unwrap_or_default();
        Ok(format!(
            "{{\"instance\":{instance},\"post_to_exec_ms\":{post_to_exec_ms},\"create_to_ready_ms\":{create_to_ready_ms},\
             \"ssh\":{ssh},\"app_http_status\":{app_http_status},{tunnel}\"leaks\":{leaks}}}"
        ))
    }
}
