//! Against a scripted QEMU; the real one with a real guest is in the product tests and the lab.

use serde_json::{Value, json};

use super::*;
use crate::qmp::tests::{FakeQemu, Script};

const SOON: Duration = Duration::from_millis(300);
/// More than QEMU may take for one command.
const PLENTY: Duration = Duration::from_secs(30);

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

/// Busy: the second question gets no answer. The guest's shutdown goes on meanwhile.
#[tokio::test]
async fn a_qemu_that_is_busy_for_a_while_is_not_given_up() {
    let (socket, script) = FakeQemu::new().serve(|mut qemu| async move {
        qemu.negotiate().await;
        let mut heard = 0;
        while let Some((command, id)) = qemu.next_command().await {
            heard += 1;
            match (heard, command.as_str()) {
                (1, _) => {}
                (_, "query-status") => qemu.answer(id, json!({"status": "running", "running": true})).await,
                (_, _) => {
                    qemu.answer(id, json!({})).await;
                    break;
                }
            }
        }
        heard
    });
    let result = shut_down(&socket, PLENTY).await;
    assert!(result.is_ok(), "{result:?}");
    assert_eq!(script.await.unwrap(), 3, "asked, asked again, pressed");
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
    assert!(matches!(result, Err(ShutdownError::Gone(_))), "{result:?}");
}

#[tokio::test]
async fn a_qemu_that_says_nothing_is_given_up() {
    let (socket, script) = FakeQemu::new().serve(|mut qemu| async move { qemu.client_is_gone().await });
    let result = shut_down(&socket, SOON).await;
    assert!(matches!(result, Err(ShutdownError::Silent(_) | ShutdownError::TooSlow(_))), "{result:?}");
    assert!(script.await.unwrap());
}
