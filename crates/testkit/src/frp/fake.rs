//! The fake frpc under a path of its own, and what shall go wrong with it. Called by tests without the real frp,
//! and by those that need a frpc that fails; the program is `src/bin/qudata-fake-frpc`.
#![allow(clippy::panic, reason = "dev only: a test that cannot go on stops here, with a sentence")]

use std::{
    env,
    ffi::OsString,
    fs::{self, Permissions},
    io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use serde_json::{Value, json};
use tempfile::TempDir;

/// Names the built program, for tests of other packages than this one.
const VARIABLE: &str = "QUDATA_TEST_FAKE_FRPC";
/// Open to the user that frpc runs as.
const PARENT: &str = "/var/tmp";

/// A fake frpc that can be ordered to fail.
#[derive(Debug)]
pub struct FakeFrpc {
    program: PathBuf,
    _dir: TempDir,
}

impl FakeFrpc {
    /// Port for HTTP by virtual host, at the address of the server.
    pub const VHOST_HTTP_PORT: u16 = 8080;

    /// A copy of the program that `cargo xtask test` has built, which every user can start.
    pub fn make() -> Self {
        let built = env::var_os(VARIABLE).unwrap_or_else(|| {
            panic!("{VARIABLE} is not set: run the product tests by `cargo xtask test`, which sets it")
        });
        Self::of(Path::new(&built))
    }

    /// The same of the program `built`.
    pub fn of(built: &Path) -> Self {
        let make = || -> io::Result<Self> {
            let dir = tempfile::Builder::new().prefix("qudata-fake-frpc-").tempdir_in(PARENT)?;
            fs::set_permissions(&dir, Permissions::from_mode(0o755))?;
            let program = dir.path().join("frpc");
            fs::hard_link(built, &program).or_else(|_| fs::copy(built, &program).map(drop))?;
            Ok(Self { program, _dir: dir })
        };
        make().unwrap_or_else(|e| panic!("cannot put a copy of {} into {PARENT}: {e}", built.display()))
    }

    /// What to start in place of frpc.
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// From now on these things go wrong and no others: an object with the fields of `Faults` in the program. Unknown
    /// fields end the program.
    pub fn order(&self, faults: &Value) {
        let name = |end: &str| {
            let mut name = OsString::from(&self.program);
            name.push(end);
            PathBuf::from(name)
        };
        // Never half of it: the program reads the file all the time.
        let write = fs::write(name(".json.new"), faults.to_string())
            .and_then(|()| fs::rename(name(".json.new"), name(".json")));
        write.unwrap_or_else(|e| panic!("cannot order faults of {}: {e}", self.program.display()));
    }

    /// From now on nothing goes wrong.
    pub fn recover(&self) {
        self.order(&json!({}));
    }
}
