//! The task that owns frpc and its routes, from the first start to the end of the agent, which it does not make frpc's.
//! Started by `tunnel`.
//!
//! ```text
//!        ┌──────────── restart, at once ───────────┐
//!        ▼                                         │
//! ──▶ attain ── adopted or started ──▶ rounds ─────┤
//!        ▲                                         │
//!        └─ after a pause ◀── died, or of no use ──┘      no handle left: the task ends, frpc goes on
//! ```

use std::{future::pending, time::Duration};

use qudata_host::{causes::chain, launch::EndError, process::ExitReport};
use tokio::{
    select,
    sync::{mpsc, oneshot, watch},
    time::{Instant, sleep_until},
};

use crate::{
    backoff::Backoff,
    board::Board,
    frpc::{self, Frpc, NotAttained},
    lookout::Lookout,
    plan::Wanted,
    rounds::{Around, Next, Rounds},
    route::Route,
    setup::TunnelSetup,
    status::TunnelState,
};

/// Between two starts of a frpc that dies.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// A frpc that lived this long did not die of its start.
const LIVED: Duration = Duration::from_secs(30);

/// An answer to the one who wants frpc ended.
pub(crate) type Stop = oneshot::Sender<Result<(), EndError>>;

pub(crate) struct TunnelTask {
    setup: TunnelSetup,
    wanted: watch::Receiver<Vec<Route>>,
    stops: mpsc::Receiver<Stop>,
    board: Board,
    pauses: Backoff,
    lookout: Option<Lookout>,
}

/// Why the care for one frpc ended.
enum Outcome {
    Died(ExitReport, Duration),
    NotAttained(NotAttained),
    Restart,
    GivenUp(TunnelState, Duration),
    Leave(Leave),
}

/// Why the task ends.
enum Leave {
    Stop(Stop),
    Unwanted,
}

impl TunnelTask {
    pub(crate) fn new(
        setup: TunnelSetup,
        wanted: watch::Receiver<Vec<Route>>,
        stops: mpsc::Receiver<Stop>,
        board: Board,
    ) -> Self {
        let pauses = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
        Self { setup, wanted, stops, board, pauses, lookout: None }
    }

    pub(crate) async fn run(mut self) {
        loop {
            let outcome = match frpc::attain(&self.setup).await {
                Ok((mut frpc, version)) => {
                    self.board.version(version);
                    self.attend(&mut frpc).await
                }
                Err(error) => Outcome::NotAttained(error),
            };
            let leave = match outcome {
                Outcome::Leave(leave) => Some(leave),
                Outcome::Restart => self.end_for_restart().await,
                Outcome::GivenUp(state, lived) => {
                    self.note_life(lived);
                    match self.end_for_restart().await {
                        None => self.pause(state, true).await,
                        leave => leave,
                    }
                }
                Outcome::Died(report, lived) => {
                    self.note_life(lived);
                    let state = self.death(report);
                    self.pause(state, true).await
                }
                Outcome::NotAttained(NotAttained { error, nothing_runs }) => {
                    let (code, remedy) = error.advice();
                    let (reason, remedy) = (chain(&error), remedy.to_owned());
                    self.pause(TunnelState::Down { code, reason, remedy }, nothing_runs).await
                }
            };
            match leave {
                None => {}
                Some(Leave::Unwanted) => return,
                Some(Leave::Stop(answer)) => {
                    let ended = frpc::end(&self.setup).await;
                    if ended.is_ok() {
                        self.board.nothing_routed(&Wanted::new(), Some(stopped()));
                    }
                    // Whoever asked may have stopped waiting.
                    let _ = answer.send(ended);
                    return;
                }
            }
        }
    }

    /// Looks after one frpc for as long as it lives.
    async fn attend(&mut self, frpc: &mut Frpc) -> Outcome {
        let mut rounds = Rounds::new();
        let mut next = Instant::now();
        loop {
            select! {
                biased;
                Some(answer) = self.stops.recv() => return Outcome::Leave(Leave::Stop(answer)),
                changed = self.wanted.changed() => {
                    if changed.is_err() {
                        return Outcome::Leave(Leave::Unwanted);
                    }
                    rounds.hurry();
                }
                report = ended(frpc) => return Outcome::Died(report, frpc.since.elapsed()),
                () = sleep_until(next) => {}
            }
            let wanted = self.wanted_now();
            let (server, board) = (&self.setup.server, &self.board);
            let mut around = Around { server, board, lookout: &mut self.lookout };
            match rounds.go(frpc, &wanted, &mut around).await {
                Next::After(pause) => next = Instant::now() + pause,
                Next::Restart => return Outcome::Restart,
                Next::GiveUp(state) => return Outcome::GivenUp(state, frpc.since.elapsed()),
            }
        }
    }

    fn note_life(&mut self, lived: Duration) {
        if lived >= LIVED {
            self.pauses.reset();
        }
    }

    fn wanted_now(&mut self) -> Wanted {
        self.wanted.borrow_and_update().iter().map(|route| (route.name.clone(), route.clone())).collect()
    }

    fn death(&self, report: ExitReport) -> TunnelState {
        let words = frpc::last_words(&self.setup);
        TunnelState::Down {
            code: "frpc_died",
            reason: format!("frpc ended with {report}; it said last: {words}"),
            remedy: "it is started again by itself; should that not last, see what it said".to_owned(),
        }
    }

    async fn end_for_restart(&mut self) -> Option<Leave> {
        let Err(error) = frpc::end(&self.setup).await else { return None };
        let reason = format!("frpc cannot be ended: {}", chain(&error));
        let remedy = "nothing: it is tried again".to_owned();
        self.pause(TunnelState::Down { code: "frpc_launch", reason, remedy }, false).await
    }

    /// No frpc runs, or none that can be used, for a while.
    async fn pause(&mut self, state: TunnelState, nothing_runs: bool) -> Option<Leave> {
        let until = Instant::now() + self.pauses.pause();
        loop {
            let (wanted, state) = (self.wanted_now(), Some(state.clone()));
            if nothing_runs {
                self.board.nothing_routed(&wanted, state);
            } else {
                self.board.unclear(&wanted, state);
            }
            select! {
                biased;
                Some(answer) = self.stops.recv() => return Some(Leave::Stop(answer)),
                changed = self.wanted.changed() => {
                    if changed.is_err() {
                        return Some(Leave::Unwanted);
                    }
                }
                () = sleep_until(until) => return None,
            }
        }
    }
}

fn stopped() -> TunnelState {
    TunnelState::Down {
        code: "tunnel_stopped",
        reason: "the tunnel was ended".to_owned(),
        remedy: "start the agent again".to_owned(),
    }
}

/// The end of frpc. One that cannot be watched is noticed by its silence.
async fn ended(frpc: &Frpc) -> ExitReport {
    match frpc.process.exited().await {
        Ok(report) => report,
        Err(error) => {
            tracing::warn!(error = chain(&error), "frpc's end cannot be watched");
            pending().await
        }
    }
}
