//! Tests only: an SSH server in this process that behaves as a guest may, well or badly.

use crate::{
    keys::{GuestKey, HostKey, ManagementKey},
    session::SessionSpec,
};
use russh::{
    Channel, ChannelId,
    keys::PrivateKey,
    server::{self, Auth, ChannelOpenHandle, Msg, VerifiedPublicKey},
};
use std::{io::Write as _, path::PathBuf, process::Stdio, sync::Arc, time::Duration};
use tokio::net::TcpListener;

#[derive(Clone, Debug)]
pub(crate) enum Conduct {
    /// Runs commands in a real shell, with this folder in place of `/root/.ssh`.
    Shell(PathBuf),
    /// Never answers a login.
    HangsAtLogin,
    /// Lets nobody in.
    RefusesLogin,
    /// Never answers a command.
    Mute,
    /// Ends every command with status 7 before it read anything.
    ExitsAtOnce,
    /// Refuses commands.
    RefusesCommands,
    /// Talks for ever.
    Endless,
    /// Closes without saying how the command ended.
    NoStatus,
    /// Reports a signal.
    Signalled,
    /// Closes the connection at a command.
    HangsUp,
    /// Opens a channel to us before it answers a command; 0 means that we refused it.
    OpensChannel,
}

/// A listening fake guest and what the agent knows of it.
pub(crate) struct FakeGuest {
    pub(crate) port: u16,
    pub(crate) management_key: ManagementKey,
    pub(crate) host_key: GuestKey,
}

impl FakeGuest {
    pub(crate) async fn start(conduct: Conduct) -> FakeGuest {
        let host = HostKey::generate().unwrap();
        let management_key = ManagementKey::generate().unwrap();
        let config = Arc::new(server::Config {
            keys: vec![PrivateKey::from_openssh(host.private_openssh()).unwrap()],
            auth_rejection_time: Duration::ZERO,
            ..server::Config::default()
        });
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let authorized = management_key.public().clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let peer = Peer {
                    conduct: conduct.clone(),
                    authorized: authorized.clone(),
                    command: String::new(),
                    stdin: Vec::new(),
                };
                let config = Arc::clone(&config);
                tokio::spawn(async move {
                    if let Ok(running) = server::run_stream(config, stream, peer).await {
                        let _ = running.await;
                    }
                });
            }
        });
        FakeGuest { port, management_key, host_key: host.public().clone() }
    }

    pub(crate) fn spec(&self) -> SessionSpec {
        SessionSpec {
            port: self.port,
            management_key: self.management_key.clone(),
            host_key: self.host_key.clone(),
            deadline: Duration::from_secs(5),
        }
    }
}

struct Peer {
    conduct: Conduct,
    authorized: GuestKey,
    command: String,
    stdin: Vec<u8>,
}

impl server::Handler for Peer {
    type Error = russh::Error;

    async fn auth_publickey(&mut self, user: &str, key: VerifiedPublicKey<'_>) -> Result<Auth, Self::Error> {
        match self.conduct {
            Conduct::HangsAtLogin => std::future::pending().await,
            Conduct::RefusesLogin => Ok(Auth::reject()),
            _ if user == "root" && key.public_key.key_data() == self.authorized.public().key_data() => {
                Ok(Auth::Accept)
            }
            _ => Ok(Auth::reject()),
        }
    }

    async fn channel_open_session(
        &mut self,
        _: Channel<Msg>,
        reply: ChannelOpenHandle,
        _: &mut server::Session,
    ) -> Result<(), Self::Error> {
        reply.accept().await;
        Ok(())
    }

    async fn exec_request(
        &mut self,
        id: ChannelId,
        command: &[u8],
        session: &mut server::Session,
    ) -> Result<(), Self::Error> {
        self.command = String::from_utf8(command.to_vec()).unwrap();
        self.stdin.clear();
        let handle = session.handle();
        match self.conduct {
            Conduct::RefusesCommands => session.channel_failure(id)?,
            Conduct::HangsUp => return Err(russh::Error::Disconnect),
            Conduct::Endless => {
                session.channel_success(id)?;
                tokio::spawn(async move { while handle.data(id, vec![b'x'; 32_000]).await.is_ok() {} });
            }
            Conduct::ExitsAtOnce => {
                session.channel_success(id)?;
                session.exit_status_request(id, 7)?;
                session.eof(id)?;
                session.close(id)?;
            }
            Conduct::NoStatus => {
                session.channel_success(id)?;
                session.eof(id)?;
                session.close(id)?;
            }
            Conduct::Signalled => {
                session.channel_success(id)?;
                session.exit_signal_request(id, russh::Sig::KILL, false, "", "")?;
                session.close(id)?;
            }
            Conduct::OpensChannel => {
                session.channel_success(id)?;
                tokio::spawn(async move {
                    let opened = handle.channel_open_forwarded_tcpip("a", 1, "b", 2).await.is_ok()
                        || handle.channel_open_agent().await.is_ok()
                        || handle.channel_open_session().await.is_ok();
                    let _ = handle.exit_status_request(id, u32::from(opened)).await;
                    let _ = handle.close(id).await;
                });
            }
            _ => session.channel_success(id)?,
        }
        Ok(())
    }

    async fn data(&mut self, _: ChannelId, data: &[u8], _: &mut server::Session) -> Result<(), Self::Error> {
        self.stdin.extend_from_slice(data);
        Ok(())
    }

    async fn channel_eof(&mut self, id: ChannelId, session: &mut server::Session) -> Result<(), Self::Error> {
        let Conduct::Shell(dot_ssh) = &self.conduct else { return Ok(()) };
        let command = self.command.replace("/root/.ssh", dot_ssh.to_str().unwrap());
        let mut child = std::process::Command::new("/bin/bash")
            .args(["-c", &command])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // A command need not read its input.
        let _ = child.stdin.take().unwrap().write_all(&self.stdin);
        let output = child.wait_with_output().unwrap();
        session.data(id, output.stdout)?;
        session.extended_data(id, 1, output.stderr)?;
        session.exit_status_request(id, output.status.code().unwrap_or(255).unsigned_abs())?;
        session.eof(id)?;
        session.close(id)?;
        Ok(())
    }
}
