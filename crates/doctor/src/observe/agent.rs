//! What a running agent says of itself and of its GPUs, over its socket.

use std::{io, path::Path};

use serde::{Deserialize, de::DeserializeOwned};
use tokio::net::UnixStream;

use super::{Look, asked};
use crate::observed::{AgentGpu, AgentLook, AgentView, Seen, Unseen};

/// The frame of every answer.
#[derive(Deserialize)]
struct Answer<T> {
    data: T,
}

#[derive(Deserialize)]
struct Host {
    version: String,
    instances: usize,
    problems: Vec<Problem>,
    control_plane: Option<Link>,
    tunnel_link: Option<Link>,
}

#[derive(Deserialize)]
struct Problem {
    message: String,
    remedy: String,
}

#[derive(Deserialize)]
struct Link {
    state: String,
}

#[derive(Deserialize)]
struct Gpu {
    address: String,
    state: String,
    instance: Option<String>,
    why: Option<String>,
}

pub(super) async fn observe(look: &Look) -> AgentLook {
    let socket = match &look.scope.socket {
        Some(socket) => socket.clone(),
        None => look.under(&look.settings.vm_run_dir).join("agent.sock"),
    };
    match UnixStream::connect(&socket).await {
        Ok(_) => {}
        Err(error) => match error.kind() {
            io::ErrorKind::NotFound => return AgentLook::NoSocket,
            io::ErrorKind::ConnectionRefused => return AgentLook::NobodyListens,
            io::ErrorKind::PermissionDenied => {
                return AgentLook::Unseen(Unseen::Denied("the agent's socket cannot be opened".to_owned()));
            }
            _ => return AgentLook::Unseen(Unseen::Failed(format!("cannot connect to the agent: {error}"))),
        },
    }
    let answers =
        async { tokio::try_join!(get::<Host>(&socket, "/host"), get::<Vec<Gpu>>(&socket, "/gpus")) };
    match look.by_end(answers).await {
        Ok((host, gpus)) => AgentLook::Answers(view(host, gpus)),
        Err(unseen) => AgentLook::Unseen(unseen),
    }
}

async fn get<T: DeserializeOwned>(socket: &Path, path: &str) -> Seen<T> {
    let connected = UnixStream::connect(socket).await;
    let stream =
        connected.map_err(|error| Unseen::Failed(format!("cannot connect to the agent: {error}")))?;
    let (status, body) = asked::get(stream, "localhost", path).await?;
    if status == 403 {
        return Err(Unseen::Denied("the agent does not answer others than root and group qudata".to_owned()));
    }
    let answer: Result<Answer<T>, _> = serde_json::from_slice(&body);
    answer.map(|answer| answer.data).map_err(|error| {
        Unseen::Failed(format!(
            "the agent answers {path} with {status} and in a form that this version does not know: {error}"
        ))
    })
}

fn view(host: Host, gpus: Vec<Gpu>) -> AgentView {
    let gpu = |gpu: Gpu| {
        let Gpu { address, state, instance, why } = gpu;
        Some(AgentGpu { address: address.parse().ok()?, state, instance, why })
    };
    AgentView {
        version: host.version,
        instances: host.instances,
        problems: host.problems.into_iter().map(|problem| (problem.message, problem.remedy)).collect(),
        gpus: gpus.into_iter().filter_map(gpu).collect(),
        control_plane: host.control_plane.map(|link| link.state),
        tunnel: host.tunnel_link.map(|link| link.state),
    }
}
