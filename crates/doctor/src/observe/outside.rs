//! The world: time, names, control plane, tunnel server. Sends no key and changes nothing there.

use std::{
    net::{SocketAddr, ToSocketAddrs},
    sync::Arc,
    time::Duration,
};

use qudata_agent_core::settings::{Settings, TunnelKind};
use qudata_host::{causes::chain, command::Tool};
use qudata_qemu::egress;
use rustls::{ClientConfig, RootCertStore, crypto::aws_lc_rs, pki_types::ServerName};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use super::{Look, asked, unreadable};
use crate::observed::{Outside, Seen, Unseen};

/// Whom to call: a server by name, and the port.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Peer {
    host: String,
    port: u16,
}

/// The control plane, from the address that the settings have.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Service {
    tls: bool,
    peer: Peer,
    /// For the `Host` header.
    authority: String,
    base: String,
}

pub(super) async fn observe(look: &Look) -> Outside {
    let service = (!look.settings.standalone).then(|| Service::of(&look.settings)).flatten();
    let frps = tunnel(&look.settings);
    let peers = service.as_ref().map(|service| &service.peer).into_iter().chain(&frps);
    let lookups: Vec<_> = peers.map(|peer| (peer.host.clone(), resolve(look, peer))).collect();
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
        match &service {
            Some(service) => Some(look.by_end(ask(look, service)).await),
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

fn tunnel(settings: &Settings) -> Option<Peer> {
    let wanted = settings.tunnel == TunnelKind::Frp && !settings.standalone;
    wanted.then(|| Peer { host: settings.frp_server(), port: settings.frp_port })
}

impl Service {
    /// The settings accept no address that this does not understand.
    fn of(settings: &Settings) -> Option<Self> {
        let url = settings.service_url.to_string();
        let (scheme, rest) = url.split_once("://")?;
        let tls = scheme == "https";
        let (authority, base) = match rest.find('/') {
            Some(at) => rest.split_at(at),
            None => (rest, ""),
        };
        let (host, port) = match authority.rsplit_once(':') {
            Some((host, port)) if !port.ends_with(']') => (host, port.parse().ok()?),
            _ => (authority, if tls { 443 } else { 80 }),
        };
        let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        let (authority, base) = (authority.to_owned(), base.to_owned());
        Some(Self { tls, peer: Peer { host, port }, authority, base })
    }
}

/// The kernel's word, whoever keeps the clock.
async fn synchronized(look: &Look) -> Seen<bool> {
    if !look.root.join("run/systemd/system").is_dir() {
        return Err(Unseen::Needs("systemd does not run this host"));
    }
    let left: Duration = look.end.saturating_duration_since(tokio::time::Instant::now());
    let args = ["show", "--property=NTPSynchronized", "--value"];
    let run = Tool::new("timedatectl").args(args).deadline(left).run().await;
    let output = run.map_err(|error| Unseen::Failed(chain(&error)))?;
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

async fn ask(look: &Look, service: &Service) -> Seen<u16> {
    // Read while the connection is made.
    let roots = look.read(|_| roots());
    let stream = connect(look, &service.peer).await?;
    let path = format!("{}/ping", service.base);
    if !service.tls {
        return asked::get(stream, &service.authority, &path).await.map(|(status, _)| status);
    }
    let distrusted = |error: &dyn std::error::Error| {
        Unseen::Failed(format!("{} does not prove who it is: {}", service.authority, chain(error)))
    };
    let name = ServerName::try_from(service.peer.host.clone()).map_err(|error| distrusted(&error))?;
    let connector = TlsConnector::from(roots.await?);
    let stream = connector.connect(name, stream).await.map_err(|error| distrusted(&error))?;
    asked::get(stream, &service.authority, &path).await.map(|(status, _)| status)
}

/// The authorities that this system trusts.
fn roots() -> Seen<Arc<ClientConfig>> {
    let mut roots = RootCertStore::empty();
    let (taken, _) = roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    if taken == 0 {
        return Err(Unseen::Failed(
            "this host has no certificate authorities: install the package ca-certificates".to_owned(),
        ));
    }
    let builder = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()));
    let builder = builder.with_safe_default_protocol_versions();
    let builder = builder.map_err(|error| Unseen::Failed(format!("TLS cannot be set up: {error}")))?;
    Ok(Arc::new(builder.with_root_certificates(roots).with_no_client_auth()))
}
