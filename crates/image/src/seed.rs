//! What the machine that customises an image is told at its boot: a NoCloud seed whose only content is one script. Pure;
//! called by `customise`.

use qudata_host::iso::{self, BuildIsoError};
use serde_json::json;

use crate::{customise::Customisation, driver::DriverPlan, machine::MAC};

const SCRIPT: &str = include_str!("customise.sh");
/// In memory: it leaves no trace on the disk.
const PATH: &str = "/run/qudata-image.sh";

/// Steps of the script for what was asked, in order.
pub(crate) fn steps(wish: &Customisation, driver: Option<&DriverPlan>) -> Vec<&'static str> {
    let mut steps = vec!["packages"];
    if driver.is_some() {
        steps.extend(["kernel", "driver", "driver-check"]);
    }
    if wish.container_toolkit {
        steps.push("container-toolkit");
    }
    if wish.jupyter {
        steps.push("jupyter");
    }
    steps.extend(["hold", "clean", "report"]);
    steps
}

/// The script with what was asked in front of it. Every value was checked for being harmless to a shell.
pub(crate) fn script(wish: &Customisation, driver: Option<&DriverPlan>, nonce: &str) -> String {
    let yes = |yes: bool| if yes { "yes" } else { "no" };
    let (version, modules, least) = match driver {
        None => ("none", "either", 0),
        Some(plan) => {
            (plan.version.as_str(), plan.modules.map_or("either", crate::driver::Modules::name), plan.least)
        }
    };
    format!(
        "NONCE={nonce}\nPACKAGES='{}'\nDRIVER={version}\nDRIVER_MODULES={modules}\nDRIVER_LEAST={least}\nTOOLKIT={}\n\
         JUPYTER={}\n{SCRIPT}",
        wish.packages.join(" "),
        yes(wish.container_toolkit),
        yes(wish.jupyter),
    )
}

/// The seed's image.
pub(crate) fn image(script: &str, nonce: &str) -> Result<Vec<u8>, BuildIsoError> {
    // Behind cloud-init's last stage, so that nothing of it is written after it was cleaned away.
    let start = [
        "systemd-run",
        "--quiet",
        "--no-block",
        "--collect",
        "--unit=qudata-image",
        "--description=Make a base image",
        "--property=After=cloud-final.service",
        "--",
        "/bin/sh",
        PATH,
    ];
    // Ubuntu's snapd would register this machine as a device and leave its key; for this boot it does not start.
    let snapd = ["snapd.service", "snapd.socket", "snapd.seeded.service"];
    let without_snapd: Vec<&str> = ["systemctl", "mask", "--runtime"].into_iter().chain(snapd).collect();
    let user_data = json!({
        "bootcmd": [without_snapd],
        "growpart": {"devices": ["/"], "ignore_growroot_disabled": false, "mode": "auto"},
        "package_update": false,
        "package_upgrade": false,
        "resize_rootfs": true,
        "runcmd": [start],
        "ssh_pwauth": false,
        // Nobody: also not the distribution's default user, whom every instance makes for itself.
        "users": [],
        "write_files": [{"content": script, "path": PATH, "permissions": "0600"}],
    });
    let meta_data = json!({"instance-id": format!("image-{nonce}"), "local-hostname": "image"});
    let network = json!({
        "ethernets": {"eth0": {"dhcp4": true, "match": {"macaddress": MAC}, "set-name": "eth0"}},
        "version": 2,
    });
    iso::build(
        "CIDATA",
        &[
            ("meta-data", &format!("{meta_data:#}\n")),
            ("network-config", &format!("{network:#}\n")),
            ("user-data", &format!("#cloud-config\n{user_data:#}\n")),
            ("vendor-data", "#cloud-config\n{}\n"),
        ],
    )
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;
    use crate::driver::Modules;

    fn all() -> (Customisation, DriverPlan) {
        let wish = Customisation {
            packages: vec!["htop".into(), "g++".into()],
            jupyter: true,
            container_toolkit: true,
            ..Customisation::default()
        };
        (wish, DriverPlan { version: "570.133".into(), modules: Some(Modules::Open), least: 570 })
    }

    #[test]
    fn shells_accept_the_script() {
        let (wish, driver) = all();
        for text in [script(&wish, Some(&driver), "abc"), script(&Customisation::default(), None, "abc")] {
            for shell in ["dash", "bash"] {
                let checked = Command::new(shell).args(["-n", "-c", &text]).output().unwrap();
                assert!(checked.status.success(), "{shell}: {}", String::from_utf8_lossy(&checked.stderr));
            }
        }
    }

    #[test]
    fn every_step_that_is_counted_begins_in_the_script() {
        let (wish, driver) = all();
        for step in steps(&wish, Some(&driver)) {
            assert!(SCRIPT.contains(&format!("    begin {step}\n")), "{step}");
        }
        let begun = SCRIPT.lines().filter(|line| line.trim_start().starts_with("begin ")).count();
        assert_eq!(begun, steps(&wish, Some(&driver)).len());
    }

    #[test]
    fn failure_is_never_swallowed() {
        for line in SCRIPT.lines() {
            assert!(!line.contains("|| true") && !line.contains("|| :"), "{line}");
        }
        assert!(SCRIPT.contains("\nset -eu\n") && SCRIPT.trim_end().ends_with("echo \"done $NONCE\" >&3"));
    }

    #[test]
    fn what_was_asked_stands_before_the_script() {
        let (wish, driver) = all();
        let head: String = script(&wish, Some(&driver), "abc").lines().take(7).collect::<Vec<_>>().join("\n");
        insta::assert_snapshot!("script_head", head);
    }
}
