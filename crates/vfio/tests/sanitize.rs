//! Cleaning GPUs between tenants on a kernel that reacts: which reset is chosen, and that any doubt is an error.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests state expectations")]

mod common;

use std::time::Instant;

use common::{AUDIO, GPU, Lab, PORT, SHORT, TWIN, driver, pci};
use qudata_host::causes::chain;
use qudata_testkit::pci::{Device, FakeHost, FakeProcess, react::Fault};
use qudata_vfio::{
    door::DoorError,
    health::{self, Baseline, HealthError, Unhealthy},
    op::BridgeReset,
    rebind::bind,
    reset::Method,
    sanitize::{SanitizeError, Sanitized, sanitize, sanitize_within},
};

/// The card on `vfio-pci`, with the baseline of before.
async fn after_a_tenant(mut lab: Lab) -> (Lab, Baseline) {
    let baseline = lab.baseline(GPU);
    bind(&lab.door, &lab.plan(GPU)).await.unwrap();
    lab.kernel.forget_writes();
    lab.look();
    (lab, baseline)
}

async fn clean(lab: &Lab, baseline: &Baseline) -> Result<Sanitized, SanitizeError> {
    sanitize(&lab.door, &lab.gpu(GPU), &lab.topology, baseline).await
}

fn resets(lab: &Lab) -> Vec<String> {
    let writes = lab.kernel.writes();
    let name = |file: &std::path::Path| file.file_name().unwrap().to_string_lossy().into_owned();
    writes.iter().map(|written| format!("{} {}", name(&written.file), written.text)).collect()
}

fn single(reset: &str) -> Lab {
    Lab::of(vec![Device::bridge(PORT, 1), Device::gpu(GPU).under(PORT).group(7).reset(reset)])
}

/// A host whose kernel has no `reset_subordinate`.
fn old_kernel(lab: Lab) -> Lab {
    let host: &FakeHost = lab.kernel.host();
    std::fs::remove_file(host.device_dir(PORT).join("reset_subordinate")).unwrap();
    lab
}

#[tokio::test]
async fn a_bus_reset_clears_more_than_flr() {
    let (lab, baseline) = after_a_tenant(Lab::twins()).await;
    let sanitized = clean(&lab, &baseline).await.unwrap();
    assert_eq!(sanitized.method, Method::OnlyFunction(pci(GPU), "bus".into()));
    assert_eq!(resets(&lab), ["reset_method bus", "reset 1", "reset_method flr bus"]);
}

#[tokio::test]
async fn a_card_is_reset_by_flr_where_the_kernel_has_no_bus_reset_for_it() {
    let (lab, baseline) = after_a_tenant(single("flr pm")).await;
    let sanitized = clean(&lab, &baseline).await.unwrap();
    assert_eq!(sanitized.method, Method::EachFunction(vec![(pci(GPU), "flr".into())]));
    assert_eq!(resets(&lab), ["reset 1"], "flr is the kernel's first choice here");
}

#[tokio::test]
async fn the_method_is_chosen_for_once() {
    let (lab, baseline) = after_a_tenant(single("pm flr bus")).await;
    clean(&lab, &baseline).await.unwrap();
    assert_eq!(resets(&lab), ["reset_method bus", "reset 1", "reset_method pm flr bus"]);
}

#[tokio::test]
async fn a_failed_reset_leaves_the_choice_of_method_as_it_was() {
    let (lab, baseline) = after_a_tenant(single("pm flr bus")).await;
    lab.kernel.fault(GPU, Fault::ResetFails);
    clean(&lab, &baseline).await.unwrap_err();
    assert_eq!(resets(&lab), ["reset_method bus", "reset 1", "reset_method pm flr bus"]);
}

#[tokio::test]
async fn a_bus_reset_is_stronger_than_power_management() {
    let (lab, baseline) = after_a_tenant(single("pm bus")).await;
    assert_eq!(clean(&lab, &baseline).await.unwrap().method, Method::OnlyFunction(pci(GPU), "bus".into()));
}

