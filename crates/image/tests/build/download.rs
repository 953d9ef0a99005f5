//! Stories of the way from a publisher to this host.

use std::{fs, net::SocketAddr, process::Command};

use qudata_host::causes::chain;
use qudata_image::{Location, Progress, SourceWish};

use crate::{
    kit::{Kit, Signer, file, from, quietly, run, sum, told, url},
    server::{Files, Server},
};

const ANY: ([u8; 4], u16) = ([127, 0, 0, 1], 0);

/// An image served with a signed list of checksums.
struct Publisher {
    kit: Kit,
    server: Server,
    signer: Signer,
    wish: SourceWish,
}

impl Publisher {
    fn new(list_tool: &str) -> Self {
        let kit = Kit::new();
        let image = kit.image("a.img", 8);
        let list = kit.path("SUMS");
        fs::write(&list, format!("{} *a.img\n", sum(list_tool, &image))).unwrap();
        let signer = Signer::new();
        let signature = signer.sign(&list);
        let mut files = Files::default();
        for (path, file) in [("/a.img", image), ("/SUMS", list), ("/SUMS.gpg", signature)] {
            files.files.insert(path.to_owned(), file);
        }
        let server = Server::start(SocketAddr::from(ANY), files);
        let wish = SourceWish {
            checksums: Some(url(&server.url("/SUMS"))),
            signature: Some(url(&server.url("/SUMS.gpg"))),
            keyring: Some(signer.keyring(&kit.path("keyring.gpg"))),
            ..from(&server.url("/a.img"))
        };
        Self { kit, server, signer, wish }
    }

    fn wish(&self) -> qudata_image::BuildWish {
        self.kit.plain(self.wish.clone())
    }
}

#[tokio::test]
async fn a_signed_image_is_published_read_only_by_its_content() {
    for tool in ["sha256sum", "sha512sum"] {
        let site = Publisher::new(tool);
        let (made, all) = told(&site.wish()).await;
        let made = made.unwrap_or_else(|e| panic!("{}", chain(&e)));
        let disk = site.kit.store().disk(&made.id);
        assert_eq!(sum("sha256sum", &disk), made.sha256);
        assert!(made.sha256.starts_with(&made.id.to_string()));
        assert!(made.base.proof.contains("signed by a key of"), "{made:?}");
        assert_eq!(run(Command::new("stat").args(["-c", "%a %U"]).arg(&disk)), "444 root\n");
        run(Command::new("qemu-img").args(["compare", "-q"]).arg(site.kit.path("a.img")).arg(&disk));
        assert_eq!(site.kit.store().current().unwrap(), Some(made.id.clone()));
        assert_eq!(site.kit.store().verify(&made.id).unwrap(), made);
        let total = fs::metadata(site.kit.path("a.img")).unwrap().len();
        assert!(all.contains(&Progress::Fetching { done: total, total: Some(total) }), "{all:?}");
        assert_eq!(
            fs::read_dir(site.kit.images().join(".fetch")).unwrap().count(),
            0,
            "downloads are not kept"
        );
    }
}

#[tokio::test]
async fn a_wrong_signature_is_bad_signature() {
    let site = Publisher::new("sha256sum");
    let list = site.kit.path("SUMS");
    let text = fs::read_to_string(&list).unwrap();
    fs::write(&list, format!("{text}# changed\n")).unwrap();
    let error = quietly(&site.wish()).await.unwrap_err();
    assert_eq!(error.code(), "bad_signature", "{}", chain(&error));
    assert!(site.server.asked().iter().all(|path| path != "/a.img"), "without proof nothing is fetched");
    site.kit.assert_nothing_made();

    // Signed, but by somebody else.
    let other = Signer::new();
    other.sign(&list);
    let error = quietly(&site.wish()).await.unwrap_err();
    assert_eq!(error.code(), "bad_signature", "{}", chain(&error));

    let mut wish = site.wish();
    wish.source.keyring = Some(site.kit.path("no-keyring.gpg"));
    let error = quietly(&wish).await.unwrap_err();
    assert_eq!(error.code(), "bad_signature");
    assert!(chain(&error).contains("--keyring"), "{}", chain(&error));

    site.signer.sign(&list);
    quietly(&site.wish()).await.unwrap();
}

