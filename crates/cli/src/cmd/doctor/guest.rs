//! The guest of a self-test, looked at by the system's ssh with a key that lives as long as the test. Called by
//! `selftest`.

use std::{ffi::OsString, path::PathBuf, time::Duration};

use anyhow::Context as _;
use qudata_api::InstanceView;
use qudata_host::command::{Tool, ToolError};
use tokio::time::sleep;

use crate::{exit::Failure, render::line};

/// Making a key takes a moment.
const KEY_DEADLINE: Duration = Duration::from_secs(20);
/// A guest under emulation takes seconds for a login, and the first call of `nvidia-smi` wakes the driver.
const LOGIN_DEADLINE: Duration = Duration::from_secs(120);
const TRIES: u32 = 3;
const PAUSE: Duration = Duration::from_secs(2);

/// One device a line: address, vendor, device, class.
const DEVICES: &str = "for d in /sys/bus/pci/devices/*; do \
     echo \"${d##*/} $(cat $d/vendor) $(cat $d/device) $(cat $d/class)\"; done";
const NVIDIA: &str = "command -v nvidia-smi >/dev/null 2>&1 || { echo absent; exit 0; }; nvidia-smi -L";

/// A device as the guest sees it. Ids are four hex digits, as the API writes them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct SeenDevice {
    pub(super) address: String,
    pub(super) vendor: String,
    pub(super) device: String,
    pub(super) class: String,
}

/// The key, in a folder that goes with it.
pub(super) struct Guest {
    dir: tempfile::TempDir,
    public_key: String,
}

impl Guest {
    pub(super) async fn prepare() -> Result<Self, Failure> {
        let dir = tempfile::Builder::new().prefix("qudata-selftest-").tempdir();
        let dir = dir.context("cannot make a folder for the key of the self-test")?;
        let file = dir.path().join("key");
        Tool::new("ssh-keygen")
            .args(["-q", "-t", "ed25519", "-N", "", "-C", "qudata-selftest", "-f"])
            .arg(&file)
            .deadline(KEY_DEADLINE)
            .run()
            .await
            .context("cannot make a key for the self-test: install openssh-client")?;
        let public = std::fs::read_to_string(file.with_extension("pub"));
        let public_key = public.context("cannot read the key of the self-test")?.trim().to_owned();
        Ok(Self { dir, public_key })
    }

    pub(super) fn public_key(&self) -> &str {
        &self.public_key
    }

    /// What is on the guest's PCI bus.
    pub(super) async fn devices(&self, view: &InstanceView) -> Result<Vec<SeenDevice>, String> {
        let devices = parse(&self.run(view, DEVICES).await?);
        if devices.is_empty() { Err("the guest lists no PCI device".to_owned()) } else { Ok(devices) }
    }

    /// What the driver in the guest says; none where there is no driver.
    pub(super) async fn nvidia_smi(&self, view: &InstanceView) -> Result<Option<String>, String> {
        let text = self.run(view, NVIDIA).await?;
        match text.trim() {
            "absent" => Ok(None),
            "" => Err("nvidia-smi lists no GPU".to_owned()),
            list => Ok(Some(list.lines().map(line).collect::<Vec<_>>().join(", "))),
        }
    }

    async fn run(&self, view: &InstanceView, command: &str) -> Result<String, String> {
        let arguments = self.plan_ssh(view)?;
        let mut tried = 1;
        loop {
            let tool = Tool::new("ssh").args(arguments.clone()).arg(command).deadline(LOGIN_DEADLINE);
            match tool.run().await {
                Ok(output) => return Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
                // 255 is ssh's own: no connection. Anything else is the command's.
                Err(ToolError::Failed { code: Some(255), .. }) if tried < TRIES => tried += 1,
                Err(ToolError::Failed { stderr, status, .. }) => {
                    return Err(line(if stderr.is_empty() { &status } else { &stderr }));
                }
                Err(error) => return Err(line(&format!("{:#}", anyhow::Error::new(error)))),
            }
            sleep(PAUSE).await;
        }
    }

