//! Installations from the beginning to the end, twice, and with things in the way.

use std::fs;

use qudata_testkit::pci::Device;

use super::world::{GPU, KEY, World, differences, tree, usual, wish, world};
use crate::{
    install::Outcome,
    outside::{KeyVerdict, Tenant},
    places,
    progress::Event,
    wish::{RebootWay, Wish},
};

fn finished() -> World {
    let world = usual();
    assert_eq!(world.install(wish()).unwrap(), Outcome::Rebooting);
    world.reboot();
    assert_eq!(world.go_on().unwrap(), Outcome::Ready { changed: true });
    world
}

#[test]
fn a_fresh_host_restarts_once_and_goes_on_by_itself() {
    let world = usual();
    assert_eq!(world.install(wish()).unwrap(), Outcome::Rebooting);
    assert!(world.commands.borrow().last().unwrap() == "systemctl reboot");
    assert!(world.text(places::CONTINUE_FILE).unwrap().contains("install --continue"));
    assert!(!world.commands.borrow().iter().any(|c| c.starts_with("selftest")), "not before the restart");
    world.reboot();
    assert_eq!(world.go_on().unwrap(), Outcome::Ready { changed: true });
    assert!(world.text(places::CONTINUE_FILE).is_none() && world.active.get());
    assert!(world.commands.borrow().iter().any(|c| c.starts_with("selftest") && c.contains("65")));
    assert!(world.text(places::SELFTEST_DROP_IN).is_none());
    assert_eq!(world.text(places::API_KEY).unwrap(), format!("{KEY}\n"));
    assert!(world.text(places::SETTINGS).unwrap().contains("frpc_binary = \"/usr/lib/qudata/frpc\""));
}

#[test]
fn the_key_is_in_one_file_of_root_and_nowhere_else() {
    let world = finished();
    let holders: Vec<String> = tree(world.host.root())
        .into_iter()
        .filter(|(_, text)| text.contains("canary"))
        .map(|(n, _)| n)
        .collect();
    assert_eq!(holders, ["etc/qudata/api_key"]);
    assert!(tree(world.host.root())["etc/qudata/api_key"].starts_with("100600 "));
    assert!(!format!("{:?} {:?}", world.events.borrow(), world.commands.borrow()).contains("canary"));
}

#[test]
fn the_same_line_again_changes_nothing() {
    let world = finished();
    let before = tree(world.host.root());
    world.commands.borrow_mut().clear();
    assert_eq!(world.install(wish()).unwrap(), Outcome::Ready { changed: false });
    let log = "var/log/qudata/install.log";
    let progress = "var/lib/qudata/setup/progress.json";
    let changed = differences(&before, &tree(world.host.root()));
    assert!(changed.iter().all(|line| line.starts_with(log) || line.starts_with(progress)), "{changed:?}");
    let commands = world.commands.borrow();
    assert!(!commands.iter().any(|c| c.contains("apt-get") || c.contains("restart") || c == "update-grub"));
}

#[test]
fn taken_back_byte_for_byte() {
    let world = usual();
    world.file("etc/udev/rules.d/99-mine.rules", "mine");
    let (before, packages) = (tree(world.host.root()), world.packages.borrow().clone());
    world.install(wish()).unwrap();
    world.reboot();
    world.go_on().unwrap();
    // The server lost its power while the one line ran for the first time.
    let download = "var/lib/qudata-install.AbCdEfGhIj/root/usr/bin/qudata-agent";
    world.file(download, "program");
    assert_eq!(world.uninstall(true).unwrap(), Vec::<String>::new());
    assert_eq!(differences(&before, &tree(world.host.root())), Vec::<String>::new());
    assert_eq!(*world.packages.borrow(), packages);
    assert!(!world.active.get() && !world.rules.get());
}

