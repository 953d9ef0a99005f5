//! `instance create`: orders an instance and shows how it comes up.

use std::{path::Path, time::Duration};

use hyper::Method;
use qudata_api::{Created, InstanceEvent, InstanceState, InstanceView};
use serde::Serialize;
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    time::{Instant, Interval, MissedTickBehavior, interval, timeout_at},
};
use uuid::Uuid;

use super::Context;
use crate::{
    args::Create,
    client::EventStream,
    exit::{Exit, Failure},
    keyfile,
    render::{self, instance::access, phase},
    screen::Tone,
};

/// How often the elapsed time is redrawn.
const REDRAW: Duration = Duration::from_millis(100);
/// How often the state is looked at after an adoption.
const LOOK: Duration = Duration::from_secs(1);

/// The body of the order, in the API's form.
#[derive(Debug, Default, Serialize)]
struct Wish {
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cpus: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    memory: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    storage_gb: Option<u64>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    ports: Vec<u16>,
    ssh_enabled: bool,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    ssh_pubkeys: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    gpus: Option<u32>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    gpu_addrs: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    user_data: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tunnel_token: Option<String>,
}

/// Orders it, waits for it, tells how to get in.
pub(super) async fn run(cx: Context<'_>, wish: Create) -> Result<Exit, Failure> {
    let deadline = Instant::now() + Duration::from_secs(wish.wait.min(u64::from(u32::MAX)));
    let wait = !wish.no_wait;
    let body = order(wish, keyfile::default_file().as_deref())?;
    if body.ssh_enabled && body.ssh_pubkeys.is_empty() {
        tell_notice(cx, "no SSH key is given: add one later with `qudata-agent instance key add`");
    }
    let created: Created = cx.agent.send(Method::POST, "/instances", &body).await?;
    for warning in &created.warnings {
        tell_notice(cx, warning);
    }
    // Before the wait, so that a script knows the id whatever happens.
    if cx.screen.json {
        cx.screen.print_json(&created)?;
    }
    let name = render::line(&created.name);
    if !wait {
        if !cx.screen.json {
            cx.screen.print(&format!("{name} is accepted\n"))?;
            cx.screen.tell(&format!("follow it with `qudata-agent instance events --follow {name}`"));
        }
        return Ok(Exit::Done);
    }
    cx.screen.tell(&format!("{} ({})", cx.screen.err.paint(Tone::Strong, &name), created.id));
    let last = (0, Instant::now());
    Wait { cx, id: created.id, name: name.clone(), deadline, last, adopted: false }.until_ready().await?;
    if !cx.screen.json {
        let view: InstanceView = cx.agent.get(&format!("/instances/{}", created.id)).await?;
        cx.screen.print(&format!("{name} is ready\n{}", render::fields(&cx.screen.out, &access(&view))))?;
    }
    Ok(Exit::Done)
}

fn tell_notice(cx: Context<'_>, text: &str) {
    let label = cx.screen.err.paint(Tone::Notice, "note:");
    cx.screen.tell(&format!("{label} {}", render::fold(&cx.screen.err, 6, text)));
}

fn order(wish: Create, default_key: Option<&Path>) -> Result<Wish, Failure> {
    let mut keys = wish.ssh_keys;
    if keys.is_empty() && !wish.no_ssh {
        keys.extend(default_key.map(|p| p.to_string_lossy().into_owned()));
    }
    let keys = keys.iter().map(|k| keyfile::keys_of(k)).collect::<Result<Vec<_>, _>>()?;
    let user_data = wish.user_data.map(|path| {
        std::fs::read_to_string(&path).map_err(|e| {
            Failure::new(Exit::Usage, format!("cannot read the user-data {}: {e}", path.display()))
        })
    });
    Ok(Wish {
        name: wish.name,
        cpus: wish.cpus,
        memory: wish.memory,
        storage_gb: wish.storage,
        ports: wish.ports,
        ssh_enabled: !wish.no_ssh,
        ssh_pubkeys: keys.into_iter().flatten().collect(),
        gpus: wish.gpus,
        gpu_addrs: wish.gpu_addrs.iter().map(ToString::to_string).collect(),
        user_data: user_data.transpose()?,
        tunnel_token: wish.tunnel_token,
    })
}