#[tokio::test]
async fn all_functions_are_reset_by_their_bridge_when_one_has_no_flr() {
    let (lab, baseline) = after_a_tenant(Lab::with_audio()).await;
    let sanitized = clean(&lab, &baseline).await.unwrap();
    assert_eq!((sanitized.method, sanitized.bridge), (Method::Bridge(pci(PORT)), Some(BridgeReset::Kernel)));
    assert_eq!(resets(&lab), ["reset_subordinate 1"]);
}

#[tokio::test]
async fn an_old_kernel_is_helped_by_the_bridges_register_and_all_is_put_back() {
    let (lab, baseline) = after_a_tenant(old_kernel(Lab::with_audio())).await;
    let config = |address: &str| std::fs::read(lab.kernel.host().device_dir(address).join("config")).unwrap();
    let before = (config(GPU), config(AUDIO));
    let sanitized = clean(&lab, &baseline).await.unwrap();
    assert_eq!(sanitized.bridge, Some(BridgeReset::Register));
    assert_eq!((config(GPU), config(AUDIO)), before, "BARs and command are back");
    assert_eq!(resets(&lab)[..2], ["config 3e=4000", "config 3e=0000"]);
}

#[tokio::test]
async fn a_device_that_does_not_survive_the_bridges_register_is_found_out() {
    let (lab, baseline) = after_a_tenant(old_kernel(Lab::with_audio())).await;
    lab.kernel.fault(AUDIO, Fault::DiesOnReset);
    let config = lab.kernel.host().device_dir(AUDIO).join("config");
    let before = std::fs::read(&config).unwrap();
    let (gpu, within) = (lab.gpu(GPU), SHORT);
    let error = sanitize_within(&lab.door, &gpu, &lab.topology, &baseline, within).await.unwrap_err();
    assert!(matches!(error.door(), Some(DoorError::Hung { .. })), "still waiting for it: {error:?}");
    std::fs::write(config, before).unwrap();
    lab.settle();
}

#[tokio::test]
async fn a_bridge_with_somebody_else_below_is_not_reset() {
    let switch = "0000:01:00.0";
    let mut audio = Device::audio("0000:02:00.1").under(switch).group(7);
    audio.reset_methods = String::new();
    let lab = Lab::of(vec![
        Device::bridge(PORT, 1),
        Device::bridge(switch, 2).under(PORT),
        Device::gpu(TWIN).under(switch).group(7),
        audio,
        Device::new("0000:02:01.0").under(switch).group(9).class(0x02_0000),
    ]);
    assert_eq!(Method::choose(&lab.topology, &lab.gpu(TWIN)), None);
}

#[tokio::test]
async fn a_device_off_the_bus_is_found_although_sysfs_still_knows_its_ids() {
    let (mut lab, baseline) = after_a_tenant(Lab::twins()).await;
    lab.kernel.fall_off_the_bus(GPU).unwrap();
    lab.look();
    assert_eq!(lab.topology.devices[&pci(GPU)].vendor, 0x10de, "as the kernel remembers it");
    let error = clean(&lab, &baseline).await.unwrap_err();
    assert!(chain(&error).contains("fallen off the bus"), "{}", chain(&error));
    assert!(lab.kernel.writes().is_empty(), "a reset would report success");
    let error = health::check(&lab.door, &baseline).await.unwrap_err();
    assert!(matches!(error, HealthError::Unhealthy(Unhealthy::OffTheBus { .. })), "{error:?}");
}

#[tokio::test]
async fn a_device_that_dies_in_its_reset_is_found() {
    let (lab, baseline) = after_a_tenant(Lab::twins()).await;
    lab.kernel.fault(GPU, Fault::DiesOnReset);
    let error = clean(&lab, &baseline).await.unwrap_err();
    assert!(
        matches!(error, SanitizeError::Unhealthy { source: Unhealthy::OffTheBus { .. }, .. }),
        "the reset itself reported success: {error:?}"
    );
}

#[tokio::test]
async fn a_reset_that_fails_is_an_error() {
    let (lab, baseline) = after_a_tenant(Lab::twins()).await;
    lab.kernel.fault(GPU, Fault::ResetFails);
    let error = clean(&lab, &baseline).await.unwrap_err();
    assert!(matches!(error.door(), Some(DoorError::Refused { .. })), "{error:?}");
}

