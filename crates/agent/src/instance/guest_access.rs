//! The agent's way into one guest: connects when somebody needs it, keeps the connection, connects again when it is
//! gone. Used by the instance's task for keys and samples; knows the pinned host key and the private port.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use qudata_guest::{
    keys::{GuestKey, ManagementKey},
    session::{ConnectError, Session, SessionSpec},
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// A login takes a fraction of a second, several under emulation.
const LOGIN_DEADLINE: Duration = Duration::from_secs(15);
/// First pause between two attempts to log in to a guest that says it is up.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// Access to one guest; clones share the connection.
#[derive(Debug, Clone)]
pub struct GuestAccess {
    port: u16,
    host_key: GuestKey,
    key: ManagementKey,
    session: Arc<Mutex<Option<Arc<Session>>>>,
    turn: Arc<Semaphore>,
}

impl GuestAccess {
    /// Access through the host's `port`, to a guest that proves itself with `host_key`.
    pub fn new(port: u16, host_key: GuestKey, key: ManagementKey) -> Self {
        Self { port, host_key, key, session: Arc::default(), turn: Arc::new(Semaphore::new(1)) }
    }

    /// The key the agent logs in with.
    pub fn management_key(&self) -> &GuestKey {
        self.key.public()
    }

    /// A living connection, the kept one where possible.
    ///
    /// # Errors
    /// When the guest cannot be logged in to.
    pub async fn session(&self) -> Result<Arc<Session>, ConnectError> {
        if let Some(session) = self.kept() {
            return Ok(session);
        }
        // No lock is held meanwhile; should two connect at once, one connection is closed again.
        let spec = SessionSpec {
            port: self.port,
            management_key: self.key.clone(),
            host_key: self.host_key.clone(),
            deadline: LOGIN_DEADLINE,
        };
        let session = Arc::new(Session::connect(spec).await?);
        *self.session.lock().unwrap_or_else(PoisonError::into_inner) = Some(session.clone());
        Ok(session)
    }

    /// Waits for this caller's turn: commands run one after the other, each with a deadline of its own. Only calls to this
    /// one guest wait for each other here.
    pub async fn turn(&self) -> Option<OwnedSemaphorePermit> {
        self.turn.clone().acquire_owned().await.ok()
    }

    /// Logs in, again and again until it works: a guest that said it is up may need another moment.
    pub async fn prove(&self) {
        let mut pause = FIRST_PAUSE;
        while let Err(error) = self.session().await {
            tracing::debug!(port = self.port, error = %qudata_host::causes::chain(&error), "login failed");
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// Forgets the connection: the guest restarts or stands still, and will not say goodbye.
    pub fn forget(&self) {
        self.session.lock().unwrap_or_else(PoisonError::into_inner).take();
    }

    fn kept(&self) -> Option<Arc<Session>> {
        let mut kept = self.session.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.as_ref().is_some_and(|session| session.is_closed()) {
            *kept = None;
        }
        kept.clone()
    }
}
