//! `instance start`, `stop`, `restart`, `delete`.

use std::time::Duration;

use hyper::Method;
use qudata_api::{Command, CommandBody, InstanceView, StatusOf, Teardown};
use tokio::time::{Instant, sleep};

use super::Context;
use crate::{
    args::{Risky, Which},
    confirm,
    exit::{Exit, Failure},
    pick::{pick, short_id},
    render::{
        instance::{since, state_word},
        line,
    },
    units::size,
};

/// Ending a VM that pins hundreds of GiB takes a while.
const GONE_DEADLINE: Duration = Duration::from_secs(120);
const GONE_PAUSE: Duration = Duration::from_millis(200);

/// `instance start`.
pub(super) async fn start(cx: Context<'_>, which: &Which) -> Result<Exit, Failure> {
    let instance = cx.agent.pick(which.instance.as_deref()).await?;
    command(cx, &instance, Command::Start).await
}

/// `instance stop`.
pub(super) async fn stop(cx: Context<'_>, which: &Which) -> Result<Exit, Failure> {
    let instance = cx.agent.pick(which.instance.as_deref()).await?;
    command(cx, &instance, Command::Stop).await
}

/// `instance restart`.
pub(super) async fn restart(cx: Context<'_>, wish: &Risky) -> Result<Exit, Failure> {
    let (instance, title) = chosen(cx, wish).await?;
    let loss = "What its guest holds in memory and has not written to its disk is lost.";
    confirm::consent(wish.yes, &format!("Reset instance {title}?\n{loss}"))?;
    command(cx, &instance, Command::Restart).await
}

/// `instance delete`.
pub(super) async fn delete(cx: Context<'_>, wish: &Risky) -> Result<Exit, Failure> {
    let (instance, title) = chosen(cx, wish).await?;
    let loss = format!("Its disk ({}) and everything on it is lost for good.", size(instance.storage));
    confirm::consent(wish.yes, &format!("Delete instance {title}?\n{loss}"))?;
    let path = format!("/instances/{}", instance.id);
    let mut teardown: Teardown = cx.agent.delete(&path).await?;
    let name = line(&instance.name);
    let underway = !teardown.complete && teardown.residues.is_empty();
    let ended = if underway { gone(cx, &path, &name).await } else { Ok(()) };
    teardown.complete |= underway && ended.is_ok();
    if cx.screen.json {
        cx.screen.print_json(&teardown)?;
    }
    ended?;
    if !teardown.complete {
        let list: String = teardown.residues.iter().map(|r| format!("\n  {}", line(r))).collect();
        return Err(Failure::new(
            Exit::Failed,
            format!("{name} is deleted, but not all of it could be removed; the agent goes on trying:{list}"),
        ));
    }
    if !cx.screen.json {
        cx.screen.print(&format!("{name} is deleted\n"))?;
    }
    Ok(Exit::Done)
}

/// The instance, and how it is called in a question.
async fn chosen(cx: Context<'_>, wish: &Risky) -> Result<(InstanceView, String), Failure> {
    let all = cx.agent.instances().await?;
    let instance = pick(&all, wish.which.instance.as_deref())?;
    let (state, since) = (state_word(instance.state), since(&cx.screen.err, instance.since));
    let gpus = match instance.gpus.len() {
        0 => String::new(),
        1 => ", 1 GPU".to_owned(),
        n => format!(", {n} GPUs"),
    };
    let (name, id) = (line(&instance.name), short_id(instance.id, &all));
    Ok((instance.clone(), format!("{name} ({id}, {state} {since}{gpus})")))
}

async fn command(cx: Context<'_>, instance: &InstanceView, command: Command) -> Result<Exit, Failure> {
    let path = format!("/instances/{}", instance.id);
    let answer: StatusOf = cx.agent.send(Method::PUT, &path, &CommandBody { command, id: None }).await?;
    if cx.screen.json {
        cx.screen.print_json(&answer)?;
    } else {
        cx.screen.print(&format!("{} is {}\n", line(&instance.name), state_word(answer.state)))?;
    }
    Ok(Exit::Done)
}

/// Waits until the instance is not there any more.
async fn gone(cx: Context<'_>, path: &str, name: &str) -> Result<(), Failure> {
    let end = Instant::now() + GONE_DEADLINE;
    loop {
        match cx.agent.get::<InstanceView>(path).await {
            Ok(_) if Instant::now() < end => sleep(GONE_PAUSE).await,
            Ok(_) => {
                return Err(Failure::new(
                    Exit::TimedOut,
                    format!("{name} is still being removed: see `qudata-agent instance show {name}`"),
                ));
            }
            Err(failure) if failure.exit == Exit::NotFound => return Ok(()),
            Err(failure) => return Err(failure),
        }
    }
}
