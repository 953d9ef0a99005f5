//! The HTTP API: who may call, how much, and what each path does. Built and served by `daemon`; everything it knows of
//! the host it asks of `Instances`.
//!
//! ```text
//! accept ─► front (first head, hyper, close) ─► call (secret, body, log) ─► routes ─► Instances
//!             limits, head                        auth, error, metrics        input
//! ```

mod auth;
mod call;
mod error;
mod front;
mod head;
mod input;
mod limits;
mod metrics;
mod routes;
pub mod sockets;

use std::{fmt, future::Future, sync::Arc, time::Duration};

use tokio::{
    net::{TcpListener, UnixListener},
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    time::timeout,
};

pub use self::limits::Limits;
use self::{auth::Peer, front::Stream};
use crate::{instances::Instances, refusal::Refusal, secret::CurrentSecret};

/// Callers over the limit that are told so at once; the rest is closed without a word.
const REFUSED_AT_ONCE: usize = 16;
/// Pause after a failed accept: it fails for want of file descriptors, and those come back when connections end.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What the API is made of.
pub struct Api {
    /// The instances it shows and changes.
    pub instances: Instances,
    /// What TCP callers present, as it is when they call.
    pub secret: CurrentSecret,
    /// Bounds on callers.
    pub limits: Limits,
}

impl Api {
    /// An API with the ordinary limits.
    pub fn new(instances: Instances, secret: impl Into<CurrentSecret>) -> Self {
        Self { instances, secret: secret.into(), limits: Limits::default() }
    }
}

impl fmt::Debug for Api {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Api").field("limits", &self.limits).finish_non_exhaustive()
    }
}

/// The OpenAPI document, as `GET /openapi.json` answers it.
pub fn openapi_json() -> String {
    String::from_utf8_lossy(&routes::openapi_json()).into_owned()
}

/// Serves until `shutdown`, then lets calls under way end for a bounded time. Returns when no connection is left or that
/// time is over.
pub async fn serve(api: Api, tcp: TcpListener, unix: UnixListener, shutdown: impl Future<Output = ()>) {
    let (close, closing) = watch::channel(false);
    let app = Arc::new(call::App::new(api, closing));
    let (remote, local) = (Places::new(&app), Places::new(&app));
    let accept_remote = async {
        loop {
            match tcp.accept().await {
                Ok((stream, _)) => {
                    sockets::tune(&stream);
                    remote.take(stream, async { Peer::Tcp });
                }
                Err(error) => accept_failed(&error).await,
            }
        }
    };
    let accept_local = async {
        loop {
            match unix.accept().await {
                Ok((stream, _)) => {
                    let credentials = stream.peer_cred();
                    local.take(stream, Peer::of(credentials));
                }
                Err(error) => accept_failed(&error).await,
            }
        }
    };
    tokio::select! {
        () = shutdown => {}
        () = accept_remote => {}
        () = accept_local => {}
    }
    // Whoever connects from here on is refused by the kernel instead of waiting for nobody.
    drop((tcp, unix));
    close.send_replace(true);
    let empty = async { tokio::join!(remote.empty(), local.empty()) };
    if timeout(app.limits.shutdown, empty).await.is_err() {
        tracing::warn!("calls under way were cut off");
    }
}

async fn accept_failed(error: &std::io::Error) {
    tracing::warn!(%error, "a connection could not be accepted");
    tokio::time::sleep(ACCEPT_PAUSE).await;
}

/// The places of one listener.
struct Places {
    app: Arc<call::App>,
    served: Arc<Semaphore>,
    refused: Arc<Semaphore>,
}

impl Places {
    fn new(app: &Arc<call::App>) -> Self {
        let semaphore = |count| Arc::new(Semaphore::new(count));
        Self {
            app: app.clone(),
            served: semaphore(app.limits.connections),
            refused: semaphore(REFUSED_AT_ONCE),
        }
    }

    /// Serves a connection in a task of its own, if there is a place.
    fn take<S: Stream>(&self, stream: S, peer: impl Future<Output = Peer> + Send + 'static) {
        let app = self.app.clone();
        match self.served.clone().try_acquire_owned() {
            Ok(place) => {
                tokio::spawn(async move {
                    let _place: OwnedSemaphorePermit = place;
                    front::attend(stream, peer.await, app).await;
                });
            }
            Err(_) => {
                let Ok(place) = self.refused.clone().try_acquire_owned() else { return };
                let refusal = Refusal::busy(&format!("{} connections are open", app.limits.connections));
                app.counters.refused(refusal.code);
                tokio::spawn(async move {
                    let _place: OwnedSemaphorePermit = place;
                    front::refuse(stream, refusal, &app.limits).await;
                });
            }
        }
    }

    /// Waits until nobody is served any more.
    async fn empty(&self) {
        let all = u32::try_from(self.app.limits.connections).unwrap_or(u32::MAX);
        // Never closed; and if it were, there would be nobody to wait for.
        let _ = self.served.acquire_many(all).await;
    }
}

#[cfg(test)]
mod tests;