#[tokio::test]
async fn a_wrong_checksum_is_bad_checksum_and_what_was_fetched_is_thrown_away() {
    let site = Publisher::new("sha256sum");
    let image = site.kit.path("a.img");
    let mut bytes = fs::read(&image).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&image, &bytes).unwrap();
    let error = quietly(&site.wish()).await.unwrap_err();
    assert_eq!(error.code(), "bad_checksum", "{}", chain(&error));
    site.kit.assert_nothing_made();
    assert_eq!(fs::read_dir(site.kit.images().join(".fetch")).unwrap().count(), 0);

    // A list that does not have it proves nothing.
    let list = site.kit.path("SUMS");
    fs::write(&list, format!("{} *b.img\n", sum("sha256sum", &image))).unwrap();
    site.signer.sign(&list);
    let error = quietly(&site.wish()).await.unwrap_err();
    assert_eq!(error.code(), "bad_checksum", "{}", chain(&error));

    // The owner's own word.
    let mut wish = site.kit.plain(from(&site.server.url("/a.img")));
    let error = quietly(&wish).await.unwrap_err();
    assert!(chain(&error).contains("--sha256"), "{}", chain(&error));
    wish.source.digest = Some("ab".repeat(64).parse().unwrap());
    assert_eq!(quietly(&wish).await.unwrap_err().code(), "bad_checksum");
    wish.source.digest = Some(sum("sha512sum", &image).parse().unwrap());
    quietly(&wish).await.unwrap();
}

#[tokio::test]
async fn a_download_that_breaks_off_goes_on_where_it_was() {
    let site = Publisher::new("sha256sum");
    let total = fs::metadata(site.kit.path("a.img")).unwrap().len();
    let third = total / 3;
    site.server.files.lock().unwrap().breaks.insert("/a.img".into(), [third].into());
    quietly(&site.wish()).await.unwrap_or_else(|e| panic!("{}", chain(&e)));
    assert!(site.server.asked().contains(&format!("/a.img {third}")), "{:?}", site.server.asked());
}

#[tokio::test]
async fn a_server_that_never_gets_to_the_end_is_download_truncated() {
    let site = Publisher::new("sha256sum");
    let breaks = |numbers: &[u64]| {
        let numbers = numbers.iter().copied().collect();
        site.server.files.lock().unwrap().breaks.insert("/a.img".into(), numbers);
    };
    breaks(&[0; 10]);
    let error = quietly(&site.wish()).await.unwrap_err();
    // Not one byte ever: nobody is there who serves it.
    assert_eq!(error.code(), "mirror_down", "{}", chain(&error));
    breaks(&[5000, 0, 0, 0, 0]);
    let error = quietly(&site.wish()).await.unwrap_err();
    assert_eq!(error.code(), "download_truncated", "{}", chain(&error));
    assert!(chain(&error).contains("after 5000 of"), "{}", chain(&error));
    site.kit.assert_nothing_made();
}

#[tokio::test]
async fn a_server_that_is_gone_midway_is_mirror_down_and_the_next_run_resumes() {
    let Publisher { kit, server, signer: _signer, wish } = Publisher::new("sha256sum");
    let total = fs::metadata(kit.path("a.img")).unwrap().len();
    // The list comes from here, so that only the image's server is gone.
    let wish = SourceWish {
        checksums: Some(Location::File(kit.path("SUMS"))),
        signature: Some(Location::File(kit.path("SUMS.gpg"))),
        ..wish
    };
    let wish = kit.plain(wish);
    let address = server.address;
    {
        let mut files = server.files.lock().unwrap();
        files.breaks.insert("/a.img".into(), [total / 2].into());
        files.dies = true;
    }
    let error = quietly(&wish).await.unwrap_err();
    drop(server);
    assert_eq!(error.code(), "mirror_down", "{}", chain(&error));
    kit.assert_nothing_made();

    let mut files = Files::default();
    files.files.insert("/a.img".into(), kit.path("a.img"));
    let server = Server::start(address, files);
    quietly(&wish).await.unwrap_or_else(|e| panic!("{}", chain(&e)));
    assert_eq!(server.asked(), [format!("/a.img {}", total / 2)]);
}

#[tokio::test]
async fn the_beginning_of_an_older_image_is_fetched_anew() {
    let site = Publisher::new("sha256sum");
    let total = fs::metadata(site.kit.path("a.img")).unwrap().len();
    site.server.files.lock().unwrap().files.remove("/a.img");
    assert_eq!(quietly(&site.wish()).await.unwrap_err().code(), "mirror_down");
    let fetched = site.kit.images().join(".fetch");
    // What an earlier run left, of another image under the same name.
    {
        let mut files = site.server.files.lock().unwrap();
        files.files.insert("/a.img".into(), site.kit.path("a.img"));
        files.breaks.insert("/a.img".into(), [5000, 0, 0, 0].into());
    }
    assert_eq!(quietly(&site.wish()).await.unwrap_err().code(), "download_truncated");
    let name = fs::read_dir(&fetched).unwrap().next().unwrap().unwrap().path();
    assert_eq!(fs::metadata(&name).unwrap().len(), 5000);
    for length in [5000, total, total + 5] {
        fs::write(&name, vec![7; usize::try_from(length).unwrap()]).unwrap();
        quietly(&site.wish()).await.unwrap_or_else(|e| panic!("{length}: {}", chain(&e)));
    }
}

