//! Moving GPUs between drivers on a kernel that reacts: what arrives, what comes back, and what is left after each kind of
//! failure.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests state expectations")]

mod common;

use std::time::Instant;

use common::{AUDIO, GPU, Lab, PORT, SHORT, TWIN, driver};
use qudata_host::causes::chain;
use qudata_testkit::pci::{Device, FakeProcess, react::Fault};
use qudata_vfio::{
    door::DoorError,
    op::{Op, Reply},
    plan::{AfterUse, BindPolicy, plan_bind},
    rebind::{RebindError, bind, give_back},
};

#[tokio::test]
async fn a_gpu_goes_to_vfio_and_comes_back_to_its_driver() {
    let mut lab = Lab::twins();
    let plan = lab.plan(GPU);
    bind(&lab.door, &plan).await.unwrap();
    assert_eq!(lab.driver(GPU), driver("vfio-pci"));
    assert_eq!(lab.kernel.override_of(GPU), driver("vfio-pci"));
    lab.look();
    give_back(&lab.door, &lab.plan_back(&plan, AfterUse::Host)).await.unwrap();
    assert_eq!((lab.driver(GPU), lab.kernel.override_of(GPU)), (driver("nvidia"), None));
}

#[tokio::test]
async fn the_whole_slot_travels() {
    let mut lab = Lab::with_audio();
    let plan = lab.plan(GPU);
    bind(&lab.door, &plan).await.unwrap();
    assert_eq!((lab.driver(GPU), lab.driver(AUDIO)), (driver("vfio-pci"), driver("vfio-pci")));
    lab.look();
    give_back(&lab.door, &lab.plan_back(&plan, AfterUse::Host)).await.unwrap();
    assert_eq!((lab.driver(GPU), lab.driver(AUDIO)), (driver("nvidia"), driver("snd_hda_intel")));
    assert_eq!((lab.kernel.override_of(GPU), lab.kernel.override_of(AUDIO)), (None, None));
}

#[tokio::test]
async fn identical_cards_are_told_apart_by_address() {
    let lab = Lab::twins();
    bind(&lab.door, &lab.plan(TWIN)).await.unwrap();
    assert_eq!((lab.driver(GPU), lab.driver(TWIN)), (driver("nvidia"), driver("vfio-pci")));
    assert!(lab.kernel.writes_to(GPU).is_empty(), "{:?}", lab.kernel.writes_to(GPU));
}

#[tokio::test]
async fn binding_twice_writes_once() {
    let mut lab = Lab::with_audio();
    let plan = lab.plan(GPU);
    bind(&lab.door, &plan).await.unwrap();
    lab.kernel.forget_writes();
    // With a fresh plan there is nothing to write at all; with the old one nothing that changes anything.
    lab.look();
    assert!(lab.plan(GPU).is_bound());
    bind(&lab.door, &lab.plan(GPU)).await.unwrap();
    assert!(lab.kernel.writes().is_empty());
    bind(&lab.door, &plan).await.unwrap();
    let overrides_only = |file: &std::path::Path| file.ends_with("driver_override");
    assert!(lab.kernel.writes().iter().all(|w| overrides_only(&w.file) && w.text == "vfio-pci"));
}

