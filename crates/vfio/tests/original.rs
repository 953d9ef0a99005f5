//! Defects of the Go original that this crate must not have, each named after its row in the audit.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests state expectations")]

mod common;

use std::time::Instant;

use common::{AUDIO, GPU, Lab, PORT, SHORT, TWIN, driver, pci};
use qudata_testkit::pci::{Device, FakeProcess, react::Fault};
use qudata_vfio::{
    plan::{AfterUse, BindPolicy, plan_bind},
    rebind::{RebindError, bind, give_back},
    sanitize::sanitize,
};

/// A hostile tenant's GPU went back to the host without a reset, and all errors were ignored.
#[tokio::test]
async fn orig_g1_a_gpu_is_reset_between_tenants_and_a_failure_is_an_error() {
    let mut lab = Lab::twins();
    let baseline = lab.baseline(GPU);
    bind(&lab.door, &lab.plan(GPU)).await.unwrap();
    lab.look();
    lab.kernel.forget_writes();
    sanitize(&lab.door, &lab.gpu(GPU), &lab.topology, &baseline).await.unwrap();
    assert!(lab.kernel.writes_to(GPU).iter().any(|w| w.file.ends_with("reset") && w.text == "1"));
    lab.kernel.fault(GPU, Fault::ResetFails);
    sanitize(&lab.door, &lab.gpu(GPU), &lab.topology, &baseline).await.unwrap_err();
}

/// A bind counted as done when the write succeeded.
#[tokio::test]
async fn orig_g2_a_bind_that_lies_is_found_out() {
    let lab = Lab::twins();
    lab.kernel.fault(GPU, Fault::BindLies);
    bind(&lab.door, &lab.plan(GPU)).await.unwrap_err();
    assert_eq!(lab.kernel.override_of(GPU), None);
}

/// The node of the group is there when any function of it is bound, and a partial bind was left behind.
#[tokio::test]
async fn orig_g3_a_partial_bind_is_undone_to_the_last_function() {
    let lab = Lab::with_audio();
    lab.kernel.fault(AUDIO, Fault::BindFails("vfio-pci".into(), 5));
    let error = bind(&lab.door, &lab.plan(GPU)).await.unwrap_err();
    assert!(matches!(error, RebindError::Undone { .. }), "{error:?}");
    assert_eq!((lab.driver(GPU), lab.driver(AUDIO)), (driver("nvidia"), driver("snd_hda_intel")));
    assert_eq!((lab.kernel.override_of(GPU), lab.kernel.override_of(AUDIO)), (None, None));
}

/// The original driver was never bound again.
#[tokio::test]
async fn orig_g4_the_original_drivers_come_back() {
    let mut lab = Lab::with_audio();
    let plan = lab.plan(GPU);
    bind(&lab.door, &plan).await.unwrap();
    lab.look();
    give_back(&lab.door, &lab.plan_back(&plan, AfterUse::Host)).await.unwrap();
    assert_eq!((lab.driver(GPU), lab.driver(AUDIO)), (driver("nvidia"), driver("snd_hda_intel")));
}

/// A driver that never let go blocked everything, and modules were unloaded under other cards.
#[tokio::test]
async fn orig_g5_a_driver_that_never_lets_go_blocks_one_card_and_no_module_is_unloaded() {
    let lab = Lab::twins();
    lab.kernel.fault(GPU, Fault::HangsOnUnbind);
    let mut plan = lab.plan(GPU);
    plan.deadline = SHORT;
    let begun = Instant::now();
    bind(&lab.door, &plan).await.unwrap_err();
    bind(&lab.door, &lab.plan(TWIN)).await.unwrap();
    assert!(begun.elapsed() < SHORT * 10);
    assert!(lab.kernel.host().path("sys/bus/pci/drivers/nvidia").is_dir());
    lab.settle();
}

/// `unbind` was written while the killed VM still held the device, which blocks for ever.
#[tokio::test]
async fn orig_g6_unbind_is_not_written_while_somebody_holds_the_group() {
    let mut lab = Lab::twins();
    let plan = lab.plan(GPU);
    bind(&lab.door, &plan).await.unwrap();
    let files = vec!["/dev/vfio/7".into()];
    let dying = FakeProcess { pid: 31, name: "qemu".into(), cgroup: "/".into(), files };
    lab.kernel.host().add_process(&dying).unwrap();
    lab.look();
    let begun = Instant::now();
    give_back(&lab.door, &lab.plan_back(&plan, AfterUse::Host)).await.unwrap_err();
    assert!(begun.elapsed().as_secs() < 10);
    assert!(!lab.kernel.writes().iter().any(|w| w.file.ends_with("vfio-pci/unbind")));
}

/// Another GPU in the group was bound along in silence.
#[tokio::test]
async fn orig_g7_a_second_gpu_in_the_group_is_refused_and_not_taken_along() {
    let lab = Lab::of(vec![
        Device::bridge(PORT, 1),
        Device::gpu(GPU).under(PORT).group(7),
        Device::gpu("0000:01:01.0").under(PORT).group(7),
    ]);
    let refusal = plan_bind(&lab.topology, &lab.gpu(GPU), &BindPolicy::default()).unwrap_err();
    assert_eq!(refusal.code(), "foreign_device");
    assert!(refusal.to_string().contains("0000:01:01.0"), "{refusal}");
}

/// Nothing was checked that keeps a guest in its place.
#[tokio::test]
async fn orig_g8_isolation_is_checked_on_the_host_as_it_is() {
    let code =
        |lab: &Lab| plan_bind(&lab.topology, &lab.gpu(GPU), &BindPolicy::default()).unwrap_err().code();
    let mut lab = Lab::twins();
    lab.kernel.host().set_interrupt_remapping(false).unwrap();
    lab.look();
    assert_eq!(code(&lab), "no_interrupt_remapping");
    lab.kernel.host().set_interrupt_remapping(true).unwrap();
    let parameter = "sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts";
    lab.kernel.host().file(parameter, "Y\n").unwrap();
    lab.look();
    assert_eq!(code(&lab), "unsafe_interrupts");
    lab.kernel.host().file(parameter, "N\n").unwrap();
    lab.kernel.host().file("proc/cmdline", "ro pcie_acs_override=downstream\n").unwrap();
    lab.look();
    assert_eq!(code(&lab), "acs_override");
}

/// Ids given to vfio-pci took every card of the kind, the host's own too.
#[tokio::test]
async fn orig_g10_a_twin_of_the_rented_card_stays_with_the_host() {
    let mut lab = Lab::twins();
    let plan = lab.plan(TWIN);
    bind(&lab.door, &plan).await.unwrap();
    assert_eq!((lab.driver(GPU), lab.driver(TWIN)), (driver("nvidia"), driver("vfio-pci")));
    let ids_written = |w: &qudata_testkit::pci::react::Written| w.file.ends_with("new_id");
    assert!(!lab.kernel.writes().iter().any(ids_written));
    lab.look();
    give_back(&lab.door, &lab.plan_back(&plan, AfterUse::Host)).await.unwrap();
    assert!(lab.kernel.writes_to(GPU).is_empty());
    assert_eq!(lab.topology.devices[&pci(GPU)].vendor, lab.topology.devices[&pci(TWIN)].vendor);
}
