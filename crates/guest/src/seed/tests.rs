//! Goldens of the rendered files, and the image read back by a foreign tool.

use super::*;
use russh::keys::{
    PrivateKey,
    ssh_key::private::{Ed25519Keypair, KeypairData},
};
use serde_json::Value;
use std::process::Command;

const RENTER: &str =
    "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAILM+rvN+ot98qgEN796jTiQfZfG1KaT0PtFDJ/XFSqti renter";
const MANAGEMENT: &str =
    "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJdD7y3aLq454yWBdwLWbieU1ebz9/cu7/QEXn9OIeZJ qudata";

fn host_key() -> HostKey {
    let pair = KeypairData::from(Ed25519Keypair::from_seed(&[7; 32]));
    HostKey::from_private(&PrivateKey::new(pair, "").unwrap()).unwrap()
}

fn render(user_data: Option<&str>) -> Seed {
    let user_data = user_data.map(|text| UserData::parse(text).unwrap());
    let renter = GuestKey::parse(RENTER).unwrap();
    Seed::render(&SeedSpec {
        instance_id: "0190d2c4-1111-7000-8000-000000000001",
        hostname: "gpu-1",
        host_key: &host_key(),
        management_key: &GuestKey::parse(MANAGEMENT).unwrap(),
        // The same key twice, and the management key once more: each must arrive once.
        ssh_keys: &[
            renter,
            GuestKey::parse(&format!("{RENTER} again")).unwrap(),
            GuestKey::parse(MANAGEMENT).unwrap(),
        ],
        user_data: user_data.as_ref(),
        network: StaticNetwork::behind_backend([0x52, 0x54, 0x00, 0xAB, 0xCD, 0x01], 65520),
    })
}

/// A golden shows no private key, not even one that nobody uses.
fn without_private_key(text: &str) -> String {
    let escaped = serde_json::to_string(host_key().private_openssh()).unwrap();
    assert!(text.contains(&escaped));
    text.replace(&escaped, "\"[private key]\"")
}

#[test]
fn without_user_data() {
    let seed = render(None);
    insta::assert_snapshot!("meta-data", seed.meta_data);
    insta::assert_snapshot!("network-config", seed.network_config);
    insta::assert_snapshot!("vendor-data", seed.vendor_data);
    insta::assert_snapshot!("user-data", without_private_key(&seed.user_data));
    let body = seed.user_data.strip_prefix("#cloud-config\n").unwrap();
    let body: Value = serde_json::from_str(body).unwrap();
    assert_eq!(body["ssh_authorized_keys"], serde_json::json!([MANAGEMENT, RENTER]));
}

#[test]
fn with_a_cloud_config() {
    let seed = render(Some("#cloud-config\npackages: [htop]\n# h\u{e9}\n"));
    insta::assert_snapshot!("user-data-cloud-config", without_private_key(&seed.user_data));
}

#[test]
fn a_script_is_appended_and_nothing_follows_it() {
    let seed = render(Some("#!/bin/sh\necho hi\n"));
    assert!(seed.user_data.contains("text/x-shellscript"));
    assert!(!seed.user_data.contains("Merge-Type"));
}

#[test]
fn the_image_reads_back_and_is_private() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("seed.iso");
    let seed = render(Some("#!/bin/sh\necho hi\n"));
    seed.write_iso(&path).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);

    let out = dir.path().join("out");
    let extracted = Command::new("xorriso")
        .args(["-osirrox", "on", "-read_fs", "norock", "-indev"])
        .arg(&path)
        .args(["-extract", "/"])
        .arg(&out)
        .output()
        .expect("xorriso must be installed: it proves that the image is readable");
    assert!(extracted.status.success(), "{}", String::from_utf8_lossy(&extracted.stderr));
    let read = |name: &str| std::fs::read_to_string(out.join(name)).unwrap();
    assert_eq!(read("meta-data"), seed.meta_data);
    assert_eq!(read("network-config"), seed.network_config);
    assert_eq!(read("user-data"), seed.user_data);
    assert_eq!(read("vendor-data"), seed.vendor_data);
    assert_eq!(std::fs::read_dir(&out).unwrap().count(), 4);

    // What udev and cloud-init go by.
    let tags = Command::new("blkid").args(["-p", "-o", "export"]).arg(&path).output().unwrap();
    let tags = String::from_utf8(tags.stdout).unwrap();
    assert!(tags.contains("TYPE=iso9660") && tags.contains("LABEL=CIDATA"), "{tags}");
}
