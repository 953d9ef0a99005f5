//! The power is cut before each single effect, in turn. The same line finishes; `uninstall` takes everything back.

use std::collections::BTreeMap;

use super::world::{World, differences, tree, usual, wish};
use crate::{install::Outcome, places, wish::Wish};

/// What an installation is judged by: everything but what it remembers of its own course, and but for ages.
fn result(world: &World) -> BTreeMap<String, String> {
    let own = ["var/lib/qudata/setup", "var/log/qudata"];
    let kept =
        tree(world.host.root()).into_iter().filter(|(name, _)| !own.iter().any(|own| name.starts_with(own)));
    kept.map(|(name, text)| (name, ageless(&text))).collect()
}

fn ageless(text: &str) -> String {
    let mut parts: Vec<&str> = text.splitn(4, ' ').collect();
    if parts.len() > 2 {
        parts.remove(2);
    }
    parts.join(" ")
}

fn finish(world: &World) {
    world.cut_after(None);
    for _ in 0..3 {
        match world.install(wish()).unwrap() {
            Outcome::Ready { .. } => {
                assert!(world.active.get() && !world.alone.get());
                return;
            }
            Outcome::Rebooting => world.reboot(),
        }
    }
    panic!("it never ends");
}

#[test]
fn an_installation_that_is_cut_anywhere_is_finished_by_the_same_line() {
    let whole = usual();
    finish(&whole);
    let expected = result(&whole);
    let mut cuts = 0;
    // In the first boot, and in the second.
    for second in [false, true] {
        for effect in 0.. {
            let world = usual();
            let before = tree(world.host.root());
            let packages = world.packages.borrow().clone();
            if second {
                world.install(wish()).unwrap();
                world.reboot();
            }
            world.cut_after(Some(effect));
            let cut = if second { world.go_on() } else { world.install(wish()) };
            if !world.fuse.blown.get() {
                assert!(cut.is_ok());
                break;
            }
            cuts += 1;
            if effect % 2 == 0 {
                world.reboot();
            }
            finish(&world);
            assert_eq!(differences(&expected, &result(&world)), Vec::<String>::new(), "cut at {effect}");
            assert_eq!(world.uninstall(true).unwrap(), Vec::<String>::new(), "cut at {effect}");
            assert_eq!(
                differences(&before, &tree(world.host.root())),
                Vec::<String>::new(),
                "cut at {effect}"
            );
            assert_eq!(*world.packages.borrow(), packages, "cut at {effect}");
        }
    }
    assert!(cuts > 60, "{cuts}");
}

#[test]
fn an_installation_that_is_cut_anywhere_can_be_taken_back_at_once() {
    for effect in 0.. {
        let world = usual();
        let before = tree(world.host.root());
        let packages = world.packages.borrow().clone();
        world.cut_after(Some(effect));
        let _ = world.install(wish());
        if !world.fuse.blown.get() {
            break;
        }
        world.cut_after(None);
        world.uninstall(true).unwrap();
        assert_eq!(differences(&before, &tree(world.host.root())), Vec::<String>::new(), "cut at {effect}");
        assert_eq!(*world.packages.borrow(), packages, "cut at {effect}");
        assert!(world.half.borrow().is_empty(), "cut at {effect}");
    }
}

#[test]
fn a_removal_that_is_cut_anywhere_is_finished_by_the_same_line() {
    let mut cuts = 0;
    for effect in 0.. {
        let world = usual();
        let before = tree(world.host.root());
        finish(&world);
        world.cut_after(Some(effect));
        let _ = world.uninstall(true);
        if !world.fuse.blown.get() {
            break;
        }
        cuts += 1;
        assert!(world.can_be_taken_back(), "cut at {effect}: no program is left");
        world.cut_after(None);
        world.uninstall(true).unwrap();
        assert_eq!(differences(&before, &tree(world.host.root())), Vec::<String>::new(), "cut at {effect}");
    }
    assert!(cuts > 30, "{cuts}");
}

#[test]
fn data_elsewhere_goes_with_the_purge_wherever_that_was_cut() {
    let mut cuts = 0;
    for effect in 0.. {
        let world = usual();
        let settings = vec![("data_dir".to_owned(), "/srv/qudata".to_owned())];
        let wish = Wish { settings, ..wish() };
        assert_eq!(world.install(wish).unwrap(), Outcome::Rebooting);
        world.reboot();
        assert_eq!(world.go_on().unwrap(), Outcome::Ready { changed: true });
        world.file("srv/qudata/images/qudata-base.qcow2", "");
        world.cut_after(Some(effect));
        let _ = world.uninstall(true);
        if !world.fuse.blown.get() {
            break;
        }
        cuts += 1;
        world.cut_after(None);
        world.uninstall(true).unwrap();
        assert!(!world.host.path("srv/qudata").exists(), "cut at {effect}: the data is still there");
    }
    assert!(cuts > 30, "{cuts}");
}

#[test]
fn a_removal_that_was_given_up_does_not_say_where_the_data_is_later() {
    let world = usual();
    finish(&world);
    world.cut_after(Some(8));
    assert!(world.uninstall(true).is_err());
    world.cut_after(None);
    let settings = vec![("data_dir".to_owned(), "/srv/later".to_owned())];
    let _ = world.install(Wish { settings, ..wish() }).unwrap();
    world.file("srv/later/images/qudata-base.qcow2", "");
    world.uninstall(true).unwrap();
    assert!(!world.host.path("srv/later").exists(), "the data is still there");
}

#[test]
fn a_removal_that_was_cut_does_not_go_on_as_an_installation() {
    for effect in 0.. {
        let world = usual();
        assert_eq!(world.install(wish()).unwrap(), Outcome::Rebooting);
        let list = world.text(places::MANIFEST);
        world.cut_after(Some(effect));
        let _ = world.uninstall(true);
        if !world.fuse.blown.get() {
            break;
        }
        // What the unit asks for that goes on after a restart.
        let untouched = world.text(places::MANIFEST) == list && world.version.borrow().is_some();
        assert!(world.text(places::WISH).is_none() || untouched, "cut at {effect}");
    }
}