#[tokio::test]
async fn giving_back_twice_is_fine_and_so_is_giving_back_the_half_bound() {
    let mut lab = Lab::with_audio();
    let plan = lab.plan(GPU);
    bind(&lab.door, &plan).await.unwrap();
    lab.look();
    let back = lab.plan_back(&plan, AfterUse::Host);
    give_back(&lab.door, &back).await.unwrap();
    give_back(&lab.door, &back).await.unwrap();
    assert_eq!((lab.driver(GPU), lab.driver(AUDIO)), (driver("nvidia"), driver("snd_hda_intel")));
    // Every state that an agent killed in the middle of a bind can leave.
    for (gpu, audio) in [
        (Some("vfio-pci"), Some("snd_hda_intel")),
        (Some("vfio-pci"), None),
        (None, None),
        (None, Some("snd_hda_intel")),
        (Some("nvidia"), Some("vfio-pci")),
    ] {
        lab.kernel.host().move_to_driver(GPU, gpu).unwrap();
        lab.kernel.host().move_to_driver(AUDIO, audio).unwrap();
        for function in [GPU, AUDIO] {
            let file = lab.kernel.host().device_dir(function).join("driver_override");
            std::fs::write(file, "vfio-pci\n").unwrap();
        }
        lab.look();
        give_back(&lab.door, &lab.plan_back(&plan, AfterUse::Host)).await.unwrap();
        assert_eq!((lab.driver(GPU), lab.driver(AUDIO)), (driver("nvidia"), driver("snd_hda_intel")));
        assert_eq!((lab.kernel.override_of(GPU), lab.kernel.override_of(AUDIO)), (None, None));
    }
}

#[tokio::test]
async fn a_half_bound_gpu_can_be_bound() {
    let mut lab = Lab::with_audio();
    for state in [Some("vfio-pci"), None] {
        lab.kernel.host().move_to_driver(GPU, state).unwrap();
        lab.look();
        bind(&lab.door, &lab.plan(GPU)).await.unwrap();
        assert_eq!((lab.driver(GPU), lab.driver(AUDIO)), (driver("vfio-pci"), driver("vfio-pci")));
        lab.kernel.host().move_to_driver(AUDIO, Some("snd_hda_intel")).unwrap();
    }
}

#[tokio::test]
async fn a_card_without_a_host_driver_stays_on_vfio_as_does_one_whose_owner_says_so() {
    let mut lab = Lab::of(vec![Device::bridge(PORT, 1), Device::gpu(GPU).under(PORT).group(7).unbound()]);
    let plan = lab.plan(GPU);
    bind(&lab.door, &plan).await.unwrap();
    lab.look();
    assert!(lab.plan_back(&plan, AfterUse::Host).ops.is_empty());
    give_back(&lab.door, &lab.plan_back(&plan, AfterUse::Host)).await.unwrap();
    assert_eq!(lab.driver(GPU), driver("vfio-pci"));

    let lab = Lab::twins();
    let plan = lab.plan(GPU);
    bind(&lab.door, &plan).await.unwrap();
    give_back(&lab.door, &lab.plan_back(&plan, AfterUse::Vfio)).await.unwrap();
    assert_eq!(lab.driver(GPU), driver("vfio-pci"));
}

#[tokio::test]
async fn a_function_without_a_driver_is_left_without_one_when_its_card_goes_back() {
    let audio = Device::audio(AUDIO).under(PORT).group(7).unbound();
    let mut lab = Lab::of(vec![Device::bridge(PORT, 1), Device::gpu(GPU).under(PORT).group(7), audio]);
    let plan = lab.plan(GPU);
    bind(&lab.door, &plan).await.unwrap();
    lab.look();
    give_back(&lab.door, &lab.plan_back(&plan, AfterUse::Host)).await.unwrap();
    assert_eq!((lab.driver(GPU), lab.driver(AUDIO)), (driver("nvidia"), None));
    assert_eq!(lab.kernel.override_of(AUDIO), None);
}

#[tokio::test]
async fn a_bind_that_fails_on_the_second_function_is_undone() {
    let lab = Lab::with_audio();
    lab.kernel.fault(AUDIO, Fault::BindFails("vfio-pci".into(), 22));
    let error = bind(&lab.door, &lab.plan(GPU)).await.unwrap_err();
    assert!(matches!(error, RebindError::Undone { .. }), "{error:?}");
    assert!(matches!(error.door(), Some(DoorError::Refused { op: Op::Bind { .. }, .. })));
    assert_eq!((lab.driver(GPU), lab.driver(AUDIO)), (driver("nvidia"), driver("snd_hda_intel")));
    assert_eq!((lab.kernel.override_of(GPU), lab.kernel.override_of(AUDIO)), (None, None));
    assert!(chain(&error).contains("binding 0000:01:00.1 to vfio-pci failed"), "{}", chain(&error));
}

