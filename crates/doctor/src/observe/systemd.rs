//! systemd: whether it runs the host, whether it can run VMs, what it knows of the agent.

use std::{path::Path, time::Duration};

use qudata_host::{causes::chain, command::Tool, launch::Launcher};

use super::{Look, is_absent, text_if_any, unreadable};
use crate::observed::{Nss, Seen, Systemd, SystemdLook, Unit, Unseen};

/// The agent's unit.
pub(crate) const UNIT: &str = "qudata-agent.service";
/// Where distributions keep libraries.
const LIBRARIES: [&str; 5] =
    ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu", "usr/lib64", "usr/lib", "lib64"];

/// What is here.
pub(super) struct SystemdSide {
    pub(super) systemd: Systemd,
    pub(super) nss: Seen<Nss>,
}

pub(super) async fn observe(look: &Look) -> SystemdSide {
    let nss = look.read(|look| nss(&look.root));
    let booted = look.read(|look| Ok(look.root.join("run/systemd/system").is_dir()));
    let (nss, booted) = tokio::join!(nss, booted);
    match booted {
        Ok(true) => {}
        Ok(false) => return SystemdSide { systemd: Systemd::NotBooted, nss },
        Err(why) => return SystemdSide { systemd: Systemd::Unseen(why), nss },
    }
    let launches = async { Launcher::systemd().await.map(drop).map_err(|e| Unseen::Failed(chain(&e))) };
    let (banner, launches, unit) = tokio::join!(banner(look), look.by_end(launches), unit(look));
    let features = banner.as_ref().map(|text| features(text)).unwrap_or_default();
    let version = banner.and_then(|text| version(&text));
    SystemdSide { systemd: Systemd::Booted(SystemdLook { version, features, launches, unit }), nss }
}

async fn systemctl(look: &Look, args: &[&str]) -> Seen<String> {
    let left: Duration = look.end.saturating_duration_since(tokio::time::Instant::now());
    let run = Tool::new("systemctl").args(args.iter().copied()).deadline(left).run().await;
    let output = run.map_err(|error| look.untold(&error))?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

async fn banner(look: &Look) -> Seen<String> {
    systemctl(look, &["--version"]).await
}

/// 252 of `systemd 252 (252.39-1~deb12u1)`.
fn version(banner: &str) -> Seen<u32> {
    let number =
        banner.strip_prefix("systemd ").and_then(|rest| rest.split([' ', '.', '~']).next()?.parse().ok());
    number.ok_or_else(|| Unseen::Failed("systemctl does not tell its version".to_owned()))
}

fn features(banner: &str) -> String {
    banner.lines().nth(1).unwrap_or_default().to_owned()
}

async fn unit(look: &Look) -> Seen<Unit> {
    let args = ["show", UNIT, "--property=LoadState,ActiveState,Result"];
    Ok(parse_unit(&systemctl(look, &args).await?))
}

fn parse_unit(text: &str) -> Unit {
    let value = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
        line.unwrap_or_default().to_owned()
    };
    Unit { load: value("LoadState"), active: value("ActiveState"), result: value("Result") }
}

fn nss(root: &Path) -> Seen<Nss> {
    // Without the file users are looked for in files alone.
    let switch = text_if_any(&root.join("etc/nsswitch.conf"))?.unwrap_or_default();
    let line = switch.lines().find_map(|line| line.trim().strip_prefix("passwd:"));
    let consulted =
        line.is_some_and(|sources| sources.split_ascii_whitespace().any(|word| word == "systemd"));
    let mut library = false;
    for dir in LIBRARIES {
        let path = root.join(dir).join("libnss_systemd.so.2");
        library |= match std::fs::metadata(&path) {
            Ok(_) => true,
            Err(error) if is_absent(&error) => false,
            Err(error) => return Err(unreadable(&path, &error)),
        };
    }
    Ok(Nss { library, consulted })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_systemctl_prints() {
        let text = "systemd 252 (252.39-1~deb12u1)\n+PAM +AUDIT +SECCOMP -APPARMOR\n";
        assert_eq!((version(text), features(text).as_str()), (Ok(252), "+PAM +AUDIT +SECCOMP -APPARMOR"));
        assert_eq!(version("systemd 257~rc1 (x)\n"), Ok(257));
        assert!(version("sysvinit 3").is_err());
        let unit = parse_unit("Result=exit-code\nLoadState=loaded\nActiveState=failed\n");
        assert_eq!(
            (unit.load.as_str(), unit.active.as_str(), unit.result.as_str()),
            ("loaded", "failed", "exit-code")
        );
        assert_eq!(parse_unit(""), Unit::default());
    }

    #[test]
    fn the_name_service() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(nss(dir.path()), Ok(Nss { library: false, consulted: false }));
        std::fs::create_dir_all(dir.path().join("etc")).unwrap();
        std::fs::create_dir_all(dir.path().join("usr/lib64")).unwrap();
        std::fs::write(dir.path().join("etc/nsswitch.conf"), "# x\npasswd: files systemd\n").unwrap();
        std::fs::write(dir.path().join("usr/lib64/libnss_systemd.so.2"), "").unwrap();
        assert_eq!(nss(dir.path()), Ok(Nss { library: true, consulted: true }));
        std::fs::remove_file(dir.path().join("etc/nsswitch.conf")).unwrap();
        std::os::unix::fs::symlink("nsswitch.conf", dir.path().join("etc/nsswitch.conf")).unwrap();
        assert!(nss(dir.path()).is_err(), "what cannot be read is not what is missing");
    }
}
