//! Builds that would take from renters, or that trust what the machine's user may write: they are refused.

use std::{fs, net::SocketAddr, os::unix::fs::PermissionsExt, path::Path, process::Command, time::Duration};

use qudata_host::{causes::chain, size::ByteSize};
use qudata_image::{BuildWish, Customisation, DriverWish, SourceWish, Start};

use crate::{
    killed::machine_runs,
    kit::{Kit, file, from, quietly, run, sum},
    server::{Files, Server},
};

/// An image that a server has, with its digest.
fn served(kit: &Kit) -> (Server, SourceWish) {
    let image = kit.image("a.img", 4);
    let digest = sum("sha256sum", &image).parse().unwrap();
    let mut files = Files::default();
    files.files.insert("/a.img".to_owned(), image);
    let server = Server::start(SocketAddr::from(([127, 0, 0, 1], 0)), files);
    let source = SourceWish { digest: Some(digest), ..from(&server.url("/a.img")) };
    (server, source)
}

/// The code and the words of a build that asked its server for nothing.
async fn refused(kit: &Kit, server: &Server, wish: &BuildWish) -> (&'static str, String) {
    let error = quietly(wish).await.unwrap_err();
    assert_eq!(server.asked(), [""; 0], "{}", chain(&error));
    if kit.images().exists() {
        kit.assert_nothing_made();
    }
    (error.code(), chain(&error))
}

/// A renter's disk, larger than any file system.
fn huge_disk(kit: &Kit) {
    let folder = kit.path("instances/a");
    fs::create_dir_all(&folder).unwrap();
    let mut command = Command::new("qemu-img");
    run(command.args(["create", "-q", "-f", "qcow2"]).arg(folder.join("disk.qcow2")).arg("1000T"));
}

#[tokio::test]
async fn memory_that_the_host_keeps_is_not_taken() {
    let kit = Kit::new();
    let (server, source) = served(&kit);
    let mut wish = kit.customised(source, Customisation::default());
    wish.place.reserve_memory = ByteSize::from_gib(1 << 20);
    let (code, text) = refused(&kit, &server, &wish).await;
    assert_eq!(code, "memory_too_small", "{text}");
    assert!(text.contains("host_reserve_memory"), "{text}");
    // Without a machine none is needed.
    wish.customise = None;
    quietly(&wish).await.unwrap();
}

#[tokio::test]
async fn room_that_is_promised_or_kept_free_is_not_taken() {
    let kit = Kit::new();
    let (server, source) = served(&kit);
    let mut wish = kit.customised(source, Customisation::default());
    wish.place.reserve_disk = ByteSize::from_gib(1 << 20);
    let (code, text) = refused(&kit, &server, &wish).await;
    assert_eq!(code, "disk_too_small", "{text}");
    wish.place.reserve_disk = ByteSize::default();
    huge_disk(&kit);
    let (code, text) = refused(&kit, &server, &wish).await;
    assert_eq!(code, "disk_too_small", "{text}");
    assert!(text.contains("may still grow by 102"), "{text}");
    // Also one of another agent.
    fs::create_dir_all(kit.images().join(".users")).unwrap();
    fs::write(kit.images().join(".users/a"), format!("{}\n", kit.path("instances").display())).unwrap();
    wish.place.instances = kit.path("none");
    assert_eq!(quietly(&wish).await.unwrap_err().code(), "disk_too_small");
}

#[tokio::test]
async fn a_machine_that_comes_to_take_the_room_of_renters_is_ended() {
    let kit = Kit::new();
    // Nothing starts from it: the machine idles until it is ended.
    let wish = kit.customised(file(&kit.image("a.qcow2", 1)), Customisation::default());
    let mut building = Box::pin(quietly(&wish));
    let error = loop {
        tokio::select! {
            done = &mut building => break done.unwrap_err(),
            () = tokio::time::sleep(Duration::from_millis(100)) => {}
        }
        if machine_runs(&kit) && !kit.path("instances").exists() {
            huge_disk(&kit);
        }
    };
    assert_eq!(error.code(), "disk_too_small", "{}", chain(&error));
    assert!(!machine_runs(&kit));
    kit.assert_nothing_made();
}

#[tokio::test]
async fn a_driver_without_boot_files_is_refused_before_anything_is_done() {
    let kit = Kit::new();
    let image = kit.image("a.qcow2", 1);
    let customisation = Customisation { driver: DriverWish::Distro(None), ..Customisation::default() };
    let mut wish = kit.customised(file(&image), customisation);
    wish.place.start = Start::Direct;
    let error = quietly(&wish).await.unwrap_err();
    assert_eq!(error.code(), "image_failed");
    let text = error.to_string();
    assert!(text.contains("--driver none") && text.contains("uefi"), "{text}");
    assert!(!kit.images().exists());
}

/// What lies in the folder where the packed disk is expected, after qemu-img has ended.
async fn packed(kit: &Kit, trick: &str) -> (String, u32) {
    let (victim, source) = (kit.path("victim"), kit.image("a.qcow2", 1));
    fs::copy(&source, &victim).unwrap();
    fs::set_permissions(&victim, fs::Permissions::from_mode(0o606)).unwrap();
    let tool = kit.path("qemu-img");
    let trick = trick.replace("VICTIM", victim.to_str().unwrap());
    let script = format!(
        "#!/bin/sh\nset -e\nfor last; do :; done\ncase $1 in\nconvert) {trick} ;;\ncheck) ;;\n*) exec qemu-img \"$@\" ;;\nesac\n"
    );
    fs::write(&tool, script).unwrap();
    fs::set_permissions(&tool, fs::Permissions::from_mode(0o755)).unwrap();
    let mut wish = kit.plain(file(&source));
    wish.place.qemu_img = tool;
    let error = quietly(&wish).await.unwrap_err();
    kit.assert_nothing_made();
    (chain(&error), mode(&victim))
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[tokio::test]
async fn what_the_machines_user_puts_in_place_of_the_disk_is_not_followed() {
    for (trick, expected) in [
        ("ln -s VICTIM \"$last\"", "cannot take"),
        ("ln VICTIM \"$last\"", ""),
        ("mkdir \"$last\"", "regular file"),
        ("head -c 4096 /dev/zero >\"$last\"", "not what qemu-img writes"),
    ] {
        let (text, mode) = packed(&Kit::new(), trick).await;
        assert!(text.contains(expected), "{trick}: {text}");
        assert_eq!(mode, 0o606, "{trick}: a file of somebody else's was changed");
    }
}
