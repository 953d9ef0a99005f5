//! Whose code is in the agent: name, version and licence of every crate that is linked in, and the texts that their
//! licences want passed on. Called by `tree`.
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::Value;

use super::NAME;
use crate::{cargo, tool};

/// How the files begin that hold such texts.
const TEXTS: &[&str] = &["LICENSE", "LICENCE", "COPYING", "COPYRIGHT", "NOTICE", "UNLICENSE"];

/// One crate.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Crate {
    name: String,
    version: String,
    licence: String,
    /// Its licence files, in order.
    texts: Vec<String>,
}

/// The document. `frpc` is the program whose Go modules it lists.
pub(super) fn gather(frpc: &[u8]) -> Result<String> {
    let words = ["metadata", "--locked", "--format-version=1", "--filter-platform=x86_64-unknown-linux-gnu"];
    let metadata = tool::output(cargo::cargo().args(words))?;
    let metadata: Value = serde_json::from_str(&metadata).context("cargo metadata answered no JSON")?;
    let crates = linked(&metadata)?.into_iter().map(read).collect::<Result<BTreeSet<_>>>()?;
    Ok(render(&crates) + &modules(frpc))
}

/// The modules that Go's linker wrote down in the program, a line each: `dep<tab>path<tab>version`, or `=>` where another
/// stands in for the one before it.
fn modules(program: &[u8]) -> String {
    const FIRST: &[u8] = b"\nmod\tgithub.com/fatedier/frp\t";
    let start = program.windows(FIRST.len()).position(|bytes| bytes == FIRST);
    let record = start.and_then(|start| program.get(start + 1..)).unwrap_or_default();
    // Bytes that are no text end it.
    let text: String = record
        .iter()
        .map(|byte| char::from(*byte))
        .take_while(|c| c.is_ascii_graphic() || "\t\n".contains(*c))
        .collect();
    let mut document = format!(
        "\n{}\nGo modules in /usr/lib/qudata/frpc; their licences are at pkg.go.dev.\n\n",
        "=".repeat(79)
    );
    for line in text.lines() {
        let mut words = line.split('\t');
        if let (Some("mod" | "dep" | "=>"), Some(path), Some(version)) =
            (words.next(), words.next(), words.next())
        {
            document.push_str(&format!("{path} {version}\n"));
        }
    }
    document
}

/// The packages of others that end up in the agent.
fn linked(metadata: &Value) -> Result<Vec<&Value>> {
    let packages = list(metadata, "packages")?;
    let nodes = metadata.get("resolve").context("cargo metadata resolves nothing")?;
    let nodes: BTreeMap<&str, &Value> =
        list(nodes, "nodes")?.iter().filter_map(|node| Some((text(node, "id").ok()?, node))).collect();
    let agent = packages.iter().find(|package| text(package, "name").is_ok_and(|name| name == NAME));
    let mut waiting = vec![text(agent.context("there is no agent in the workspace")?, "id")?];
    let mut seen = BTreeSet::new();
    while let Some(id) = waiting.pop() {
        if seen.insert(id) {
            for edge in list(nodes.get(id).with_context(|| format!("{id} is not resolved"))?, "deps")? {
                // A kind that is null is the usual one; dev and build are for whoever builds.
                if list(edge, "dep_kinds")?.iter().any(|kind| kind.get("kind").is_some_and(Value::is_null)) {
                    waiting.push(text(edge, "pkg")?);
                }
            }
        }
    }
    let others = |package: &&Value| package.get("source").is_some_and(|source| !source.is_null());
    Ok(packages.iter().filter(others).filter(|p| text(p, "id").is_ok_and(|id| seen.contains(id))).collect())
}

