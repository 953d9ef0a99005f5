//! nft tables in scope with everything in them: chains, sets, elements, rules. Called by `leakcheck::look`.

use std::{process::Command, time::Duration};

use serde_json::{Map, Value};

use super::{Kind, LookError, Scope, Sightings, note};
use crate::tool;

const DEADLINE: Duration = Duration::from_secs(10);
/// The set that follows the host's own networks: what comes and goes there was left by nobody.
const OF_THE_HOST: &str = "attached";

pub(super) fn look(scope: &Scope, seen: &mut Sightings) -> Result<(), LookError> {
    for (family, table) in tables(&scope.tables)? {
        note(seen, Kind::Firewall, format!("{family} {table}"), format!("table {family} {table}"));
        let Some(items) = list(&["table", &family, &table])? else { continue };
        for item in items.iter().filter_map(Value::as_object) {
            look_at_item(&format!("{family} {table}"), item, seen);
        }
    }
    Ok(())
}

/// Families and names of the tables whose name starts with `prefix`.
pub(crate) fn tables(prefix: &str) -> Result<Vec<(String, String)>, LookError> {
    let items = list(&["tables"])?.unwrap_or_default();
    let of = |table: &Value| Some((text(table, "family")?, text(table, "name")?));
    let found = items.iter().filter_map(|item| of(item.get("table")?));
    Ok(found.filter(|(_, name)| name.starts_with(prefix)).collect())
}

fn look_at_item(table: &str, item: &Map<String, Value>, seen: &mut Sightings) {
    for (sort, value) in item {
        match sort.as_str() {
            "chain" => {
                let what = format!("chain {table} {}", text(value, "name").unwrap_or_default());
                note(seen, Kind::Firewall, what.clone(), what);
            }
            "set" | "map" => {
                let set = text(value, "name").unwrap_or_default();
                let name = format!("{sort} {table} {set}");
                let elements = value.get("elem").and_then(Value::as_array).filter(|_| set != OF_THE_HOST);
                for element in elements.into_iter().flatten() {
                    let what = format!("element {element} of {name}");
                    note(seen, Kind::Firewall, what.clone(), what);
                }
                note(seen, Kind::Firewall, name.clone(), name);
            }
            "rule" => {
                let chain = text(value, "chain").unwrap_or_default();
                let words = value.get("expr").map(Value::to_string).unwrap_or_default();
                let what = format!("rule in {table} {chain}: {words}");
                note(seen, Kind::Firewall, what.clone(), what);
            }
            _ => {}
        }
    }
}

fn text(value: &Value, field: &str) -> Option<String> {
    value.get(field).and_then(Value::as_str).map(str::to_owned)
}

/// `nft -j list …`; none when the table went while we looked.
fn list(what: &[&str]) -> Result<Option<Vec<Value>>, LookError> {
    let fail = |reason: &dyn std::fmt::Display| LookError::new("nft", reason);
    let mut command = Command::new("nft");
    // Stateless: counters that tick are no difference.
    let output = tool::run(command.args(["-s", "-j", "list"]).args(what), DEADLINE).map_err(|e| fail(&e))?;
    if !output.status.success() {
        let gone = output.stderr.contains("No such file");
        return if gone { Ok(None) } else { Err(fail(&output.stderr.trim())) };
    }
    let document: Value = serde_json::from_str(&output.stdout).map_err(|e| fail(&e))?;
    let items = document.get("nftables").and_then(Value::as_array).cloned();
    items.map(Some).ok_or_else(|| fail(&"its answer has no `nftables` list"))
}
