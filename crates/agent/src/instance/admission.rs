//! Which command is allowed in which state. Pure; asked by the instance's task.

use qudata_api::{Command, ErrorCode, InstanceState};

use crate::refusal::Refusal;

/// What a command means in a state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It is that way already.
    AlreadySo,
    /// Let the paused VM go on.
    Resume,
    /// Pause the VM.
    Pause,
    /// Reset the running VM.
    Reset,
    /// Reset the paused VM and let it go on.
    ResetAndResume,
    /// Start a VM from the disk.
    Boot,
}

/// Decides.
///
/// # Errors
/// 409 with what to do instead; 404 while it is being deleted.
pub fn plan_command(state: InstanceState, command: Command) -> Result<Verdict, Refusal> {
    use InstanceState as S;
    let wrong = |sentence: &str| Err(Refusal::new(ErrorCode::WrongState, sentence));
    match (state, command) {
        (S::Deleting, _) => Err(Refusal::no_such_instance()),
        (S::Unresponsive, _) => {
            wrong("the VM does not answer; wait until it does, or delete the instance, which needs no answer")
        }
        (S::Running | S::Booting | S::Rebooting | S::Provisioning, Command::Start) => Ok(Verdict::AlreadySo),
        (S::Paused, Command::Start) => Ok(Verdict::Resume),
        (S::Stopped | S::Failed, Command::Start | Command::Restart) => Ok(Verdict::Boot),
        (S::Running, Command::Stop) => Ok(Verdict::Pause),
        (S::Paused | S::Stopped, Command::Stop) => Ok(Verdict::AlreadySo),
        (S::Provisioning | S::Booting | S::Rebooting, Command::Stop) => {
            wrong("the instance is still starting; stop it when it is running, or delete it")
        }
        (S::Failed, Command::Stop) => wrong("the instance has failed and does not run; start or delete it"),
        (S::Running | S::Booting | S::Rebooting, Command::Restart) => Ok(Verdict::Reset),
        (S::Paused, Command::Restart) => Ok(Verdict::ResetAndResume),
        (S::Provisioning, Command::Restart) => {
            wrong("the instance has not started yet; nothing can be restarted")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_state_and_command() {
        use Command::{Restart, Start, Stop};
        use InstanceState::*;
        use Verdict::*;
        let table = [
            (Provisioning, [Ok(AlreadySo), Err(()), Err(())]),
            (Booting, [Ok(AlreadySo), Err(()), Ok(Reset)]),
            (Running, [Ok(AlreadySo), Ok(Pause), Ok(Reset)]),
            (Paused, [Ok(Resume), Ok(AlreadySo), Ok(ResetAndResume)]),
            (Rebooting, [Ok(AlreadySo), Err(()), Ok(Reset)]),
            (Stopped, [Ok(Boot), Ok(AlreadySo), Ok(Boot)]),
            (Unresponsive, [Err(()), Err(()), Err(())]),
            (Deleting, [Err(()), Err(()), Err(())]),
            (Failed, [Ok(Boot), Err(()), Ok(Boot)]),
        ];
        for (state, row) in table {
            for (command, expected) in [Start, Stop, Restart].into_iter().zip(row) {
                assert_eq!(plan_command(state, command).map_err(|_| ()), expected, "{state:?} {command:?}");
            }
        }
        assert_eq!(plan_command(Deleting, Start).unwrap_err().code, ErrorCode::NoSuchInstance);
    }
}
