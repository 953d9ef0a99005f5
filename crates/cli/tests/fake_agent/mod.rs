//! An agent that answers as it was told, and remembers what it was asked. Speaks just enough HTTP on a unix socket; a
//! request that nobody expected fails the test.

use std::{
    collections::HashMap,
    io::{BufRead, BufReader, Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    process::{Command, Output, Stdio},
    sync::{Arc, Mutex},
    thread,
};

use serde_json::Value;

/// What was asked.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Asked {
    pub(crate) call: String,
    pub(crate) body: Value,
}

/// What is answered.
#[derive(Debug, Clone)]
pub(crate) struct Answer {
    status: u16,
    body: String,
    then: Then,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Then {
    Close,
    KeepOpen,
}

impl Answer {
    /// Success with data.
    pub(crate) fn data(data: &impl serde::Serialize) -> Self {
        Self::raw(200, &serde_json::json!({ "ok": true, "data": data }).to_string())
    }

    /// Success with nothing.
    pub(crate) fn done() -> Self {
        Self::raw(200, r#"{"ok":true}"#)
    }

    /// A refusal.
    pub(crate) fn error(status: u16, code: &str, sentence: &str) -> Self {
        Self::raw(status, &serde_json::json!({ "ok": false, "error": sentence, "code": code }).to_string())
    }

    /// Any body.
    pub(crate) fn raw(status: u16, body: &str) -> Self {
        Self { status, body: body.to_owned(), then: Then::Close }
    }

    /// The same events, happening a minute later.
    pub(crate) fn later(self) -> Self {
        Self { body: self.body.replace("T11:46:", "T11:47:"), ..self }
    }

    /// Leaves the connection open after this answer.
    pub(crate) fn and_hang(self) -> Self {
        Self { then: Then::KeepOpen, ..self }
    }
}

type Script = HashMap<String, Vec<Answer>>;

/// The agent and its socket.
pub(crate) struct FakeAgent {
    dir: tempfile::TempDir,
    asked: Arc<Mutex<Vec<Asked>>>,
    unexpected: Arc<Mutex<Vec<String>>>,
}

impl FakeAgent {
    /// Listens. Each entry: `"GET /instances"` and its answers in order, of which the last is repeated.
    pub(crate) fn start(script: Vec<(&str, Vec<Answer>)>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("agent.sock")).unwrap();
        let agent = Self { dir, asked: Arc::default(), unexpected: Arc::default() };
        let script: Script = script.into_iter().map(|(call, answers)| (call.to_owned(), answers)).collect();
        let script = Arc::new(Mutex::new(script));
        let (asked, unexpected) = (agent.asked.clone(), agent.unexpected.clone());
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (script, asked, unexpected) = (script.clone(), asked.clone(), unexpected.clone());
                thread::spawn(move || serve(stream, &script, &asked, &unexpected));
            }
        });
        agent
    }

    /// A folder for the test's files; the home of the commands it runs.
    pub(crate) fn dir(&self) -> &std::path::Path {
        self.dir.path()
    }

    /// The command with this agent as its agent and an empty environment.
    pub(crate) fn command(&self, line: &str) -> Command {
        let mut command = qudata_agent(line);
        command.env("QUDATA_VM_RUN_DIR", self.dir.path()).env("HOME", self.dir.path());
        command
    }

    /// Runs a command to its end.
    pub(crate) fn run(&self, line: &str) -> Ended {
        let ended = Ended::of(self.command(line).output().unwrap());
        let unexpected = self.unexpected.lock().unwrap().clone();
        assert!(unexpected.is_empty(), "unexpected calls {unexpected:?} by {line:?}: {ended:?}");
        ended
    }

    /// All calls so far.
    pub(crate) fn asked(&self) -> Vec<Asked> {
        self.asked.lock().unwrap().clone()
    }

    /// Body of the only call of this kind.
    pub(crate) fn body_of(&self, call: &str) -> Value {
        let calls: Vec<_> = self.asked().into_iter().filter(|a| a.call == call).collect();
        assert_eq!(calls.len(), 1, "{call}: {:?}", self.asked());
        calls[0].body.clone()
    }
}

/// The binary without an agent, an environment or input.
pub(crate) fn qudata_agent(line: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_qudata-agent"));
    command.args(line.split_whitespace()).env_clear().env("PATH", "/usr/bin:/bin").stdin(Stdio::null());
    command
}

/// How a command ended.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) code: Option<i32>,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Ended {
    pub(crate) fn of(output: Output) -> Self {
        Self {
            code: output.status.code(),
            out: String::from_utf8(output.stdout).unwrap(),
            err: String::from_utf8(output.stderr).unwrap(),
        }
    }

    /// Asserts the exit code, and shows what was printed when it is another.
    #[track_caller]
    pub(crate) fn exits(self, code: i32) -> Self {
        assert_eq!(self.code, Some(code), "{self:?}");
        self
    }

    /// Standard output as JSON.
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }
}

fn serve(
    stream: UnixStream,
    script: &Mutex<Script>,
    asked: &Mutex<Vec<Asked>>,
    unexpected: &Mutex<Vec<String>>,
) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut head = Vec::new();
    loop {
        let mut line = String::new();
        // Nothing comes from those who only try whether somebody listens.
        if reader.read_line(&mut line).unwrap_or(0) == 0 {
            return;
        }
        if line.trim().is_empty() {
            break;
        }
        head.push(line.trim().to_owned());
    }
    let header = |name: &str| {
        head.iter().find_map(|l| {
            let (key, value) = l.split_once(':')?;
            key.eq_ignore_ascii_case(name).then(|| value.trim().to_owned())
        })
    };
    let length = header("content-length").map_or(0, |l| l.parse().unwrap());
    let mut body = vec![0; length];
    reader.read_exact(&mut body).unwrap();
    let call = head[0].rsplit_once(' ').unwrap().0.to_owned();
    let body = serde_json::from_slice(&body).unwrap_or(Value::Null);
    asked.lock().unwrap().push(Asked { call: call.clone(), body });
    let answer = match script.lock().unwrap().get_mut(&call) {
        Some(answers) if answers.len() > 1 => answers.remove(0),
        Some(answers) => answers[0].clone(),
        None => {
            unexpected.lock().unwrap().push(call);
            Answer::raw(500, "unexpected")
        }
    };
    write(stream, &answer);
}

fn write(mut stream: UnixStream, answer: &Answer) {
    // Without a length: the body ends with the connection, as a stream of events does.
    let head = format!("HTTP/1.1 {} X\r\nconnection: close\r\n\r\n", answer.status);
    // Whoever asked may have gone already.
    let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(answer.body.as_bytes()));
    if answer.then == Then::KeepOpen {
        // Until the other side closes.
        let _ = stream.read(&mut [0]);
    }
}
