//! `gpu list`, `gpu topo`, `gpu show`, `gpu quarantine`, `gpu release`.

use std::time::Duration;

use hyper::Method;
use qudata_api::{GpuState, GpuTopology, GpuView, QuarantineBody};
use tokio::time::{Instant, sleep};

use super::Context;
use crate::{
    args::{Gpu, GpuAddress, Quarantine, Release},
    confirm,
    exit::{Exit, Failure},
    pick::pick_gpu,
    render::{self, gpu, line, status, table, topo},
};

/// The agent gives a reset and the check 90 s; whoever still has the GPU open is waited for before.
const RELEASE_DEADLINE: Duration = Duration::from_secs(180);
const RELEASE_PAUSE: Duration = Duration::from_millis(200);

/// Any of them.
pub(super) async fn run(cx: Context<'_>, command: Gpu) -> Result<Exit, Failure> {
    match command {
        Gpu::List => list(cx).await,
        Gpu::Topo => topology(cx).await,
        Gpu::Show(wish) => show(cx, &wish).await,
        Gpu::Quarantine(wish) => quarantine(cx, wish).await,
        Gpu::Release(wish) => release(cx, &wish).await,
    }
}

/// The table, and below it what keeps GPUs from being rented.
async fn list(cx: Context<'_>) -> Result<Exit, Failure> {
    let gpus: Vec<GpuView> = cx.agent.get("/gpus").await?;
    if cx.screen.json {
        cx.screen.print_json(&gpus)?;
        return Ok(Exit::Done);
    }
    let instances = cx.agent.instances().await?;
    let look = &cx.screen.out;
    let mut text = table::gpus(look, &gpus, &instances);
    let wrong = gpu::problems(&gpus);
    let more = status::problems(look, wrong.iter().map(|p| (None, p))) + &gpu::notes(look, &gpus);
    if !more.is_empty() {
        text.push_str(&format!("\n{more}"));
    }
    cx.screen.print(&text)?;
    Ok(Exit::Done)
}

async fn topology(cx: Context<'_>) -> Result<Exit, Failure> {
    let topology: GpuTopology = cx.agent.get("/gpus/topology").await?;
    if cx.screen.json {
        cx.screen.print_json(&topology)?;
    } else {
        cx.screen.print(&topo::topology(&cx.screen.out, &topology))?;
    }
    Ok(Exit::Done)
}

async fn show(cx: Context<'_>, wish: &GpuAddress) -> Result<Exit, Failure> {
    let path = path(&chosen(cx, wish).await?);
    let view: GpuView = cx.agent.get(&path).await?;
    if cx.screen.json {
        cx.screen.print_json(&view)?;
    } else {
        let owner = owner(cx, &view).await?;
        cx.screen.print(&gpu::show(&cx.screen.out, &view, owner.as_deref()))?;
    }
    Ok(Exit::Done)
}

async fn quarantine(cx: Context<'_>, wish: Quarantine) -> Result<Exit, Failure> {
    let view = chosen(cx, &wish.gpu).await?;
    let owner = owner(cx, &view).await?;
    let address = line(&view.address);
    let title = gpu::title(&cx.screen.err, &view, owner.as_deref());
    let kept = owner.map_or_else(String::new, |name| format!("Instance {} keeps it. ", line(&name)));
    let effect = format!("{kept}Nobody else gets it until it is released, which resets and checks it first.");
    let effect = render::fold(&cx.screen.err, 0, &effect);
    confirm::consent(wish.yes, &format!("Quarantine GPU {title}?\n{effect}"))?;
    let body = QuarantineBody { reason: wish.reason };
    let now: GpuView = cx.agent.send(Method::POST, &format!("{}/quarantine", path(&view)), &body).await?;
    if cx.screen.json {
        cx.screen.print_json(&now)?;
        return Ok(Exit::Done);
    }
    match now.state {
        GpuState::Quarantined => {
            cx.screen.print(&format!("{address} is quarantined\n"))?;
            cx.screen.tell(&format!("bring it back with `qudata-agent gpu release {address}`"));
        }
        state => {
            let word = gpu::state_word(state).0;
            cx.screen.print(&format!("{address} is {word}, and quarantined as soon as it comes back\n"))?;
        }
    }
    Ok(Exit::Done)
}

