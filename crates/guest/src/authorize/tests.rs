//! Key changes against a real shell and a real file.

use super::*;
use crate::session::fake_guest::{Conduct, FakeGuest};
use std::os::unix::fs::PermissionsExt;

const RENTER: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAILM+rvN+ot98qgEN796jTiQfZfG1KaT0PtFDJ/XFSqti";

struct Guest {
    dir: tempfile::TempDir,
    fake: FakeGuest,
    session: Session,
}

impl Guest {
    async fn start() -> Guest {
        let dir = tempfile::tempdir().unwrap();
        let fake = FakeGuest::start(Conduct::Shell(dir.path().join("ssh"))).await;
        let session = Session::connect(fake.spec()).await.unwrap();
        Guest { dir, fake, session }
    }

    fn file(&self) -> std::path::PathBuf {
        self.dir.path().join("ssh/authorized_keys")
    }

    fn write(&self, content: &str) {
        std::fs::create_dir_all(self.dir.path().join("ssh")).unwrap();
        std::fs::write(self.file(), content).unwrap();
    }

    fn content(&self) -> String {
        std::fs::read_to_string(self.file()).unwrap()
    }

    fn entries(&self) -> usize {
        std::fs::read_dir(self.dir.path().join("ssh")).unwrap().count()
    }
}

#[tokio::test]
async fn adding_and_removing_is_idempotent_and_keeps_the_rest() {
    let guest = Guest::start().await;
    let management = guest.fake.management_key.public();
    let before = format!("# by hand: $(touch /tmp/x) `id` '\"\\\n{management}\nfrom=\"a b\" garbage\n");
    guest.write(&before);
    std::fs::set_permissions(guest.file(), std::fs::Permissions::from_mode(0o640)).unwrap();
    let key = GuestKey::parse(&format!("{RENTER} $(reboot);`id`|&'\"")).unwrap();

    assert!(authorize(&guest.session, &key).await.unwrap());
    assert!(!authorize(&guest.session, &key).await.unwrap());
    assert_eq!(guest.content(), format!("{before}{RENTER} __reboot___id_____\n"));
    assert_eq!(std::fs::metadata(guest.file()).unwrap().permissions().mode() & 0o777, 0o640);

    assert!(revoke(&guest.session, management, &key).await.unwrap());
    assert!(!revoke(&guest.session, management, &key).await.unwrap());
    assert_eq!(guest.content(), before);
    assert_eq!(guest.entries(), 1, "a temporary file was left");
}

#[tokio::test]
async fn a_missing_file_is_made_private() {
    let guest = Guest::start().await;
    assert!(authorize(&guest.session, &GuestKey::parse(RENTER).unwrap()).await.unwrap());
    assert_eq!(guest.content(), format!("{RENTER}\n"));
    assert_eq!(std::fs::metadata(guest.file()).unwrap().permissions().mode() & 0o777, 0o600);
}

#[tokio::test]
async fn the_management_key_is_neither_removed_nor_doubled() {
    let guest = Guest::start().await;
    let management = guest.fake.management_key.public();
    guest.write(&format!("{management}\n"));
    let again = GuestKey::parse(&format!("{} renamed", management)).unwrap();
    assert!(matches!(revoke(&guest.session, management, &again).await, Err(AuthorizeError::ManagementKey)));
    assert!(!authorize(&guest.session, &again).await.unwrap());
    assert_eq!(guest.content(), format!("{management}\n"));
}

#[tokio::test]
async fn a_write_that_breaks_off_leaves_the_old_file() {
    let guest = Guest::start().await;
    guest.write("old\n");
    let output = guest.session.exec(WRITE, b"100\nonly the beginning", DEADLINE).await.unwrap();
    assert_ne!(output.status, 0);
    assert_eq!(guest.content(), "old\n");
    assert_eq!(guest.entries(), 1, "a temporary file was left");
}

#[tokio::test]
async fn a_failing_guest_is_quoted() {
    let guest = Guest::start().await;
    guest.write("");
    std::fs::remove_file(guest.file()).unwrap();
    std::fs::create_dir(guest.file()).unwrap();
    let error = authorize(&guest.session, &GuestKey::parse(RENTER).unwrap()).await.unwrap_err();
    assert!(error.to_string().contains("Is a directory"), "{error}");
}
