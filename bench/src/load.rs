//! A steady stream of GETs, sent by the clock whether or not the last one was answered, so that a server that stalls is
//! charged for every call that would have come meanwhile. Called by `get_under_create`.

use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use qudata_testkit::http::Client;

use crate::samples::{Samples, millis};

/// Between two calls: 100 a second.
pub(crate) const PERIOD: Duration = Duration::from_millis(10);
/// Calls that can be waiting at once; the agent takes 64 connections, other calls included.
const CALLERS: usize = 40;

/// What a stream of calls has seen.
#[derive(Debug)]
pub(crate) struct Calls {
    /// Time of each answer.
    pub(crate) latency: Samples,
    /// How late the caller itself was in sending: this machine's part, not in `latency`.
    pub(crate) lateness: Samples,
    pub(crate) elapsed: Duration,
}

#[derive(Debug, Default)]
struct Part {
    latency: Vec<f64>,
    lateness: Vec<f64>,
    failures: Vec<String>,
}

/// GETs `path` every [`PERIOD`] while `act` runs; what that returned, and what the calls saw.
pub(crate) fn while_running<T: Send>(
    client: &Client,
    path: &str,
    act: impl FnOnce() -> T + Send,
) -> Result<(T, Calls)> {
    let (over, turn, start) = (AtomicBool::new(false), AtomicU64::new(0), Instant::now());
    let call = || caller(client, path, &over, &turn, start);
    let (value, parts) = thread::scope(|scope| {
        let callers: Vec<_> = (0..CALLERS).map(|_| scope.spawn(call)).collect();
        let value = scope.spawn(act).join();
        over.store(true, Ordering::Relaxed);
        let parts: Vec<_> = callers.into_iter().filter_map(|caller| caller.join().ok()).collect();
        (value, parts)
    });
    let elapsed = start.elapsed();
    let Ok(value) = value else { bail!("what was to run beside the calls gave up; its words are above") };
    let mut all = Part::default();
    for part in parts {
        all.latency.extend(part.latency);
        all.lateness.extend(part.lateness);
        all.failures.extend(part.failures);
    }
    if let Some(first) = all.failures.first() {
        bail!("{} of the GETs failed, the first with: {first}", all.failures.len());
    }
    let latency = Samples::new(all.latency).context("no call was made")?;
    let lateness = Samples::new(all.lateness).context("no call was made on time")?;
    Ok((value, Calls { latency, lateness, elapsed }))
}

fn caller(client: &Client, path: &str, over: &AtomicBool, turn: &AtomicU64, start: Instant) -> Part {
    let mut part = Part::default();
    loop {
        let turn = u32::try_from(turn.fetch_add(1, Ordering::Relaxed)).unwrap_or(u32::MAX);
        let due = start + PERIOD.saturating_mul(turn);
        let early = due.saturating_duration_since(Instant::now());
        thread::sleep(early);
        if over.load(Ordering::Relaxed) {
            return part;
        }
        // All callers were waiting for answers: the call is late through the server's fault and counts from when it was due.
        let sent = if early.is_zero() { due } else { Instant::now() };
        match client.call("GET", path, None) {
            Ok(reply) if reply.status == 200 => part.latency.push(millis(sent.elapsed())),
            Ok(reply) => part.failures.push(format!("{} {}", reply.status, reply.text())),
            Err(e) => part.failures.push(e.to_string()),
        }
        if !early.is_zero() {
            part.lateness.push(millis(sent.duration_since(due)));
        }
    }
}

/// A server that answers at once and knows nothing: what calls to it see is this machine's doing.
#[derive(Debug)]
pub(crate) struct Floor {
    client: Client,
    over: Arc<AtomicBool>,
}

impl Floor {
    pub(crate) fn open() -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").context("opening a server to compare with")?;
        let address = listener.local_addr()?;
        let over = Arc::new(AtomicBool::new(false));
        let seen = over.clone();
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                if seen.load(Ordering::Relaxed) {
                    return;
                }
                thread::spawn(|| answer(stream));
            }
        });
        Ok(Self { client: Client { address, secret: None, deadline: Duration::from_secs(30) }, over })
    }

    pub(crate) fn client(&self) -> &Client {
        &self.client
    }
}

impl Drop for Floor {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        // Wakes it up, so that it sees.
        let _ = self.client.connect();
    }
}

fn answer(mut stream: TcpStream) {
    let mut head = [0; 2048];
    // The caller reports what goes wrong.
    if stream.read(&mut head).is_ok_and(|bytes| bytes > 0) {
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}");
    }
}

/// What calls by the same clock would see for `window` behind one lock that is held from the beginning for `held`.
/// Computed: each waits until the lock is free, and takes no time of its own.
pub(crate) fn behind_a_lock(window: Duration, held: Duration) -> Option<Samples> {
    let calls = u32::try_from(window.as_nanos() / PERIOD.as_nanos()).ok()?;
    let wait = |call: u32| millis(held.saturating_sub(PERIOD.saturating_mul(call)));
    Samples::new((0..calls).map(wait).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Answers one call after the other and sleeps before the sixth.
    fn server(stall: Duration) -> Client {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        thread::spawn(move || {
            for (n, stream) in listener.incoming().map_while(Result::ok).enumerate() {
                if n == 5 {
                    thread::sleep(stall);
                }
                answer(stream);
            }
        });
        Client { address, secret: None, deadline: Duration::from_secs(10) }
    }

    #[test]
    fn a_stall_is_charged_to_every_call_in_it() {
        let client = server(Duration::from_millis(600));
        let (value, calls) = while_running(&client, "/", || thread::sleep(Duration::from_millis(1500)))
            .map(|(_, c)| ((), c))
            .unwrap();
        assert_eq!(value, ());
        // 60 calls came during the stall; on average they waited half of it. More than the 40 callers can hold.
        let waited = calls.latency.percentile(75);
        assert!(waited > 100.0, "{waited}: {calls:?}");
        assert!(calls.latency.max() > 500.0 && calls.elapsed >= Duration::from_millis(1500));
    }

    #[test]
    fn the_floor_answers_beside_another_stream() {
        let (one, two) = (Floor::open().unwrap(), Floor::open().unwrap());
        let wait = || thread::sleep(Duration::from_millis(200));
        let (inner, outer) =
            while_running(one.client(), "/", || while_running(two.client(), "/", wait)).unwrap();
        let ((), inner) = inner.unwrap();
        assert!(
            inner.latency.len() >= 10 && outer.latency.len() >= inner.latency.len(),
            "{inner:?} {outer:?}"
        );
    }

    #[test]
    fn a_refusal_is_an_error() {
        let client =
            Client { address: ([127, 0, 0, 1], 1).into(), secret: None, deadline: Duration::from_secs(1) };
        let error = while_running(&client, "/", || thread::sleep(Duration::from_millis(60))).unwrap_err();
        assert!(error.to_string().contains("GETs failed"), "{error}");
    }

    #[test]
    fn the_lock_is_computed() {
        let samples = behind_a_lock(Duration::from_secs(10), Duration::from_secs(2)).unwrap();
        assert_eq!((samples.len(), samples.max(), samples.p50()), (1000, 2000.0, 0.0));
        // Ten of the thousand waited longer.
        assert!((samples.percentile(99) - 1900.0).abs() < 1e-9);
        assert!(behind_a_lock(Duration::ZERO, Duration::ZERO).is_none());
    }
}