#[tokio::test]
async fn a_function_that_cannot_go_back_does_not_keep_the_others() {
    let lab = Lab::with_audio();
    lab.kernel.fault(AUDIO, Fault::BindFails("vfio-pci".into(), 22));
    lab.kernel.fault(GPU, Fault::BindFails("nvidia".into(), 5));
    let error = bind(&lab.door, &lab.plan(GPU)).await.unwrap_err();
    assert!(matches!(error, RebindError::Left { .. }), "{error:?}");
    assert!(error.to_string().contains("binding 0000:01:00.0 to nvidia failed"), "{error}");
    assert_eq!((lab.driver(GPU), lab.driver(AUDIO)), (None, driver("snd_hda_intel")));
    assert_eq!((lab.kernel.override_of(GPU), lab.kernel.override_of(AUDIO)), (None, None));
}

#[tokio::test]
async fn a_wrong_driver_is_found_out_and_named() {
    let lab = Lab::twins();
    lab.kernel.host().add_driver("nouveau").unwrap();
    lab.kernel.fault(GPU, Fault::WrongDriverWins("nouveau".into()));
    let error = bind(&lab.door, &lab.plan(GPU)).await.unwrap_err();
    assert!(
        matches!(error.door(), Some(DoorError::Unmet { op: Op::ExpectDriver { .. }, found: Reply::Driver(Some(found)), .. })
            if found == "nouveau"),
        "{error:?}"
    );
    assert!(chain(&error).contains("it is bound to nouveau"), "{}", chain(&error));
    assert_eq!(lab.kernel.override_of(GPU), None);
}

#[tokio::test]
async fn a_hung_unbind_ends_at_its_deadline_and_nothing_else_touches_the_card() {
    let lab = Lab::with_audio();
    lab.kernel.fault(GPU, Fault::HangsOnUnbind);
    let mut plan = lab.plan(GPU);
    plan.deadline = SHORT;
    let begun = Instant::now();
    let error = bind(&lab.door, &plan).await.unwrap_err();
    assert!(begun.elapsed() < SHORT * 5, "{:?}", begun.elapsed());
    assert!(matches!(error, RebindError::Wedged { .. }), "{error:?}");
    assert!(matches!(error.door(), Some(DoorError::Hung { op: Op::Unbind { .. }, .. })), "{error:?}");
    let before = lab.kernel.writes();
    assert!(before.last().unwrap().file.ends_with("nvidia/unbind"), "{before:?}");
    // Should the kernel ever let go, the rest of the list is not carried out behind everybody's back.
    lab.settle();
    assert_eq!(lab.kernel.writes(), before);
    assert_eq!((lab.driver(GPU), lab.driver(AUDIO)), (None, driver("snd_hda_intel")));
}

#[tokio::test]
async fn a_hung_card_holds_up_no_other() {
    let lab = Lab::twins();
    lab.kernel.fault(GPU, Fault::HangsOnUnbind);
    let mut hung = lab.plan(GPU);
    hung.deadline = SHORT;
    let well = lab.plan(TWIN);
    let (hung, well) = tokio::join!(bind(&lab.door, &hung), bind(&lab.door, &well));
    assert!(matches!(hung.unwrap_err(), RebindError::Wedged { .. }));
    well.unwrap();
    assert_eq!(lab.driver(TWIN), driver("vfio-pci"));
    lab.settle();
}

