//! Who asks a self-test to end early, so that it can still delete its instance. Called by `selftest`.

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::exit::Failure;

/// Ctrl-C, the request to end, or a terminal that went away.
pub(super) struct Interruption {
    interrupt: Signal,
    terminate: Signal,
    /// None: whoever started this wants it to outlive its terminal (nohup).
    hangup: Option<Signal>,
}

impl Interruption {
    pub(super) fn listen() -> Result<Self, Failure> {
        let listen = |kind| signal(kind).map_err(|e| Failure::from(anyhow::Error::new(e)));
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let hangup = (!ignores_hangup(&status)).then(|| listen(SignalKind::hangup())).transpose()?;
        let (interrupt, terminate) = (listen(SignalKind::interrupt())?, listen(SignalKind::terminate())?);
        Ok(Self { interrupt, terminate, hangup })
    }

    pub(super) async fn happens(&mut self) {
        let hangup = async {
            match &mut self.hangup {
                Some(hangup) => hangup.recv().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
            _ = hangup => {}
        }
    }
}

/// Whether this process, whose `/proc/self/status` it is, was started with SIGHUP ignored.
fn ignores_hangup(status: &str) -> bool {
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    // SIGHUP is signal 1, the lowest bit.
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).is_some_and(|mask| mask & 1 == 1)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn only_an_ignored_hangup_is_left_alone() {
        assert!(ignores_hangup("Name:\tx\nSigIgn:\t0000000000001001\n"));
        assert!(!ignores_hangup("Name:\tx\nSigIgn:\t0000000000001002\n"));
        assert!(!ignores_hangup(""));
    }

    #[tokio::test]
    async fn a_terminal_that_goes_away_interrupts() {
        let mut interruption = Interruption::listen().unwrap();
        interruption.hangup = Some(signal(SignalKind::hangup()).unwrap());
        let own = rustix::process::getpid();
        rustix::process::kill_process(own, rustix::process::Signal::HUP).unwrap();
        tokio::time::timeout(Duration::from_secs(5), interruption.happens()).await.unwrap();
    }
}