#[test]
fn what_the_owner_changed_since_is_left_alone_and_said() {
    let world = finished();
    world.file(places::GRUB_DROP_IN, "GRUB_CMDLINE_LINUX_DEFAULT=\"mine\"\n");
    world.needed_by_owner.replace(Some("owner-vm-tool".into()));
    let left = world.uninstall(false).unwrap();
    assert!(left.iter().any(|line| line.contains("90-qudata.cfg was changed")), "{left:?}");
    assert!(left.iter().any(|line| line.contains("qemu-system-x86")), "{left:?}");
    assert!(world.text(places::GRUB_DROP_IN).unwrap().contains("mine"));
    assert!(world.text("boot/grub/grub.cfg").unwrap().contains("mine"), "made anew");
    assert!(world.packages.borrow().contains("qemu-system-x86"));
    assert_eq!(world.text("etc/group").unwrap(), "root:x:0:\n_ssh:x:101:\n", "its group stays with it");
    assert!(world.text("var/lib/qudata/images/qudata-base.qcow2").is_some(), "data is kept");
    assert!(!world.host.path("var/lib/qudata/setup").exists());
}

#[test]
fn a_second_restart_never_comes() {
    let world = usual();
    world.install(wish()).unwrap();
    world.file("proc/sys/kernel/random/boot_id", "another\n");
    let error = world.go_on().unwrap_err();
    assert_eq!(error.code.as_str(), "bootloader_failed", "{error:?}");
    let params = "root=/dev/sda1 ro quiet intel_iommu=on iommu=pt\n";
    world.file("proc/cmdline", params);
    assert_eq!(world.go_on().unwrap_err().code.as_str(), "iommu_off");
    assert_eq!(world.commands.borrow().iter().filter(|c| *c == "systemctl reboot").count(), 1);
    world.iommu_on();
    assert!(world.go_on().is_ok(), "it goes on when that is mended");
}

#[test]
fn a_restart_is_the_owners_to_allow() {
    let tenant = || Tenant { id: "1".into(), name: "renter".into(), gpus: Vec::new() };
    for (way, yes, answer, tenants, goes) in [
        (RebootWay::Never, true, None, false, false),
        (RebootWay::Ask, false, None, false, false),
        (RebootWay::Ask, false, Some(true), false, true),
        (RebootWay::Ask, false, Some(false), false, false),
        (RebootWay::Auto, false, Some(false), false, false),
        (RebootWay::Auto, false, None, true, false),
        (RebootWay::Auto, true, None, true, true),
    ] {
        let world = usual();
        world.answer.set(answer);
        world.tenants.borrow_mut().extend(tenants.then(tenant));
        let result = world.install(Wish { reboot: way, yes, ..wish() });
        match result {
            Ok(outcome) => assert!(goes && outcome == Outcome::Rebooting, "{way:?} {answer:?}"),
            Err(error) => {
                assert!(!goes && error.code.as_str() == "reboot_needed", "{error:?}");
                assert_eq!(error.what.contains("renter"), tenants);
                world.reboot();
                world.tenants.borrow_mut().clear();
                assert!(world.go_on().is_ok(), "a restart by hand goes on as well");
            }
        }
    }
}

#[test]
fn tenants_are_not_disturbed() {
    let world = world(vec![Device::gpu(GPU).group(7), Device::gpu("0000:66:00.0").group(8)]);
    world.install(wish()).unwrap();
    let gpus = vec![GPU.parse().unwrap()];
    world.tenants.borrow_mut().push(Tenant { id: "1".into(), name: "renter".into(), gpus });
    world.commands.borrow_mut().clear();
    fs::remove_file(world.host.path("var/lib/qudata/setup/progress.json")).unwrap();
    world.install(wish()).unwrap();
    let commands = world.commands.borrow().clone();
    let tested: Vec<&String> = commands.iter().filter(|c| c.starts_with("selftest")).collect();
    assert!(tested.len() == 1 && tested[0].as_str() == "selftest 0000:66:00.0", "{tested:?}");
    assert!(!commands.iter().any(|c| c.contains("restart") || c.contains("stop")), "{commands:?}");
    let error = world.uninstall(false).unwrap_err();
    assert_eq!(error.code.as_str(), "instances_exist");
    assert!(error.what.contains("renter") && world.active.get());
}

