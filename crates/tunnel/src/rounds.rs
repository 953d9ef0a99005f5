//! Looking after one living frpc, round by round: observe → plan → apply → judge → tell. Called by `task`.
//!
//! A round that has nothing to do reads frpc's log and no more. frpc's admin server, which notes every call, is asked
//! when something changes, every few seconds otherwise, and many times a second until frps has answered about a change.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use qudata_host::causes::chain;
use tokio::time::Instant;

use crate::{
    admin::{AdminError, SeenRoute},
    astray::Astray,
    backoff::Backoff,
    balk::Balk,
    board::{Board, States},
    definition::Definitions,
    frpc::Frpc,
    judge::{Link, any_answered, blame, link, route_states},
    log::Session,
    lookout::Lookout,
    plan::{Wanted, plan_changes},
    publish::PublishError,
    route::{ProxyName, Refusal, Route},
    setup::Server,
    status::{RouteState, TunnelState},
};

/// How often the admin server is asked when nothing happens.
const CHECK: Duration = Duration::from_secs(5);
/// A session this young may be one of many that a restarting frps gives; frpc then does not note every loss at once.
const YOUNG: Duration = Duration::from_secs(120);
/// How often the log is looked at.
const GLANCE: Duration = Duration::from_secs(1);
const GLANCE_WHEN_DOWN: Duration = Duration::from_millis(500);
/// From one look to the next while an answer of frps is awaited; the last one goes on.
const SETTLING: [u64; 12] = [20, 20, 30, 50, 50, 50, 100, 100, 200, 200, 500, 1000];
/// A new frpc needs a moment until its admin server listens; an old one that is silent is in trouble.
const ADMIN_PATIENCE: Duration = Duration::from_secs(3);
/// A frpc whose admin server has been silent for so long is restarted. Long, because it may carry sessions all the same,
/// on a host that is merely too busy.
const ADMIN_LOST: Duration = Duration::from_secs(120);
/// At the beginning of a session frps may still believe in the one before, which has our names. (frps looks at the name
/// first, so a port or a domain that is taken is always somebody else's.)
const GHOST_PATIENCE: Duration = Duration::from_secs(3);
const FIRST_RETRY: Duration = Duration::from_millis(500);
const LONGEST_RETRY: Duration = Duration::from_secs(30);

/// What outlives a frpc.
pub(crate) struct Around<'a> {
    pub(crate) server: &'a Server,
    pub(crate) board: &'a Board,
    /// There while there is no session.
    pub(crate) lookout: &'a mut Option<Lookout>,
}

/// What comes after a round.
pub(crate) enum Next {
    /// Another one, after this or earlier.
    After(Duration),
    /// The end of this frpc, and another one at once.
    Restart,
    /// The end of this frpc, which is of no use; another one after a pause that grows, for that one may be no better.
    GiveUp(TunnelState),
}

struct Retry {
    route: Route,
    at: Instant,
    pauses: Backoff,
}

/// The memory of one frpc's rounds.
pub(crate) struct Rounds {
    link: Link,
    /// When the present session was first seen.
    session_since: Instant,
    /// Since when there are routes and none was answered.
    unanswered: Option<Instant>,
    /// Looks at the admin server since something changed; none: everything is settled.
    settling: Option<usize>,
    checked: Option<Instant>,
    /// Since when frpc has not been told anything.
    failing: Option<Instant>,
    retries: BTreeMap<ProxyName, Retry>,
    balk: Balk,
    astray: Astray,
    /// The log could not be read; told once.
    blind: bool,
}

impl Rounds {
    pub(crate) fn new() -> Self {
        Self {
            link: Link::Pending,
            session_since: Instant::now(),
            unanswered: None,
            settling: Some(0),
            checked: None,
            failing: None,
            retries: BTreeMap::new(),
            balk: Balk::default(),
            astray: Astray::new(),
            blind: false,
        }
    }

    /// Something else is wanted.
    pub(crate) fn hurry(&mut self) {
        self.settling = Some(0);
    }

    /// One round.
    pub(crate) async fn go(&mut self, frpc: &mut Frpc, wanted: &Wanted, around: &mut Around<'_>) -> Next {
        let news = self.read_log(frpc, around);
        let due = self.link == Link::Down
            && around.lookout.as_ref().is_some_and(|lookout| lookout.is_due(frpc.since));
        if !news && !due && self.may_rest(frpc) {
            return self.next();
        }
        self.checked = Some(Instant::now());
        let look = match self.look(frpc, wanted).await {
            Ok(look) => look,
            Err(error) => return self.failed(&error, frpc, wanted, around.board),
        };
        self.failing = None;
        self.judge_link(&look, frpc);
        let mut states = route_states(wanted, &look.known, &look.seen, &frpc.publication, self.link);
        self.plan_retries(&mut states, around.board);
        let settled = states.values().all(|(_, state)| is_settled(state));
        self.tell(states, frpc, around);
        self.settling = if settled { None } else { Some(self.settling.map_or(0, |looks| looks + 1)) };
        if self.astray.is_due(&look.known, &look.seen, self.link, Instant::now()) {
            self.reconcile(frpc).await;
        }
        // Looked at just now: nothing is routed.
        if due
            && self.link == Link::Down
            && let Some(lookout) = around.lookout
        {
            tracing::info!("frps is there again and frpc is made to try at once");
            lookout.note_try();
            return Next::Restart;
        }
        self.next()
    }

