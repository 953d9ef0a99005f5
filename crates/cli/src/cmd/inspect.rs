//! `instance list`, `instance show`, `status`: reads without effects.

use qudata_api::{GpuView, InstanceList, InstanceView};

use super::Context;
use crate::{
    args::Which,
    exit::{Exit, Failure},
    render::{
        instance,
        status::{Overview, overview},
        table,
    },
};

/// `instance list`.
pub(super) async fn list(cx: Context<'_>) -> Result<Exit, Failure> {
    let list: InstanceList = cx.agent.get("/instances").await?;
    if cx.screen.json {
        cx.screen.print_json(&list)?;
    } else {
        cx.screen.print(&table::instances(&cx.screen.out, &list.instances))?;
    }
    Ok(Exit::Done)
}

/// `instance show`.
pub(super) async fn show(cx: Context<'_>, which: &Which) -> Result<Exit, Failure> {
    let picked = cx.agent.pick(which.instance.as_deref()).await?;
    let view: InstanceView = cx.agent.get(&format!("/instances/{}", picked.id)).await?;
    if cx.screen.json {
        cx.screen.print_json(&view)?;
    } else {
        // An instance without GPUs is shown even where nothing is known of any.
        let gpus: Vec<GpuView> =
            if view.gpus.is_empty() { Vec::new() } else { cx.agent.get("/gpus").await? };
        cx.screen.print(&instance::show(&cx.screen.out, &view, &gpus))?;
    }
    Ok(Exit::Done)
}

/// `status`: fails when something is wrong, so that it can be used as a check.
pub(super) async fn status(cx: Context<'_>) -> Result<Exit, Failure> {
    let (host, instances, gpus) =
        tokio::try_join!(cx.agent.get("/host"), cx.agent.instances(), cx.agent.get("/gpus"))?;
    let all = Overview { host, instances, gpus };
    if cx.screen.json {
        cx.screen.print_json(&all)?;
    } else {
        cx.screen.print(&overview(&cx.screen.out, &all))?;
    }
    Ok(if all.problems().is_empty() { Exit::Done } else { Exit::Failed })
}
