//! `instance ssh`: becomes the system's ssh, which then trusts one host key and no other.
//!
//! The key reaches ssh as the output of `echo` (KnownHostsCommand, OpenSSH 8.5 and newer) and not as a file, because
//! after exec nobody is left who could take a file away.

use std::{ffi::OsString, os::unix::process::CommandExt, process::Command};

use qudata_api::{InstanceState, InstanceView};

use super::Context;
use crate::{
    args::Ssh,
    exit::{Exit, Failure},
    render::{instance::state_word, line},
};

/// Replaces this process by ssh.
pub(super) async fn run(cx: Context<'_>, wish: Ssh) -> Result<Exit, Failure> {
    let instance = cx.agent.pick(wish.which.instance.as_deref()).await?;
    let arguments = plan_ssh(&instance, wish.command)?;
    let error = Command::new("ssh").args(arguments).exec();
    let remedy = "install it (Debian and Ubuntu: apt install openssh-client)";
    Err(Failure::new(Exit::Failed, format!("cannot run ssh: {error}: {remedy}")))
}

/// Arguments of ssh; pure.
fn plan_ssh(instance: &InstanceView, command: Vec<OsString>) -> Result<Vec<OsString>, Failure> {
    let name = line(&instance.name);
    let refuse = |sentence: String| Err(Failure::new(Exit::Refused, sentence));
    let Some(ssh) = &instance.ssh else {
        return refuse(format!(
            "{name} does not publish port 22: create an instance without --no-ssh, or look at \
             `qudata-agent instance console {name}`"
        ));
    };
    // Connecting to a guest that does not answer would only hang.
    match instance.state {
        InstanceState::Running => {}
        InstanceState::Paused | InstanceState::Stopped => {
            let state = state_word(instance.state);
            return refuse(format!("{name} is {state}: `qudata-agent instance start {name}` first"));
        }
        InstanceState::Provisioning | InstanceState::Booting | InstanceState::Rebooting => {
            let state = state_word(instance.state);
            return refuse(format!(
                "{name} is {state}: wait for it with `qudata-agent instance events --follow {name}`"
            ));
        }
        InstanceState::Unresponsive | InstanceState::Failed | InstanceState::Deleting => {
            let state = state_word(instance.state);
            return refuse(format!("{name} is {state}: see `qudata-agent instance show {name}`"));
        }
    }
    let key = host_key(&instance.ssh_host_key).ok_or_else(|| {
        Failure::new(Exit::Failed, format!("the host key of {name} is not known to the agent"))
    })?;
    let alias = instance.id;
    let options = [
        format!("KnownHostsCommand=/bin/echo {alias} {key}"),
        format!("HostKeyAlias={alias}"),
        "StrictHostKeyChecking=yes".to_owned(),
        "UserKnownHostsFile=/dev/null".to_owned(),
        "GlobalKnownHostsFile=/dev/null".to_owned(),
        "UpdateHostKeys=no".to_owned(),
        // A shared connection of the user's own configuration could lead to an earlier instance on this port.
        "ControlPath=none".to_owned(),
    ];
    let mut arguments: Vec<OsString> = Vec::new();
    for option in options {
        arguments.extend(["-o".into(), option.into()]);
    }
    // Behind a tunnel the owner's way is the host's own port, which is there also when the tunnel is down.
    let (host, port) = match instance.local_ports.get("22") {
        Some(port) => ("127.0.0.1".to_owned(), port.clone()),
        None => (ssh.host.clone(), ssh.port.to_string()),
    };
    arguments.extend(["-p".into(), port.into(), "-l".into(), ssh.user.clone().into()]);
    arguments.extend(["--".into(), host.into()]);
    arguments.extend(command);
    Ok(arguments)
}

/// Algorithm and base64 of the key, and nothing that ssh or `echo` could take for something else.
fn host_key(text: &str) -> Option<String> {
    let mut words = text.split_whitespace();
    let (algorithm, base64) = (words.next()?, words.next()?);
    let plain = |s: &str, extra: &str| s.chars().all(|c| c.is_ascii_alphanumeric() || extra.contains(c));
    (plain(algorithm, "-@.") && plain(base64, "+/=")).then(|| format!("{algorithm} {base64}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::render::sample;

    fn one() -> InstanceView {
        sample::instance("web", "019b7f3a-1b00-7000-8000-000000000001")
    }

    #[test]
    fn ssh_trusts_the_instances_key_alone() {
        let arguments = plan_ssh(&one(), vec!["uname".into(), "-a".into()]).unwrap();
        let text: Vec<_> = arguments.iter().map(|a| a.to_str().unwrap()).collect();
        insta::assert_snapshot!("ssh", text.join("\n"));
    }

    #[test]
    fn a_guest_that_cannot_answer_is_not_called() {
        let table = [
            (InstanceState::Paused, "instance start web"),
            (InstanceState::Stopped, "instance start web"),
            (InstanceState::Booting, "events --follow web"),
            (InstanceState::Failed, "instance show web"),
        ];
        for (state, remedy) in table {
            let failure = plan_ssh(&InstanceView { state, ..one() }, Vec::new()).unwrap_err();
            assert!(failure.exit == Exit::Refused && failure.sentence.contains(remedy), "{failure}");
        }
        let failure = plan_ssh(&InstanceView { ssh: None, ..one() }, Vec::new()).unwrap_err();
        assert!(failure.exit == Exit::Refused && failure.sentence.contains("--no-ssh"), "{failure}");
    }

    #[test]
    fn behind_a_tunnel_the_owner_goes_by_the_hosts_own_port() {
        let mut tunneled = one();
        tunneled.local_ports.insert("22".to_owned(), "10007".to_owned());
        let arguments = plan_ssh(&tunneled, Vec::new()).unwrap();
        assert!(arguments.ends_with(&["-p", "10007", "-l", "root", "--", "127.0.0.1"].map(OsString::from)));
    }

    #[test]
    fn a_host_key_is_a_key_or_nothing() {
        assert_eq!(host_key("ssh-ed25519 AAAA+/= root@guest").as_deref(), Some("ssh-ed25519 AAAA+/="));
        for bad in ["", "ssh-ed25519", "ssh-ed25519 AA\"AA", "ssh-ed25519 AA%h", "* AAAA"] {
            assert_eq!(host_key(bad), None, "{bad}");
        }
    }
}
