//! `cargo xtask demo`: from nothing to a rented machine and back, on this machine. Called by main.
//!
//! ```text
//! as the caller:  packages → build the agent → guest image ──┐
//! as root:        agent → instance → timeline → SSH, HTTP → (Ctrl-C) → delete → leak check → agent stops
//! ```
mod agent;
mod guest;
mod interrupt;
mod site;
mod story;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;
use qudata_testkit::leakcheck::Baseline;

use self::agent::Agent;
use self::interrupt::Interrupt;
use self::site::Site;
use self::story::Proof;
use crate::tool::{self, say};
use crate::{cargo, deps, image};

/// Idle threads of the agent's runtime end after ten seconds; what is there after that is a leak.
const SETTLE: Duration = Duration::from_secs(20);

#[derive(Debug, Args)]
pub(crate) struct Demo {
    /// Do not wait: delete at once, look for leaks, print one JSON line last.
    #[arg(long)]
    once: bool,
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
}

/// Prepares as the caller and goes on as root.
pub(crate) fn prepare(demo: Demo) -> Result<ExitCode> {
    deps::ensure(&[deps::PRODUCT])?;
    let agent = cargo::build_agent(true)?;
    let image = image::ensure()?.guest;
    let plan = Plan { once: demo.once, firmware: demo.firmware, agent, image };
    if tool::is_root() {
        return run(&plan);
    }
    // Ctrl-C reaches this process too; it must not leave before the other one has cleaned up.
    let _interrupt = Interrupt::install()?;
    let mut command = tool::privileged(std::env::current_exe().context("cannot find this program")?);
    command.args(["demo-as-root", "--firmware", &plan.firmware, "--agent"]).arg(&plan.agent);
    command.arg("--image").arg(&plan.image).args(plan.once.then_some("--once"));
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
    say("starting the agent");
    let mut agent = Agent::start(plan, site, interrupt)?;
    let shown = with_instance(plan, site, &agent, interrupt);
    let stopped = agent.stop();
    let (summary, mut leaks) =
        shown.with_context(|| format!("the agent's last words:\n{}", agent::log_tail(site)))?;
    stopped?;
    leaks.extend(before.settle(SETTLE)?);
    Ok((summary, leaks))
}

type Leaks = Vec<qudata_testkit::leakcheck::Leak>;

fn with_instance(plan: &Plan, site: &Site, agent: &Agent, interrupt: &Interrupt) -> Result<(Summary, Leaks)> {
    let public_key = guest::make_key(site)?;
    let before = Baseline::take(&site.scope_with_agent(agent.pid()))?;
    let created = story::create(agent, &public_key)?;
    let id = story::text(&created, "id")?.to_owned();
    say(format!("instance {id} accepted"));
    let proof = story::prove(agent, site, &created, interrupt);
    if let (Ok(proof), false) = (&proof, plan.once) {
        show(proof);
        interrupt.wait();
        say("cleaning up");
    }
    // Whatever happened before: the instance goes.
    let deleted = story::delete(agent, &id);
    let proof = proof?;
    deleted?;
    Ok((Summary { instance: id, proof }, before.settle(SETTLE)?))
}

fn show(proof: &Proof) {
    println!();
    println!("  log in:      {}", proof.login.command().join(" "));
    println!("  application: http://127.0.0.1:{}/", proof.app_port);
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
        let Proof { post_to_exec_ms, create_to_ready_ms, ssh, app_http_status, .. } = &self.proof;
        let (instance, ssh) = (serde_json::to_string(&self.instance)?, serde_json::to_string(ssh)?);
        Ok(format!(
            "{{\"instance\":{instance},\"post_to_exec_ms\":{post_to_exec_ms},\"create_to_ready_ms\":{create_to_ready_ms},\
             \"ssh\":{ssh},\"app_http_status\":{app_http_status},\"leaks\":{leaks}}}"
        ))
    }
}