#[tokio::test]
async fn lost_bars_are_found() {
    let (lab, baseline) = after_a_tenant(Lab::twins()).await;
    lab.kernel.fault(GPU, Fault::LosesBarsOnReset);
    let error = clean(&lab, &baseline).await.unwrap_err();
    assert!(matches!(error, SanitizeError::Unhealthy { source: Unhealthy::Bar { .. }, .. }), "{error:?}");
}

#[tokio::test]
async fn a_narrower_link_is_found_and_a_slower_one_is_idle() {
    let (lab, baseline) = after_a_tenant(Lab::twins()).await;
    let config = lab.kernel.host().device_dir(GPU).join("config");
    let well = std::fs::read(&config).unwrap();
    let with_status = |status: u16| {
        let mut bytes = well.clone();
        bytes[0x52..0x54].copy_from_slice(&status.to_le_bytes());
        std::fs::write(&config, bytes).unwrap();
    };
    with_status(0x0101);
    health::check(&lab.door, &baseline).await.unwrap();
    with_status(0x0084);
    let error = health::check(&lab.door, &baseline).await.unwrap_err();
    assert!(matches!(error, HealthError::Unhealthy(Unhealthy::Link { .. })), "{error:?}");
    assert!(chain(&error).contains("is x8 of x16"), "{}", chain(&error));
}

#[tokio::test]
async fn another_card_in_the_slot_is_found() {
    let (lab, mut baseline) = after_a_tenant(Lab::twins()).await;
    baseline.functions.get_mut(&pci(GPU)).unwrap().device = 0x2330;
    let error = health::check(&lab.door, &baseline).await.unwrap_err();
    assert!(chain(&error).contains("answers as 10de:20b5, and was 10de:2330"), "{}", chain(&error));
}

#[tokio::test]
async fn a_held_gpu_is_never_reset() {
    let (lab, baseline) = after_a_tenant(Lab::twins()).await;
    let process = FakeProcess {
        pid: 99,
        name: "qemu-system-x86".into(),
        cgroup: "/".into(),
        files: vec!["/dev/vfio/7".into()],
    };
    lab.kernel.host().add_process(&process).unwrap();
    let error = clean(&lab, &baseline).await.unwrap_err();
    assert!(chain(&error).contains("held by process 99"), "{}", chain(&error));
    assert!(lab.kernel.writes().is_empty(), "a reset would succeed and hit the tenant");
}

#[tokio::test]
async fn a_gpu_of_the_host_is_never_reset() {
    let lab = Lab::twins();
    let error = clean(&lab, &lab.baseline(GPU)).await.unwrap_err();
    assert!(matches!(&error, SanitizeError::HostDriver { driver, .. } if driver == "nvidia"), "{error:?}");
    assert!(lab.kernel.writes().is_empty());
}

#[tokio::test]
async fn a_gpu_without_a_baseline_is_not_clean() {
    let (lab, _) = after_a_tenant(Lab::twins()).await;
    let error = clean(&lab, &Baseline::default()).await.unwrap_err();
    assert!(matches!(error, SanitizeError::NoBaseline { .. }), "{error:?}");
}

#[tokio::test]
async fn a_reset_that_hangs_ends_at_its_deadline() {
    let (lab, baseline) = after_a_tenant(Lab::twins()).await;
    lab.kernel.fault(GPU, Fault::HangsOnReset);
    let begun = Instant::now();
    let error = sanitize_within(&lab.door, &lab.gpu(GPU), &lab.topology, &baseline, SHORT).await.unwrap_err();
    assert!(begun.elapsed() < SHORT * 5);
    assert!(matches!(error.door(), Some(DoorError::Hung { .. })), "{error:?}");
    // The files that stay safe do: it can still be looked at.
    health::check(&lab.door, &baseline).await.unwrap();
    lab.settle();
}

#[tokio::test]
async fn a_baseline_survives_being_written_down() {
    let lab = Lab::with_audio();
    let baseline = lab.baseline(GPU);
    assert_eq!(baseline.functions.len(), 2);
    let text = serde_json::to_string(&baseline).unwrap();
    assert_eq!(serde_json::from_str::<Baseline>(&text).unwrap(), baseline);
    assert_eq!(lab.driver(GPU), driver("nvidia"));
}
