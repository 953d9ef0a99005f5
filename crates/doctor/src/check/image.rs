//! `image`: is there a base image, and can the QEMU of an instance open it?

use std::path::{Path, PathBuf};

use super::{fail, pass, unseen, warn};
use crate::{
    Finding,
    observed::{ImageFault, ImageLook, Observed, Unseen},
};

const IMAGE: &str = "image";

/// What the unit of a VM does not see of the host: of the folders there it gets copies that everybody may pass.
const HIDDEN: [&str; 5] = ["/home", "/root", "/run/user", "/tmp", "/var/tmp"];

pub(super) fn check(seen: &Observed) -> Finding {
    let path = seen.settings.base_image.display();
    match &seen.files.image {
        Ok(image) => opened(seen, image),
        Err(ImageFault::Missing) => fail(
            IMAGE,
            format!("there is no base image at {path}"),
            "run `qudata-agent image build`, or set base_image to one that is there",
        ),
        Err(ImageFault::Unusable(why)) => {
            fail(IMAGE, why.clone(), "run `qudata-agent image build`, or set base_image to another one")
        }
        Err(ImageFault::Unseen(why @ (Unseen::Denied(_) | Unseen::Late(_)))) => unseen(IMAGE, why),
        Err(ImageFault::Unseen(why)) => warn(
            IMAGE,
            format!("the base image {path} was not looked at: {why}"),
            format!(
                "look at it: `namei -l {path}` and `qemu-img info {path}`; a disk that fails shows in `dmesg`"
            ),
        ),
    }
}

/// Root opens every file. QEMU runs as a user of its own per instance, which no group of the owner's holds.
fn opened(seen: &Observed, image: &ImageLook) -> Finding {
    if !image.unreadable.is_empty() {
        let (files, them) = (list(&image.unreadable), words(&image.unreadable));
        return fail(
            IMAGE,
            format!("VMs cannot read {files}: each runs as a user of its own, and others may not read it"),
            format!("run `chmod o+r {them}`"),
        );
    }
    // Where it is not known whether VMs are units, they are: nothing else is meant for renting out.
    let units = seen.has_units().unwrap_or(true);
    let in_a_copy = |dir: &Path| units && HIDDEN.iter().any(|hidden| dir.starts_with(hidden));
    let closed: Vec<PathBuf> = image.closed.iter().filter(|dir| !in_a_copy(dir)).cloned().collect();
    if !closed.is_empty() {
        let (folders, them) = (list(&closed), words(&closed));
        return fail(
            IMAGE,
            format!(
                "VMs cannot get to the base image: each runs as a user of its own, and others may not pass {folders}"
            ),
            format!("run `chmod o+x {them}`, or set base_image to one in an open folder"),
        );
    }
    pass(IMAGE, image.what.clone())
}

fn list(paths: &[PathBuf]) -> String {
    let paths: Vec<String> = paths.iter().map(|path| path.display().to_string()).collect();
    paths.join(", ")
}

/// As words of a shell's line.
fn words(paths: &[PathBuf]) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+:@%".contains(c);
    let word = |path: &PathBuf| {
        let text = path.display().to_string();
        if text.chars().all(plain) { text } else { format!("'{}'", text.replace('\'', r"'\''")) }
    };
    paths.iter().map(word).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Verdict,
        check::made_up::{host, settings},
        observed::Systemd,
    };

    fn image(unreadable: &[&str], closed: &[&str]) -> ImageLook {
        let paths = |list: &[&str]| list.iter().map(PathBuf::from).collect();
        ImageLook { what: "raw".to_owned(), unreadable: paths(unreadable), closed: paths(closed) }
    }

    #[test]
    fn an_image_that_only_root_can_open_is_a_fault_with_the_command_against_it() {
        let mut seen = host();
        seen.files.image = Ok(image(&["/var/my images/disk.raw", "/srv/disk.initrd"], &[]));
        let found = check(&seen);
        assert_eq!(found.verdict, Verdict::Fail, "{found:?}");
        assert_eq!(found.remedy.unwrap(), "run `chmod o+r '/var/my images/disk.raw' /srv/disk.initrd`");
        seen.files.image = Ok(image(&[], &["/srv/images", "/srv"]));
        let found = check(&seen);
        assert_eq!(found.verdict, Verdict::Fail, "{found:?}");
        assert!(found.remedy.unwrap().starts_with("run `chmod o+x /srv/images /srv`"));
    }

    #[test]
    fn a_home_is_open_to_units_and_closed_to_others() {
        let mut seen = host();
        seen.files.image = Ok(image(&[], &["/root/images", "/root"]));
        assert_eq!(check(&seen).verdict, Verdict::Pass);
        seen.settings = settings(&[("QUDATA_STANDALONE", "true"), ("QUDATA_LAUNCHER", "detached")]);
        let found = check(&seen);
        assert!(found.verdict == Verdict::Fail && found.line.contains("/root/images, /root"), "{found:?}");
        seen.settings = settings(&[("QUDATA_STANDALONE", "true")]);
        seen.systemd = Systemd::NotBooted;
        assert_eq!(check(&seen).verdict, Verdict::Fail);
    }
}
