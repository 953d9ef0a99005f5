//! What nft says is in force. Owns the reading of its JSON; tolerant, because the listing grows with every nft.

use std::collections::BTreeSet;

use serde_json::Value;

/// The policy as it stands in the kernel.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EgressState {
    /// The table exists.
    pub installed: bool,
    /// Every chain has all its rules. `false` when somebody flushed them: then nothing is confined.
    pub intact: bool,
    /// uids of confined passt processes.
    pub guests: BTreeSet<u32>,
    /// Host ports that refuse new connections.
    pub gated: BTreeSet<u16>,
    /// Host ports that only root may connect to.
    pub management: BTreeSet<u16>,
}

pub(super) fn has_table(listing: &Value, table: &str) -> bool {
    objects(listing, "table").any(|found| found["name"] == table)
}

/// Reads one table's listing; `rules` are what its chains should hold.
pub(super) fn parse(listing: &Value, rules: &[(&str, &str)]) -> EgressState {
    let held = |chain: &str| objects(listing, "rule").filter(|rule| rule["chain"] == chain).count();
    let wanted = |chain: &str| rules.iter().filter(|(name, _)| *name == chain).count();
    let hooked =
        |chain: &str| objects(listing, "chain").any(|found| found["name"] == chain && found["hook"] == chain);
    EgressState {
        installed: true,
        intact: rules.iter().all(|(chain, _)| held(chain) == wanted(chain))
            && hooked("output")
            && hooked("input"),
        guests: numbers(listing, "guests"),
        gated: numbers(listing, "gated"),
        management: numbers(listing, "management"),
    }
}

fn objects<'a>(listing: &'a Value, kind: &'a str) -> impl Iterator<Item = &'a Value> {
    listing["nftables"].as_array().into_iter().flatten().filter_map(move |entry| entry.get(kind))
}

fn numbers<T: Ord + TryFrom<u64>>(listing: &Value, set: &str) -> BTreeSet<T> {
    objects(listing, "set")
        .filter(|found| found["name"] == set)
        .flat_map(|found| found["elem"].as_array().into_iter().flatten())
        .filter_map(|element| T::try_from(element.as_u64()?).ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    #[test]
    fn a_flushed_chain_is_noticed() {
        let rules = [("output", "a"), ("output", "b"), ("input", "c")];
        let chain = |name| json!({"chain": {"name": name, "hook": name}});
        let rule = |name| json!({"rule": {"chain": name}});
        let whole = [chain("output"), chain("input"), rule("output"), rule("output"), rule("input")];
        assert!(parse(&json!({ "nftables": whole }), &rules).intact);
        for missing in 0..whole.len() {
            let mut rest = whole.to_vec();
            rest.remove(missing);
            assert!(!parse(&json!({ "nftables": rest }), &rules).intact, "without {}", whole[missing]);
        }
    }

    #[test]
    fn elements_are_read_and_what_is_no_number_is_passed_over() {
        let listing = json!({"nftables": [
            {"metainfo": {}},
            {"set": {"name": "guests", "elem": [61001, 100, "root", -1]}},
            {"set": {"name": "gated", "elem": [80, 70000]}},
            {"set": {"name": "management"}},
        ]});
        let state = parse(&listing, &[]);
        assert_eq!(state.guests, [100, 61001].into());
        assert_eq!(state.gated, [80].into());
        assert!(state.management.is_empty());
    }

    proptest! {
        #[test]
        fn any_text_is_read(text in "\\PC{0,80}") {
            let listing = serde_json::from_str(&text).unwrap_or(Value::String(text));
            let state = parse(&listing, &[("output", "a")]);
            prop_assert!(!state.intact);
            prop_assert!(!has_table(&listing, "x"));
        }
    }
}