/// The wait for a new instance, with what is shown meanwhile.
struct Wait<'a> {
    cx: Context<'a>,
    id: Uuid,
    name: String,
    deadline: Instant,
    /// The agent's clock as of the last event; what is shown goes on from there.
    last: (u64, Instant),
    /// Another agent took the VM over, and need not repeat that it is ready.
    adopted: bool,
}

enum Step {
    Event(InstanceEvent),
    Gone,
    Redraw,
    Look,
}

impl Wait<'_> {
    async fn until_ready(&mut self) -> Result<(), Failure> {
        // Before anything is shown: an interruption must find somebody who says that the work goes on.
        let mut interrupt = signal(SignalKind::interrupt()).map_err(anyhow::Error::new)?;
        let mut events = self.cx.agent.events(self.id).await?;
        let (mut redraw, mut look) = (interval(REDRAW), interval(LOOK));
        redraw.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let step = self.step(&mut events, &mut interrupt, &mut redraw, &mut look);
            let happened = timeout_at(self.deadline, step);
            let step = happened.await.unwrap_or_else(|_| Err(not_waited("it is not ready yet", &self.name)));
            // A line that is redrawn is only for those who look at it, and nothing else may stand behind it.
            if self.live() && !matches!(step, Ok(Step::Redraw)) {
                self.cx.screen.redraw("");
            }
            match step? {
                Step::Event(event) => {
                    self.last = (event.elapsed_ms, Instant::now());
                    self.adopted |= event.phase == "adopted";
                    self.cx.screen.tell(&phase::event(&self.cx.screen.err, &event));
                    if let Some(end) = verdict(&event, &self.name) {
                        return end;
                    }
                }
                Step::Gone => {
                    let sentence = format!("{} was deleted before it was ready", self.name);
                    return Err(Failure::new(Exit::NotFound, sentence));
                }
                Step::Redraw => self.draw(),
                Step::Look => {
                    let view = self.cx.agent.get::<InstanceView>(&format!("/instances/{}", self.id)).await;
                    if view.is_ok_and(|v| v.state == InstanceState::Running) {
                        return Ok(());
                    }
                }
            }
        }
    }

    /// Whatever happens first. Nothing is lost when it is dropped.
    async fn step(
        &self,
        events: &mut EventStream,
        interrupt: &mut Signal,
        redraw: &mut Interval,
        look: &mut Interval,
    ) -> Result<Step, Failure> {
        tokio::select! {
            event = events.next() => Ok(event?.map_or(Step::Gone, Step::Event)),
            _ = redraw.tick(), if self.live() => Ok(Step::Redraw),
            _ = look.tick(), if self.adopted => Ok(Step::Look),
            _ = interrupt.recv() => Err(not_waited("the wait was interrupted", &self.name)),
        }
    }

    fn live(&self) -> bool {
        self.cx.screen.err.width.is_some()
    }

    fn draw(&self) {
        let (base, since) = self.last;
        let elapsed = u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.cx.screen.redraw(&phase::waiting(&self.cx.screen.err, elapsed.saturating_add(base), &self.name));
    }
}

/// Whether an event ends the wait, and how.
fn verdict(event: &InstanceEvent, name: &str) -> Option<Result<(), Failure>> {
    let what = match event.phase.as_str() {
        "ready" => return Some(Ok(())),
        "failed" => "failed",
        "stopped" => "was powered off before it was ready",
        "deleting" => "is being deleted",
        _ => return None,
    };
    let reason = event.message.as_deref().map_or_else(String::new, |m| format!(": {}", render::line(m)));
    let next = format!(
        "see `qudata-agent instance console {name}`, then `qudata-agent instance delete {name}`; its disk is kept until then"
    );
    let sentence = match what {
        "is being deleted" => format!("{name} {what}{reason}"),
        _ => format!("{name} {what}{reason}\n{next}"),
    };
    Some(Err(Failure::new(Exit::Failed, sentence)))
}