    /// Arguments up to the command. Trusts the key that the agent made for this instance and no other, and reads nothing
    /// of the user's own configuration.
    fn plan_ssh(&self, view: &InstanceView) -> Result<Vec<OsString>, String> {
        let known_hosts: PathBuf = self.dir.path().join("known_hosts");
        let mut words = view.ssh_host_key.split_whitespace();
        let (Some(algorithm), Some(key)) = (words.next(), words.next()) else {
            return Err("the agent does not know the host key of the guest".to_owned());
        };
        let alias = view.id;
        std::fs::write(&known_hosts, format!("{alias} {algorithm} {key}\n"))
            .map_err(|error| format!("cannot write {}: {error}", known_hosts.display()))?;
        let ports = if view.local_ports.contains_key("22") { &view.local_ports } else { &view.ports };
        let port = ports.get("22").ok_or("the agent does not publish port 22 of the guest")?;
        let host = match &view.ssh {
            Some(ssh) if view.local_ports.is_empty() => ssh.host.clone(),
            _ => "127.0.0.1".to_owned(),
        };
        let options = [
            format!("UserKnownHostsFile={}", known_hosts.display()),
            "GlobalKnownHostsFile=/dev/null".to_owned(),
            format!("HostKeyAlias={alias}"),
            "StrictHostKeyChecking=yes".to_owned(),
            "BatchMode=yes".to_owned(),
            "IdentitiesOnly=yes".to_owned(),
            "ConnectTimeout=20".to_owned(),
            "LogLevel=ERROR".to_owned(),
        ];
        let mut arguments: Vec<OsString> = vec!["-F".into(), "/dev/null".into()];
        arguments.extend(options.into_iter().flat_map(|option| ["-o".into(), option.into()]));
        arguments.extend(["-i".into(), self.dir.path().join("key").into()]);
        arguments.extend(["-p".into(), port.into(), "-l".into(), "root".into(), "--".into(), host.into()]);
        Ok(arguments)
    }
}

fn parse(text: &str) -> Vec<SeenDevice> {
    let id = |word: &str| word.trim_start_matches("0x").to_ascii_lowercase();
    let device = |line: &str| {
        let mut words = line.split_whitespace();
        Some(SeenDevice {
            address: words.next()?.to_owned(),
            vendor: id(words.next()?),
            device: id(words.next()?),
            class: words.next()?.to_owned(),
        })
    };
    text.lines().filter_map(device).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::render::sample;

    #[test]
    fn devices_are_read_as_the_guest_prints_them() {
        let text = "0000:00:00.0 0x8086 0x29c0 0x060000\n0000:01:00.0 0x10DE 0x2330 0x030200\ncut off\n";
        let devices = parse(text);
        assert_eq!(devices.len(), 2);
        let gpu = SeenDevice {
            address: "0000:01:00.0".to_owned(),
            vendor: "10de".to_owned(),
            device: "2330".to_owned(),
            class: "0x030200".to_owned(),
        };
        assert_eq!(devices.last(), Some(&gpu));
    }

    #[tokio::test]
    async fn the_guest_is_called_at_its_own_port_and_trusted_by_its_own_key() {
        let guest = Guest::prepare().await.unwrap();
        assert!(guest.public_key().starts_with("ssh-ed25519 "), "{}", guest.public_key());
        let mut view = sample::instance("web", "019b7f3a-1b00-7000-8000-000000000001");
        view.ports.insert("22".to_owned(), "10001".to_owned());
        let text = |view: &InstanceView| {
            let arguments = guest.plan_ssh(view).unwrap();
            arguments.iter().map(|a| a.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
        };
        assert!(text(&view).contains("-p 10001 -l root -- "), "{}", text(&view));
        view.local_ports.insert("22".to_owned(), "10007".to_owned());
        assert!(text(&view).ends_with("-p 10007 -l root -- 127.0.0.1"), "{}", text(&view));
        let known = std::fs::read_to_string(guest.dir.path().join("known_hosts")).unwrap();
        assert!(known.starts_with("019b7f3a-1b00-7000-8000-000000000001 ssh-ed25519 "), "{known}");
        view.ssh_host_key = String::new();
        assert!(guest.plan_ssh(&view).unwrap_err().contains("host key"));
    }
}