fn read(package: &Value) -> Result<Crate> {
    let name = text(package, "name")?.to_owned();
    let home = Path::new(text(package, "manifest_path")?).parent().context("a manifest without a folder")?;
    let mut files = Vec::new();
    for entry in fs::read_dir(home).with_context(|| format!("cannot list {}", home.display()))? {
        let path = entry?.path();
        let file = path.file_name().map(|file| file.to_string_lossy().to_uppercase()).unwrap_or_default();
        if path.is_file() && TEXTS.iter().any(|start| file.starts_with(start)) {
            files.push(path);
        }
    }
    files.sort();
    let texts =
        files.iter().map(|file| fs::read(file).map(|text| String::from_utf8_lossy(&text).trim().to_owned()));
    let texts = texts
        .collect::<std::io::Result<_>>()
        .with_context(|| format!("cannot read the licence of {name}"))?;
    let licence = text(package, "license").unwrap_or("see below").to_owned();
    Ok(Crate { version: text(package, "version")?.to_owned(), name, licence, texts })
}

/// The list, then each text once, under the names of all who use it.
fn render(crates: &BTreeSet<Crate>) -> String {
    let mut document = "Crates that are linked into qudata-agent, and their licences.\n\n".to_owned();
    let mut texts: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for Crate { name, version, licence, texts: own } in crates {
        document.push_str(&format!("{name} {version}: {licence}\n"));
        for text in own {
            texts.entry(text).or_default().push(name);
        }
    }
    for (text, names) in texts {
        document.push_str(&format!("\n{}\n{}\n\n{text}\n", "=".repeat(79), names.join(", ")));
    }
    document
}

fn list<'a>(value: &'a Value, field: &str) -> Result<&'a Vec<Value>> {
    value.get(field).and_then(Value::as_array).with_context(|| format!("cargo metadata has no list {field}"))
}

fn text<'a>(value: &'a Value, field: &str) -> Result<&'a str> {
    value.get(field).and_then(Value::as_str).with_context(|| format!("cargo metadata has no text {field}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_linked_is_followed_and_what_only_builds_is_not() {
        let package = |name: &str, source: Option<&str>| serde_json::json!({ "name": name, "id": name, "source": source, "version": "1.0.0" });
        let edge =
            |to: &str, kind: Option<&str>| serde_json::json!({ "pkg": to, "dep_kinds": [{ "kind": kind }] });
        let metadata = serde_json::json!({
            "packages": [package(NAME, None), package("ours", None), package("linked", Some("r")), package("dev", Some("r")), package("build", Some("r"))],
            "resolve": { "nodes": [
                { "id": NAME, "deps": [edge("ours", None), edge("dev", Some("dev"))] },
                { "id": "ours", "deps": [edge("linked", None), edge("build", Some("build"))] },
                { "id": "linked", "deps": [] },
            ] },
        });
        let names: Vec<_> =
            linked(&metadata).unwrap().iter().map(|package| package["name"].clone()).collect();
        assert_eq!(names, ["linked"]);
    }

    #[test]
    fn modules_are_read_out_of_a_program() {
        let program = b"\x7fELF\xff\npath\tx\nmod\tgithub.com/fatedier/frp\tv1.2.3\th1:a=\ndep\tgithub.com/a/b\tv0.1.0\n=>\tgithub.com/c/b\tv0.2.0\th1:b=\nbuild\t-trimpath=true\n\xf9dep\tno\tno";
        let document = modules(program);
        assert!(
            document.ends_with(
                "\n\ngithub.com/fatedier/frp v1.2.3\ngithub.com/a/b v0.1.0\ngithub.com/c/b v0.2.0\n"
            ),
            "{document}"
        );
    }

    #[test]
    fn a_text_that_two_share_is_there_once_with_both_names() {
        let one = |name: &str, texts: &[&str]| Crate {
            name: name.into(),
            version: "1".into(),
            licence: "MIT".into(),
            texts: texts.iter().map(|text| (*text).to_owned()).collect(),
        };
        let document = render(&BTreeSet::from([one("a", &["same"]), one("b", &["same", "other"])]));
        assert_eq!(document.matches("same").count(), 1);
        assert!(
            document.contains("\na 1: MIT\nb 1: MIT\n") && document.contains("\na, b\n\nsame\n"),
            "{document}"
        );
    }
}
