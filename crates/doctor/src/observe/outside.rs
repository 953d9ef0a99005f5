//! The world: time, names, control plane, tunnel server. Sends no key and changes nothing there.

use std::{
    net::{SocketAddr, ToSocketAddrs},
    time::Duration,
};

use qudata_agent_core::{
    control_plane::{Answer, ServiceUrl, reach},
    settings::{Settings, TunnelKind},
};
use qudata_host::{causes::chain, command::Tool};
use qudata_qemu::egress;
use tokio::net::TcpStream;

use super::{Look, unreadable};
use crate::observed::{Outside, Seen, Unseen};

/// Whom to call: a server by name, and the port.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Peer {
    host: String,
    port: u16,
}

pub(super) async fn observe(look: &Look) -> Outside {
    let service = (!look.settings.standalone).then_some(&look.settings.service_url);
    let frps = tunnel(&look.settings);
    let peers = service.map(Peer::of).into_iter().chain(frps.clone());
    let lookups: Vec<_> = peers.map(|peer| (peer.host.clone(), resolve(look, &peer))).collect();
    let resolvers = look.read(|look| {
        let servers = egress::resolvers(&look.root);
        let servers = servers.map_err(|error| unreadable(&look.root.join("etc/resolv.conf"), &error))?;
        Ok(servers.iter().map(ToString::to_string).collect())
    });
    let names = async {
        let mut names = Vec::new();
        for (name, lookup) in lookups {
            names.push((name, lookup.await.map(drop)));
        }
        names
    };
    let control_plane = async {
        match service {
            Some(url) => Some(look.by_end(ask(url)).await),
            None => None,
        }
    };
    let tunnel_server = async {
        match &frps {
            Some(peer) => Some(look.by_end(connect(look, peer)).await.map(drop)),
            None => None,
        }
    };
    let (synchronized, resolvers, names, control_plane, frps) =
        tokio::join!(synchronized(look), resolvers, names, control_plane, tunnel_server);
    Outside { synchronized, resolvers, names, control_plane, frps }
}

impl Peer {
    fn of(url: &ServiceUrl) -> Self {
        Self { host: url.host().to_owned(), port: url.port() }
    }
}

fn tunnel(settings: &Settings) -> Option<Peer> {
    let wanted = settings.tunnel == TunnelKind::Frp && !settings.standalone;
    wanted.then(|| Peer { host: settings.frp_server(), port: settings.frp_port })
}

/// The kernel's word, whoever keeps the clock.
async fn synchronized(look: &Look) -> Seen<bool> {
    if !look.root.join("run/systemd/system").is_dir() {
        return Err(Unseen::Needs("systemd does not run this host"));
    }
    let left: Duration = look.end.saturating_duration_since(tokio::time::Instant::now());
    let args = ["show", "--property=NTPSynchronized", "--value"];
    let run = Tool::new("timedatectl").args(args).deadline(left).run().await;
    let output = run.map_err(|error| look.untold(&error))?;
    match String::from_utf8_lossy(&output.stdout).trim() {
        "yes" => Ok(true),
        "no" => Ok(false),
        other => Err(Unseen::Failed(format!("timedatectl answers {other:?}"))),
    }
}

/// Not by the runtime: it would wait at its end for a resolver that hangs.
fn resolve(look: &Look, peer: &Peer) -> impl Future<Output = Seen<Vec<SocketAddr>>> + use<> {
    let Peer { host, port } = peer.clone();
    look.read(move |_| {
        let found = (host.as_str(), port).to_socket_addrs();
        found
            .map(Iterator::collect::<Vec<_>>)
            .map_err(|error| Unseen::Failed(format!("{host} is not found: {error}")))
    })
}

/// The first address that takes a connection.
async fn connect(look: &Look, peer: &Peer) -> Seen<TcpStream> {
    let mut last = Unseen::Failed(format!("{} has no address", peer.host));
    // The check of names tells why.
    let found = resolve(look, peer).await.map_err(|_| Unseen::Needs("its name is not found"));
    for address in found? {
        match TcpStream::connect(address).await {
            Ok(stream) => return Ok(stream),
            Err(error) => last = Unseen::Failed(format!("cannot connect to {address}: {error}")),
        }
    }
    Err(last)
}

async fn ask(url: &ServiceUrl) -> Seen<Answer> {
    reach(url, None).await.map_err(|error| match error.knows_no_name() {
        // The check of names tells why.
        true => Unseen::Needs("its name is not found"),
        false => Unseen::Failed(chain(&error)),
    })
}
