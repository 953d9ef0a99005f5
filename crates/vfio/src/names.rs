//! Names of PCI devices, from the list that the distribution installs. Called by whoever shows GPUs to a person.
//!
//! The list (`pci.ids`: vendors at the start of a line, their devices after one tab, subsystems after two) has 1.5 MB.
//! It is read when a name is wanted, line by line, and only the names that were found are kept.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, BufRead, BufReader, Read},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

/// Where distributions put it: Debian's `pci.ids`, then the `hwdata` of others.
const PLACES: [&str; 2] = ["usr/share/misc/pci.ids", "usr/share/hwdata/pci.ids"];

/// The list is not read further than this.
const MOST: u64 = 16 << 20;

/// A name is cut to so many characters.
const LONGEST: usize = 120;

/// So many names are kept: more than a machine has kinds of devices.
const KEPT: usize = 1024;

/// The list, by where it may be.
#[derive(Debug)]
pub struct PciIds {
    places: Vec<PathBuf>,
    /// What was looked up already; none = the list does not have it.
    found: Mutex<BTreeMap<(u16, u16), Option<String>>>,
}

impl PciIds {
    /// The list of the system. `root` is `/` but in tests. Reads nothing before the first name is wanted.
    #[must_use]
    pub fn load(root: &Path) -> Self {
        Self { places: PLACES.iter().map(|place| root.join(place)).collect(), found: Mutex::default() }
    }

    /// Vendor and name of a device, for example `NVIDIA Corporation GA100 [A100 PCIe 40GB]`; the vendor's name and the
    /// device's id where only the vendor is known. None without either, or without a list.
    pub fn name(&self, vendor: u16, device: u16) -> Option<String> {
        let key = (vendor, device);
        if let Some(known) = self.found.lock().unwrap_or_else(PoisonError::into_inner).get(&key) {
            return known.clone();
        }
        // Not under the lock: reading takes milliseconds. Without a list nothing is kept, it may be installed later.
        let name = self.places.iter().find_map(|place| match look_up(place, vendor, device) {
            Ok(name) => Some(name),
            Err(error) => {
                if error.kind() != io::ErrorKind::NotFound {
                    tracing::warn!(list = %place.display(), %error, "the list of PCI names cannot be read");
                }
                None
            }
        })?;
        let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        if found.len() < KEPT {
            found.insert(key, name.clone());
        }
        name
    }

    /// The name, or both ids as `10de:20b5`.
    pub fn name_or_ids(&self, vendor: u16, device: u16) -> String {
        self.name(vendor, device).unwrap_or_else(|| format!("{vendor:04x}:{device:04x}"))
    }
}

fn look_up(list: &Path, vendor: u16, device: u16) -> io::Result<Option<String>> {
    find(BufReader::with_capacity(64 << 10, File::open(list)?.take(MOST)), vendor, device)
}

/// Finds a device in a list.
fn find(list: impl BufRead, vendor: u16, device: u16) -> io::Result<Option<String>> {
    let (vendor, device) = (format!("{vendor:04x}"), format!("{device:04x}"));
    let mut maker = None;
    for line in list.split(b'\n') {
        let line = line?;
        match (line.first(), &maker) {
            (None | Some(b'#'), _) => {}
            (Some(b'\t'), Some(maker)) => {
                // Two tabs: a subsystem, whose id has another meaning.
                if let Some(name) = line.get(1..).and_then(|rest| after_id(rest, &device)) {
                    return Ok(Some(tidy(&format!("{maker} {name}"))));
                }
            }
            (Some(b'\t'), None) => {}
            // The next vendor, or the list of classes: the device is not listed.
            (Some(_), Some(_)) => break,
            (Some(_), None) => maker = after_id(&line, &vendor),
        }
    }
    Ok(maker.map(|maker| tidy(&format!("{maker} {device}"))))
}

/// The name behind an id and white space.
fn after_id(line: &[u8], id: &str) -> Option<String> {
    let rest = line.strip_prefix(id.as_bytes())?;
    rest.first().filter(|byte| byte.is_ascii_whitespace())?;
    let name = String::from_utf8_lossy(rest.trim_ascii()).into_owned();
    (!name.is_empty()).then_some(name)
}

