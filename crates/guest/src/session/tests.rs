//! Sessions with a well-behaved guest and with every kind of bad one.

use super::{
    fake_guest::{Conduct, FakeGuest},
    *,
};
use crate::keys::HostKey;
use std::time::Instant;
use tokio::{
    io::AsyncWriteExt,
    net::{TcpListener, TcpStream},
};

const SHORT: Duration = Duration::from_millis(300);
const LONG: Duration = Duration::from_secs(5);

async fn session(conduct: Conduct) -> Session {
    Session::connect(FakeGuest::start(conduct).await.spec()).await.unwrap()
}

fn shell() -> Conduct {
    Conduct::Shell("/nonexistent".into())
}

#[tokio::test]
async fn one_connection_runs_many_commands() {
    let session = session(shell()).await;
    for status in [0, 3, 255] {
        let command = format!("cat; echo complaint >&2; exit {status}");
        let output = session.exec(&command, b"a line\n", LONG).await.unwrap();
        let expected = ExecOutput { status, stdout: b"a line\n".to_vec(), stderr: b"complaint\n".to_vec() };
        assert!(output == expected, "{output:?}");
    }
    assert!(!session.is_closed());
}

#[tokio::test]
async fn large_input_and_output_up_to_the_limit_pass() {
    let session = session(shell()).await;
    let input = vec![b'y'; MAX_OUTPUT_BYTES];
    let output = session.exec("cat", &input, LONG).await.unwrap();
    assert!(output.stdout == input);
    let error = session.exec("cat; echo", &input, LONG).await.unwrap_err();
    assert!(matches!(error, ExecError::OutputTooLarge { .. }), "{error:?}");
}

#[tokio::test]
async fn a_command_that_reads_nothing_still_ends() {
    let session = session(Conduct::ExitsAtOnce).await;
    let output = session.exec("exit 7", &vec![0; 8 * 1024 * 1024], LONG).await.unwrap();
    assert_eq!(output.status, 7);
    assert_eq!(session.exec("exit 7", &[], LONG).await.unwrap().status, 7);
}

