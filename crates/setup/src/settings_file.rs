//! `agent.toml`: puts values in and leaves everything else, comments and order, as the owner wrote it. Pure; called by
//! `observe` and `plan`.

use std::{io, path::Path};

use qudata_agent_core::settings::{LoadFrom, Settings, SettingsFile};
use toml_edit::{DocumentMut, Item, Value};

use crate::{
    error::{Code, SetupError},
    places,
};

/// What a host without a template begins with.
const BARE: &str = "# Settings of the Qudata agent; `qudata-agent settings` lists them all.\n";

/// Settings that no command line may carry, because others can read it.
const SECRET: [&str; 2] = ["api_key", "frp_token"];

/// The secrets that stand in a text of `agent.toml`.
pub fn secrets(text: &str) -> Vec<String> {
    SECRET.iter().filter_map(|key| text_of(text, key)).filter(|secret| !secret.is_empty()).collect()
}

/// The text of `agent.toml` with `values` in it. `base` is the file as it is, or the template.
///
/// # Errors
/// When the base is not TOML, or a value is not for the command line.
pub fn with_values(base: Option<&str>, values: &[(String, String)]) -> Result<String, SetupError> {
    let base = base.unwrap_or(BARE);
    if let Some((key, _)) = values.iter().find(|(key, _)| SECRET.contains(&key.as_str())) {
        let what = format!("{key} is a secret: other users of this host can read a command line");
        let remedy =
            format!("Write it to a file of root, and give that: --set {key}_file=/path/to/the/file.");
        return Err(SetupError::new(Code::BadSettings, what, remedy));
    }
    // The parser's own words show the line, which may hold a key.
    let mut document: DocumentMut = base.parse().map_err(|_| {
        let what = format!("{} is not TOML", places::SETTINGS);
        SetupError::new(Code::BadSettings, what, "Write one key = \"value\" a line.")
            .next("qudata-agent settings")
    })?;
    let mut wanted: Vec<(String, String)> = Vec::new();
    for (key, text) in values {
        wanted.retain(|(known, _)| known != key);
        wanted.push((key.clone(), text.clone()));
    }
    let values = wanted.as_slice();
    if document.is_empty() && !values.is_empty() {
        // Comments of a file without values stand at its end, and values would come before them.
        let lines: String = values.iter().map(|(key, text)| format!("{key} = {}\n", value(text))).collect();
        return with_values(Some(&format!("{}\n{lines}", base.trim_end())), values);
    }
    for (key, text) in values {
        let new = value(text);
        match place(&mut document, key) {
            // The decoration of the old value holds the owner's comment behind it.
            Some(Item::Value(old)) => {
                if !same(old, &new) {
                    let decor = old.decor().clone();
                    *old = new;
                    *old.decor_mut() = decor;
                }
            }
            _ => {
                document.insert(key, Item::Value(new));
            }
        }
    }
    Ok(document.to_string())
}

/// Where a key stands already: by itself, or as `x.y` or `[x] y` for `x_y`.
fn place<'a>(document: &'a mut DocumentMut, key: &str) -> Option<&'a mut Item> {
    if document.contains_key(key) {
        return document.get_mut(key);
    }
    let splits = key.match_indices('_').map(|(at, _)| key.split_at(at));
    let found = splits.map(|(group, rest)| (group.to_owned(), rest.trim_start_matches('_').to_owned())).find(
        |(group, rest)| {
            document.get(group).and_then(Item::as_table_like).is_some_and(|table| table.contains_key(rest))
        },
    );
    let (group, rest) = found?;
    document.get_mut(&group)?.as_table_like_mut()?.get_mut(&rest)
}

/// Numbers and switches as such, everything else as text: the settings take both.
fn value(text: &str) -> Value {
    match text {
        "true" => true.into(),
        "false" => false.into(),
        _ => match text.parse::<i64>() {
            Ok(number) if number.to_string() == text => number.into(),
            _ => text.into(),
        },
    }
}

fn same(a: &Value, b: &Value) -> bool {
    let plain = |value: &Value| value.clone().decorated("", "").to_string();
    plain(a) == plain(b)
}

