//! Which setting a mistyped name means. Pure; asked by `layers` for the sentence about an unknown name.

use super::keys;

/// The known name that a mistyped one probably means.
pub(super) fn nearest(name: &str) -> Option<&'static str> {
    let distances = keys::KEYS.iter().map(|key| (distance(name, key.name), key.name));
    let (distance, nearest) = distances.min()?;
    // A third of the letters wrong is another word, not a slip.
    (distance <= 1 + nearest.len() / 4).then_some(nearest)
}

/// Edits (insert, remove, replace) between two short texts.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    // Names from outside can be long; past this many letters they resemble nothing.
    for (i, x) in a.chars().take(40).enumerate() {
        let mut diagonal = i;
        let mut left = i + 1;
        let mut next = vec![left];
        for (y, above) in b.iter().zip(row.iter().skip(1)) {
            let replaced = diagonal + usize::from(x != *y);
            diagonal = *above;
            left = replaced.min(above + 1).min(left + 1);
            next.push(left);
        }
        row = next;
    }
    row.last().copied().unwrap_or_default()
}