#[tokio::test]
async fn another_host_key_is_refused_and_named() {
    let guest = FakeGuest::start(shell()).await;
    let other = HostKey::generate().unwrap();
    let spec = SessionSpec { host_key: other.public().clone(), ..guest.spec() };
    match Session::connect(spec).await {
        Err(ConnectError::HostKeyMismatch { expected, offered, .. }) => {
            assert_eq!(expected, other.public().fingerprint());
            assert_eq!(offered, guest.host_key.fingerprint());
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_host_key_of_another_kind_is_a_mismatch_too() {
    let guest = FakeGuest::start(shell()).await;
    let ecdsa = "ecdsa-sha2-nistp256 AAAAE2VjZHNhLXNoYTItbmlzdHAyNTYAAAAIbmlzdHAyNTYAAABBBHwf2HMM5TRXvo2SQJjsNkiDD5\
                 KqiiNjrGVv3UUh+mMT5RHxiRtOnlqvjhQtBq0VpmpCV/PwUdhOig4vkbqAcEc=";
    let spec = SessionSpec { host_key: GuestKey::parse(ecdsa).unwrap(), ..guest.spec() };
    let error = Session::connect(spec).await.unwrap_err();
    assert!(matches!(error, ConnectError::HostKeyMismatch { .. }), "{error:?}");
}

#[tokio::test]
async fn refused_and_hanging_logins_are_told_apart() {
    let guest = FakeGuest::start(Conduct::RefusesLogin).await;
    let error = Session::connect(guest.spec()).await.unwrap_err();
    assert!(matches!(error, ConnectError::LoginRefused { .. }), "{error:?}");

    let guest = FakeGuest::start(Conduct::HangsAtLogin).await;
    let error = Session::connect(SessionSpec { deadline: SHORT, ..guest.spec() }).await.unwrap_err();
    assert!(matches!(error, ConnectError::Deadline { stage: ConnectStage::Login, .. }), "{error:?}");
}

#[tokio::test]
async fn nobody_there_is_said_with_the_port() {
    let guest = FakeGuest::start(shell()).await;
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    drop(listener);
    let error = Session::connect(SessionSpec { port, ..guest.spec() }).await.unwrap_err();
    assert!(matches!(error, ConnectError::Unreachable { .. }), "{error:?}");
    assert!(error.to_string().contains(&port.to_string()));
}

/// What one hostile connection says first and then for ever, until we hang up.
async fn hostile(mut stream: TcpStream, greeting: &[u8], chatter: &[u8], pause: Duration) {
    let mut unread = [0; 4096];
    stream.write_all(greeting).await.unwrap();
    loop {
        let chat = async {
            tokio::time::sleep(pause).await;
            stream.write_all(chatter).await
        };
        if chat.await.is_err() || matches!(stream.try_read(&mut unread), Ok(0)) {
            return;
        }
    }
}

#[tokio::test]
async fn endless_silent_and_dripping_greetings_end_and_leave_no_connection_behind() {
    const OFTEN: Duration = Duration::from_millis(20);
    let cases: [(&[u8], &[u8], Duration); 5] = [
        (b"", b"", OFTEN),
        (b"", b"x", OFTEN),
        (b"", b"hello\r\n", Duration::from_millis(1)),
        // From here on a task of the SSH library owns the connection.
        (b"SSH-2.0-x\r\n", b"", OFTEN),
        // An endless packet.
        (b"SSH-2.0-x\r\n\0\0\x7f\xf0", b"\0", OFTEN),
    ];
    for (greeting, chatter, pause) in cases {
        let guest = FakeGuest::start(shell()).await;
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let served = tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            hostile(stream, greeting, chatter, pause).await;
        });
        let started = Instant::now();
        let spec = SessionSpec { port, deadline: SHORT, ..guest.spec() };
        let error = Session::connect(spec).await.unwrap_err();
        assert!(started.elapsed() < Duration::from_secs(2));
        assert!(
            matches!(
                error,
                ConnectError::Deadline { stage: ConnectStage::Handshake, .. } | ConnectError::Protocol { .. }
            ),
            "{error:?}"
        );
        // The server side sees the end of the connection: no task of ours holds it open.
        tokio::time::timeout(LONG, served).await.expect("the connection was left open").unwrap();
    }
}

#[tokio::test]
async fn endless_output_is_cut() {
    let session = session(Conduct::Endless).await;
    let error = session.exec("yes", &[], LONG).await.unwrap_err();
    assert!(matches!(error, ExecError::OutputTooLarge { limit: MAX_OUTPUT_BYTES }), "{error:?}");
    assert!(session.is_closed());
    assert!(matches!(session.exec("true", &[], LONG).await, Err(ExecError::Disconnected)));
}

#[tokio::test]
async fn a_mute_guest_costs_the_deadline_and_no_more() {
    let session = session(Conduct::Mute).await;
    let started = Instant::now();
    let error = session.exec("sleep 1000", &[], SHORT).await.unwrap_err();
    assert!(matches!(error, ExecError::Deadline { .. }), "{error:?}");
    assert!(started.elapsed() < Duration::from_secs(2));
    assert!(session.is_closed());
}

#[tokio::test]
async fn a_dropped_command_closes_the_session() {
    let session = session(Conduct::Mute).await;
    let dropped = tokio::time::timeout(SHORT, session.exec("sleep 1000", &[], LONG)).await;
    assert!(dropped.is_err());
    assert!(session.is_closed());
}

#[tokio::test]
async fn odd_ends_have_their_own_errors() {
    let refused = session(Conduct::RefusesCommands).await;
    assert!(matches!(refused.exec("x", &[], LONG).await, Err(ExecError::Refused)));
    assert!(!refused.is_closed());

    let silent = session(Conduct::NoStatus).await;
    assert!(matches!(silent.exec("x", &[], LONG).await, Err(ExecError::NoStatus)));
    assert!(!silent.is_closed());

    let killed = session(Conduct::Signalled).await;
    match killed.exec("x", &[], LONG).await {
        Err(ExecError::Signalled { signal }) => assert_eq!(signal, "KILL"),
        other => panic!("{other:?}"),
    }

    let gone = session(Conduct::HangsUp).await;
    assert!(matches!(gone.exec("x", &[], LONG).await, Err(ExecError::Disconnected)));
    assert!(gone.is_closed());
}

#[tokio::test]
async fn the_guest_cannot_open_channels_to_the_agent() {
    let session = session(Conduct::OpensChannel).await;
    let output = session.exec("x", &[], LONG).await.unwrap();
    assert_eq!(output.status, 0, "a channel was accepted");
}
