//! The person who looks on at an installation: lines as steps end, a redrawn line where there is a terminal, questions on
//! the terminal itself, because standard input may be a script. Called by `install` and `uninstall`.

use std::{
    cell::RefCell,
    fs::OpenOptions,
    io::{BufRead, BufReader, Write},
    time::Duration,
};

use qudata_setup::{
    outside::Person,
    progress::{End, Event, word},
};
use tokio::{runtime::Handle, time::sleep};

use crate::{
    screen::{Screen, Tone, harmless},
    units::duration,
};

/// Names of steps are padded to this.
const NAME: usize = 10;

fn milliseconds(took: Duration) -> String {
    duration(u64::try_from(took.as_millis()).unwrap_or(u64::MAX))
}

/// The terminal, or whatever standard error is.
#[derive(Debug)]
pub(super) struct Terminal {
    screen: Screen,
    handle: Handle,
    /// The step that is drawn, to be drawn again.
    drawn: RefCell<bool>,
}

impl Terminal {
    pub(super) fn new(screen: Screen, handle: Handle) -> Self {
        Self { screen, handle, drawn: RefCell::new(false) }
    }

    fn redraw(&self, text: &str) {
        let Some(width) = self.screen.err.width else { return };
        // A line that wraps could not be replaced.
        let fits: String = text.chars().take(usize::from(width).saturating_sub(1)).collect();
        self.screen.redraw(&fits);
        self.drawn.replace(true);
    }

    /// A line that stays, in the place of the one that was redrawn.
    fn say(&self, text: &str) {
        if self.drawn.replace(false) {
            self.screen.redraw("");
        }
        self.screen.tell(text);
    }
}

impl Person for Terminal {
    fn tell(&self, event: &Event) {
        let look = &self.screen.err;
        match event {
            Event::Begins(step) => self.redraw(&format!("{step:NAME$} …")),
            Event::Tick(step, tick, further) => {
                let text = format!("{step:NAME$} {}", harmless(&tick.to_string()));
                if look.width.is_some() {
                    self.redraw(&text);
                } else if *further {
                    self.say(&text);
                }
            }
            Event::Ended(step, end, took) => {
                let tone = match end {
                    End::Done => Tone::Good,
                    End::Already => Tone::Faint,
                    End::Skipped => Tone::Notice,
                    End::Failed => Tone::Bad,
                };
                let ended = look.paint(tone, &format!("{:14}", word(*end)));
                self.say(&format!("{step:NAME$} {ended} {}", milliseconds(*took)));
            }
            Event::Note(text) => self.say(&harmless(text)),
            Event::Warning(text) => {
                self.say(&format!("{} {}", look.paint(Tone::Notice, "warning:"), harmless(text)));
            }
        }
    }

    fn ask(&self, question: &str) -> Option<bool> {
        let mut terminal = OpenOptions::new().read(true).write(true).open("/dev/tty").ok()?;
        self.say("");
        write!(terminal, "{question} [y/N] ").and_then(|()| terminal.flush()).ok()?;
        let mut answer = String::new();
        BufReader::new(terminal).read_line(&mut answer).ok()?;
        Some(matches!(answer.trim().to_ascii_lowercase().as_str(), "y" | "yes"))
    }

    fn count_down(&self, seconds: u32, what: &str) -> bool {
        self.say(&format!("{what} in {seconds} s; Ctrl-C stops that."));
        for left in (1..=seconds).rev() {
            self.redraw(&format!("{what} in {left} s; Ctrl-C stops that."));
            let stopped = self.handle.block_on(async {
                tokio::select! {
                    () = sleep(Duration::from_secs(1)) => false,
                    pressed = tokio::signal::ctrl_c() => pressed.is_ok(),
                }
            });
            if stopped {
                return false;
            }
        }
        true
    }
}