    /// Whether the log has news of the session.
    fn read_log(&mut self, frpc: &mut Frpc, around: &mut Around<'_>) -> bool {
        let (session, failures, logins) =
            (frpc.log.session().cloned(), frpc.log.failures(), frpc.log.logins());
        if let Err(error) = frpc.log.read_on() {
            if !self.blind {
                tracing::warn!(%error, "frpc's log cannot be read, so why it has no session is not known");
            }
            self.blind = true;
        }
        if frpc.log.failures() != failures
            && let Some(lookout) = around.lookout
        {
            lookout.note_failure();
        }
        // Also one that came so soon after the loss of another that nothing else has changed.
        frpc.log.logins() != logins || (self.link == Link::Up && frpc.log.session() != session.as_ref())
    }

    /// Whether nothing needs the admin server now.
    fn may_rest(&self, frpc: &Frpc) -> bool {
        let now = Instant::now();
        let young = self.link == Link::Up && self.session_since.elapsed() < YOUNG;
        let check = if young { GLANCE } else { CHECK };
        let fresh = self.checked.is_some_and(|at| now < at + check) && self.failing.is_none();
        let retry = self.link == Link::Up && self.retries.values().any(|retry| now >= retry.at);
        // Without a session nothing settles.
        let away = self.link == Link::Down
            && frpc.log.session() != Some(&Session::LoggedIn)
            && self.settling != Some(0);
        fresh && !retry && (away || self.settling.is_none())
    }

    async fn look(&mut self, frpc: &mut Frpc, wanted: &Wanted) -> Result<Look, PublishError> {
        frpc.publication.reconsider(wanted);
        let known = frpc.publication.observe(&frpc.admin).await?;
        let again = self.due_retries();
        let unfit = |name: &ProxyName| frpc.publication.rejection(name).is_some();
        let fit: Wanted =
            wanted.iter().filter(|(name, _)| !unfit(name)).map(|(n, r)| (n.clone(), r.clone())).collect();
        let changes = plan_changes(&fit, &known, &again);
        let mut look = Look { known, seen: Vec::new() };
        if changes.is_empty() {
            self.balk.end();
        } else {
            let hurry = match frpc.publication.apply(&frpc.admin, &changes).await {
                Ok(()) => {
                    self.balk.end();
                    true
                }
                // The outcome is looked at; what is still to do is done in the next round, later each time.
                Err(error @ PublishError::Admin(_)) => self.balk.note(error, Instant::now()),
                Err(error) => return Err(error),
            };
            if hurry {
                self.settling = Some(0);
            }
            look.known = frpc.publication.observe(&frpc.admin).await?;
        }
        look.seen = frpc.admin.status().await?;
        Ok(look)
    }

    async fn reconcile(&mut self, frpc: &mut Frpc) {
        tracing::info!("frpc does not run the routes it has and is made to compare them");
        if let Err(error) = frpc.publication.reconcile(&frpc.admin).await {
            tracing::warn!(error = chain(&error), "frpc does not compare its routes; it is tried again");
        }
        self.settling = Some(0);
    }

    /// Names of the routes that are to be tried again now.
    fn due_retries(&mut self) -> BTreeSet<ProxyName> {
        let now = Instant::now();
        if self.link != Link::Up {
            return BTreeSet::new();
        }
        let due = self.retries.iter_mut().filter(|(_, retry)| now >= retry.at);
        due.map(|(name, retry)| {
            retry.at = now + retry.pauses.pause();
            name.clone()
        })
        .collect()
    }

    fn judge_link(&mut self, look: &Look, frpc: &Frpc) {
        let has_routes = !look.known.is_empty();
        let answered = !has_routes || any_answered(&look.seen);
        let since = *self.unanswered.get_or_insert_with(Instant::now);
        if answered {
            self.unanswered = None;
        }
        let unanswered = if answered { Duration::ZERO } else { since.elapsed() };
        let link = link(&look.seen, has_routes, frpc.log.session(), unanswered);
        if link == Link::Up && self.link != Link::Up {
            self.session_since = Instant::now();
        }
        self.link = link;
    }

