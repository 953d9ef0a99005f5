//! The handle the agent holds.

use std::sync::Arc;

use qudata_host::launch::EndError;
use tokio::sync::{mpsc, oneshot, watch};

use crate::{
    board::{Board, first_states},
    earlier::earlier_routes,
    route::Route,
    setup::TunnelSetup,
    status::TunnelStatus,
    task::{Stop, TunnelTask},
};

/// frpc could not be ended.
#[derive(Debug, thiserror::Error)]
#[error("the tunnel cannot be ended")]
pub struct StopError(#[source] pub(crate) EndError);

/// A tunnel. Clones are the same one. When the last is dropped the care for frpc ends, and frpc goes on: the next
/// [`Tunnel::start`] in the same directory takes it over.
#[derive(Debug, Clone)]
pub struct Tunnel {
    ends: Arc<Ends>,
}

#[derive(Debug)]
struct Ends {
    wanted: watch::Sender<Vec<Route>>,
    stops: mpsc::Sender<Stop>,
    status: watch::Receiver<TunnelStatus>,
}

impl Tunnel {
    /// Takes over the frpc of an earlier agent if it runs with the same settings, else starts one, and sees to it that it
    /// has the wanted routes. Needs a tokio runtime. Whatever goes wrong is told by the status and tried again. One
    /// directory has one tunnel at a time.
    ///
    /// From the first moment the status has what an earlier frpc may still route, as far as the disk tells it, until it
    /// is known better.
    pub fn start(setup: TunnelSetup, wanted: Vec<Route>) -> Self {
        let (board, status) = Board::new(first_states(&wanted, earlier_routes(&setup.dir, &setup.config)));
        let (wanted, wanted_seen) = watch::channel(wanted);
        let (stops, stops_seen) = mpsc::channel(1);
        tokio::spawn(TunnelTask::new(setup, wanted_seen, stops_seen, board).run());
        Self { ends: Arc::new(Ends { wanted, stops, status }) }
    }

    /// The routes there are to be from now on, all of them. Of two with the same name the last counts. Never waits.
    pub fn want(&self, routes: Vec<Route>) {
        self.ends.wanted.send_if_modified(|wanted| {
            let changed = *wanted != routes;
            *wanted = routes;
            changed
        });
    }

    /// How the tunnel does.
    pub fn status(&self) -> watch::Receiver<TunnelStatus> {
        self.ends.status.clone()
    }

    /// Ends frpc and the care for it, once and for all. An agent that stops does not call this.
    ///
    /// # Errors
    /// When frpc is still there.
    pub async fn stop(&self) -> Result<(), StopError> {
        let (answer, answered) = oneshot::channel();
        // The task is gone when it was stopped before.
        if self.ends.stops.send(answer).await.is_err() {
            return Ok(());
        }
        answered.await.unwrap_or(Ok(())).map_err(StopError)
    }
}
