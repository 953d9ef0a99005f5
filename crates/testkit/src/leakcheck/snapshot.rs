//! What is on a machine at one moment, as JSON: looked at by a process on the machine under test, kept and compared on
//! another, over a reboot in between. Called by the lab and its probe.

use serde_json::{Value, json};

use super::{Kind, Leak, LookError, Scope, Sighting, Sightings, difference, look};

/// Everything in a scope at one moment.
#[derive(Debug, Clone)]
pub struct Snapshot(Sightings);

impl Snapshot {
    /// Looks at everything in `scope`.
    ///
    /// # Errors
    /// When something cannot be looked at.
    pub fn take(scope: &Scope) -> Result<Self, LookError> {
        look(scope).map(Self)
    }

    /// A list of objects with `kind`, `key`, `what` and `count`.
    pub fn to_json(&self) -> Value {
        let row = |((kind, key), seen): (&(Kind, String), &Sighting)| json!({ "kind": kind.to_string(), "key": key, "what": seen.what, "count": seen.count });
        self.0.iter().map(row).collect()
    }

    /// Reads what [`Self::to_json`] wrote; `None` when it is something else.
    pub fn from_json(value: &Value) -> Option<Self> {
        let row = |row: &Value| {
            let text = |field: &str| Some(row.get(field)?.as_str()?.to_owned());
            let kind = Kind::ALL.into_iter().find(|kind| Some(kind.to_string()) == text("kind"))?;
            let count = usize::try_from(row.get("count")?.as_u64()?).ok()?;
            Some(((kind, text("key")?), Sighting { count, what: text("what")? }))
        };
        value.as_array()?.iter().map(row).collect::<Option<Sightings>>().map(Self)
    }

    /// What is here and was not in `before`, in a stable order. So many more threads of one name are no leak.
    pub fn leaks_since(&self, before: &Self, idle_threads: usize) -> Vec<Leak> {
        difference(&before.0, &self.0, idle_threads)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_survives_the_way_and_shows_what_is_new() {
        let mut before = Sightings::new();
        super::super::note(&mut before, Kind::Pci, "a driver x", "a driver x");
        super::super::note(&mut before, Kind::Thread, "worker", "worker");
        let mut after = before.clone();
        super::super::note(&mut after, Kind::Unit, "qudata-vm-1.service", "qudata-vm-1.service failed");
        super::super::note(&mut after, Kind::Thread, "worker", "worker");
        let carried = |seen: &Sightings| Snapshot::from_json(&Snapshot(seen.clone()).to_json()).unwrap();
        let leaks = carried(&after).leaks_since(&carried(&before), 1);
        assert_eq!(leaks.len(), 1, "{leaks:?}");
        assert_eq!(leaks[0].to_string(), "unit: qudata-vm-1.service failed");
        assert!(Snapshot::from_json(&json!([{ "kind": "ghost" }])).is_none());
    }
}