/// Whether a key is set in a text.
#[must_use]
pub fn is_set(text: &str, key: &str) -> bool {
    text.parse::<DocumentMut>().is_ok_and(|mut document| place(&mut document, key).is_some())
}

/// Whether a text can be understood at all.
#[must_use]
pub fn is_toml(text: &str) -> bool {
    text.parse::<DocumentMut>().is_ok()
}

/// The value of a key in a text, as text.
#[must_use]
pub fn text_of(text: &str, key: &str) -> Option<String> {
    let mut document: DocumentMut = text.parse().ok()?;
    let value = place(&mut document, key)?.as_value()?;
    Some(value.as_str().map_or_else(|| value.to_string().trim().to_owned(), str::to_owned))
}

/// The settings that the agent would have with this text.
///
/// # Errors
/// With everything that is wrong.
pub fn check(text: &str) -> Result<Settings, SetupError> {
    // Secrets in files are looked at by the agent: here it is about the text.
    let read = |_: &Path| -> io::Result<Vec<u8>> { Ok(b"ak-not-looked-at".to_vec()) };
    let exists = |_: &Path| true;
    let file = SettingsFile { path: places::SETTINGS.into(), text: text.to_owned() };
    let from =
        LoadFrom { file: Some(file), env: Vec::new(), flags: Vec::new(), read: &read, exists: &exists };
    Settings::load(&from).map_err(|error| {
        let problems: Vec<String> = error.problems.iter().map(ToString::to_string).collect();
        let what = format!("the settings are refused: {}", problems.join("; "));
        SetupError::new(
            Code::BadSettings,
            what,
            "Say it otherwise; `qudata-agent settings` lists what is allowed.",
        )
        .next("qudata-agent settings")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(base: &str, values: &[(&str, &str)]) -> String {
        let values: Vec<_> = values.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        with_values(Some(base), &values).unwrap()
    }

    #[test]
    fn comments_and_order_stay() {
        let base = "# mine\nvm_cpus = 2 # few\n\n# after\nregion = \"ru1\"\n";
        let expected = "# mine\nvm_cpus = 8 # few\n\n# after\nregion = \"ru1\"\nlisten = \"0.0.0.0\"\n";
        assert_eq!(with(base, &[("vm_cpus", "8"), ("listen", "0.0.0.0")]), expected);
        assert_eq!(with(expected, &[("vm_cpus", "8"), ("listen", "0.0.0.0")]), expected);
        assert_eq!(with(base, &[]), base);
    }

    #[test]
    fn values_come_after_the_comments_of_a_file_without_any() {
        assert_eq!(
            with("# one\n# two\n", &[("vm_cpus", "8"), ("vm_cpus", "9")]),
            "# one\n# two\nvm_cpus = 9\n"
        );
        assert_eq!(with("", &[("region", "ru2")]).trim_start(), "region = \"ru2\"\n");
    }

    #[test]
    fn a_key_is_found_in_its_group() {
        let base = "[gpu]\nafter = \"host\"\n";
        assert_eq!(with(base, &[("gpu_after", "vfio")]), "[gpu]\nafter = \"vfio\"\n");
        assert!(is_set(base, "gpu_after") && !is_set(base, "gpu_no_mmap"));
        // A key of the top must not land in the last group.
        let both = with(base, &[("region", "ru2")]);
        assert_eq!(check(&both).unwrap().region, "ru2", "{both}");
    }

    #[test]
    fn what_is_refused_is_told_without_secrets() {
        let error = with_values(None, &[("api_key".into(), "ak-canary".into())]).unwrap_err();
        assert!(!format!("{error} {error:?}").contains("canary"), "{error:?}");
        let error = with_values(Some("api_key = ak-canary"), &[]).unwrap_err();
        assert!(!format!("{error:?}").contains("canary"), "{error:?}");
        let error = check("vm_cpuss = 1\n").unwrap_err();
        assert!(error.what.contains("vm_cpuss") && error.what.contains("did you mean"), "{error}");
    }
}