    /// Routes that somebody else has in the way are tried again. What was told of one stays told while it is tried, and
    /// nothing is told of a refusal that may come from our own former session.
    fn plan_retries(&mut self, states: &mut States, board: &Board) {
        self.retries.retain(|name, retry| {
            states.get(name).is_some_and(|(route, state)| *route == retry.route && may_be_refused(state))
        });
        let young = self.session_since.elapsed() < GHOST_PATIENCE;
        for (name, (route, state)) in states.iter_mut() {
            match state {
                RouteState::Refused { why, .. } if why.is_taken() => {
                    self.retries.entry(name.clone()).or_insert_with(|| first_retry(route));
                    if young && *why == Refusal::NameTaken {
                        *state = RouteState::Adding;
                    }
                }
                RouteState::Adding if self.retries.contains_key(name) => {
                    if let Some(told @ RouteState::Refused { .. }) = board.told(route) {
                        *state = told;
                    }
                }
                RouteState::Adding
                | RouteState::Up { .. }
                | RouteState::Refused { .. }
                | RouteState::Waiting
                | RouteState::Removing => {}
            }
        }
    }

    fn tell(&self, states: States, frpc: &Frpc, around: &mut Around<'_>) {
        let Around { server, board, lookout } = around;
        let state = match self.link {
            Link::Up => {
                **lookout = None;
                Some(self.balk.state(Instant::now()).unwrap_or(TunnelState::Up))
            }
            Link::Pending => None,
            Link::Down => {
                lookout.get_or_insert_with(|| Lookout::new(&server.host, server.port));
                Some(blame(server, frpc.log.failure()))
            }
        };
        board.all(states, state);
    }

    /// When to look again.
    fn next(&self) -> Next {
        let pause = match (self.link, self.settling) {
            (Link::Down, _) => GLANCE_WHEN_DOWN,
            (Link::Up | Link::Pending, None) => GLANCE,
            (Link::Up | Link::Pending, Some(looks)) => {
                Duration::from_millis(SETTLING.get(looks).copied().unwrap_or(1000))
            }
        };
        // Without a session nothing is tried again, however long it has been due.
        let retries = self.retries.values().filter(|_| self.link == Link::Up);
        let retry = retries.map(|retry| retry.at.saturating_duration_since(Instant::now())).min();
        Next::After(retry.map_or(pause, |retry| pause.min(retry.max(Duration::from_millis(20)))))
    }

    fn failed(&mut self, error: &PublishError, frpc: &Frpc, wanted: &Wanted, board: &Board) -> Next {
        let failing = self.failing.get_or_insert_with(Instant::now).elapsed();
        let (code, remedy) = error.advice();
        let reason = format!("frpc runs and cannot be told what to route: {}", chain(error));
        let state = TunnelState::Down { code, reason, remedy: remedy.to_owned() };
        if is_lost(error, failing) {
            tracing::warn!(error = chain(error), "frpc cannot be told what to route and is restarted");
            return Next::GiveUp(state);
        }
        let late = matches!(error, PublishError::Admin(AdminError::Late { .. }));
        let state = (late || failing >= ADMIN_PATIENCE).then_some(state);
        board.unclear(wanted, state);
        // A new frpc is about to listen.
        let new = frpc.since.elapsed() < ADMIN_PATIENCE;
        Next::After(if new { Duration::from_millis(20) } else { GLANCE_WHEN_DOWN })
    }
}

/// Whether a frpc is to be given up that may carry sessions: it does not know the agent, or has not answered for long. No
/// other trouble is worth that.
fn is_lost(error: &PublishError, failing: Duration) -> bool {
    match error {
        PublishError::Admin(AdminError::Stranger) => true,
        PublishError::Admin(
            AdminError::Connect { .. } | AdminError::Late { .. } | AdminError::Broken { .. },
        ) => failing >= ADMIN_LOST,
        PublishError::Admin(AdminError::Refused { .. } | AdminError::Words { .. })
        | PublishError::Config(_)
        | PublishError::Write(_)
        | PublishError::Read(_)
        | PublishError::Verify(_) => false,
    }
}

/// What frpc has and how it does.
struct Look {
    known: Definitions,
    seen: Vec<SeenRoute>,
}

fn first_retry(route: &Route) -> Retry {
    let mut pauses = Backoff::new(FIRST_RETRY, LONGEST_RETRY);
    Retry { route: route.clone(), at: Instant::now() + pauses.pause(), pauses }
}

fn may_be_refused(state: &RouteState) -> bool {
    match state {
        RouteState::Refused { why, .. } => why.is_taken(),
        RouteState::Adding | RouteState::Waiting => true,
        RouteState::Up { .. } | RouteState::Removing => false,
    }
}

fn is_settled(state: &RouteState) -> bool {
    match state {
        RouteState::Up { .. } | RouteState::Refused { .. } => true,
        RouteState::Adding | RouteState::Waiting | RouteState::Removing => false,
    }
}

#[cfg(test)]
mod tests;
