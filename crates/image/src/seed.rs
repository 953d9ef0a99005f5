//! What the machine that customises an image is told at its boot: a NoCloud seed whose only content is one script. Pure;
//! called by `customise`.

use qudata_host::iso::{self, BuildIsoError};
use serde_json::json;

use crate::{
    customise::Customisation,
    driver::{DriverPlan, Modules},
    machine::MAC,
};

const SCRIPT: &str = include_str!("customise.sh");
/// In memory: it leaves no trace on the disk.
const PATH: &str = "/run/qudata-image.sh";

/// What starts the system's own updates. They may run already when the seed is read.
const TIMERS: [&str; 2] = ["apt-daily.timer", "apt-daily-upgrade.timer"];
/// What must not start in this boot, but in every other: a mask of the runtime leaves nothing on the disk.
const QUIET: [&str; 6] = [
    // It would register this machine as a device and leave its key.
    "snapd.service",
    "snapd.socket",
    "snapd.seeded.service",
    // Another kernel in the middle of the work would come without a driver.
    "apt-daily.service",
    "apt-daily-upgrade.service",
    "unattended-upgrades.service",
];

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
    let version = driver.map_or("none", |plan| plan.version.as_str());
    let modules = driver.and_then(|plan| plan.modules).map_or("either", Modules::name);
    let least = driver.map_or(0, |plan| plan.least);
    // Larger than any branch.
    let most = driver.and_then(|plan| plan.most).unwrap_or(99_999);
    format!(
        "NONCE={nonce}\nPACKAGES='{}'\nDRIVER={version}\nDRIVER_MODULES={modules}\nDRIVER_LEAST={least}\n\
         DRIVER_MOST={most}\nTOOLKIT={}\nJUPYTER={}\n{SCRIPT}",
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
    let stop: Vec<&str> = ["systemctl", "stop", "--no-block"].into_iter().chain(TIMERS).collect();
    let mask: Vec<&str> = ["systemctl", "mask", "--runtime"].into_iter().chain(QUIET).chain(TIMERS).collect();
    let user_data = json!({
        "bootcmd": [stop, mask],
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
mod tests;
