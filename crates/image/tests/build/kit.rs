//! What the stories share: a folder for images, a key that signs, wishes.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
};

use qudata_host::size::ByteSize;
use qudata_image::{
    BuildError, BuildWish, Customisation, ImageRecord, Location, Place, Progress, Source, SourceWish, Start,
    Store, build,
};
use qudata_qemu::{disk::Owner, machine::Accel};

/// A user that nobody is: what root's builds run their machine as.
const NOBODY: u32 = 719_999;

pub(crate) struct Kit {
    // Not below /tmp's private folders: the machine's user must pass through it.
    pub(crate) dir: tempfile::TempDir,
}

impl Kit {
    pub(crate) fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("qudata-image-test-").tempdir_in("/var/tmp").unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o711)).unwrap();
        Self { dir }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn images(&self) -> PathBuf {
        self.path("images")
    }

    pub(crate) fn store(&self) -> Store {
        Store::open(&self.images()).unwrap()
    }

    /// An image that is one in every respect but that nothing boots from it.
    pub(crate) fn image(&self, name: &str, megabytes: usize) -> PathBuf {
        let (raw, path) = (self.path("content.raw"), self.path(name));
        let mut content = vec![0_u8; megabytes << 20];
        let mut state = 0x2545_f491_4f6c_dd1d_u64;
        for chunk in content.chunks_mut(8) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            chunk.copy_from_slice(&state.to_le_bytes()[..chunk.len()]);
        }
        fs::write(&raw, content).unwrap();
        run(Command::new("qemu-img").args(["convert", "-f", "raw", "-O", "qcow2"]).arg(&raw).arg(&path));
        path
    }

    pub(crate) fn place(&self) -> Place {
        let root = rustix::process::geteuid().is_root();
        Place {
            image_dir: self.images(),
            qemu: "/usr/bin/qemu-system-x86_64".into(),
            qemu_img: "/usr/bin/qemu-img".into(),
            start: Start::Bios,
            accel: Accel::Tcg,
            user: root.then_some(Owner { uid: NOBODY, gid: NOBODY }),
            log: self.path("build.log"),
            instances: self.path("instances"),
            reserve_memory: ByteSize::default(),
            reserve_disk: ByteSize::default(),
        }
    }

    /// Publishes the source as it is.
    pub(crate) fn plain(&self, source: SourceWish) -> BuildWish {
        BuildWish { source, customise: None, size: None, place: self.place() }
    }

    pub(crate) fn customised(&self, source: SourceWish, customisation: Customisation) -> BuildWish {
        BuildWish { customise: Some(customisation), ..self.plain(source) }
    }

    /// Asserts that nothing of a build that failed can be seen. A download may lie there.
    pub(crate) fn assert_nothing_made(&self) {
        let listing = self.store().list().unwrap();
        assert!(listing.images.is_empty() && listing.damaged.is_empty(), "{listing:?}");
        let names: Vec<_> = fs::read_dir(self.images())
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        assert!(names.iter().all(|name| [".lock", ".fetch"].contains(&name.as_str())), "{names:?}");
    }
}

pub(crate) async fn quietly(wish: &BuildWish) -> Result<ImageRecord, BuildError> {
    build(wish, &mut |_| ()).await
}

/// Builds, and returns what was told as well.
pub(crate) async fn told(wish: &BuildWish) -> (Result<ImageRecord, BuildError>, Vec<Progress>) {
    let mut all = Vec::new();
    let result = build(wish, &mut |progress| {
        println!("{}", progress.label());
        all.push(progress);
    })
    .await;
    (result, all)
}

pub(crate) fn url(text: &str) -> Location {
    text.parse().unwrap()
}

pub(crate) fn from(text: &str) -> SourceWish {
    SourceWish::from(text.parse::<Source>().unwrap())
}

pub(crate) fn file(path: &Path) -> SourceWish {
    SourceWish::from(Source::Place(Location::File(path.to_owned())))
}

pub(crate) fn run(command: &mut Command) -> String {
    let out = command.output().unwrap();
    assert!(out.status.success(), "{command:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

pub(crate) fn sum(tool: &str, path: &Path) -> String {
    run(Command::new(tool).arg(path)).split(' ').next().unwrap().to_owned()
}

/// A fresh key that signs lists.
pub(crate) struct Signer {
    home: tempfile::TempDir,
}

impl Signer {
    pub(crate) fn new() -> Self {
        let home = tempfile::tempdir().unwrap();
        let signer = Self { home };
        run(signer.gpg().args([
            "--passphrase",
            "",
            "--quick-generate-key",
            "images@example",
            "ed25519",
            "sign",
        ]));
        signer
    }

    fn gpg(&self) -> Command {
        let mut command = Command::new("gpg");
        command.args(["--batch", "--quiet", "--homedir"]).arg(self.home.path());
        command
    }

    pub(crate) fn keyring(&self, path: &Path) -> PathBuf {
        run(self.gpg().args(["--export", "--output"]).arg(path));
        path.to_owned()
    }

    pub(crate) fn sign(&self, list: &Path) -> PathBuf {
        let signature = list.with_extension("gpg");
        run(self.gpg().args(["--yes", "--detach-sign", "--output"]).arg(&signature).arg(list));
        signature
    }
}

impl Drop for Signer {
    fn drop(&mut self) {
        let ended =
            Command::new("gpgconf").arg("--homedir").arg(self.home.path()).args(["--kill", "all"]).status();
        assert!(ended.is_ok_and(|status| status.success()), "gpg's agent ends with the test");
    }
}