#[tokio::test]
async fn what_is_larger_than_it_may_be_is_not_kept() {
    let site = Publisher::new("sha256sum");
    let list = site.kit.path("SUMS");
    let mut text = fs::read_to_string(&list).unwrap();
    text.push_str(&"#\n".repeat(5 << 20));
    fs::write(&list, text).unwrap();
    let error = quietly(&site.wish()).await.unwrap_err();
    assert_eq!(error.code(), "image_failed");
    assert!(chain(&error).contains("/SUMS has more than"), "{}", chain(&error));
    site.kit.assert_nothing_made();
}

#[tokio::test]
async fn images_that_depend_on_other_files_or_are_none_are_refused() {
    let kit = Kit::new();
    let base = kit.image("base.img", 1);
    let overlay = kit.path("overlay.qcow2");
    run(Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"])
        .arg(&base)
        .arg(&overlay));
    let outside = kit.path("outside.qcow2");
    let option = format!("data_file={},data_file_raw=on", kit.path("data.raw").display());
    run(Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-o", &option])
        .arg(&outside)
        .arg("1M"));
    let packed = kit.path("packed.img");
    fs::write(&packed, b"\xfd7zXZ\0 and so on").unwrap();
    for (path, word) in [(overlay, "backing file"), (outside, "external data file"), (packed, "xz")] {
        let error = quietly(&kit.plain(file(&path))).await.unwrap_err();
        assert_eq!(error.code(), "image_failed");
        assert!(chain(&error).contains(word), "{}", chain(&error));
        kit.assert_nothing_made();
    }
    let error = quietly(&kit.plain(file(&kit.path("none.img")))).await.unwrap_err();
    assert!(chain(&error).contains("none.img"), "{}", chain(&error));
}

#[tokio::test]
async fn sizes_are_whole_and_never_less_than_the_source() {
    let kit = Kit::new();
    let image = kit.path("two.qcow2");
    run(Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&image).arg("2G"));
    let mut wish = kit.plain(file(&image));
    wish.size = Some(1);
    let error = quietly(&wish).await.unwrap_err();
    assert!(error.to_string().contains("2 GiB"), "{error}");
    wish.size = Some(5);
    assert_eq!(quietly(&wish).await.unwrap().virtual_size, 5 << 30);
}

#[tokio::test]
async fn boot_files_beside_the_source_go_with_it() {
    let kit = Kit::new();
    let image = kit.image("a.qcow2", 1);
    fs::write(kit.path("a.vmlinuz"), "kernel").unwrap();
    fs::write(kit.path("a.initrd"), "disk").unwrap();
    fs::write(kit.path("a.cmdline"), "root=/dev/vda1 ro\n").unwrap();
    let made = quietly(&kit.plain(file(&image))).await.unwrap();
    let disk = kit.store().disk(&made.id);
    let found = qudata_qemu::firmware::find_boot_files(&disk).unwrap();
    let qudata_qemu::firmware::Firmware::Direct { kernel, cmdline, .. } = found else { panic!("direct") };
    assert_eq!((fs::read(kernel).unwrap(), cmdline.as_str()), (b"kernel".to_vec(), "root=/dev/vda1 ro"));
}

#[tokio::test]
async fn two_builders_do_not_meet() {
    let site = Publisher::new("sha256sum");
    let wish = site.wish();
    let (first, second) = tokio::join!(quietly(&wish), quietly(&wish));
    let (good, bad) = if first.is_ok() { (first, second) } else { (second, first) };
    good.unwrap();
    assert_eq!(bad.unwrap_err().code(), "busy");
}

#[tokio::test]
async fn a_full_disk_is_disk_too_small_wherever_it_fills() {
    if !rustix::process::geteuid().is_root() {
        panic!("this story mounts a small file system: run it as root, as `cargo xtask test` does");
    }
    let site = Publisher::new("sha256sum");
    let images = site.kit.images();
    fs::create_dir(&images).unwrap();
    // Too small for the download; enough for it and not for the packed disk.
    for size in ["4m", "12m"] {
        run(Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={size},mode=711"), "tmpfs"])
            .arg(&images));
        let result = quietly(&site.wish()).await;
        let listing = site.kit.store().list();
        let fetched = fs::read_dir(images.join(".fetch")).unwrap().count();
        run(Command::new("umount").arg("--lazy").arg(&images));
        let error = result.unwrap_err();
        assert_eq!(error.code(), "disk_too_small", "{size}: {}", chain(&error));
        assert!(
            chain(&error).contains("are needed on the file system of"),
            "before it is full: {}",
            chain(&error)
        );
        assert!(listing.unwrap().images.is_empty());
        assert_eq!(fetched, usize::from(size == "12m"), "what is too large is not kept, what fits is");
    }
}