async fn release(cx: Context<'_>, wish: &Release) -> Result<Exit, Failure> {
    let view = chosen(cx, &wish.gpu).await?;
    let address = line(&view.address);
    if view.state != GpuState::Quarantined {
        let word = gpu::state_word(view.state).0;
        return Err(Failure::new(
            Exit::Refused,
            format!("GPU {address} is {word}: only a quarantined GPU is released; nothing was done"),
        ));
    }
    let title = gpu::title(&cx.screen.err, &view, None);
    let why =
        view.why.as_deref().map_or_else(String::new, |why| format!("It is quarantined because: {why}\n"));
    let absent = view.vendor_id.is_none();
    let effect = if absent {
        "It is not in this host any more, so it is forgotten."
    } else {
        "It is reset and checked first. It is free if it passes, and stays quarantined if not."
    };
    let text: Vec<_> = why.lines().chain([effect]).map(|l| render::fold(&cx.screen.err, 0, l)).collect();
    confirm::consent(wish.yes, &format!("Release GPU {title}?\n{}", text.join("\n")))?;
    if !absent {
        cx.screen.tell(&format!("resetting and checking {address}"));
    }
    let begun: GpuView = cx.agent.post(&format!("{}/release", path(&view))).await?;
    let ended = passed(cx, begun).await?;
    if cx.screen.json {
        cx.screen.print_json(&ended)?;
    }
    if ended.state == GpuState::Quarantined {
        let wrong = gpu::problems([&ended]);
        let told: String =
            wrong.iter().map(|p| format!("\n{}\n{}", line(&p.message), line(&p.remedy))).collect();
        return Err(Failure::new(Exit::Failed, format!("{address} did not pass{told}")));
    }
    if !cx.screen.json && absent && ended.vendor_id.is_none() {
        cx.screen.print(&format!("{address} is forgotten\n"))?;
        cx.screen.tell("put back where it was, it is quarantined again");
    } else if !cx.screen.json {
        cx.screen.print(&format!("{address} is {}\n", gpu::state_word(ended.state).0))?;
        let wrong = gpu::problems([&ended]);
        let look = &cx.screen.err;
        let more = status::problems(look, wrong.iter().map(|p| (None, p))) + &gpu::notes(look, [&ended]);
        if !more.is_empty() {
            cx.screen.tell(more.trim_end());
        }
    }
    Ok(Exit::Done)
}

/// Waits until reset and check are over, whatever they found.
async fn passed(cx: Context<'_>, begun: GpuView) -> Result<GpuView, Failure> {
    let end = Instant::now() + RELEASE_DEADLINE;
    let mut view = begun;
    while matches!(view.state, GpuState::Draining | GpuState::Sanitizing) {
        if Instant::now() >= end {
            let address = line(&view.address);
            return Err(Failure::new(
                Exit::TimedOut,
                format!("{address} is still being reset and checked: see `qudata-agent gpu show {address}`"),
            ));
        }
        sleep(RELEASE_PAUSE).await;
        view = cx.agent.get(&path(&view)).await?;
    }
    Ok(view)
}

/// The GPU that is meant.
async fn chosen(cx: Context<'_>, wish: &GpuAddress) -> Result<GpuView, Failure> {
    let gpus: Vec<GpuView> = cx.agent.get("/gpus").await?;
    pick_gpu(&gpus, wish.address).cloned()
}

/// Name of the instance that has it; its id where the instance is not listed.
async fn owner(cx: Context<'_>, view: &GpuView) -> Result<Option<String>, Failure> {
    let Some(id) = view.instance else { return Ok(None) };
    let instances = cx.agent.instances().await?;
    let named = instances.into_iter().find(|i| i.id == id).map(|i| i.name);
    Ok(Some(named.unwrap_or_else(|| id.to_string())))
}

fn path(view: &GpuView) -> String {
    format!("/gpus/{}", view.address)
}
