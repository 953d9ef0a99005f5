//! The demo's agent: started on directories of its own, standalone or with a tunnel, spoken to over TCP with its secret.
//! Called by `demo`.
use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use qudata_testkit::http::Client;
use qudata_testkit::process::Seen;
use rustix::process::Signal;
use serde_json::Value;

use super::Plan;
use super::interrupt::Interrupt;
use super::site::{self, Site};
use super::tunnel::World;
use crate::tool::{self, say};

const START: Duration = Duration::from_secs(60);
const STOP: Duration = Duration::from_secs(20);

#[derive(Debug)]
pub(super) struct Agent {
    child: Child,
    pub(super) client: Client,
}

impl Agent {
    /// Starts it and waits until it answers.
    pub(super) fn start(
        plan: &Plan,
        site: &Site,
        world: Option<&World>,
        interrupt: &Interrupt,
    ) -> Result<Self> {
        let binary = site.agent();
        fs::copy(&plan.agent, &binary).with_context(|| format!("cannot copy {}", plan.agent.display()))?;
        fs::write(site.dir.join("agent.toml"), "").context("cannot write the settings file")?;
        let log = File::create(site.log()).context("cannot create the agent's log")?;
        let mut command = Command::new(&binary);
        command
            .args(["serve", "--config"])
            .arg(site.dir.join("agent.toml"))
            .args(world.is_none().then_some("--standalone"))
            // Nothing of the caller's environment: the demo is the same for everybody.
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .envs(environment(plan, site))
            .envs(world.map(|world| world.environment(site)).unwrap_or_default())
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            // Ctrl-C is for the demo, which then deletes through the agent.
            .process_group(0);
        let child = command.spawn().with_context(|| format!("cannot start {}", binary.display()))?;
        let client = Client {
            address: ([127, 0, 0, 1], site.api_port).into(),
            secret: None,
            deadline: Duration::from_secs(30),
        };
        let mut agent = Self { child, client };
        if let Err(error) = agent.greet(site, world, interrupt) {
            agent.stop()?;
            return Err(error);
        }
        Ok(agent)
    }

    fn greet(&mut self, site: &Site, world: Option<&World>, interrupt: &Interrupt) -> Result<()> {
        let (child, client) = (&mut self.child, &self.client);
        interrupt.poll("answer of the agent", START, || {
            if let Some(status) = child.try_wait()? {
                bail!("the agent ended at its start: {status}\n{}", log_tail(site));
            }
            Ok(client.call("GET", "/ping", None).ok().filter(|reply| reply.status == 200))
        })?;
        if let Some(world) = world {
            // The secret comes from the control plane.
            world.meet(interrupt)?;
        }
        let secret =
            fs::read_to_string(site.data().join("agent_secret")).context("the agent left no secret")?;
        self.client.secret = Some(secret.trim().to_owned());
        // The leak check looks for a table of this name; under another name it would see nothing.
        tool::run(Command::new("nft").args(["list", "table", "inet", &site.table()]))
            .context("the agent runs without the firewall table it should have")
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// One call; a refusal is an error with the agent's own sentence.
    pub(super) fn call(&self, method: &str, path: &str, body: Option<&Value>) -> Result<Value> {
        let reply =
            self.client.call(method, path, body).with_context(|| format!("{method} {path} got no answer"))?;
        if reply.status != 200 {
            bail!("{method} {path} was answered {}: {}", reply.status, reply.error());
        }
        Ok(reply.data())
    }

    /// SIGTERM, and SIGKILL for one that does not listen.
    pub(super) fn stop(&mut self) -> Result<()> {
        if let Some(process) = Seen::of(self.pid()) {
            process.signal(Signal::TERM);
        }
        let until = Instant::now() + STOP;
        while self.child.try_wait()?.is_none() {
            if Instant::now() > until {
                say("the agent does not end; killing it");
                self.child.kill()?;
                self.child.wait()?;
                bail!("the agent did not end within {} s of SIGTERM", STOP.as_secs());
            }
            thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }
}

fn environment(plan: &Plan, site: &Site) -> Vec<(&'static str, String)> {
    let text = |path: &Path| path.to_string_lossy().into_owned();
    let range = |ports: std::ops::RangeInclusive<u16>| format!("{}-{}", ports.start(), ports.end());
    vec![
        ("QUDATA_DEBUG", "true".to_owned()),
        ("QUDATA_ACCEL", accelerator(&plan.agent).to_owned()),
        ("QUDATA_FIRMWARE", plan.firmware.clone()),
        ("QUDATA_BASE_IMAGE", text(&plan.image)),
        ("QUDATA_DATA_DIR", text(&site.data())),
        ("QUDATA_VM_RUN_DIR", text(&site.run())),
        // The one before the first VM's is that of frpc.
        ("QUDATA_VM_UID_BASE", (site::UIDS.start() + 1).to_string()),
        ("QUDATA_AGENT_PORT", site.api_port.to_string()),
        ("QUDATA_SSH_PORTS", range(site::SSH_PORTS)),
        ("QUDATA_APP_PORTS", range(site::APP_PORTS)),
        ("QUDATA_MANAGEMENT_PORTS", range(site::MANAGEMENT_PORTS)),
    ]
}

/// kvm where it really runs guests, emulation elsewhere.
fn accelerator(agent: &Path) -> &'static str {
    match tool::output(Command::new(agent).arg("probe-kvm")) {
        Ok(_) => "kvm",
        Err(_) => {
            say("KVM does not run guests here; using emulation, which is some 20 times slower");
            "tcg"
        }
    }
}

/// The end of the agent's log, for error messages.
pub(super) fn log_tail(site: &Site) -> String {
    let log = String::from_utf8_lossy(&fs::read(site.log()).unwrap_or_default()).into_owned();
    tool::tail(log.trim_end(), 3000).to_owned()
}
