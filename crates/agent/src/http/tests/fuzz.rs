//! Whatever is sent, the agent answers with a fault of the caller's, never of its own, and goes on.

use proptest::{prelude::*, test_runner::Config};

use super::*;

struct Target {
    runtime: tokio::runtime::Runtime,
    served: Served,
}

fn target() -> Target {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let limits = Limits {
        head_deadline: Duration::from_millis(100),
        body_deadline: Duration::from_millis(100),
        farewell: Duration::from_millis(100),
        ..Limits::default()
    };
    let served = runtime.block_on(Served::limited(2, limits));
    Target { runtime, served }
}

impl Target {
    /// Sends and checks; an empty answer is a connection that was closed without a word.
    fn throw(&self, bytes: &[u8]) -> Result<(), TestCaseError> {
        let answer = self.runtime.block_on(async {
            let mut stream = TcpStream::connect(self.served.address).await.unwrap();
            let _ = stream.write_all(bytes).await;
            let _ = stream.shutdown().await;
            let mut answer = Vec::new();
            let read = timeout(Duration::from_secs(10), stream.read_to_end(&mut answer)).await;
            read.map(|_| answer)
        });
        let answer = answer.map_err(|_| TestCaseError::fail("the connection hangs"))?;
        let text = String::from_utf8_lossy(&answer);
        // Where a call is right, this host has no image to create an instance from, which is told.
        let right =
            bytes.starts_with(b"POST /instances") && text.contains("\"error\":\"the base image of this host");
        prop_assert!(right || !text.lines().any(|line| line.starts_with("HTTP/1.1 5")), "{text}");
        prop_assert!(!text.contains(self.served.secret.as_str()));
        Ok(())
    }

    fn untouched(&self) {
        assert_eq!(self.served.ids().len(), 2, "nothing was created or deleted");
        let alive =
            self.runtime.block_on(self.served.raw(b"GET /ping HTTP/1.1\r\nConnection: close\r\n\r\n"));
        assert_eq!(alive.status, 200);
    }
}

fn run<S: Strategy>(cases: u32, strategy: &S, test: impl Fn(S::Value) -> Result<(), TestCaseError>) {
    let config = Config { cases, failure_persistence: None, ..Config::default() };
    proptest::test_runner::TestRunner::new(config).run(strategy, test).unwrap();
}

#[test]
fn random_heads_are_no_fault_of_the_agent() {
    let target = target();
    let noise = proptest::collection::vec(any::<u8>(), 0..200);
    run(60, &noise, |bytes| target.throw(&bytes));
    let nearly =
        "[A-Z]{0,7} ?/[a-z0-9/%?=&.]{0,30} ?HTTP/1.[01]\r?\n([A-Za-z-]{0,20}:? ?[ -~]{0,30}\r?\n){0,4}\r?\n?";
    run(120, &nearly, |text| target.throw(text.as_bytes()));
    target.untouched();
}

/// With the secret, so that routes are reached; ids are of instances that do not exist, or malformed.
#[test]
fn random_calls_are_no_fault_of_the_agent() {
    let target = target();
    let path = prop_oneof![
        Just("/instances".to_owned()),
        Just("/ssh".to_owned()),
        "/instances/[0-9a-f-]{0,36}(/ssh|/console|/events)?",
        "/(host|gpus|ping|openapi.json|instances)/?[?][a-z]{0,4}=[a-z0-9%]{0,8}",
    ];
    let method = prop_oneof![Just("POST"), Just("PUT"), Just("DELETE"), Just("PATCH"), Just("HEAD")];
    let body = prop_oneof![
        "[ -~]{0,80}",
        "\\{\"(command|ssh_pubkey|id|gpus|ports|cpus|name)\":(\"[ -~&&[^\"\\\\]]{0,20}\"|-?[0-9]{0,20}|\\[\\]|null)\\}",
    ];
    run(200, &(method, path, body), |(method, path, body)| {
        let secret = &target.served.secret;
        let length = body.len();
        target.throw(format!("{method} {path} HTTP/1.1\r\nX-Agent-Secret: {secret}\r\nContent-Length: {length}\r\n\r\n{body}").as_bytes())
    });
    target.untouched();
}
