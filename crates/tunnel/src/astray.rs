//! Routes on which frpc disagrees with itself: taken and not run, or run and not taken. What it is told in the moment in
//! which it logs in may not reach the new session (client/service.go, loginFunc, of frp 0.70), and it never looks again
//! by itself. Notices it and says when to do something; called by `rounds`.

use std::time::Duration;

use tokio::time::Instant;

use crate::{admin::SeenRoute, backoff::Backoff, definition::Definitions, judge::Link, route::ProxyName};

/// A route that was taken may need a moment. One that runs and must not has none: its port may be somebody else's next.
const PATIENCE: Duration = Duration::from_secs(3);
/// Between two tries.
const FIRST_PAUSE: Duration = Duration::from_secs(3);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// For how long frpc has disagreed with itself.
#[derive(Debug)]
pub(crate) struct Astray {
    missing: Option<Instant>,
    not_before: Option<Instant>,
    pauses: Backoff,
}

impl Astray {
    pub(crate) fn new() -> Self {
        let pauses = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
        Self { missing: None, not_before: None, pauses }
    }

    /// Whether frpc should be made to compare what it has with what it runs now.
    pub(crate) fn is_due(
        &mut self,
        known: &Definitions,
        seen: &[SeenRoute],
        link: Link,
        now: Instant,
    ) -> bool {
        // Without a session frpc lists nothing.
        let missing = link == Link::Up && known.keys().any(|name| !is_seen(name, seen));
        let extra = seen.iter().any(|seen| is_extra(seen, known));
        if !missing {
            self.missing = None;
        }
        if !missing && !extra {
            self.not_before = None;
            self.pauses.reset();
            return false;
        }
        let lasts = missing && *self.missing.get_or_insert(now) + PATIENCE <= now;
        let due = (extra || lasts) && self.not_before.is_none_or(|at| at <= now);
        if due {
            self.not_before = Some(now + self.pauses.pause());
        }
        due
    }
}

fn is_seen(name: &ProxyName, seen: &[SeenRoute]) -> bool {
    seen.iter().any(|seen| seen.name == name.as_str())
}

/// Whether frpc runs a route that it does not have.
pub(crate) fn is_extra(seen: &SeenRoute, known: &Definitions) -> bool {
    !known.keys().any(|name| name.as_str() == seen.name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::definition::{Defined, tests::tcp};

    fn known(names: &[&str]) -> Definitions {
        let defined = |name: &&str| Defined { route: tcp(name, 1, 2), attempt: 0 };
        names.iter().map(defined).map(|defined| (defined.route.name.clone(), defined)).collect()
    }

    fn seen(names: &[&str]) -> Vec<SeenRoute> {
        names.iter().map(|name| SeenRoute { name: (*name).into(), ..SeenRoute::default() }).collect()
    }

    #[test]
    fn a_route_that_does_not_run_has_a_moment_and_is_not_stormed() {
        let mut astray = Astray::new();
        let (known, half, whole) = (known(&["a", "b"]), seen(&["a"]), seen(&["b", "a"]));
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        assert!(!astray.is_due(&known, &half, Link::Up, at(0)));
        assert!(!astray.is_due(&known, &half, Link::Up, at(2)), "it may still come");
        assert!(!astray.is_due(&known, &whole, Link::Up, at(3)), "it came");
        assert!(!astray.is_due(&known, &half, Link::Up, at(4)), "another time");
        assert!(!astray.is_due(&known, &[], Link::Down, at(8)), "without a session nothing runs");
        assert!(!astray.is_due(&known, &half, Link::Up, at(9)));
        let tries: Vec<u64> =
            (10..70).filter(|second| astray.is_due(&known, &half, Link::Up, at(*second))).collect();
        assert!(tries[0] == 12 && (3..=6).contains(&tries.len()), "{tries:?}");
    }

    #[test]
    fn a_route_that_must_not_run_has_none() {
        let mut astray = Astray::new();
        let (known, more) = (known(&["a"]), seen(&["a", "gone"]));
        let start = Instant::now();
        assert!(astray.is_due(&known, &more, Link::Up, start));
        assert!(!astray.is_due(&known, &more, Link::Up, start), "just tried");
        assert!(astray.is_due(&known, &more, Link::Up, start + Duration::from_secs(4)));
        assert!(!astray.is_due(&known, &seen(&["a"]), Link::Up, start));
        assert!(astray.is_due(&known, &more, Link::Pending, start), "it is there again");
    }
}