#[tokio::test]
async fn a_dead_card_is_not_touched_by_a_bind() {
    let lab = Lab::with_audio();
    lab.kernel.fall_off_the_bus(AUDIO).unwrap();
    let error = bind(&lab.door, &lab.plan(GPU)).await.unwrap_err();
    assert!(matches!(error, RebindError::Undone { .. }), "{error:?}");
    assert!(chain(&error).contains("fallen off the bus"), "{}", chain(&error));
    assert!(lab.kernel.writes().is_empty());
}

#[tokio::test]
async fn a_card_that_dies_on_the_way_is_kept_from_its_host_driver() {
    let lab = Lab::twins();
    lab.kernel.fault(GPU, Fault::DiesOnUnbind);
    let error = bind(&lab.door, &lab.plan(GPU)).await.unwrap_err();
    assert!(matches!(error, RebindError::Left { .. }), "{error:?}");
    assert_eq!(lab.driver(GPU), driver("vfio-pci"));
}

#[tokio::test]
async fn a_held_card_is_not_given_back() {
    let mut lab = Lab::twins();
    let plan = lab.plan(GPU);
    bind(&lab.door, &plan).await.unwrap();
    let holder = FakeProcess {
        pid: 4711,
        name: "qemu-system-x86".into(),
        cgroup: "/qudata.slice/vm.service".into(),
        files: vec!["/dev/null".into(), "/dev/vfio/7".into()],
    };
    lab.kernel.host().add_process(&holder).unwrap();
    lab.kernel.forget_writes();
    lab.look();
    let error = give_back(&lab.door, &lab.plan_back(&plan, AfterUse::Host)).await.unwrap_err();
    assert!(matches!(error, RebindError::Undone { .. }), "{error:?}");
    assert!(chain(&error).contains("held by process 4711"), "{}", chain(&error));
    assert!(lab.kernel.writes().is_empty(), "a write to unbind would block until the holder is gone");
}

#[tokio::test]
async fn a_host_driver_that_is_not_loaded_any_more_is_named_with_the_remedy() {
    let mut lab = Lab::of(vec![Device::bridge(PORT, 1), Device::gpu(GPU).under(PORT).group(7)]);
    let plan = lab.plan(GPU);
    bind(&lab.door, &plan).await.unwrap();
    lab.kernel.host().remove_driver("nvidia").unwrap();
    lab.look();
    let error = give_back(&lab.door, &lab.plan_back(&plan, AfterUse::Host)).await.unwrap_err();
    assert!(matches!(error, RebindError::Left { .. }), "{error:?}");
    assert!(chain(&error).contains("modprobe nvidia"), "{}", chain(&error));
}

#[tokio::test]
async fn a_give_back_that_hangs_holds_up_no_other() {
    let mut lab = Lab::twins();
    let plans = (lab.plan(GPU), lab.plan(TWIN));
    bind(&lab.door, &plans.0).await.unwrap();
    bind(&lab.door, &plans.1).await.unwrap();
    lab.look();
    lab.kernel.fault(GPU, Fault::HangsOnUnbind);
    let mut hung = lab.plan_back(&plans.0, AfterUse::Host);
    hung.deadline = SHORT;
    let well = lab.plan_back(&plans.1, AfterUse::Host);
    let (hung, well) = tokio::join!(give_back(&lab.door, &hung), give_back(&lab.door, &well));
    assert!(matches!(hung.unwrap_err(), RebindError::Wedged { .. }));
    well.unwrap();
    assert_eq!(lab.driver(TWIN), driver("nvidia"));
    lab.settle();
}

#[tokio::test]
async fn a_refused_gpu_is_not_touched() {
    let lab = Lab::of(vec![
        Device::bridge(PORT, 1),
        Device::gpu(GPU).under(PORT).group(7),
        Device::new("0000:01:01.0").under(PORT).group(7).class(0x02_0000).driver("e1000e"),
    ]);
    let refusal = plan_bind(&lab.topology, &lab.gpu(GPU), &BindPolicy::default()).unwrap_err();
    assert_eq!(refusal.code(), "foreign_device");
    assert!(lab.kernel.writes().is_empty());
}
