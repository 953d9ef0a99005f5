//! The line that tells where a build is: redrawn on a terminal, one line per part of the work elsewhere.

use qudata_image::Progress;

use crate::screen::{Screen, Tone};

/// The line.
pub(super) struct ProgressLine<'a> {
    screen: &'a Screen,
    last: String,
}

impl<'a> ProgressLine<'a> {
    pub(super) fn new(screen: &'a Screen) -> Self {
        Self { screen, last: String::new() }
    }

    /// Tells where it is now.
    pub(super) fn show(&mut self, progress: &Progress) {
        let label = progress.label();
        let fresh = label != self.last;
        if self.screen.err.width.is_none() {
            if fresh {
                self.screen.tell(&label);
            }
        } else {
            if fresh {
                self.end();
            }
            let percent = progress.percent().map(|percent| format!(" {percent} %")).unwrap_or_default();
            self.screen.redraw(&self.screen.err.paint(Tone::Faint, &format!("{label}{percent}")));
        }
        self.last = label;
    }

    /// Ends the line that was redrawn.
    pub(super) fn end(&mut self) {
        if self.screen.err.width.is_some() && !self.last.is_empty() {
            self.screen.tell("");
        }
        self.last.clear();
    }
}
