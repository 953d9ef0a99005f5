//! Answers as people read them. Pure: views and a look go in, text comes out; printing is for the commands.

pub(crate) mod doctor;
pub(crate) mod gpu;
pub(crate) mod image;
pub(crate) mod instance;
pub(crate) mod phase;
#[cfg(test)]
pub(crate) mod sample;
pub(crate) mod status;
pub(crate) mod table;
pub(crate) mod topo;

use crate::screen::{Look, Tone, harmless};

/// Lines `label  value` with the labels right-aligned; a value may have several lines.
pub(crate) fn fields(look: &Look, fields: &[(&str, String)]) -> String {
    let label_width = fields.iter().map(|(label, _)| label.chars().count()).max().unwrap_or(0);
    let mut text = String::new();
    for (label, value) in fields {
        let mut label = look.paint(Tone::Faint, &format!("{label:>label_width$}"));
        for line in value.lines() {
            text.push_str(&format!("{label}  {line}\n"));
            label = " ".repeat(label_width);
        }
    }
    text
}

/// One line without anything that a terminal would obey.
pub(crate) fn line(text: &str) -> String {
    harmless(text).replace(['\n', '\t'], " ")
}

/// Folds a text at spaces so that it fits the look with `indent` columns before it.
pub(crate) fn fold(look: &Look, indent: usize, text: &str) -> String {
    folded(look, indent, text).join(&format!("\n{}", " ".repeat(indent)))
}

/// The lines of [`fold`].
pub(crate) fn folded(look: &Look, indent: usize, text: &str) -> Vec<String> {
    let room = look.width.map_or(usize::MAX, |w| usize::from(w).saturating_sub(indent).max(20));
    let mut lines = Vec::new();
    let mut current = String::new();
    for word in line(text).split(' ').filter(|w| !w.is_empty()) {
        if !current.is_empty() && current.chars().count() + 1 + word.chars().count() > room {
            lines.push(std::mem::take(&mut current));
        }
        if !current.is_empty() {
            current.push(' ');
        }
        current.push_str(word);
    }
    lines.push(current);
    lines
}