#[test]
fn apt_and_the_self_test_have_codes_of_their_own() {
    let world = usual();
    for (words, code) in [
        ("E: Failed to fetch http://x Could not resolve 'x'", "mirror_down"),
        ("E: Unable to correct problems", "package_failed"),
    ] {
        world.apt_says.replace(Some(words.into()));
        assert_eq!(world.install(wish()).unwrap_err().code.as_str(), code);
    }
    world.apt_says.replace(None);
    *world.selftest.borrow_mut() = Err("selftest.ready: no".into());
    world.install(wish()).unwrap();
    world.reboot();
    let error = world.go_on().unwrap_err();
    assert_eq!(error.code.as_str(), "selftest_failed");
    assert!(world.text(places::SELFTEST_DROP_IN).is_none() && !world.active.get(), "not rented out");
    *world.selftest.borrow_mut() = Ok(());
    assert!(world.go_on().is_ok());
}

#[test]
fn two_at_once_and_a_damaged_list() {
    let world = finished();
    let held = world.with(|means| crate::install::lock(means).unwrap());
    assert_eq!(world.install(wish()).unwrap_err().code.as_str(), "busy");
    assert_eq!(world.uninstall(false).unwrap_err().code.as_str(), "busy");
    drop(held);
    world.file(places::MANIFEST, "{");
    assert_eq!(world.install(wish()).unwrap_err().code.as_str(), "manifest_damaged");
    assert_eq!(world.uninstall(false).unwrap_err().code.as_str(), "manifest_damaged");
}

#[test]
fn percentages_come_from_apt_and_the_builder() {
    let world = finished();
    let ticks: Vec<u8> = world
        .events
        .borrow()
        .iter()
        .filter_map(|event| match event {
            Event::Tick(_, tick, _) => tick.percent,
            _ => None,
        })
        .collect();
    assert_eq!(ticks, [100, 50]);
}

fn named(id: &str, name: &str) -> Tenant {
    Tenant { id: id.into(), name: name.into(), gpus: vec![GPU.parse().unwrap()] }
}

#[test]
fn an_instance_that_came_after_the_question_stops_a_restart() {
    let world = usual();
    world.latecomer.replace(Some(named("7", "renter")));
    let error = world.install(Wish { reboot: RebootWay::Auto, ..wish() }).unwrap_err();
    assert_eq!(error.code.as_str(), "reboot_needed");
    assert!(error.what.contains("renter (7)"), "{error}");
    assert!(!world.commands.borrow().iter().any(|c| c == "systemctl reboot"));
}

#[test]
fn instances_that_the_agent_does_not_know_stop_a_removal() {
    let made: [(&str, &str); 3] = [
        ("sys/fs/cgroup/systemd/qudata.slice/qudata-vm-0d-1-3-qemu.service/cgroup.procs", "0d-1"),
        ("var/lib/qudata/instances/0a-1/disk.qcow2", "0a-1"),
        ("sys/fs/cgroup/qudata.slice/qudata-vm-0b-1-3-qemu.service/cgroup.procs", "0b-1"),
    ];
    for (path, id) in made {
        for purge in [false, true] {
            let world = finished();
            world.file(path, "");
            let error = world.uninstall(purge).unwrap_err();
            assert_eq!(error.code.as_str(), "instances_exist", "{error:?}");
            assert!(error.what.contains(id), "{error}");
            assert!(world.rules.get() && world.active.get(), "the agent runs on");
            assert!(world.host.path(path).exists());
        }
    }
}

#[test]
fn the_last_order_before_the_agent_stops_stops_a_removal() {
    for purge in [false, true] {
        let world = finished();
        world.latecomer.replace(Some(named("7", "renter")));
        let error = world.uninstall(purge).unwrap_err();
        assert_eq!(error.code.as_str(), "instances_exist", "{error:?}");
        assert!(error.what.contains("renter"), "{error}");
        assert!(world.active.get() && world.rules.get(), "it was started again");
        let commands = world.commands.borrow();
        assert!(!commands.iter().any(|c| c.contains("frpc") || c.contains("disable --now")), "{commands:?}");
    }
}

