//! `instance key add` and `instance key remove`.

use hyper::Method;
use qudata_api::SshKeyBody;

use super::Context;
use crate::{
    args::Key,
    exit::{Exit, Failure},
    keyfile,
    render::line,
};

/// Adds or removes every key that is meant.
pub(super) async fn run(cx: Context<'_>, command: &Key) -> Result<Exit, Failure> {
    let (method, wish, done) = match command {
        Key::Add(wish) => (Method::POST, wish, "may log in to"),
        Key::Remove(wish) => (Method::DELETE, wish, "may no longer log in to"),
    };
    let keys = keyfile::keys_of(&wish.key)?;
    let instance = cx.agent.pick(wish.which.instance.as_deref()).await?;
    let path = format!("/instances/{}/ssh", instance.id);
    for ssh_pubkey in &keys {
        let body = SshKeyBody { ssh_pubkey: ssh_pubkey.clone(), id: None };
        cx.agent.order(method.clone(), &path, &body).await?;
    }
    if cx.screen.json {
        cx.screen.print_json(&serde_json::json!({ "id": instance.id, "keys": keys.len() }))?;
    } else {
        let who = if keys.len() == 1 { "the key".to_owned() } else { format!("{} keys", keys.len()) };
        cx.screen.print(&format!("{who} {done} {}\n", line(&instance.name)))?;
    }
    Ok(Exit::Done)
}
