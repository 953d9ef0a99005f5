//! The base image is replaced under instances that exist.

use std::{
    env, fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
};

use qudata_testkit::{
    agent::{Image, Setup},
    process::Seen,
};
use qudata_tests::{SOON, small};
use rustix::process::Signal;

/// A folder with two images and a link, as `image build` leaves it.
struct Images(PathBuf);

impl Images {
    fn make() -> Self {
        let dir = PathBuf::from(format!("/var/tmp/qudata-images-{}", std::process::id()));
        let blank = env::var_os("QUDATA_TEST_BLANK")
            .unwrap_or_else(|| panic!("`cargo xtask test` sets QUDATA_TEST_BLANK"));
        for name in ["first", "second"] {
            let folder = dir.join(name);
            fs::create_dir_all(&folder).unwrap();
            fs::set_permissions(&folder, fs::Permissions::from_mode(0o755)).unwrap();
            fs::copy(&blank, folder.join("disk.qcow2")).unwrap();
        }
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o711)).unwrap();
        let images = Self(dir);
        images.lead_to("first");
        images
    }

    fn link(&self) -> PathBuf {
        self.0.join("base.qcow2")
    }

    fn lead_to(&self, name: &str) {
        let new = self.0.join("new");
        symlink(Path::new(name).join("disk.qcow2"), &new).unwrap();
        fs::rename(new, self.link()).unwrap();
    }

    /// Which of the images a QEMU has open.
    fn open_in(&self, qemu: &Seen) -> Vec<String> {
        let open = fs::read_dir(format!("/proc/{}/fd", qemu.pid)).unwrap();
        let targets = open.filter_map(|entry| fs::read_link(entry.unwrap().path()).ok());
        let ours = targets.filter_map(|path| path.strip_prefix(&self.0).ok().map(Path::to_owned));
        ours.map(|path| path.parent().unwrap().display().to_string()).collect()
    }
}

impl Drop for Images {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[test]
fn an_instance_keeps_its_image_when_there_is_a_newer_one() {
    let images = Images::make();
    let agent = Setup::new(Image::Blank).set("QUDATA_BASE_IMAGE", images.link().to_str().unwrap()).start();
    let mut baseline = agent.baseline();
    let old = agent.create(&small());
    agent.wait_for_phase(&old, "booting", SOON);
    assert_eq!(images.open_in(&agent.qemu(&old)), ["first"]);

    images.lead_to("second");
    let new = agent.create(&small());
    agent.wait_for_phase(&new, "booting", SOON);
    assert_eq!(images.open_in(&agent.qemu(&new)), ["second"]);

    // Booted again, and by an agent that never saw the old link.
    let qemu = agent.qemu(&old);
    agent.kill9();
    assert!(qemu.signal(Signal::KILL));
    agent.restart();
    agent.wait_for_state(&old, "booting", SOON);
    assert_ne!(agent.qemu(&old).identity(), qemu.identity());
    assert_eq!(images.open_in(&agent.qemu(&old)), ["first"]);
    agent.delete(&old);
    agent.delete(&new);
    agent.assert_clean(&mut baseline);
}
