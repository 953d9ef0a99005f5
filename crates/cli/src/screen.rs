//! Where output goes: data on standard output, everything else on standard error. Owns what is known of the terminal
//! (width, colours) and the cleaning of text that guests could have written; used by every command.

use std::io::{self, IsTerminal, Write};

use jiff::Timestamp;
use serde::Serialize;

use crate::exit::Failure;

/// What output may look like.
#[derive(Debug, Clone)]
pub(crate) struct Screen {
    /// `--json`.
    pub(crate) json: bool,
    /// Look of standard output.
    pub(crate) out: Look,
    /// Look of standard error.
    pub(crate) err: Look,
}

/// What one stream can show.
#[derive(Debug, Clone)]
pub(crate) struct Look {
    /// Columns; absent when nobody looks at it, then nothing is folded.
    pub(crate) width: Option<u16>,
    /// Whether colours may be used.
    pub(crate) colour: bool,
    /// The present, from which "3 min ago" counts.
    pub(crate) now: Timestamp,
}

/// Colours by meaning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tone {
    /// As it should be.
    Good,
    /// On its way, or worth a look.
    Notice,
    /// Needs somebody.
    Bad,
    /// Less important.
    Faint,
    /// A heading.
    Strong,
    /// Nothing special.
    Plain,
}

impl Screen {
    /// The real terminal.
    pub(crate) fn observe(json: bool) -> Self {
        let colour = std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty())
            && std::env::var_os("TERM").is_none_or(|t| t != "dumb");
        let (out, err) = (io::stdout(), io::stderr());
        Self { json, out: look(&out, out.is_terminal(), colour), err: look(&err, err.is_terminal(), colour) }
    }

    /// Prints data.
    pub(crate) fn print(&self, text: &str) -> Result<(), Failure> {
        self.print_bytes(text.as_bytes())
    }

    /// Prints data as it is.
    pub(crate) fn print_bytes(&self, bytes: &[u8]) -> Result<(), Failure> {
        let mut out = io::stdout().lock();
        match out.write_all(bytes).and_then(|()| out.flush()) {
            Ok(()) => Ok(()),
            Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Err(Failure::reader_gone()),
            Err(e) => Err(anyhow::Error::new(e).context("cannot write to standard output").into()),
        }
    }

    /// Prints data as JSON, indented.
    pub(crate) fn print_json<T: Serialize>(&self, data: &T) -> Result<(), Failure> {
        let text = serde_json::to_string_pretty(data).map_err(anyhow::Error::new)?;
        self.print(&format!("{text}\n"))
    }

    /// Tells a person something. Nobody may be listening, so failure does not matter.
    pub(crate) fn tell(&self, text: &str) {
        let _ = writeln!(io::stderr().lock(), "{text}");
    }

    /// Replaces the last line of standard error, without ending it. Only for terminals.
    pub(crate) fn redraw(&self, text: &str) {
        let mut err = io::stderr().lock();
        let _ = write!(err, "\r\x1b[2K{text}").and_then(|()| err.flush());
    }
}

fn look(stream: &impl std::os::fd::AsFd, terminal: bool, colour: bool) -> Look {
    let size = rustix::termios::tcgetwinsize(stream).ok().filter(|_| terminal);
    // A serial console reports 0 columns: it does not know.
    let width = size.map(|s| if s.ws_col == 0 { 80 } else { s.ws_col });
    Look { width, colour: colour && terminal, now: Timestamp::now() }
}

impl Look {
    /// The text in a tone, where colours may be used.
    pub(crate) fn paint(&self, tone: Tone, text: &str) -> String {
        let code = match tone {
            Tone::Good => "32",
            Tone::Notice => "33",
            Tone::Bad => "31",
            Tone::Faint => "2",
            Tone::Strong => "1",
            Tone::Plain => return text.to_owned(),
        };
        if self.colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
}

/// The text without anything that a terminal would obey: a guest can put words into a reason or a console, and must
/// not move the cursor, set the title or paste into the owner's shell. Line feeds and tabs stay.
pub(crate) fn harmless(text: &str) -> String {
    Cleaner::default().clean(text)
}

/// [`harmless`] for text that comes in pieces: an escape sequence may be cut anywhere.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Cleaner(Escape);

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Escape {
    #[default]
    None,
    /// After ESC.
    Begun,
    /// After ESC [ : up to a byte from @ to ~.
    Control,
    /// After ESC ] and its relatives: up to BEL or ESC \.
    Text,
}

impl Cleaner {
    /// Cleans the next piece.
    pub(crate) fn clean(&mut self, text: &str) -> String {
        text.chars().filter(|c| self.keep(*c)).collect()
    }

    fn keep(&mut self, c: char) -> bool {
        let (next, keep) = match (self.0, c) {
            (_, '\x1b') => (Escape::Begun, false),
            // A line end ends a sequence that never ends by itself, so that what follows is not swallowed.
            (_, '\n') => (Escape::None, true),
            (Escape::None, '\t') => (Escape::None, true),
            (Escape::None, c) => (Escape::None, !is_control(c)),
            (Escape::Begun, '[') => (Escape::Control, false),
            (Escape::Begun, ']' | 'P' | 'X' | '^' | '_') => (Escape::Text, false),
            (Escape::Begun, c) => {
                (if (' '..='/').contains(&c) { Escape::Begun } else { Escape::None }, false)
            }
            (Escape::Control, c) => {
                (if ('@'..='~').contains(&c) { Escape::None } else { Escape::Control }, false)
            }
            (Escape::Text, c) => (if c == '\x07' { Escape::None } else { Escape::Text }, false),
        };
        self.0 = next;
        keep
    }
}

/// Control characters, and the marks by which text is shown in another order than it is written.
fn is_control(c: char) -> bool {
    c.is_control() || matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn terminals_are_not_commanded() {
        let table = [
            ("plain\ttext\n", "plain\ttext\n"),
            ("\x1b[31mred\x1b[0m", "red"),
            ("\x1b]0;title\x07after", "after"),
            ("\x1b]52;c;cm0gLXJm\x1b\\after", "after"),
            ("\x1b(Bset\x1bcreset", "setreset"),
            ("\u{9b}31mred\u{202e}", "31mred"),
            ("\x1b]never ended\nnext", "\nnext"),
            ("a\r\nb\x08\x7f", "a\nb"),
        ];
        for (given, expected) in table {
            assert_eq!(harmless(given), expected, "{given:?}");
        }
    }

    #[test]
    fn colours_only_where_they_may_be_used() {
        let look = |colour| Look { width: Some(80), colour, now: Timestamp::UNIX_EPOCH };
        assert_eq!(look(false).paint(Tone::Bad, "x"), "x");
        assert_eq!(look(true).paint(Tone::Bad, "x"), "\x1b[31mx\x1b[0m");
    }

    proptest! {
        #[test]
        fn nothing_but_lines_and_tabs_gets_through(text in "[\x00-\x7f\u{80}-\u{9f}é]{0,80}") {
            let clean = harmless(&text);
            prop_assert!(clean.chars().all(|c| c == '\n' || c == '\t' || !c.is_control()), "{clean:?}");
        }

        #[test]
        fn pieces_are_cleaned_like_the_whole(text in "[\x00-\x7f]{0,80}", at in 0usize..80) {
            let at = at.min(text.len());
            let mut cleaner = Cleaner::default();
            let pieces = cleaner.clean(&text[..at]) + &cleaner.clean(&text[at..]);
            prop_assert_eq!(pieces, harmless(&text));
        }
    }
}
