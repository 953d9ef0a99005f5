//! A host's files, to be compared before and after.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::Path,
};

/// Every file, folder and link below the root but the kernel's, with its content, mode, owner and age. Folders are without
/// age: it changes with what was in them for a while.
pub(super) fn tree(root: &Path) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    let mut dirs = vec![root.to_owned()];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(&dir).unwrap() {
            let path = entry.unwrap().path();
            let name = path.strip_prefix(root).unwrap().display().to_string();
            if ["proc", "sys", "dev"].contains(&name.as_str()) {
                continue;
            }
            let meta = fs::symlink_metadata(&path).unwrap();
            let mut text = format!("{:o} {}:{}", meta.permissions().mode(), meta.uid(), meta.gid());
            if meta.is_dir() {
                dirs.push(path);
            } else {
                let content = fs::read(&path).unwrap_or_default();
                text = format!(
                    "{text} {}.{} {}",
                    meta.mtime(),
                    meta.mtime_nsec(),
                    String::from_utf8_lossy(&content)
                );
            }
            found.insert(name, text);
        }
    }
    found
}

/// What differs between two trees, one line each.
pub(super) fn differences(
    before: &BTreeMap<String, String>,
    after: &BTreeMap<String, String>,
) -> Vec<String> {
    let names: BTreeSet<&String> = before.keys().chain(after.keys()).collect();
    let differs = names.into_iter().filter(|name| before.get(*name) != after.get(*name));
    differs.map(|name| format!("{name}: {:?} / {:?}", before.get(name), after.get(name))).collect()
}
