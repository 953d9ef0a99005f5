//! Against a scripted QEMU; the real one with a real guest is in the product tests and the lab.

use serde_json::{Value, json};

use super::*;
use crate::qmp::tests::{FakeQemu, Script};

const SOON: Duration = Duration::from_millis(300);

/// Says that it is in `state`, does what it is told, and ends at the power button where it `obeys`. Returns what it heard.
async fn play(mut qemu: Script, state: &'static str, obeys: bool) -> Vec<String> {
    qemu.negotiate().await;
    let mut heard = Vec::new();
    while let Some((command, id)) = qemu.next_command().await {
        let reply: Value = match command.as_str() {
            "query-status" => json!({"status": state, "running": state == "running"}),
            _ => json!({}),
        };
        let last = obeys && command == "system_powerdown";
        heard.push(command);
        qemu.answer(id, reply).await;
        if last {
            break;
        }
    }
    heard
}

async fn told(state: &'static str, obeys: bool) -> (Result<(), ShutdownError>, Vec<String>) {
    let (socket, script) = FakeQemu::new().serve(move |qemu| play(qemu, state, obeys));
    let result = shut_down(&socket, SOON).await;
    (result, script.await.unwrap())
}

#[tokio::test]
async fn the_power_button_is_pressed_and_the_end_awaited() {
    let (result, heard) = told("running", true).await;
    assert!(result.is_ok(), "{result:?}");
    assert_eq!(heard, ["query-status", "system_powerdown"]);
}

#[tokio::test]
async fn a_paused_guest_is_continued_first() {
    let (result, heard) = told("paused", true).await;
    assert!(result.is_ok(), "{result:?}");
    assert_eq!(heard, ["query-status", "cont", "system_powerdown"]);
}

#[tokio::test]
async fn a_guest_that_cannot_react_is_not_waited_for() {
    for state in ["io-error", "prelaunch", "internal-error", "guest-panicked"] {
        let (result, heard) = told(state, true).await;
        assert!(matches!(result, Err(ShutdownError::NotRunning(_))), "{state}: {result:?}");
        assert_eq!(heard, ["query-status"], "{state}");
    }
}

#[tokio::test]
async fn a_guest_that_does_not_react_is_given_up() {
    let (result, _) = told("running", false).await;
    assert!(matches!(result, Err(ShutdownError::TooSlow(_))), "{result:?}");
}

#[tokio::test]
async fn no_qemu_is_an_error() {
    let result = shut_down(Path::new("/nonexistent/power.sock"), SOON).await;
    assert!(matches!(result, Err(ShutdownError::Connect(_))), "{result:?}");
}
