//! Places that can hold a setting: file, environment, flags. Owns collecting their texts by key, the rule which one
//! wins, and the sentence about each that is unknown or malformed. `Settings::load` asks it.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fmt, io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use super::{DEFAULT_FILE, Problem, Settings, keys, nearest};

/// The configuration file as it was read.
#[derive(Clone)]
pub struct SettingsFile {
    /// Where it is.
    pub path: PathBuf,
    /// What is in it.
    pub text: String,
}

impl fmt::Debug for SettingsFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The text may hold the API key.
        f.debug_struct("SettingsFile").field("path", &self.path).finish_non_exhaustive()
    }
}

/// Everything `Settings::load` looks at.
pub struct LoadFrom<'a> {
    /// The configuration file, if there is one.
    pub file: Option<SettingsFile>,
    /// The environment; names without `QUDATA_` are not looked at, but for `CREDENTIALS_DIRECTORY`.
    pub env: Vec<(OsString, OsString)>,
    /// Flags of the command line as key and value, for example `("standalone", "true")`.
    pub flags: Vec<(&'static str, String)>,
    /// Reads a file that a setting names.
    pub read: &'a dyn Fn(&Path) -> io::Result<Vec<u8>>,
    /// Whether a path exists.
    pub exists: &'a dyn Fn(&Path) -> bool,
}

impl fmt::Debug for LoadFrom<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LoadFrom").field("file", &self.file).finish_non_exhaustive()
    }
}

/// The configuration file could not be read.
#[derive(Debug, thiserror::Error)]
#[error("cannot read the settings file {}", path.display())]
pub struct ReadFileError {
    /// Which file.
    pub path: PathBuf,
    /// Why.
    #[source]
    pub source: io::Error,
}

impl LoadFrom<'static> {
    /// The file at `config`, or [`DEFAULT_FILE`] where it exists; this process's environment; `flags`.
    ///
    /// # Errors
    /// When the file cannot be read. Only the default one may be missing.
    pub fn host(config: Option<&Path>, flags: Vec<(&'static str, String)>) -> Result<Self, ReadFileError> {
        let path = config.unwrap_or(Path::new(DEFAULT_FILE));
        let file = match std::fs::read_to_string(path) {
            Ok(text) => {
                keep_from_others(path);
                Some(SettingsFile { path: path.to_owned(), text })
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound && config.is_none() => None,
            Err(source) => return Err(ReadFileError { path: path.to_owned(), source }),
        };
        let (read, exists) = (&|path: &Path| std::fs::read(path), &|path: &Path| path.exists());
        Ok(Self { file, env: std::env::vars_os().collect(), flags, read, exists })
    }

    /// Loads from here: the one call of a real start.
    ///
    /// # Errors
    /// With every problem that was found.
    pub fn load(&self) -> Result<Settings, super::SettingsError> {
        Settings::load(self)
    }
}

/// The file may hold secrets, its name is known to everybody, and others may pass its directory. Whoever is not its owner
/// cannot do this and need not.
fn keep_from_others(path: &Path) {
    let Ok(found) = std::fs::metadata(path) else { return };
    let mode = found.permissions().mode();
    if mode & 0o007 != 0 {
        let _ = std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode & 0o7770));
    }
}

/// A text for a key, and where it is from, written as a person would find it there.
struct Given {
    written: String,
    place: String,
    text: String,
}

/// All texts by key, the weakest first.
pub(super) struct Layers {
    given: BTreeMap<&'static str, Vec<Given>>,
}

/// Collects file, environment and flags.
pub(super) fn stack(from: &LoadFrom<'_>) -> (Layers, Vec<Problem>) {
    let mut layers = Layers { given: BTreeMap::new() };
    let mut problems = Vec::new();
    if let Some(file) = &from.file {
        layers.add_file(file, &mut problems);
    }
    layers.add_environment(from, &mut problems);
    for (name, value) in &from.flags {
        let written = format!("--{}", name.replace('_', "-"));
        layers.add(name, Given { written, place: "command line".into(), text: value.clone() }, &mut problems);
    }
    (layers, problems)
}

impl Layers {
    pub(super) fn is_set(&self, key: &str) -> bool {
        self.given.contains_key(key)
    }

    /// Sets what wins, and checks what does not: a wrong value is wrong also where nobody looks at it today.
    pub(super) fn apply(&self, settings: &mut Settings) -> Vec<Problem> {
        let mut problems = Vec::new();
        for key in keys::KEYS {
            let Some((winner, overridden)) = self.given.get(key.name).and_then(|g| g.split_last()) else {
                continue;
            };
            let mut unused = settings.clone();
            for given in overridden {
                if (key.set)(&mut unused, &given.text).is_none() {
                    problems.push(not_allowed(key, given));
                }
            }
            if (key.set)(settings, &winner.text).is_none() {
                problems.push(not_allowed(key, winner));
            }
        }
        problems
    }

    fn add(&mut self, name: &str, given: Given, problems: &mut Vec<Problem>) {
        match keys::find(name) {
            Some(key) => self.given.entry(key.name).or_default().push(given),
            None => problems.push(Problem(format!("{} is no setting ({})", given.written, given.place))),
        }
    }

