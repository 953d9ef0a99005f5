//! What a test does with instances: create, look, wait, delete; each over the API. Called by product tests.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use super::{Event, Events, TestAgent};
use crate::{http::Reply, process::Seen, ssh::Login};

/// DELETE may be answered before everything is gone; this is how long the rest may take.
const DELETE: Duration = Duration::from_secs(30);

/// An instance a test made.
#[derive(Debug)]
pub struct TestInstance {
    /// Its id.
    pub id: String,
    /// `data` of the create call's answer.
    pub created: Value,
    /// The last event a wait has seen: the next wait goes on from there.
    seen: AtomicU64,
}

impl TestInstance {
    /// An instance that is known by its id alone.
    pub fn known(id: &str) -> Self {
        Self { id: id.to_owned(), created: Value::Null, seen: AtomicU64::new(0) }
    }

    /// Host port of a guest port.
    #[track_caller]
    pub fn port(&self, guest_port: u16) -> u16 {
        let port = self.created.get("ports").and_then(|ports| ports.get(guest_port.to_string()));
        let port = port.and_then(Value::as_str).and_then(|text| text.parse().ok());
        port.unwrap_or_else(|| panic!("guest port {guest_port} was not published: {}", self.created))
    }

    /// Its path in the API.
    pub fn path(&self) -> String {
        format!("/instances/{}", self.id)
    }

    /// The next wait looks at its whole history again, as after a restart of the agent.
    pub fn from_the_beginning(&self) {
        self.seen.store(0, Ordering::Relaxed);
    }
}

impl TestAgent {
    /// `POST /instances`; panics when it is refused.
    #[track_caller]
    pub fn create(&self, body: &Value) -> TestInstance {
        let reply = self.call("POST", "/instances", Some(body));
        assert_eq!(reply.status, 200, "create was refused: {}", reply.text());
        let created = reply.data();
        let id = created.get("id").and_then(Value::as_str);
        let id = id.unwrap_or_else(|| panic!("create gave no id: {created}")).to_owned();
        TestInstance { id, created, seen: AtomicU64::new(0) }
    }

    /// `GET /instances/{id}`.
    pub fn get(&self, vm: &TestInstance) -> Reply {
        self.call("GET", &vm.path(), None)
    }

    /// The instance as the API shows it now.
    #[track_caller]
    pub fn view(&self, vm: &TestInstance) -> Value {
        let reply = self.get(vm);
        assert_eq!(reply.status, 200, "GET was refused: {}", reply.text());
        reply.data()
    }

    /// A text field of the instance's view, empty when absent.
    #[track_caller]
    pub fn field(&self, vm: &TestInstance, name: &str) -> String {
        self.view(vm).get(name).and_then(Value::as_str).unwrap_or_default().to_owned()
    }

    /// The instance's precise state.
    #[track_caller]
    pub fn state(&self, vm: &TestInstance) -> String {
        self.field(vm, "state")
    }

    /// Ids of all instances, oldest first.
    pub fn ids(&self) -> Vec<String> {
        let data = self.call("GET", "/instances", None).data();
        let list = data.get("instances").and_then(Value::as_array).cloned().unwrap_or_default();
        list.iter().filter_map(|vm| vm.get("id")?.as_str().map(str::to_owned)).collect()
    }

    /// `PUT` with a command; the answer, whatever it is.
    pub fn put(&self, vm: &TestInstance, command: &str) -> Reply {
        self.call("PUT", &vm.path(), Some(&json!({ "command": command })))
    }

    /// `PUT` with a command that must be accepted.
    #[track_caller]
    pub fn command(&self, vm: &TestInstance, command: &str) {
        let reply = self.put(vm, command);
        assert_eq!(reply.status, 200, "{command} was refused: {}", reply.text());
    }

    /// Reads the events of `vm`, on from where the last wait stopped, until `phase`. Panics past `within`, and when the
    /// instance fails or goes away first.
    #[track_caller]
    pub fn wait_for_phase(&self, vm: &TestInstance, phase: &str, within: Duration) -> Event {
        let deadline = Instant::now() + within;
        let mut events = Events::open(self.client(), &vm.id, vm.seen.load(Ordering::Relaxed))
            .unwrap_or_else(|e| panic!("no events of {}: {e}\n{}", vm.id, self.log_tail()));
        let mut passed = Vec::new();
        loop {
            match events.next(deadline) {
                Ok(Some(event)) => {
                    vm.seen.store(event.seq, Ordering::Relaxed);
                    passed.push(format!("{} ms {} {}", event.elapsed_ms, event.phase, event.message));
                    if event.phase == phase {
                        return event;
                    }
                    assert!(event.phase != "failed", "failed instead of {phase}:\n{}", passed.join("\n"));
                }
                Ok(None) => panic!("the events ended before {phase}:\n{}", passed.join("\n")),
                Err(e) => panic!(
                    "no {phase} within {within:?} ({e}); state {}, events:\n{}\n{}",
                    self.state(vm),
                    passed.join("\n"),
                    self.log_tail()
                ),
            }
        }
    }

    /// Waits until the instance's precise state is `state`.
    #[track_caller]
    pub fn wait_for_state(&self, vm: &TestInstance, state: &str, within: Duration) {
        let deadline = Instant::now() + within;
        loop {
            let view = self.view(vm);
            if view.get("state").and_then(Value::as_str) == Some(state) {
                return;
            }
            assert!(Instant::now() < deadline, "not {state} within {within:?}: {view}\n{}", self.log_tail());
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// `DELETE /instances/{id}`, and waits until the API no longer knows it.
    #[track_caller]
    pub fn delete(&self, vm: &TestInstance) {
        let reply = self.call("DELETE", &vm.path(), None);
        assert_eq!(reply.status, 200, "delete was refused: {}", reply.text());
        let deadline = Instant::now() + DELETE;
        while self.get(vm).status != 404 {
            assert!(
                Instant::now() < deadline,
                "not gone within {DELETE:?}: {}\n{}",
                self.view(vm),
                self.log_tail()
            );
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// The QEMU process of an instance; panics when there is none.
    #[track_caller]
    pub fn qemu(&self, vm: &TestInstance) -> Seen {
        self.process_of(vm, "qemu-system").unwrap_or_else(|| panic!("{} has no QEMU process", vm.id))
    }

    /// The network process of an instance; panics when there is none.
    #[track_caller]
    pub fn passt(&self, vm: &TestInstance) -> Seen {
        self.process_of(vm, "passt").unwrap_or_else(|| panic!("{} has no passt process", vm.id))
    }

    /// A process of an instance by the start of its executable's name.
    pub fn process_of(&self, vm: &TestInstance, program: &str) -> Option<Seen> {
        let mine = |p: &Seen| p.runs(program) && p.args.iter().any(|arg| arg.contains(&vm.id));
        self.vm_processes().into_iter().find(mine)
    }

    /// How to log in with the key in `identity`, the host key pinned.
    #[track_caller]
    pub fn login(&self, vm: &TestInstance, identity: &std::path::Path) -> Login {
        Login::new(self.dir(), identity, vm.port(22), &self.field(vm, "ssh_host_key"))
    }
}