#[test]
fn data_is_not_removed_over_an_instance() {
    let world = finished();
    world.straggler.set(true);
    let error = world.uninstall(true).unwrap_err();
    assert_eq!(error.code.as_str(), "instances_exist", "{error:?}");
    assert_eq!(world.text("var/lib/qudata/instances/0c-1/disk.qcow2").unwrap(), "theirs");
}

/// As a run that was cut off in its self-test leaves it.
fn cut_in_the_self_test(tenants: Vec<Tenant>) -> World {
    let world = finished();
    fs::remove_file(world.host.path("var/lib/qudata/setup/progress.json")).unwrap();
    world.file("var/lib/qudata/setup/selftest.json", "[\"1\"]");
    for tenant in &tenants {
        world.file(&format!("var/lib/qudata/instances/{}/disk.qcow2", tenant.id), "");
    }
    world.tenants.replace(tenants);
    world.commands.borrow_mut().clear();
    world
}

#[test]
fn what_a_cut_self_test_left_is_deleted_and_tried_again() {
    for active in [true, false] {
        let world = cut_in_the_self_test(vec![named("2", "selftest-0123abcd")]);
        world.silent.set(true);
        world.active.set(active);
        world.install(wish()).unwrap();
        assert!(world.tenants.borrow().is_empty(), "it is nobody's");
        assert!(world.commands.borrow().contains(&format!("selftest {GPU}")), "its GPU is tried");
        assert!(world.active.get() && !world.alone.get());
        assert!(world.text("var/lib/qudata/setup/selftest.json").is_none());
    }
}

#[test]
fn a_renter_who_is_named_like_a_self_test_is_none() {
    for (id, name) in [("1", "selftest-0123abcd"), ("2", "selftest-mine")] {
        let world = cut_in_the_self_test(vec![named(id, name)]);
        world.install(wish()).unwrap();
        assert_eq!(world.tenants.borrow().len(), 1, "{name}");
    }
    let world = finished();
    fs::remove_file(world.host.path("var/lib/qudata/setup/progress.json")).unwrap();
    world.tenants.replace(vec![named("2", "selftest-0123abcd")]);
    world.install(wish()).unwrap();
    assert_eq!(world.tenants.borrow().len(), 1, "no self-test was cut off");
}

#[test]
fn only_what_was_tried_counts_as_tried() {
    let other = "0000:66:00.0";
    let world = world(vec![Device::gpu(GPU).group(7), Device::gpu(other).group(8)]);
    world.tenants.replace(vec![named("1", "renter")]);
    world.active.set(true);
    world.install(wish()).unwrap();
    world.tenants.borrow_mut().clear();
    world.commands.borrow_mut().clear();
    world.install(wish()).unwrap();
    let last = || world.commands.borrow_mut().split_off(0).into_iter().filter(|c| c.starts_with("selftest"));
    assert_eq!(last().collect::<Vec<_>>(), [format!("selftest {GPU}")], "the one that was rented");
    world.tenants.replace(vec![named("1", "renter")]);
    world.install(wish()).unwrap();
    assert_eq!(last().next(), None, "both were tried, whatever is rented now");
    // Another card in the host, and the firmware has numbered them anew.
    let kept = world.text("var/lib/qudata/setup/progress.json").unwrap();
    assert!(kept.contains(other), "{kept}");
    world.file("var/lib/qudata/setup/progress.json", &kept.replace(other, "0000:17:00.0"));
    world.tenants.borrow_mut().clear();
    world.install(wish()).unwrap();
    assert_eq!(last().collect::<Vec<_>>(), [format!("selftest {GPU} {other}")], "an address proves nothing");
}

#[test]
fn a_card_that_is_rented_is_not_promised_to_be_tried() {
    let world = world(vec![Device::gpu(GPU).group(7)]);
    world.tenants.replace(vec![Tenant { gpus: vec![GPU.parse().unwrap()], ..named("1", "renter") }]);
    world.active.set(true);
    world.install(wish()).unwrap();
    assert!(!world.commands.borrow().iter().any(|c| c.starts_with("selftest")));
    let said = format!("{:?}", world.events.borrow());
    assert!(said.contains("tried out another time") && said.contains(GPU), "{said}");
}

