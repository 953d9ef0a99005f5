//! `instance console`: the guest's serial log, once or as it grows.

use std::time::Duration;

use serde_json::json;
use tokio::time::sleep;

use super::Context;
use crate::{
    args::Console,
    exit::{Exit, Failure},
    screen::Cleaner,
};

/// How often a followed console is read.
const PAUSE: Duration = Duration::from_millis(500);
/// How much of it is read then; more than a serial port writes in that time.
const WINDOW: u32 = 128 << 10;

/// Prints the console.
pub(super) async fn run(cx: Context<'_>, wish: &Console) -> Result<Exit, Failure> {
    let instance = cx.agent.pick(wish.which.instance.as_deref()).await?;
    let path = format!("/instances/{}/console", instance.id);
    let first = match wish.tail {
        Some(tail) => format!("{path}?tail={tail}"),
        None => path.clone(),
    };
    let mut seen = read(cx, &first).await?;
    if cx.screen.json {
        cx.screen.print_json(&json!({ "id": instance.id, "console": seen }))?;
        return Ok(Exit::Done);
    }
    // Piped output is data and stays as it is; a terminal would obey it.
    let mut cleaner = (!wish.raw && cx.screen.out.width.is_some()).then(Cleaner::default);
    let mut print = |text: &str| match &mut cleaner {
        Some(cleaner) => cx.screen.print(&cleaner.clean(text)),
        None => cx.screen.print(text),
    };
    print(&seen)?;
    if !wish.follow {
        return Ok(Exit::Done);
    }
    loop {
        sleep(PAUSE).await;
        let now = match read(cx, &format!("{path}?tail={WINDOW}")).await {
            Ok(now) => now,
            Err(failure) if failure.exit == Exit::NotFound => return Ok(Exit::Done),
            Err(failure) => return Err(failure),
        };
        print(news(&seen, &now))?;
        seen = now;
    }
}

async fn read(cx: Context<'_>, path: &str) -> Result<String, Failure> {
    let bytes = cx.agent.get_bytes(path).await?;
    let text = String::from_utf8_lossy(&bytes);
    // The window may begin within a character, which then reads differently each time.
    Ok(text.trim_start_matches('\u{fffd}').to_owned())
}

/// What `now` has after the part that both windows of the log share.
fn news<'a>(seen: &str, now: &'a str) -> &'a str {
    let shared = overlap(seen.as_bytes(), now.as_bytes());
    // Equal bytes end at equal characters.
    now.get(shared..).unwrap_or(now)
}

/// Length of the longest end of `seen` that `now` begins with, in linear time (Knuth, Morris, Pratt).
fn overlap(seen: &[u8], now: &[u8]) -> usize {
    let mut border = vec![0; now.len()];
    let mut matched = 0;
    for (i, byte) in now.iter().enumerate().skip(1) {
        matched = advance(now, &border, matched, *byte);
        if let Some(slot) = border.get_mut(i) {
            *slot = matched;
        }
    }
    let mut matched = 0;
    for byte in seen {
        matched = advance(now, &border, matched, *byte);
    }
    matched
}

/// How much of `pattern` is matched after one more byte.
fn advance(pattern: &[u8], border: &[usize], mut matched: usize, byte: u8) -> usize {
    loop {
        if pattern.get(matched) == Some(&byte) {
            return matched + 1;
        }
        match matched.checked_sub(1).and_then(|last| border.get(last)) {
            Some(shorter) => matched = *shorter,
            None => return 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn only_what_is_new_is_shown() {
        let table = [
            ("", "", ""),
            ("", "boot", "boot"),
            ("boot", "boot", ""),
            ("boot", "boot\nlogin", "\nlogin"),
            ("a long boot", "boot and more", " and more"),
            ("aaaa", "aaaaaa", "aa"),
            ("abab", "ababab", "ab"),
            ("more", "else", "lse"),
            ("lost", "windows without", "windows without"),
            ("grüß", "üße", "e"),
        ];
        for (seen, now, expected) in table {
            assert_eq!(news(seen, now), expected, "{seen:?} {now:?}");
        }
    }

    proptest! {
        #[test]
        fn a_sliding_window_is_followed(log in "[ab\n]{0,60}", a in 0usize..60, b in 0usize..60) {
            let seen = &log[..a.min(log.len())];
            let from = b.min(seen.len());
            let naive = (0..=seen.len().min(log.len() - from))
                .rev()
                .find(|n| seen.ends_with(&log[from..from + n]))
                .unwrap();
            prop_assert_eq!(overlap(seen.as_bytes(), &log.as_bytes()[from..]), naive);
        }
    }
}
