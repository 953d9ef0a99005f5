//! Units of the service manager in scope, loaded ones and failed ones. Called by `leakcheck::look`.

use std::{path::Path, process::Command, time::Duration};

use super::{Kind, LookError, Scope, Sightings, note};
use crate::tool;

const DEADLINE: Duration = Duration::from_secs(20);

pub(super) fn look(scope: &Scope, seen: &mut Sightings) -> Result<(), LookError> {
    // The test systemd documents for "this machine was booted with systemd".
    if !Path::new("/run/systemd/system").exists() {
        return Ok(());
    }
    let mut command = Command::new("systemctl");
    command.args(["list-units", "--all", "--plain", "--no-legend", "--full"]);
    command.arg(format!("{}*", scope.cgroups));
    let output = tool::run(&mut command, DEADLINE).map_err(|e| LookError::new("systemctl", e))?;
    if !output.status.success() {
        return Err(LookError::new("systemctl", output.stderr.trim()));
    }
    for line in output.stdout.lines() {
        // Columns: unit, load, active, sub, description.
        let fields: Vec<&str> = line.split_whitespace().collect();
        if let (Some(unit), Some(active)) = (fields.first(), fields.get(2)) {
            note(seen, Kind::Unit, format!("{unit} {active}"), format!("{unit} {active}"));
        }
    }
    Ok(())
}
