//! `instance events`: what happened to an instance, and what goes on to happen.

use std::time::Duration;

use tokio::time::timeout;

use super::Context;
use crate::{
    args::Events,
    exit::{Exit, Failure},
    render::phase,
};

/// The agent sends the whole history at once and then waits for more; a pause this long is the end of the history.
const QUIET: Duration = Duration::from_millis(300);
const FOREVER: Duration = Duration::from_secs(u32::MAX as u64);

/// Prints events, with `--json` one object per line.
pub(super) async fn run(cx: Context<'_>, wish: &Events) -> Result<Exit, Failure> {
    let instance = cx.agent.pick(wish.which.instance.as_deref()).await?;
    let mut events = cx.agent.events(instance.id).await?;
    let patience = if wish.follow { FOREVER } else { QUIET };
    while let Ok(event) = timeout(patience, events.next()).await {
        let Some(event) = event? else { break };
        let line = match cx.screen.json {
            true => serde_json::to_string(&event).map_err(anyhow::Error::new)?,
            false => phase::event(&cx.screen.out, &event),
        };
        cx.screen.print(&format!("{line}\n"))?;
    }
    Ok(Exit::Done)
}
