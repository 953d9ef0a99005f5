//! The local socket: who may call is what the kernel says of them.

use std::{os::unix::process::CommandExt, process::Stdio};

use super::*;

async fn local(served: &Served, request: &[u8]) -> Answer {
    let mut stream = tokio::net::UnixStream::connect(&served.socket).await.unwrap();
    stream.write_all(request).await.unwrap();
    Answer::parse(&read_all(&mut stream).await)
}

#[tokio::test]
async fn the_agents_own_user_needs_no_secret() {
    let served = Served::with(1).await;
    let answer = local(&served, b"GET /instances HTTP/1.1\r\nConnection: close\r\n\r\n").await;
    assert_eq!(answer.data()["instances"].as_array().unwrap().len(), 1);
}

/// Another user gets 403 even where the file's mode lets it in, and a right secret does not help.
#[tokio::test]
async fn another_user_is_refused() {
    if !rustix::process::geteuid().is_root() {
        // Only root can become somebody else.
        return;
    }
    let served = Served::with(0).await;
    use std::os::unix::fs::PermissionsExt;
    let run = served.socket.parent().unwrap();
    for path in [run.parent().unwrap(), run, &served.socket] {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o777)).unwrap();
    }
    let script = r#"use IO::Socket::UNIX; my $s = IO::Socket::UNIX->new($ARGV[0]) or die "$!";
        print $s "GET $ARGV[1] HTTP/1.1\r\nX-Agent-Secret: $ARGV[2]\r\nConnection: close\r\n\r\n"; print <$s>;"#;
    let ask = |path: &'static str| {
        let mut command = std::process::Command::new("/usr/bin/perl");
        command.args(["-e", script]).arg(&served.socket).args([path, &served.secret]);
        command
            .uid(65534)
            .gid(65534)
            .current_dir("/")
            .env_clear()
            .stdin(Stdio::null())
            .stderr(Stdio::inherit());
        tokio::task::spawn_blocking(move || command.output())
    };
    let output = ask("/instances").await.unwrap().unwrap();
    let said = Answer::parse(&output.stdout).refused(403, "forbidden");
    assert!(said.contains("root") && said.contains("qudata"), "{said}");
    let output = ask("/ping").await.unwrap().unwrap();
    assert_eq!(Answer::parse(&output.stdout).status, 200);
}
