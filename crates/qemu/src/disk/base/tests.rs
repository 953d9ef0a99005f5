use std::process::Command;

use proptest::prelude::*;

use super::*;

/// A version 3 header of a clean 10 GiB image.
fn header() -> Vec<u8> {
    let mut bytes = vec![0; 112];
    put(&mut bytes, 0, b"QFI\xfb");
    put(&mut bytes, 4, &3_u32.to_be_bytes());
    put(&mut bytes, 20, &16_u32.to_be_bytes());
    put(&mut bytes, 24, &(10_u64 << 30).to_be_bytes());
    put(&mut bytes, 96, &4_u32.to_be_bytes());
    put(&mut bytes, 100, &112_u32.to_be_bytes());
    bytes
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

#[test]
fn clean_images_are_accepted() {
    let ten = Ok(BaseImage { format: BaseFormat::Qcow2, virtual_size: ByteSize::from_gib(10) });
    assert_eq!(parse(&header(), 4096), ten);
    let mut old = header();
    put(&mut old, 4, &2_u32.to_be_bytes());
    old.truncate(HEADER_V2);
    assert_eq!(parse(&old, 4096), ten, "version 2 ends after 72 bytes");
    let mut zstd = header();
    put(&mut zstd, 72, &(COMPRESSION | EXTENDED_L2).to_be_bytes());
    zstd[104] = 1;
    assert_eq!(parse(&zstd, 4096), ten);
}

#[test]
fn every_reason_to_refuse() {
    let cases: [(usize, &[u8], Unfit); 13] = [
        (4, &[0, 0, 0, 1], Unfit::Version(1)),
        (4, &[0, 0, 0, 4], Unfit::Version(4)),
        (8, &[0, 0, 0, 0, 0, 0, 1, 0], Unfit::Dependent("a backing file")),
        (16, &[0, 0, 0, 9], Unfit::Dependent("a backing file")),
        (20, &[0, 0, 0, 8], Unfit::Damaged("cluster size")),
        (24, &[0; 8], Unfit::Empty),
        (24, &[0xff; 8], Unfit::Damaged("disk size")),
        (32, &[0, 0, 0, 2], Unfit::Encrypted),
        (79, &[1], Unfit::Unclean("dirty mark")),
        (79, &[2], Unfit::Unclean("corrupt mark")),
        (79, &[4], Unfit::Dependent("an external data file")),
        (79, &[8], Unfit::Damaged("compression type")),
        (79, &[0x20], Unfit::Features(0x20)),
    ];
    for (at, value, reason) in cases {
        let mut bytes = header();
        put(&mut bytes, at, value);
        assert_eq!(parse(&bytes, 4096), Err(reason), "byte {at} = {value:?}");
    }
}

#[test]
fn foreign_formats_are_named_and_never_taken_for_raw() {
    for (magic, name) in FOREIGN {
        let mut bytes = magic.to_vec();
        bytes.resize(112, 0);
        assert_eq!(parse(&bytes, 1 << 20), Err(Unfit::Foreign(name)));
    }
    assert_eq!(parse(b"", 0), Err(Unfit::Empty));
    let raw = BaseImage { format: BaseFormat::Raw, virtual_size: ByteSize::from_bytes(1024) };
    assert_eq!(parse(&[0; 112], 1000), Ok(raw));
}

#[test]
fn what_is_no_file_is_refused_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let fifo = dir.path().join("fifo");
    assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    for path in [dir.path(), &fifo, Path::new("/dev/null")] {
        let refused = inspect_base(path).unwrap_err();
        assert!(matches!(refused, InspectBaseError::Unfit { source: Unfit::NotAFile, .. }), "{path:?}");
    }
    let absent = inspect_base(&dir.path().join("no.qcow2")).unwrap_err();
    assert!(absent.to_string().contains("no.qcow2"), "{absent}");
}

/// Has qemu-img make an image of 3 GiB.
fn create(options: &str, path: &Path) {
    let made = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-o", options])
        .arg(path)
        .arg("3G")
        .status();
    assert!(made.unwrap().success(), "{options}");
}

#[test]
fn real_images_are_read_as_qemu_img_writes_them() {
    let dir = tempfile::tempdir().unwrap();
    let whole = BaseImage { format: BaseFormat::Qcow2, virtual_size: ByteSize::from_gib(3) };
    for options in ["compat=1.1", "compat=0.10", "extended_l2=on,cluster_size=128k", "compression_type=zstd"]
    {
        let path = dir.path().join("image");
        create(options, &path);
        assert_eq!(inspect_base(&path).unwrap(), whole, "{options}");
    }
    let dependent = [
        ("backing_file=image,backing_fmt=qcow2", "a backing file"),
        ("data_file=d", "an external data file"),
    ];
    for (options, reason) in dependent {
        let path = dir.path().join("dependent");
        let absolute = options.replace("_file=", &format!("_file={}/", dir.path().display()));
        create(&absolute, &path);
        let refused = inspect_base(&path).unwrap_err();
        assert!(
            matches!(refused, InspectBaseError::Unfit { source: Unfit::Dependent(why), .. } if why == reason),
            "{refused:?}"
        );
    }
}

proptest! {
    #[test]
    fn a_cut_header_is_refused(length in 4..HEADER_V2) {
        prop_assert_eq!(parse(&header()[..length], 4096), Err(Unfit::Truncated));
    }

    #[test]
    fn a_cut_version_3_header_is_refused(length in HEADER_V2..104_usize) {
        prop_assert_eq!(parse(&header()[..length], 4096), Err(Unfit::Truncated));
    }

    #[test]
    fn damaged_headers_never_panic_and_never_gain_a_dependency(
        changes in prop::collection::vec((4..112_usize, any::<u8>()), 1..8),
        cut in 0..=112_usize,
    ) {
        let mut bytes = header();
        for (at, value) in changes {
            bytes[at] = value;
        }
        if parse(&bytes[..cut], 4096).is_ok_and(|image| image.format == BaseFormat::Qcow2) {
            prop_assert_eq!(&bytes[8..20], &[0; 12][..], "a backing file slipped through");
            if bytes[7] == 3 {
                prop_assert_eq!(bytes[79] & !0x18, 0, "an unsafe feature slipped through");
            }
        }
    }

    #[test]
    fn any_bytes_are_decided(bytes in prop::collection::vec(any::<u8>(), 0..200), length: u32) {
        let _ = parse(&bytes, u64::from(length));
    }
}
