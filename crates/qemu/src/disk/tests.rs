use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use super::*;

const QEMU_IMG: &str = "qemu-img";

fn me() -> Owner {
    Owner { uid: rustix::process::getuid().as_raw(), gid: rustix::process::getgid().as_raw() }
}

fn base(dir: &Path, name: &str) -> PathBuf {
    let path = dir.join(name);
    let made = Command::new(QEMU_IMG).args(["create", "-q", "-f", "qcow2"]).arg(&path).arg("64M").status();
    assert!(made.unwrap().success());
    path
}

fn described(overlay: &Path) -> serde_json::Value {
    let out = Command::new(QEMU_IMG).args(["info", "--output=json", "-U"]).arg(overlay).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    serde_json::from_slice(&out.stdout).unwrap()
}

#[tokio::test]
async fn an_overlay_has_its_final_size_and_names_its_base() {
    let dir = tempfile::tempdir().unwrap();
    // Names that an option parser would trip over.
    let (base, overlay) = (base(dir.path(), "base, v=2 image.qcow2"), dir.path().join("vm,disk=1.qcow2"));
    let image = inspect_base(&base).unwrap();
    let plan = plan_overlay(&overlay, &base, image, ByteSize::from_gib(5), me()).unwrap();
    create_overlay(&plan, QEMU_IMG.as_ref()).await.unwrap();
    let described = described(&overlay);
    assert_eq!(described["virtual-size"], 5_u64 << 30);
    assert_eq!(described["cluster-size"], 128 << 10);
    assert_eq!(described["format-specific"]["data"]["extended-l2"], true);
    assert_eq!(described["backing-filename"], base.to_str().unwrap());
    assert_eq!(described["backing-filename-format"], "qcow2");
    assert_eq!(fs::metadata(&overlay).unwrap().permissions().mode() & 0o777, 0o600);
    assert!(remove_overlay(&overlay).unwrap());
    assert!(!remove_overlay(&overlay).unwrap(), "a second undo finds nothing to do");
}

#[tokio::test]
async fn a_raw_base_is_named_raw_whatever_it_contains() {
    let dir = tempfile::tempdir().unwrap();
    let (base, overlay) = (dir.path().join("base.img"), dir.path().join("disk.qcow2"));
    fs::write(&base, vec![0; 1 << 20]).unwrap();
    let plan =
        plan_overlay(&overlay, &base, inspect_base(&base).unwrap(), ByteSize::from_mib(1), me()).unwrap();
    create_overlay(&plan, QEMU_IMG.as_ref()).await.unwrap();
    assert_eq!(described(&overlay)["backing-filename-format"], "raw");
}

#[tokio::test]
async fn an_existing_disk_is_never_touched() {
    let dir = tempfile::tempdir().unwrap();
    let (base, overlay) = (base(dir.path(), "base.qcow2"), dir.path().join("disk.qcow2"));
    fs::write(&overlay, b"a renter's data").unwrap();
    let plan =
        plan_overlay(&overlay, &base, inspect_base(&base).unwrap(), ByteSize::from_gib(1), me()).unwrap();
    let refused = create_overlay(&plan, QEMU_IMG.as_ref()).await.unwrap_err();
    assert!(matches!(refused, CreateOverlayError::Exists { .. }), "{refused:?}");
    assert_eq!(fs::read(&overlay).unwrap(), b"a renter's data");
}

#[tokio::test]
async fn a_failed_creation_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (base, overlay) = (base(dir.path(), "base.qcow2"), dir.path().join("disk.qcow2"));
    let plan =
        plan_overlay(&overlay, &base, inspect_base(&base).unwrap(), ByteSize::from_gib(1), me()).unwrap();
    let failed = create_overlay(&plan, "/bin/false".as_ref()).await.unwrap_err();
    assert!(matches!(failed, CreateOverlayError::Image { .. }), "{failed:?}");
    assert!(!overlay.exists());
}

#[test]
fn a_disk_below_the_base_is_refused_with_both_sizes() {
    let image = BaseImage { format: BaseFormat::Raw, virtual_size: ByteSize::from_gib(10) };
    let refused =
        plan_overlay("/vm/disk".as_ref(), "/base".as_ref(), image, ByteSize::from_gib(9), me()).unwrap_err();
    assert!(refused.to_string().contains("9G") && refused.to_string().contains("10G"), "{refused}");
    for (overlay, base) in [("disk", "/base"), ("/disk", "nbd:host:1")] {
        let refused = plan_overlay(overlay.as_ref(), base.as_ref(), image, ByteSize::from_gib(10), me());
        assert!(matches!(refused, Err(PlanOverlayError::Relative { .. })));
    }
}
