//! What kind of machine it is: distribution, processor, kernel, firmware. Called by `observe`.

use crate::{error::SetupError, files::Files};

/// `/etc/os-release`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Distribution {
    /// `ID`.
    pub id: String,
    /// `VERSION_ID`, as numbers.
    pub version: (u32, u32),
    /// `PRETTY_NAME`.
    pub name: String,
}

impl Distribution {
    /// Whether it is one of those that the package is made for.
    #[must_use]
    pub fn is_supported(&self) -> bool {
        match self.id.as_str() {
            "debian" => self.version >= (12, 0),
            "ubuntu" => self.version >= (22, 4),
            _ => false,
        }
    }

    pub(super) fn observe(files: &Files) -> Result<Self, SetupError> {
        let text = match files.text("/etc/os-release")? {
            Some(text) => text,
            None => files.text("/usr/lib/os-release")?.unwrap_or_default(),
        };
        let field = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
            line.unwrap_or_default().trim_matches(['"', '\'']).to_owned()
        };
        let version = field("VERSION_ID");
        let mut numbers = version.split('.').map(|part| part.parse().unwrap_or(0));
        Ok(Self {
            id: field("ID"),
            version: (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)),
            name: field("PRETTY_NAME"),
        })
    }
}

/// Who made the processor.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Maker {
    /// Intel: VT-d, DMAR.
    Intel,
    /// AMD: AMD-Vi, IVRS.
    Amd,
    /// Another.
    #[default]
    Other,
}

/// The processor: its maker, and whether it can run guests.
pub(super) fn processor(files: &Files) -> Result<(Maker, bool), SetupError> {
    let text = files.text("/proc/cpuinfo")?.unwrap_or_default();
    let of = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|rest| rest.split_once(':')).map(|(_, value)| value.trim()).unwrap_or_default()
    };
    let maker = match of("vendor_id") {
        "GenuineIntel" => Maker::Intel,
        "AuthenticAMD" | "HygonGenuine" => Maker::Amd,
        _ => Maker::Other,
    };
    Ok((maker, of("flags").split(' ').any(|flag| flag == "vmx" || flag == "svm")))
}

/// What the firmware says about an IOMMU, in its tables: which of the two kinds it has; `Some(None)` for none, none where
/// the tables cannot be seen.
pub(super) fn firmware(files: &Files) -> Result<Option<Option<Maker>>, SetupError> {
    let names = files.names("/sys/firmware/acpi/tables")?;
    if names.is_empty() {
        return Ok(None);
    }
    let has = |table: &str| names.iter().any(|name| name == table);
    Ok(Some(match (has("DMAR"), has("IVRS")) {
        (true, _) => Some(Maker::Intel),
        (_, true) => Some(Maker::Amd),
        (false, false) => None,
    }))
}

/// Whether the running kernel has a module, or has it built in.
pub(super) fn has_module(files: &Files, release: &str, module: &str) -> Result<bool, SetupError> {
    let dashed = format!("/{}.ko", module.replace('_', "-"));
    let lined = format!("/{}.ko", module.replace('-', "_"));
    for list in ["modules.dep", "modules.builtin"] {
        let text = files.text(&format!("/lib/modules/{release}/{list}"))?.unwrap_or_default();
        let named = |line: &str| {
            let path = line.split(':').next().unwrap_or_default();
            path.contains(&dashed) || path.contains(&lined)
        };
        if text.lines().any(named) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The id of a group; none when there is none.
pub(crate) fn group(files: &Files, name: &str) -> Result<Option<u32>, SetupError> {
    let text = files.text("/etc/group")?.unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    Ok(line.and_then(|rest| rest.split(':').nth(1)).and_then(|id| id.parse().ok()))
}
