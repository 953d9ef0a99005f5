//! What has to change so that frpc has the wanted routes, and nothing else. Pure; called by `rounds`.

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    definition::{Defined, Definitions},
    route::{ProxyName, Route},
};

/// Wanted routes by name.
pub(crate) type Wanted = BTreeMap<ProxyName, Route>;

/// Changes, to be made in this order: a port that moves from one route to another is free before it is asked for.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Changes {
    pub(crate) remove: Vec<ProxyName>,
    pub(crate) add: Vec<Defined>,
}

impl Changes {
    pub(crate) fn is_empty(&self) -> bool {
        self.remove.is_empty() && self.add.is_empty()
    }

    /// What frpc has once they are made.
    pub(crate) fn applied_to(&self, present: &Definitions) -> Definitions {
        let mut after = present.clone();
        for name in &self.remove {
            after.remove(name);
        }
        after.extend(self.add.iter().map(|defined| (defined.route.name.clone(), defined.clone())));
        after
    }
}

/// The way from `present` to `wanted`. Routes in `again` are taken out and put in once more even if nothing about them
/// changes; all others that are as they should be stay untouched.
pub(crate) fn plan_changes(wanted: &Wanted, present: &Definitions, again: &BTreeSet<ProxyName>) -> Changes {
    let as_it_should_be = |defined: &Defined| {
        let name = &defined.route.name;
        wanted.get(name) == Some(&defined.route) && !again.contains(name)
    };
    let remove = present.values().filter(|defined| !as_it_should_be(defined));
    let remove = remove.map(|defined| defined.route.name.clone()).collect();
    let add = wanted.values().filter(|route| !present.get(&route.name).is_some_and(as_it_should_be));
    let attempt = |route: &Route| match present.get(&route.name) {
        Some(before) if before.route == *route => before.attempt.wrapping_add(1),
        _ => 0,
    };
    let add = add.map(|route| Defined { route: route.clone(), attempt: attempt(route) }).collect();
    Changes { remove, add }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;
    use crate::definition::tests::{any_route, tcp};

    fn wanted(routes: &[Route]) -> Wanted {
        routes.iter().map(|route| (route.name.clone(), route.clone())).collect()
    }

    fn present(routes: &[Route]) -> Definitions {
        let defined = |route: &Route| Defined { route: route.clone(), attempt: 0 };
        routes.iter().map(|route| (route.name.clone(), defined(route))).collect()
    }

    #[test]
    fn a_changed_route_is_removed_and_added() {
        let changes = plan_changes(
            &wanted(&[tcp("a", 1, 5), tcp("b", 2, 6)]),
            &present(&[tcp("a", 1, 5), tcp("b", 3, 6), tcp("c", 2, 7)]),
            &BTreeSet::new(),
        );
        let names: Vec<String> = changes.remove.iter().map(ToString::to_string).collect();
        assert_eq!(names, ["b", "c"]);
        assert_eq!(changes.add, [Defined { route: tcp("b", 2, 6), attempt: 0 }]);
    }

    #[test]
    fn a_route_that_is_tried_again_differs_from_before() {
        let again = BTreeSet::from(["a".parse().unwrap()]);
        let changes = plan_changes(&wanted(&[tcp("a", 1, 5)]), &present(&[tcp("a", 1, 5)]), &again);
        assert_eq!(changes.remove.len(), 1);
        assert_eq!(changes.add, [Defined { route: tcp("a", 1, 5), attempt: 1 }]);
    }

    proptest! {
        #[test]
        fn changes_lead_to_what_is_wanted_and_touch_nothing_else(
            is in vec(any_route(), 0..4),
            should_be in vec(any_route(), 0..4),
            common in vec(any_route(), 0..3),
        ) {
            let present = present(&[is, common.clone()].concat());
            let wanted = wanted(&[should_be, common].concat());
            let changes = plan_changes(&wanted, &present, &BTreeSet::new());
            let after = changes.applied_to(&present);
            let routes: Wanted = after.iter().map(|(n, d)| (n.clone(), d.route.clone())).collect();
            prop_assert_eq!(&routes, &wanted);
            for (name, defined) in &present {
                if wanted.get(name) == Some(&defined.route) {
                    prop_assert!(!changes.remove.contains(name));
                    prop_assert!(changes.add.iter().all(|added| added.route.name != *name));
                }
            }
            prop_assert!(plan_changes(&wanted, &after, &BTreeSet::new()).is_empty());
        }
    }
}