#[test]
fn a_control_plane_that_is_silent_after_the_restart_ends_nothing() {
    let world = usual();
    assert_eq!(world.install(wish()).unwrap(), Outcome::Rebooting);
    world.reboot();
    world.verdict.replace(KeyVerdict::Unreachable("no route".into()));
    assert_eq!(world.go_on().unwrap(), Outcome::Ready { changed: true });
    let warned = |event: &Event| matches!(event, Event::Warning(text) if text.contains("no route"));
    assert!(world.events.borrow().iter().any(warned));
}

#[test]
fn options_that_are_refused_are_not_gone_on_with() {
    let world = usual();
    assert_eq!(world.install(wish()).unwrap(), Outcome::Rebooting);
    let kept = world.text(places::WISH);
    let wrong = Wish { settings: vec![("vm_cpuss".into(), "4".into())], ..wish() };
    assert_eq!(world.install(wrong).unwrap_err().code.as_str(), "bad_settings");
    world.verdict.replace(KeyVerdict::Refused(401));
    let other = Wish { skip_selftest: true, ..wish() };
    assert_eq!(world.install(other).unwrap_err().code.as_str(), "bad_key");
    assert_eq!(world.text(places::WISH), kept);
}

#[test]
fn what_the_owner_wrote_into_our_files_is_kept_when_they_go() {
    let world = finished();
    let edited = format!("{}# mine\n", world.text(places::SETTINGS).unwrap());
    world.file(places::SETTINGS, &edited);
    let again = Wish { settings: vec![("region".into(), "ru2".into())], ..wish() };
    assert_eq!(world.install(again).unwrap(), Outcome::Ready { changed: true });
    assert!(world.text(places::SETTINGS).unwrap().contains("# mine"));
    let left = world.uninstall(true).unwrap();
    let [line] = left.as_slice() else { panic!("{left:?}") };
    let place = line.rsplit(' ').next().unwrap();
    assert_eq!(world.text(place).unwrap(), edited, "{line}");
    assert!(!world.host.path("etc/qudata").exists());
}

#[test]
fn entries_of_systemd_boot_of_later_kernels_forget_our_parameters() {
    let world = usual();
    fs::remove_dir_all(world.host.path("boot/grub")).unwrap();
    let entry = |words: &str| {
        format!("title Debian\nversion 6.9\nlinux /b\noptions root=/dev/sda1 ro quiet{words}\n")
    };
    world.file("boot/efi/loader/entries/a.conf", &entry(""));
    for (path, text) in [("lib/modules/6.1/kernel", ""), ("boot/vmlinuz-6.1", "")] {
        world.file(path, text);
    }
    let before = tree(world.host.root());
    world.install(wish()).unwrap();
    world.file("boot/efi/loader/entries/b.conf", &entry(" intel_iommu=on iommu=pt"));
    world.uninstall(true).unwrap();
    assert_eq!(world.text("boot/efi/loader/entries/b.conf").unwrap(), entry(""));
    let changed = differences(&before, &tree(world.host.root()));
    assert!(changed.iter().all(|line| line.contains("b.conf")), "{changed:?}");

    // What the owner wrote into the file since is left, and so is what is made of it.
    fs::remove_file(world.host.path("boot/efi/loader/entries/b.conf")).unwrap();
    world.install(wish()).unwrap();
    let line = world.text(places::KERNEL_CMDLINE).unwrap();
    world.file(places::KERNEL_CMDLINE, &format!("{} mitigations=off\n", line.trim_end()));
    world.file("boot/efi/loader/entries/b.conf", &entry(" intel_iommu=on iommu=pt mitigations=off"));
    let left = world.uninstall(true).unwrap();
    assert!(left.iter().any(|line| line.contains(places::KERNEL_CMDLINE)), "{left:?}");
    let kept = world.text("boot/efi/loader/entries/b.conf").unwrap();
    assert_eq!(kept, entry(" intel_iommu=on iommu=pt mitigations=off"));
}

