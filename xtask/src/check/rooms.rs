//! The dependency rule: which of our crates may know which. Called by the parent module.
//!
//! ```text
//! api    host          know none of ours
//!  |      |
//!  |   vfio qemu guest tunnel      know host, never each other
//!  |      |
//!  +-- agent-core                  the only one that joins them      image   knows host and qemu
//!         |                                                            |
//!       doctor ------------------------ setup -------------------------+
//!         |                               |
//!        cli -----------------------------+                           what is shipped
//! ```
use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::cargo;

/// What one of our packages may depend on. A package that is not listed is refused: a new room is a decision.
const ROOMS: &[(&str, &[&str])] = &[
    ("qudata-api", &[]),
    ("qudata-host", &[]),
    ("qudata-vfio", &["qudata-host"]),
    ("qudata-qemu", &["qudata-host"]),
    ("qudata-guest", &["qudata-host"]),
    ("qudata-tunnel", &["qudata-host"]),
    ("qudata-image", &["qudata-host", "qudata-qemu"]),
    (
        "qudata-agent-core",
        &["qudata-api", "qudata-host", "qudata-vfio", "qudata-qemu", "qudata-guest", "qudata-tunnel"],
    ),
    ("qudata-doctor", &["qudata-host", "qudata-vfio", "qudata-qemu", "qudata-agent-core"]),
    ("qudata-setup", &["qudata-host", "qudata-vfio", "qudata-image", "qudata-doctor", "qudata-agent-core"]),
    // `host`, `vfio` and `qemu` for the programs it becomes: `launch-shim`, `pci-child` and `shutdown-guest`.
    (
        "qudata-agent",
        &[
            "qudata-api",
            "qudata-host",
            "qudata-vfio",
            "qudata-qemu",
            "qudata-agent-core",
            "qudata-doctor",
            "qudata-image",
            "qudata-setup",
        ],
    ),
    ("qudata-testkit", &["qudata-api", "qudata-host"]),
    ("qudata-tests", EVERYTHING),
    ("qudata-bench", EVERYTHING),
    ("qudata-lab", &["qudata-testkit"]),
    ("xtask", &["qudata-testkit"]),
];

/// Never shipped, so it may look anywhere.
const EVERYTHING: &[&str] = &["*"];

/// Crates that only code for development may use.
const DEV_ONLY: &str = "qudata-testkit";

/// The wire contract is types; whoever needs a runtime there has put logic into it.
const NOT_IN_API: &[&str] = &["tokio", "axum", "hyper"];

struct Edge {
    from: String,
    to: String,
    dev: bool,
}

pub(super) fn check() -> Result<()> {
    let broken: Vec<String> = edges(&cargo::metadata()?)?.iter().filter_map(judge).collect();
    if broken.is_empty() {
        return Ok(());
    }
    bail!("{}", broken.join("\n  "))
}

fn edges(metadata: &Value) -> Result<Vec<Edge>> {
    let mut edges = Vec::new();
    for package in list(metadata, "packages")? {
        let from = text(package, "name")?;
        for dependency in list(package, "dependencies")? {
            let dev = dependency.get("kind").and_then(Value::as_str) == Some("dev");
            edges.push(Edge { from: from.to_owned(), to: text(dependency, "name")?.to_owned(), dev });
        }
    }
    Ok(edges)
}

fn list<'a>(value: &'a Value, field: &str) -> Result<&'a Vec<Value>> {
    value.get(field).and_then(Value::as_array).with_context(|| format!("cargo metadata has no list {field}"))
}

fn text<'a>(value: &'a Value, field: &str) -> Result<&'a str> {
    value.get(field).and_then(Value::as_str).with_context(|| format!("cargo metadata has no text {field}"))
}

/// Why this dependency breaks the rule, if it does.
fn judge(edge: &Edge) -> Option<String> {
    let Edge { from, to, dev } = edge;
    if from == "qudata-api" && !dev && NOT_IN_API.contains(&to.as_str()) {
        return Some(format!("{from} is types only and must not depend on {to}"));
    }
    let Some((_, allowed)) = ROOMS.iter().find(|(name, _)| name == from) else {
        return Some(format!("{from} is new: say in {} what it may depend on", file!()));
    };
    let ours = ROOMS.iter().any(|(name, _)| name == to);
    if !ours || allowed.contains(&to.as_str()) || *allowed == EVERYTHING || (*dev && to == DEV_ONLY) {
        return None;
    }
    Some(format!(
        "{from} depends on {to}; it may depend on {}",
        if allowed.is_empty() { "none of our crates".to_owned() } else { allowed.join(", ") }
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(from: &str, to: &str, dev: bool) -> bool {
        judge(&Edge { from: from.into(), to: to.into(), dev }).is_none()
    }

    #[test]
    fn rooms_are_kept_apart() {
        assert!(verdict("qudata-qemu", "qudata-host", false));
        assert!(verdict("qudata-qemu", "serde", false));
        assert!(!verdict("qudata-qemu", "qudata-guest", false));
        assert!(!verdict("qudata-qemu", "qudata-api", false));
        assert!(!verdict("qudata-host", "qudata-api", false));
        assert!(verdict("qudata-agent-core", "qudata-guest", false));
        assert!(!verdict("qudata-agent", "qudata-guest", false));
    }

    #[test]
    fn the_testkit_is_for_development() {
        assert!(verdict("qudata-guest", "qudata-testkit", true));
        assert!(!verdict("qudata-agent-core", "qudata-testkit", false));
        assert!(verdict("qudata-tests", "qudata-testkit", false));
    }

    #[test]
    fn a_dev_dependency_opens_no_back_door() {
        assert!(!verdict("qudata-guest", "qudata-qemu", true));
    }

    #[test]
    fn a_new_crate_is_a_decision_and_the_contract_has_no_runtime() {
        assert!(!verdict("qudata-extras", "serde", false));
        assert!(!verdict("qudata-api", "tokio", false));
    }

    #[test]
    fn this_workspace_has_edges_to_judge() {
        let edges = edges(&cargo::metadata().unwrap()).unwrap();
        assert!(edges.iter().any(|edge| edge.from == "qudata-qemu" && edge.to == "qudata-host"));
    }
}
