//! What sysfs shows: drivers and overrides of PCI devices, and cgroups. Called by `leakcheck::look`.

use std::{fs, io, path::Path};

use super::{Kind, LookError, Scope, Sightings, note};

pub(super) fn look_at_pci(scope: &Scope, seen: &mut Sightings) -> Result<(), LookError> {
    let dir = scope.sysfs.join("bus/pci/devices");
    let devices = match fs::read_dir(&dir) {
        Ok(devices) => devices,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(LookError::new(dir.display().to_string(), e)),
    };
    for device in devices.filter_map(Result::ok) {
        let address = device.file_name().to_string_lossy().into_owned();
        let driver = fs::read_link(device.path().join("driver"))
            .ok()
            .and_then(|link| Some(link.file_name()?.to_string_lossy().into_owned()))
            .unwrap_or_else(|| "none".into());
        let over = fs::read_to_string(device.path().join("driver_override")).unwrap_or_default();
        for what in
            [format!("{address} driver {driver}"), format!("{address} driver override {}", over.trim())]
        {
            note(seen, Kind::Pci, what.clone(), what);
        }
    }
    Ok(())
}

pub(super) fn look_at_cgroups(scope: &Scope, seen: &mut Sightings) -> Result<(), LookError> {
    walk(scope, &scope.sysfs.join("fs/cgroup"), seen).map_err(|e| LookError::new("cgroups", e))
}

fn walk(scope: &Scope, dir: &Path, seen: &mut Sightings) -> io::Result<()> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(e),
    };
    for entry in entries.filter_map(Result::ok) {
        if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            continue;
        }
        let path = entry.path();
        if entry.file_name().to_string_lossy().starts_with(&scope.cgroups) {
            let text = path.to_string_lossy().into_owned();
            note(seen, Kind::Cgroup, text.clone(), text);
        }
        walk(scope, &path, seen)?;
    }
    Ok(())
}