#[test]
fn an_owners_own_beside_the_data_stays() {
    let world = usual();
    let settings = vec![("data_dir".to_owned(), "/srv/disk/".to_owned())];
    world.install(Wish { settings, ..wish() }).unwrap();
    world.reboot();
    world.go_on().unwrap();
    let theirs = [
        "srv/disk/photos/a.jpg",
        "srv/disk/images/holiday.jpg",
        "srv/disk/instances/mine/b",
        "srv/disk/.ssh/authorized_keys",
    ];
    let ours = [
        "srv/disk/agent.redb",
        "srv/disk/agent.damaged-1",
        "srv/disk/images/0123456789abcdef/disk.qcow2",
        "srv/disk/images/.users/a",
        "srv/disk/instances/01a22df4-e0de-72dc-899f-8b3f479af46a.gone/disk.qcow2",
        "srv/disk/.ssh/management_key",
    ];
    theirs.iter().chain(&ours).for_each(|path| world.file(path, ""));
    fs::remove_dir_all(world.host.path("srv/disk/instances/mine")).unwrap();
    let left = world.uninstall(true).unwrap();
    for path in ours {
        assert!(!world.host.path(path).exists(), "{path}");
    }
    for path in theirs.into_iter().filter(|path| !path.contains("mine")) {
        assert!(world.host.path(path).exists(), "{path}");
        let named = path.trim_end_matches("/a.jpg");
        assert!(left.iter().any(|line| line.contains(named)), "{path}: {left:?}");
    }
}

#[test]
fn where_the_agents_unit_has_its_data_instances_are_looked_for_too() {
    let world = finished();
    world.environment.replace("A=b QUDATA_DATA_DIR=/nvme/q\n".into());
    world.file("nvme/q/instances/0a-1/disk.qcow2", "theirs");
    let error = world.uninstall(true).unwrap_err();
    assert!(error.code.as_str() == "instances_exist" && error.what.contains("0a-1"), "{error:?}");
    let world = finished();
    world.file(places::SETTINGS, "data_dir = ");
    assert_eq!(world.uninstall(true).unwrap_err().code.as_str(), "bad_settings");
    assert!(world.active.get());
}

#[test]
fn packages_that_somebody_asked_for_since_stay_and_settings_that_go_are_copied() {
    let world = finished();
    world.manual.replace(["passt", "pci.ids", "qudata-agent"].map(str::to_owned).into());
    world.file("etc/nftables.conf", "rules");
    world
        .verified
        .replace("??5?????? c /etc/nftables.conf\nmissing   c /etc/x\n??5??????   /usr/bin/y\n".into());
    let left = world.uninstall(true).unwrap();
    assert!(
        world.packages.borrow().contains("passt") && !world.packages.borrow().contains("qemu-system-x86")
    );
    let line = left.iter().find(|line| line.contains("/etc/nftables.conf")).unwrap();
    assert_eq!(world.text(line.rsplit(' ').next().unwrap()).unwrap(), "rules");
    assert!(left.iter().any(|line| line.contains("passt")) && left.len() == 2, "{left:?}");
}

#[test]
fn a_group_that_was_there_before_stays_with_packages_that_stay() {
    let world = usual();
    world.file("etc/group", "root:x:0:\nqudata:x:997:\n");
    world.install(wish()).unwrap();
    world.needed_by_owner.replace(Some("owner-vm-tool".into()));
    world.uninstall(true).unwrap();
    assert!(world.text("etc/group").unwrap().contains("qudata"));
}

#[test]
fn what_a_purge_is_to_be_said_again_with() {
    let world = finished();
    world.silent.set(true);
    world.cut_after(Some(2));
    let error = world.uninstall(true).unwrap_err();
    assert_eq!(error.next, "qudata-agent uninstall --purge", "{error:?}");
    world.cut_after(None);
    world.uninstall(true).unwrap();
    let told = format!("{:?}", world.events.borrow());
    assert!(told.contains("sudo /var/lib/qudata/setup/qudata-agent uninstall --purge"), "{told}");
}