/// Nothing from a file reaches a terminal that could steer it.
fn tidy(name: &str) -> String {
    name.chars().filter(|c| !c.is_control()).take(LONGEST).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    const LIST: &str = "# a comment\n\
        10dd  Micro\n\
        \t20b5  Not this one\n\
        10de  NVIDIA Corporation\n\
        \t\t20b5 1533  Nor this\n\
        \t20b2  GA100 [A100 SXM4 80GB]\n\
        \t\t10de 1463  A100-SXM4-80GB\n\
        \t20b5  GA100 [A100 PCIe 80GB]\n\
        10df  Emulex\n\
        \t2331  Neither\n\
        C 03  Display controller\n\
        \t00  VGA compatible controller\n";

    fn name(vendor: u16, device: u16) -> Option<String> {
        find(LIST.as_bytes(), vendor, device).unwrap()
    }

    #[test]
    fn devices_of_the_right_vendor() {
        assert_eq!(name(0x10de, 0x20b5).unwrap(), "NVIDIA Corporation GA100 [A100 PCIe 80GB]");
        assert_eq!(name(0x10de, 0x20b2).unwrap(), "NVIDIA Corporation GA100 [A100 SXM4 80GB]");
        assert_eq!(name(0x10de, 0x2331).unwrap(), "NVIDIA Corporation 2331");
        assert_eq!(name(0x10df, 0x0000).unwrap(), "Emulex 0000");
        assert_eq!(name(0x1002, 0x20b5), None);
    }

    #[test]
    fn what_could_steer_a_terminal_is_left_out() {
        let list = b"10de  Evil\x1b[2J\xff\n\t0001  \x07Card\r\n";
        assert_eq!(find(&list[..], 0x10de, 1).unwrap().unwrap(), "Evil[2J\u{fffd} Card");
        let long = format!("10de  {}\n", "x".repeat(1000));
        assert_eq!(find(long.as_bytes(), 0x10de, 1).unwrap().unwrap().chars().count(), LONGEST);
    }

    #[test]
    fn either_place_and_none_at_all() {
        let root = tempfile::tempdir().unwrap();
        let ids = PciIds::load(root.path());
        assert_eq!(ids.name(0x10de, 0x20b5), None);
        assert_eq!(ids.name_or_ids(0x10de, 0x20b5), "10de:20b5");
        for (place, device) in [("usr/share/hwdata", 0x20b5), ("usr/share/misc", 0x20b2)] {
            std::fs::create_dir_all(root.path().join(place)).unwrap();
            std::fs::write(root.path().join(place).join("pci.ids"), LIST).unwrap();
            assert!(ids.name(0x10de, device).unwrap().starts_with("NVIDIA Corporation GA100"));
        }
        // Looked up once: the list may go.
        std::fs::remove_dir_all(root.path().join("usr")).unwrap();
        assert!(ids.name(0x10de, 0x20b5).is_some() && ids.name(0x10de, 0x20b1).is_none());
    }

    /// Vendors with their devices.
    fn entries() -> impl Strategy<Value = BTreeMap<u16, BTreeSet<u16>>> {
        let devices = proptest::collection::btree_set(any::<u16>(), 1..5);
        proptest::collection::btree_map(any::<u16>(), devices, 1..8)
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_list(list in proptest::collection::vec(any::<u8>(), 0..400), id in any::<(u16, u16)>()) {
            let _ = find(&list[..], id.0, id.1).unwrap();
        }

        #[test]
        fn a_listed_device_is_found(entries in entries()) {
            let mut list = String::new();
            for (vendor, devices) in &entries {
                list += &format!("{vendor:04x}  V{vendor:04x}\n");
                for device in devices {
                    list += &format!("\t{device:04x}  D{device:04x}\n\t\t1234 5678  Sub\n");
                }
            }
            for (vendor, devices) in &entries {
                for device in devices {
                    let name = find(list.as_bytes(), *vendor, *device).unwrap();
                    prop_assert_eq!(name, Some(format!("V{vendor:04x} D{device:04x}")));
                }
            }
        }
    }
}
