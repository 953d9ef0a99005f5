//! Starts what connects this host to the outside: the control plane's client, the tunnel, and what publishes the ports.
//! Called once by `daemon`, when all instances of an earlier agent are taken over and the API's port is bound: nobody
//! else can answer for it.

use std::sync::Arc;

use qudata_api::Problem;
use qudata_host::causes::chain;
use qudata_tunnel::{Route, Server, Tunnel, TunnelSetup};
use tokio::{sync::watch, task::JoinSet};
use uuid::Uuid;

use super::Outside;
use crate::{
    control_plane::{
        ControlPlane, ControlPlaneSetup, HostLook, Introduction, Membership, Registration, StatsInput,
    },
    instance::record::Sealed,
    instances::Instances,
    publishing::{Own, Publisher},
    secret::AgentSecret,
    settings::{Settings, TunnelKind},
    site::Site,
};

/// What works for the outside; dropping it ends the work, not frpc.
#[derive(Debug)]
pub struct Connections {
    _control_plane: Option<ControlPlane>,
    _tasks: JoinSet<()>,
}

/// Begins to register and to publish, waiting for neither. `secret` is what callers of the API present from now on; `port`
/// is the API's.
///
/// Without a tunnel it first ends the client that an agent with one has left: its routes would go on, and lead to whoever
/// gets their ports next.
pub async fn connect(
    site: &Arc<Site>,
    instances: &Instances,
    port: u16,
    membership: Membership,
    secret: watch::Sender<AgentSecret>,
) -> Connections {
    let mut tasks = JoinSet::new();
    if site.settings.tunnel == TunnelKind::None
        && let Err(error) = qudata_tunnel::end_earlier(&site.launcher, &site.tunnel_dir()).await
    {
        let message = format!("the tunnel was turned off and its client still runs: {}", chain(&error));
        tracing::error!(message);
        instances.report(vec![Problem {
            code: "frpc_left".to_owned(),
            message,
            remedy: "end frpc yourself, then restart the agent; VMs are not affected".to_owned(),
            since: jiff::Timestamp::now(),
        }]);
    }
    let Membership::Member { registration, .. } = membership else {
        return Connections { _control_plane: None, _tasks: tasks };
    };
    let own = Own { agent_id: registration.agent_id, port };
    let control_plane = ControlPlane::start(setup(&site.settings, instances, own, registration, secret));
    let tunnel = (site.settings.tunnel == TunnelKind::Frp).then(|| {
        let token = control_plane.tunnel_token();
        let (tunnel, publisher) = publish(site, instances, own, token);
        tasks.spawn(publisher.run());
        tunnel.status()
    });
    instances.watch_outside(Outside { tunnel, control_plane: Some(control_plane.status()) });
    Connections { _control_plane: Some(control_plane), _tasks: tasks }
}

fn setup(
    settings: &Settings,
    instances: &Instances,
    own: Own,
    registration: Registration,
    secret: watch::Sender<AgentSecret>,
) -> ControlPlaneSetup {
    let instances = instances.clone();
    ControlPlaneSetup {
        service: settings.service_url.clone(),
        api_key: settings.api_key.clone(),
        registration,
        data_dir: settings.data_dir.clone(),
        introduction: Introduction {
            agent_port: own.port,
            address: settings.public_address,
            test_mode: settings.test_mode,
        },
        look: HostLook {
            root: "/".into(),
            data_dir: settings.data_dir.clone(),
            gpus: (!settings.debug).then(|| settings.gpu_pci_addrs.clone()),
            location: settings.location(),
        },
        secret,
        stats: Arc::new(move || {
            let oldest = instances.list().into_iter().next()?;
            Some(StatsInput { status: oldest.status, sample: oldest.sample })
        }),
    }
}

/// The tunnel with everything that is to be published already, so that a frpc of an earlier agent keeps its routes.
fn publish(
    site: &Site,
    instances: &Instances,
    own: Own,
    token: watch::Receiver<Option<Sealed>>,
) -> (Tunnel, Publisher) {
    let settings = &site.settings;
    // One below those of the VMs: a user of its own, that no instance ever has.
    let user = settings.vm_uid_base.saturating_sub(1);
    let setup = TunnelSetup {
        frpc: settings.frpc_binary.clone(),
        config: settings.frpc_config.clone(),
        dir: site.tunnel_dir(),
        uid: user,
        gid: user,
        launcher: site.launcher.clone(),
        server: Server {
            host: settings.frp_server(),
            port: settings.frp_port,
            token: settings.frp_token.clone(),
            ca: settings.frp_ca.clone(),
        },
        user: own.agent_id.to_string(),
    };
    let kept = orphaned(site, instances, qudata_tunnel::earlier_routes(&setup.dir, &setup.config));
    let mut wanted = Publisher::wanted(own, token.borrow().as_ref(), &instances.published());
    wanted.extend(kept.iter().cloned());
    let tunnel = Tunnel::start(setup, wanted);
    let publisher = Publisher::new(tunnel.clone(), instances.clone(), own, token, kept);
    (tunnel, publisher)
}

/// Those of these routes that lead to VMs which no record knows, as after a damaged store. They live on, untouched; their
/// tenants shall be able to reach them. Their run directories are gone after a reboot of the host.
fn orphaned(site: &Site, instances: &Instances, earlier: Vec<Route>) -> Vec<Route> {
    let known = |id: Uuid| instances.get(id).is_some();
    let id =
        |route: &Route| route.name.as_str().get(..Uuid::nil().hyphenated().to_string().len())?.parse().ok();
    let orphan = |route: &Route| {
        id(route).is_some_and(|id| !known(id) && site.paths.vms().join(id.to_string()).exists())
    };
    earlier.into_iter().filter(orphan).collect()
}