    fn add_environment(&mut self, from: &LoadFrom<'_>, problems: &mut Vec<Problem>) {
        let place = || "environment".to_owned();
        for (name, value) in &from.env {
            let name = name.to_string_lossy();
            let Some(rest) = name.strip_prefix("QUDATA_") else { continue };
            let key = rest.to_ascii_lowercase();
            // `qudata_x` and `QUDATA_x` are other variables than `QUDATA_X`.
            if keys::find(&key).is_none() || rest != rest.to_ascii_uppercase() {
                let meant = nearest::nearest(&key).map(keys::env_name);
                problems.push(unknown(&name, "environment", meant));
                continue;
            }
            match value.to_str() {
                // As in the original: an empty variable is not set. Unit files cannot unset one.
                Some("") => {}
                Some(text) => {
                    let given = Given { written: name.to_string(), place: place(), text: text.into() };
                    self.add(&key, given, problems);
                }
                None => problems.push(Problem(format!("{name} (environment): the value is not UTF-8 text"))),
            }
        }
    }

    fn add_file(&mut self, file: &SettingsFile, problems: &mut Vec<Problem>) {
        let place = file.path.display().to_string();
        let table: toml::Table = match toml::from_str(&file.text) {
            Ok(table) => table,
            // The error's own display shows the line, and the line may hold the key.
            Err(error) => {
                let line = error.span().map_or(1, |span| line_of(&file.text, span.start));
                problems
                    .push(Problem(format!("{place}, line {line}: this is not TOML: write key = \"value\"")));
                return;
            }
        };
        let given = |written| Given { written, place: place.clone(), text: String::new() };
        for (name, value) in &table {
            match value {
                // `gpu.after` and `[gpu] after` are other spellings of `gpu_after`.
                toml::Value::Table(group) if keys::find(name).is_none() => {
                    for (rest, value) in group {
                        let key = format!("{name}_{rest}");
                        self.add_value(&key, given(format!("{name}.{rest}")), value, problems);
                    }
                }
                _ => self.add_value(name, given(name.clone()), value, problems),
            }
        }
    }

    /// `given` without its text, which is in `value`.
    fn add_value(&mut self, name: &str, given: Given, value: &toml::Value, problems: &mut Vec<Problem>) {
        let Given { written, place, .. } = &given;
        let Some(key) = keys::find(name) else {
            problems.push(unknown(written, place, nearest::nearest(name).map(str::to_owned)));
            return;
        };
        match text_of(value, key.list) {
            Some(text) => self.add(name, Given { text, ..given }, problems),
            None => problems.push(Problem(format!(
                "{written} ({place}): a {} is not allowed; {} is",
                value.type_str(),
                key.allowed
            ))),
        }
    }
}

fn line_of(text: &str, offset: usize) -> usize {
    1 + text.bytes().take(offset).filter(|byte| *byte == b'\n').count()
}

fn text_of(value: &toml::Value, list: bool) -> Option<String> {
    match value {
        toml::Value::String(text) => Some(text.clone()),
        toml::Value::Integer(number) => Some(number.to_string()),
        toml::Value::Boolean(flag) => Some(flag.to_string()),
        toml::Value::Array(items) if list => {
            let texts: Option<Vec<String>> = items.iter().map(|item| text_of(item, false)).collect();
            Some(texts?.join(","))
        }
        toml::Value::Array(_) | toml::Value::Float(_) | toml::Value::Datetime(_) | toml::Value::Table(_) => {
            None
        }
    }
}

/// A name from outside, cut and printable.
fn shown(text: &str) -> String {
    text.chars().take(40).flat_map(char::escape_debug).collect()
}

fn unknown(name: &str, place: &str, meant: Option<String>) -> Problem {
    let meant = meant.map(|meant| format!(": did you mean {meant}?")).unwrap_or_default();
    Problem(format!("{} is no setting ({place}){meant}", shown(name)))
}

fn not_allowed(key: &keys::Key, given: &Given) -> Problem {
    let Given { written, place, text } = given;
    let value = if key.secret { "the value".to_owned() } else { format!("\"{}\"", shown(text)) };
    Problem(format!("{written} ({place}): {value} is not allowed; {} is", key.allowed))
}

/// The text of the file that holds the secret of the key `name`, with the name to call it by. A systemd credential may be
/// missing, a file that somebody named may not.
pub(super) fn secret_text(
    name: &str,
    layers: &Layers,
    from: &LoadFrom<'_>,
) -> Result<Option<(String, String)>, Problem> {
    let named = layers.given.get(format!("{name}_file").as_str()).and_then(|given| given.last());
    let (place, path) = match named {
        Some(given) => (given.written.clone(), PathBuf::from(&given.text)),
        None => {
            let credentials = from.env.iter().find(|(name, _)| name == "CREDENTIALS_DIRECTORY");
            let Some((_, directory)) = credentials else { return Ok(None) };
            (format!("$CREDENTIALS_DIRECTORY/{name}"), Path::new(directory).join(name))
        }
    };
    match (from.read)(&path) {
        Ok(bytes) => Ok(Some((place, String::from_utf8_lossy(&bytes).into_owned()))),
        Err(error) if named.is_none() && error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Problem(format!("{place}: cannot read {}: {error}", path.display()))),
    }
}
