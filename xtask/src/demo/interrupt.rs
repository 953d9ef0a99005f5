//! Ctrl-C and SIGTERM as a flag, so that the demo can clean up wherever it is. Called by `demo` and asked in every wait.
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use tokio::signal::unix::{SignalKind, signal};

/// Whether somebody wants the demo to end.
#[derive(Debug, Clone)]
pub(super) struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// From now on the two signals set the flag instead of ending the process.
    pub(super) fn install() -> Result<Self> {
        let raised = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&raised);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build();
        let runtime = runtime.context("cannot watch for Ctrl-C")?;
        let watch = {
            let _inside = runtime.enter();
            (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
        };
        let (Ok(mut interrupt), Ok(mut terminate)) = watch else { bail!("cannot watch for Ctrl-C") };
        thread::spawn(move || {
            runtime.block_on(async {
                tokio::select! { _ = interrupt.recv() => {}, _ = terminate.recv() => {} }
                flag.store(true, Ordering::Release);
                // Later signals change nothing: cleaning up has deadlines of its own.
                std::future::pending::<()>().await;
            });
        });
        Ok(Self(raised))
    }

    pub(super) fn raised(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }

    /// Sleeps until the flag is raised.
    pub(super) fn wait(&self) {
        while !self.raised() {
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// Asks `attempt` again and again until it gives something; an error past the deadline or when interrupted.
    pub(super) fn poll<T>(
        &self,
        what: &str,
        within: Duration,
        mut attempt: impl FnMut() -> Result<Option<T>>,
    ) -> Result<T> {
        let until = Instant::now() + within;
        loop {
            if let Some(value) = attempt()? {
                return Ok(value);
            }
            if self.raised() {
                bail!("interrupted while waiting for {what}");
            }
            if Instant::now() > until {
                bail!("no {what} within {} s", within.as_secs());
            }
            thread::sleep(Duration::from_millis(100));
        }
    }
}
