//! Stories with a real guest, in emulation.

use std::{
    collections::BTreeSet,
    env, fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use qudata_host::causes::chain;
use qudata_image::{Customisation, DriverWish, Progress, SourceWish, Start};
use serde_json::json;

use crate::{
    kit::{Kit, Signer, file, from, run, sum, told, url},
    server::{Files, Server},
};

const BOOT: Duration = Duration::from_secs(600);
const UEFI_CODE: &str = "/usr/share/OVMF/OVMF_CODE_4M.fd";
const UEFI_VARS: &str = "/usr/share/OVMF/OVMF_VARS_4M.fd";
/// Small, and in no image: what is installed to show that packages are.
const PACKAGE: &str = "hello";

fn guest_image() -> PathBuf {
    let path = env::var_os("QUDATA_TEST_IMAGE").map(PathBuf::from);
    let path = path.unwrap_or_else(|| {
        panic!("QUDATA_TEST_IMAGE is not set: run `cargo xtask test`, which builds the guest image")
    });
    assert!(path.is_file(), "QUDATA_TEST_IMAGE names {}, which is no file", path.display());
    path
}

fn uefi() -> Start {
    Start::Uefi { code: UEFI_CODE.into(), vars: UEFI_VARS.into() }
}

#[tokio::test]
async fn slow_a_signed_cloud_image_becomes_a_base_image_without_identity() {
    let kit = Kit::new();
    let list = kit.path("SHA256SUMS");
    fs::write(&list, format!("{} *guest.img\n", sum("sha256sum", &guest_image()))).unwrap();
    let signer = Signer::new();
    let signature = signer.sign(&list);
    let mut files = Files::default();
    for (path, file) in [("/guest.img", guest_image()), ("/SHA256SUMS", list), ("/SHA256SUMS.gpg", signature)]
    {
        files.files.insert(path.to_owned(), file);
    }
    let server = Server::start(SocketAddr::from(([127, 0, 0, 1], 0)), files);
    let source = SourceWish {
        checksums: Some(url(&server.url("/SHA256SUMS"))),
        signature: Some(url(&server.url("/SHA256SUMS.gpg"))),
        keyring: Some(signer.keyring(&kit.path("keyring.gpg"))),
        ..from(&server.url("/guest.img"))
    };
    let customisation = Customisation {
        driver: DriverWish::None,
        packages: vec![PACKAGE.to_owned()],
        ..Customisation::default()
    };
    let mut wish = kit.customised(source, customisation);
    wish.place.start = uefi();
    wish.size = Some(4);
    let begin = Instant::now();
    let (made, all) = told(&wish).await;
    let made = made.unwrap_or_else(|e| panic!("{}", chain(&e)));
    println!("built in {:?}", begin.elapsed());
    let steps: Vec<_> = all
        .iter()
        .filter_map(|progress| match progress {
            Progress::Step { name, number, of } => Some((name.as_str(), *number, *of)),
            _ => None,
        })
        .collect();
    assert_eq!(steps, [("packages", 1, 4), ("hold", 2, 4), ("clean", 3, 4), ("report", 4, 4)]);
    assert_eq!(made.virtual_size, 4 << 30);
    assert!(made.packages.iter().any(|(name, _)| name == PACKAGE), "{:?}", made.packages);
    assert!(
        made.kernel.is_some() && made.driver.is_none() && made.system.as_deref().unwrap().contains("Debian")
    );

    let disk = kit.store().disk(&made.id);
    assert_no_identity(&kit, &disk);
    let twins: Vec<_> = (1..=2).map(|number| first_boot(&kit, &disk, number)).collect();
    let different = |at: usize| twins.iter().map(|said| said[at].clone()).collect::<BTreeSet<_>>().len() == 2;
    for said in &twins {
        assert_eq!(said.len(), 5, "{said:?}");
        assert!(said[0].len() == 32 && said[1].contains("ssh-ed25519") && said[2].len() == 128, "{said:?}");
        assert!(said[3].contains("Hello, world!"), "{said:?}");
        assert!(said[4].split(' ').any(|package| package.starts_with("linux-image")), "held: {said:?}");
    }
    assert!(different(0) && different(1) && different(2), "{twins:?}");
    assert_eq!(kit.store().verify(&made.id).unwrap(), made, "instances change nothing of it");
}

#[tokio::test]
async fn slow_work_that_fails_inside_is_told_with_its_step_and_its_reason() {
    let kit = Kit::new();
    let customisation = Customisation {
        driver: DriverWish::None,
        packages: vec!["no-such-package-anywhere".to_owned()],
        ..Customisation::default()
    };
    let mut wish = kit.customised(file(&guest_image()), customisation);
    wish.place.start = Start::Direct;
    let (made, _) = told(&wish).await;
    let error = made.unwrap_err();
    assert_eq!(error.code(), "image_failed");
    let text = chain(&error);
    assert!(text.contains("the step packages failed") && text.contains("no-such-package-anywhere"), "{text}");
    assert!(text.contains(&kit.path("build.log").display().to_string()), "{text}");
    kit.assert_nothing_made();
}

/// The distribution's own driver, whose kernel modules are compiled inside: no GPU is needed for that.
#[tokio::test]
#[ignore = "compiles NVIDIA's kernel modules: minutes on hardware, hours in emulation"]
async fn slow_the_nvidia_driver_of_debian_is_installed() {
    let kit = Kit::new();
    let driver = DriverWish::Distro(None);
    let customisation = Customisation { driver, ..Customisation::default() };
    let mut wish = kit.customised(file(&guest_image()), customisation);
    wish.place.start = uefi();
    wish.size = Some(12);
    let begin = Instant::now();
    let (made, _) = told(&wish).await;
    let made = made.unwrap_or_else(|e| panic!("{}", chain(&e)));
    println!("built in {:?}", begin.elapsed());
    let driver = made.driver.clone().unwrap();
    let packaged = made.packages.iter().find(|(name, _)| name == "nvidia-driver").unwrap();
    println!("{driver:?} {packaged:?}");
    assert_eq!(kit.store().verify(&made.id).unwrap(), made);
}

/// Looks into the disk without booting it: what a first boot would make anew must not be there.
fn assert_no_identity(kit: &Kit, disk: &Path) {
    let raw = kit.path("looked-at.raw");
    run(Command::new("qemu-img").args(["convert", "-O", "raw"]).arg(disk).arg(&raw));
    let table = run(Command::new("sfdisk").arg("--json").arg(&raw));
    let table: serde_json::Value = serde_json::from_str(&table).unwrap();
    let parts = table["partitiontable"]["partitions"].as_array().unwrap();
    let root = parts.iter().max_by_key(|part| part["size"].as_u64()).unwrap();
    let place = format!("{}?offset={}", raw.display(), root["start"].as_u64().unwrap() * 512);
    let ask = |request: &str| run(Command::new("debugfs").args(["-R", request]).arg(&place));
    let names = |path: &str| -> Vec<String> {
        let listed = ask(&format!("ls -p {path}"));
        let name = |line: &str| line.split('/').nth(5).map(str::to_owned);
        listed.lines().filter_map(name).filter(|name| name != "." && name != "..").collect()
    };
    assert_eq!(ask("cat /etc/machine-id"), "");
    assert_eq!(ask("cat /etc/hostname"), "localhost\n");
    assert!(names("/etc/ssh").iter().any(|name| name == "sshd_config"), "{:?}", names("/etc/ssh"));
    assert!(names("/etc/ssh").iter().all(|name| !name.starts_with("ssh_host_")));
    assert_eq!(names("/var/lib/cloud"), [""; 0]);
    assert!(!names("/var/lib/systemd").contains(&"random-seed".to_owned()));
    assert!(!names("/etc/systemd/network").iter().any(|name| name.starts_with("10-cloud-init")));
    for empty in ["/var/lib/apt/lists", "/var/tmp", "/tmp"] {
        // Apt's own folder, and those that systemd makes at every boot.
        let usual = |name: &String| name == "partial" || name.ends_with("-unix");
        let left: Vec<_> = names(empty).into_iter().filter(|name| !usual(name)).collect();
        assert_eq!(left, [""; 0], "{empty}");
    }
    assert!(!names("/root").iter().any(|name| name.ends_with("_history") || name == ".ssh"));
    fs::remove_file(raw).unwrap();
}

/// Boots an overlay as an instance is booted for the first time; returns its machine id, its host key, a digest of its
/// random seed, what the package says, and what is held.
fn first_boot(kit: &Kit, base: &Path, number: u32) -> Vec<String> {
    let name = |what: &str| kit.path(&format!("{what}-{number}"));
    let (overlay, seed, vars, said) = (name("overlay"), name("seed"), name("vars"), name("said"));
    run(Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"])
        .arg(base)
        .arg(&overlay));
    let script = "set -eu\nexec >/dev/virtio-ports/test\ncat /etc/machine-id\ncat /etc/ssh/ssh_host_ed25519_key.pub\n\
                  sha512sum </var/lib/systemd/random-seed | cut -d' ' -f1\nhello\necho $(apt-mark showhold)\npoweroff\n";
    let user_data = json!({
        "runcmd": [["systemctl", "restart", "systemd-random-seed"], ["sh", "-c", script]],
        "users": [],
    });
    let image = qudata_host::iso::build(
        "CIDATA",
        &[
            ("meta-data", &json!({"instance-id": format!("twin-{number}")}).to_string()),
            ("user-data", &format!("#cloud-config\n{user_data}\n")),
        ],
    );
    fs::write(&seed, image.unwrap()).unwrap();
    fs::copy(UEFI_VARS, &vars).unwrap();
    let drive = |path: &Path, more: &str| format!("file={},{more}", path.display());
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args([
        "-machine",
        "q35,accel=tcg",
        "-cpu",
        "max",
        "-m",
        "768",
        "-smp",
        "2",
        "-nodefaults",
        "-display",
        "none",
    ]);
    qemu.arg("-drive").arg(format!("if=pflash,format=raw,readonly=on,file={UEFI_CODE}"));
    qemu.arg("-drive").arg(drive(&vars, "if=pflash,format=raw"));
    qemu.arg("-drive").arg(drive(&overlay, "if=virtio,format=qcow2"));
    qemu.arg("-drive").arg(drive(&seed, "if=virtio,format=raw,readonly=on"));
    qemu.args([
        "-device",
        "virtio-rng-pci",
        "-device",
        "virtio-serial-pci",
        "-device",
        "virtserialport,chardev=said,name=test",
    ]);
    qemu.arg("-chardev").arg(format!("file,id=said,path={}", said.display()));
    qemu.arg("-serial").arg(format!("file:{}", name("console").display()));
    let mut child = qemu.stdin(Stdio::null()).spawn().unwrap();
    let end = Instant::now() + BOOT;
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if Instant::now() > end {
            child.kill().unwrap();
            child.wait().unwrap();
            let console = fs::read(name("console")).unwrap_or_default();
            let tail = console.len().saturating_sub(3000);
            panic!("not done after {BOOT:?}: {}", String::from_utf8_lossy(&console[tail..]));
        }
        std::thread::sleep(Duration::from_millis(200));
    };
    assert!(status.success(), "{status}");
    fs::read_to_string(said).unwrap().lines().map(str::to_owned).collect()
}
