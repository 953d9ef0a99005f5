//! NVIDIA's own programs before and after an unbind, with fake ones that write down what they were told.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests state expectations")]

mod common;

use std::{fs, os::unix::fs::PermissionsExt, path::Path};

use common::{GPU, Lab, SHORT, TWIN, driver, pci};
use qudata_testkit::pci::react::Fault;
use qudata_vfio::{
    holders::{Holder, HoldingProcess},
    nvidia::{NvidiaError, Quieting, Tools, minor, plan_nvidia, quiet, resume, yields},
    rebind::{RebindError, bind_with},
};

fn process(name: &str, unit: Option<&str>) -> Holder {
    Holder::Process(HoldingProcess {
        pid: 5,
        name: name.into(),
        unit: unit.map(str::to_owned),
        node: "/dev/nvidia0".into(),
        certain: true,
    })
}

/// Tools that append their name and arguments to `log`, and fail when told about `fails`.
fn tools(dir: &Path, fails: &str) -> Tools {
    let tool = |name: &str| {
        let path = dir.join(name);
        let log = dir.join("log");
        let script = format!(
            "#!/bin/sh\necho \"{name} $*\" >>{log}\ncase \"$*\" in {fails}) echo no >&2; exit 1;; esac\n",
            log = log.display()
        );
        fs::write(&path, script).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    };
    Tools { nvidia_smi: tool("nvidia-smi"), systemctl: tool("systemctl") }
}

fn told(dir: &Path) -> Vec<String> {
    fs::read_to_string(dir.join("log")).unwrap_or_default().lines().map(str::to_owned).collect()
}

fn quieting() -> Quieting {
    plan_nvidia(
        pci(GPU),
        &[
            process("nvidia-persiste", Some("nvidia-persistenced.service")),
            process("nv-hostengine", Some("nvidia-dcgm.service")),
            process("nv-fabricmanager", Some("nvidia-fabricmanager.service")),
            process("python3", Some("training.service")),
            process("python3", None),
            Holder::Module { name: "nvidia".into() },
        ],
    )
}

#[tokio::test]
async fn the_driver_says_which_device_file_is_whose() {
    let lab = Lab::twins();
    let information = "Model: \t\t Fake\nDevice Minor: \t 3\n";
    lab.kernel.host().file(format!("proc/driver/nvidia/gpus/{GPU}/information"), information).unwrap();
    assert_eq!(minor(&lab.door, pci(GPU)).await.unwrap(), Some(3));
    assert_eq!(minor(&lab.door, pci(TWIN)).await.unwrap(), None);
}

#[test]
fn only_services_that_hold_the_card_and_come_back_are_stopped() {
    assert_eq!(quieting().services, ["nvidia-dcgm.service", "nvidia-persistenced.service"]);
    assert!(plan_nvidia(pci(GPU), &[]).services.is_empty());
    assert!(!yields(&process("nv-fabricmanager", Some("nvidia-fabricmanager.service"))));
    assert!(!yields(&process("nvidia-persistenced", None)), "a name proves nothing");
}

#[tokio::test]
async fn persistence_goes_for_this_card_only_and_services_come_back_in_reverse() {
    let dir = tempfile::tempdir().unwrap();
    let tools = tools(dir.path(), "never");
    quiet(&tools, &quieting()).await.unwrap();
    resume(&tools, &quieting()).await.unwrap();
    assert_eq!(
        told(dir.path()),
        [
            "nvidia-smi -i 0000:01:00.0 -pm 0",
            "systemctl stop nvidia-dcgm.service",
            "systemctl stop nvidia-persistenced.service",
            "systemctl start nvidia-persistenced.service",
            "systemctl start nvidia-dcgm.service",
        ]
    );
}

#[tokio::test]
async fn a_host_without_the_tool_has_no_persistence_mode_to_turn_off() {
    let dir = tempfile::tempdir().unwrap();
    let tools = Tools { nvidia_smi: dir.path().join("missing"), ..tools(dir.path(), "never") };
    quiet(&tools, &quieting()).await.unwrap();
    assert_eq!(told(dir.path()).len(), 2);
}

#[tokio::test]
async fn a_service_that_does_not_stop_brings_the_others_back() {
    let dir = tempfile::tempdir().unwrap();
    let tools = tools(dir.path(), "'stop nvidia-persistenced.service'");
    let error = quiet(&tools, &quieting()).await.unwrap_err();
    assert!(matches!(error, NvidiaError::Service { attempt: "stop", .. }), "{error:?}");
    assert_eq!(
        told(dir.path())[3..],
        ["systemctl start nvidia-persistenced.service", "systemctl start nvidia-dcgm.service"]
    );
}

#[tokio::test]
async fn a_card_that_stays_persistent_is_not_unbound() {
    let dir = tempfile::tempdir().unwrap();
    let tools = tools(dir.path(), "*pm*");
    let lab = Lab::twins();
    let mut plan = lab.plan(GPU);
    plan.quieting = Some(quieting());
    let error = bind_with(&tools, &lab.door, &plan).await.unwrap_err();
    assert!(matches!(error, RebindError::Busy { .. }), "{error:?}");
    assert!(lab.kernel.writes().is_empty());
    assert_eq!(told(dir.path()).len(), 1, "and no service was stopped");
}

#[tokio::test]
async fn services_are_back_after_a_bind_and_after_a_failed_one() {
    let dir = tempfile::tempdir().unwrap();
    let tools = tools(dir.path(), "never");
    let lab = Lab::twins();
    let mut plan = lab.plan(GPU);
    plan.quieting = Some(quieting());
    bind_with(&tools, &lab.door, &plan).await.unwrap();
    assert_eq!(lab.driver(GPU), driver("vfio-pci"));
    assert_eq!(told(dir.path()).last().unwrap(), "systemctl start nvidia-dcgm.service");

    let lab = Lab::twins();
    lab.kernel.fault(GPU, Fault::BindLies);
    fs::remove_file(dir.path().join("log")).unwrap();
    bind_with(&tools, &lab.door, &plan).await.unwrap_err();
    assert_eq!(told(dir.path()).last().unwrap(), "systemctl start nvidia-dcgm.service");
}

#[tokio::test]
async fn nothing_that_opens_all_cards_is_started_beside_a_wedged_one() {
    let dir = tempfile::tempdir().unwrap();
    let tools = tools(dir.path(), "never");
    let lab = Lab::twins();
    lab.kernel.fault(GPU, Fault::HangsOnUnbind);
    let mut plan = lab.plan(GPU);
    (plan.quieting, plan.deadline) = (Some(quieting()), SHORT);
    let error = bind_with(&tools, &lab.door, &plan).await.unwrap_err();
    assert!(matches!(error, RebindError::Wedged { .. }), "{error:?}");
    assert!(!told(dir.path()).iter().any(|line| line.contains("start")), "{:?}", told(dir.path()));
    lab.settle();
}