fn not_waited(why: &str, name: &str) -> Failure {
    Failure::new(
        Exit::TimedOut,
        format!(
            "{why}; {name} goes on booting: follow it with `qudata-agent instance events --follow {name}`, \
             or give it up with `qudata-agent instance delete {name}`"
        ),
    )
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use qudata_api::CreateBody;

    use super::*;
    use crate::args::{Command, CommandLine, Instance};

    fn parsed(words: &[&str]) -> Create {
        let all = ["qudata-agent", "instance", "create"].iter().chain(words);
        match CommandLine::try_parse_from(all).unwrap().command {
            Command::Instance(Instance::Create(create)) => create,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn every_option_reaches_the_api_under_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let user_data = dir.path().join("user-data");
        std::fs::write(&user_data, "#cloud-config\n").unwrap();
        let wish = parsed(&[
            "--name",
            "a",
            "--cpus",
            "8",
            "--memory",
            "32G",
            "--storage",
            "1T",
            "--port",
            "22",
            "--port",
            "8888",
            "--gpu",
            "65:00.0",
            "--ssh-key",
            "ssh-ed25519 AAAA me",
            "--tunnel-token",
            "t",
            "--user-data",
            user_data.to_str().unwrap(),
        ]);
        let json = serde_json::to_string(&order(wish, None).unwrap()).unwrap();
        let body: CreateBody = serde_json::from_str(&json).unwrap();
        assert_eq!(body.name.as_deref(), Some("a"));
        assert_eq!(body.cpus.unwrap().to_string(), "8");
        assert_eq!(body.memory.unwrap().to_string(), "32G");
        assert_eq!(body.storage_gb.unwrap().to_string(), "1024");
        assert_eq!(body.ports.unwrap().len(), 2);
        assert_eq!(body.ssh_enabled, Some(true));
        assert_eq!(body.ssh_pubkeys.unwrap(), ["ssh-ed25519 AAAA me"]);
        assert_eq!(body.gpu_addrs.unwrap(), ["0000:65:00.0"]);
        assert!(body.gpus.is_none() && body.user_data.is_some() && body.tunnel_token.is_some());
    }

    #[test]
    fn nothing_asked_for_is_nothing_said_but_ssh() {
        let json = serde_json::to_string(&order(parsed(&[]), None).unwrap()).unwrap();
        assert_eq!(json, r#"{"ssh_enabled":true}"#);
    }

    #[test]
    fn the_default_key_is_taken_only_where_ssh_is_wanted_and_no_key_given() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("id_ed25519.pub");
        std::fs::write(&file, "ssh-ed25519 DEFAULT me\n").unwrap();
        let keys = |words: &[&str]| order(parsed(words), Some(&file)).unwrap().ssh_pubkeys;
        assert_eq!(keys(&[]), ["ssh-ed25519 DEFAULT me"]);
        assert_eq!(keys(&["--ssh-key", "ssh-ed25519 OTHER x"]), ["ssh-ed25519 OTHER x"]);
        assert_eq!(keys(&["--no-ssh"]), [""; 0]);
    }

    #[test]
    fn only_ends_end_the_wait() {
        let event = |phase: &str| InstanceEvent {
            seq: 1,
            at: jiff::Timestamp::UNIX_EPOCH,
            elapsed_ms: 0,
            phase: phase.to_owned(),
            message: Some("because".to_owned()),
        };
        for phase in ["accepted", "booting", "guest_up", "problem", "unresponsive", "adopted"] {
            assert!(verdict(&event(phase), "a").is_none(), "{phase}");
        }
        assert!(verdict(&event("ready"), "a").unwrap().is_ok());
        for phase in ["failed", "stopped", "deleting"] {
            let failure = verdict(&event(phase), "a").unwrap().unwrap_err();
            assert!(failure.exit == Exit::Failed && failure.sentence.contains("because"), "{failure}");
        }
    }
}
