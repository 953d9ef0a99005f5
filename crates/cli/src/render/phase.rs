//! Phases of an instance as lines: `instance create` while it waits, `instance events`.

use qudata_api::InstanceEvent;

use super::{fold, line};
use crate::{
    screen::{Look, Tone},
    units::duration,
};

/// Width of the column with the elapsed time: `23 h 59 min`.
const TIME: usize = 11;
/// Width of the column with the phase.
const PHASE: usize = 16;

/// `     14.2 s  guest up         sentence`.
pub(crate) fn event(look: &Look, event: &InstanceEvent) -> String {
    let time = look.paint(Tone::Faint, &format!("{:>TIME$}", duration(event.elapsed_ms)));
    let word = words(&event.phase);
    let Some(message) = event.message.as_deref().filter(|m| !m.is_empty()) else {
        return format!("{time}  {}", look.paint(tone(&event.phase), &word));
    };
    let phase = look.paint(tone(&event.phase), &format!("{word:<PHASE$}"));
    format!("{time}  {phase}  {}", fold(look, TIME + 2 + PHASE + 2, message))
}

/// The line below the phases while the next one is awaited.
pub(crate) fn waiting(look: &Look, elapsed_ms: u64, name: &str) -> String {
    look.paint(Tone::Faint, &format!("{:>TIME$}  waiting for {}", duration(elapsed_ms), line(name)))
}

/// `qemu_started` is `QEMU started` to people.
fn words(phase: &str) -> String {
    line(phase).replace('_', " ").replace("qemu", "QEMU")
}

fn tone(phase: &str) -> Tone {
    match phase {
        "ready" | "resumed" | "responsive" => Tone::Good,
        "failed" | "problem" | "unresponsive" => Tone::Bad,
        _ => Tone::Plain,
    }
}

#[cfg(test)]
mod tests {
    use super::{super::sample, *};

    #[test]
    fn a_life_at_80_columns() {
        let table = [
            (0, "accepted", None),
            (140, "qemu_started", None),
            (14_230, "guest_up", Some("the guest's sshd listens")),
            (14_310, "ready", None),
            (
                4_000_000,
                "problem",
                Some(
                    "QEMU has not answered for 30 s; it is left alone and watched, see the remedies in status",
                ),
            ),
            (4_100_000, "failed", Some("\x1b[1mred\x1b[0m\nherring")),
        ];
        let look = sample::look(Some(80));
        let mut text = String::new();
        for (seq, (elapsed_ms, phase, message)) in (1..).zip(table) {
            let message = message.map(str::to_owned);
            let one = InstanceEvent { seq, at: look.now, elapsed_ms, phase: phase.to_owned(), message };
            text.push_str(&event(&look, &one));
            text.push('\n');
        }
        text.push_str(&waiting(&look, 15_000, "web"));
        insta::assert_snapshot!("phases", text);
    }
}
