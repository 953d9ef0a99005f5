//! A release made for one test, a web server that serves it well or badly, and the script run from a pipe in a mount
//! namespace whose /var/lib is the test's own. The program in the package writes down how it was started.
use std::{
    collections::BTreeMap,
    fs,
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use tempfile::TempDir;

/// What is released.
pub(crate) const PACKAGE: &str = "qudata-agent_1.2.3_amd64.deb";
/// More than any step takes, on a machine that others use too.
pub(crate) const SOON: Duration = Duration::from_secs(60);

/// Started in place of the agent: says how, waits if it is told to, and fails in its own way.
const STAND_IN: &str = r#"#!/bin/bash
out=@OUT@
tr '\0' '\n' </proc/$$/cmdline >"$out/argv"
tr '\0' '\n' </proc/$$/environ >"$out/env"
readlink /proc/$$/fd/0 >"$out/stdin"
umask >"$out/umask"
home=${BASH_SOURCE[0]%/root/usr/bin/qudata-agent}
stat --format='%a %u' "$home" >"$out/mode"
[ -s "$home/qudata-agent_1.2.3_amd64.deb" ] && echo "$home" >"$out/home"
for file in /proc/[0-9]*/cmdline; do
    words=$(tr '\0' ' ' <"$file" 2>/dev/null)
    [[ -z $QUDATA_API_KEY || $words != *"$QUDATA_API_KEY"* ]] || echo "$file: $words" >>"$out/seen"
done
touch "$out/ran"
while [ -e "$out/wait" ]; do sleep 0.05; done
# A server that goes down ends everything in the session, what is started meanwhile too.
if [ -e "$out/storm" ]; then
    trap '' TERM HUP
    setsid bash -c 'for i in {1..500}; do kill -TERM -- "-$0"; kill -HUP -- "-$0"; sleep 0.001; done' \
        "$(ps -o pgid= $$ | tr -d ' ')" >/dev/null 2>&1 &
    sleep 0.3
fi
exit 7
"#;

/// One test's world.
#[derive(Debug)]
pub(crate) struct Site {
    home: TempDir,
}

/// How a run of the script ended.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) code: Option<i32>,
    pub(crate) said: String,
}

impl Ended {
    /// It failed with this code, said what to do next, and ran nothing.
    #[track_caller]
    pub(crate) fn refused(&self, site: &Site, code: &str) {
        assert_eq!(self.code, Some(1), "{self:?}");
        let last = self.said.lines().last().unwrap_or_default();
        assert!(last.starts_with(&format!("install.sh: [{code}] ")) && last.contains(" Next: "), "{self:?}");
        site.untouched();
    }

    /// It ran the program, which always exits with 7.
    #[track_caller]
    pub(crate) fn handed_over(&self, site: &Site) {
        assert_eq!(self.code, Some(7), "{self:?}");
        assert!(site.out("ran").exists(), "{self:?}");
        site.swept();
    }
}

impl Site {
    /// A good release.
    pub(crate) fn new() -> Self {
        assert!(
            rustix::process::geteuid().is_root(),
            "install.sh needs root: run this by `cargo xtask test`"
        );
        let site = Self { home: tempfile::tempdir().unwrap() };
        for folder in ["release", "out", "lib", "tree/DEBIAN", "tree/usr/bin"] {
            fs::create_dir_all(site.home.path().join(folder)).unwrap();
        }
        let tree = site.home.path().join("tree");
        let program = tree.join("usr/bin/qudata-agent");
        fs::write(&program, STAND_IN.replace("@OUT@", &site.home.path().join("out").display().to_string()))
            .unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        let control = "Package: qudata-agent\nVersion: 1.2.3\nArchitecture: amd64\nMaintainer: Test <t@example.org>\nDescription: test\n";
        fs::write(tree.join("DEBIAN/control"), control).unwrap();
        tool(Command::new("dpkg-deb").arg("--build").arg(&tree).arg(site.release(PACKAGE)));
        tool(Command::new("openssl").args(["genpkey", "-algorithm", "ed25519", "-out"]).arg(site.key()));
        site.sum();
        site.sign(&site.key());
        site
    }

    pub(crate) fn release(&self, name: &str) -> PathBuf {
        self.home.path().join("release").join(name)
    }

    pub(crate) fn out(&self, name: &str) -> PathBuf {
        self.home.path().join("out").join(name)
    }

    /// What /var/lib is for the script.
    pub(crate) fn lib(&self) -> PathBuf {
        self.home.path().join("lib")
    }

    pub(crate) fn key(&self) -> PathBuf {
        self.home.path().join("key.pem")
    }

    /// What the program wrote down.
    #[track_caller]
    pub(crate) fn noted(&self, name: &str) -> String {
        fs::read_to_string(self.out(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    /// Lists the package in SHA256SUMS as it is now.
    pub(crate) fn sum(&self) {
        let sums = tool(Command::new("sha256sum").arg(PACKAGE).current_dir(self.release(".")));
        fs::write(self.release("SHA256SUMS"), sums).unwrap();
    }

    /// Signs SHA256SUMS as it is now.
    pub(crate) fn sign(&self, key: &Path) {
        let mut openssl = Command::new("openssl");
        openssl.args(["pkeyutl", "-sign", "-rawin", "-inkey"]).arg(key);
        tool(
            openssl
                .arg("-in")
                .arg(self.release("SHA256SUMS"))
                .arg("-out")
                .arg(self.release("SHA256SUMS.sig")),
        );
    }

    /// The script of this release, as `cargo xtask dist` fills it in.
    pub(crate) fn script(&self, url: &str) -> String {
        let template = Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging/install.sh");
        let public = tool(Command::new("openssl").args(["pkey", "-pubout", "-in"]).arg(self.key()));
        let script = fs::read_to_string(template).unwrap();
        assert!(script.contains("'@PUBLIC_KEY@'") && script.contains("'@RELEASE_URL@'"));
        script.replace("@PUBLIC_KEY@", public.trim()).replace("@RELEASE_URL@", url)
    }

    /// bash with `words`, in the test's namespace; `before` is done there first.
    pub(crate) fn bash(&self, before: &str, words: &[&str]) -> Command {
        let mut command = Command::new("unshare");
        command.args([
            "--mount",
            "bash",
            "-ec",
            &format!("mount --bind \"$0\" /var/lib; {before}\nexec \"$@\""),
        ]);
        command.arg(self.lib()).arg("bash").args(words);
        command.env_remove("QUDATA_API_KEY").env_remove("QUDATA_RELEASE_URL");
        command
    }

    /// `curl … | sudo bash -s -- words`.
    pub(crate) fn pipe(&self, url: &str, words: &[&str]) -> Ended {
        let words: Vec<&str> = ["-s", "--"].iter().chain(words).copied().collect();
        run(self.bash("", &words), self.script(url).as_bytes())
    }

    /// Nothing of the release was run and nothing is left.
    #[track_caller]
    pub(crate) fn untouched(&self) {
        assert!(!self.out("ran").exists(), "the program was started");
        self.swept();
    }

    /// Nothing is left in /var/lib.
    #[track_caller]
    pub(crate) fn swept(&self) {
        let left: Vec<_> =
            fs::read_dir(self.lib()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert!(left.is_empty(), "{left:?}");
    }

    /// Serves the release, with other answers for some paths; all requests are noted.
    pub(crate) fn serve(&self, odd: &[(&str, Vec<u8>)]) -> Server {
        let odd: BTreeMap<String, Vec<u8>> = odd.iter().map(|(n, a)| ((*n).to_owned(), a.clone())).collect();
        let folder = self.release("");
        Server::start(move |name| {
            odd.get(name).cloned().unwrap_or_else(|| match fs::read(folder.join(name)) {
                Ok(body) => answer("200 OK", &format!("Content-Length: {}\r\n", body.len()), &body),
                Err(_) => answer("404 Not Found", "Content-Length: 0\r\n", b""),
            })
        })
    }
}

/// An answer, to the byte.
pub(crate) fn answer(status: &str, headers: &str, body: &[u8]) -> Vec<u8> {
    [format!("HTTP/1.1 {status}\r\nConnection: close\r\n{headers}\r\n").as_bytes(), body].concat()
}

/// A web server on a loopback address, until the test process ends.
#[derive(Debug)]
pub(crate) struct Server {
    pub(crate) url: String,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Server {
    fn start(reply: impl Fn(&str) -> Vec<u8> + Send + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let asked = Arc::new(Mutex::new(Vec::new()));
        let notes = Arc::clone(&asked);
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if let Some(name) = asked_for(&stream) {
                    notes.lock().unwrap().push(name.clone());
                    // A client that hangs up has seen enough.
                    drop((&stream).write_all(&reply(&name)));
                }
            }
        });
        Self { url, asked }
    }

    /// Paths that were asked for, without the slash.
    pub(crate) fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().clone()
    }
}

/// Reads a request's head.
fn asked_for(mut stream: &TcpStream) -> Option<String> {
    stream.set_read_timeout(Some(SOON)).ok()?;
    let (mut head, mut byte) = (Vec::new(), [0]);
    while !head.ends_with(b"\r\n\r\n") {
        stream.read_exact(&mut byte).ok()?;
        head.push(byte[0]);
    }
    let path = String::from_utf8_lossy(&head).split(' ').nth(1)?.to_owned();
    Some(path.trim_start_matches('/').to_owned())
}

/// Runs to the end with `input` on standard input, which comes in pieces as it does from a network.
pub(crate) fn run(mut command: Command, input: &[u8]) -> Ended {
    let child = start(&mut command, input);
    end(child)
}

/// Starts it and gives it its input.
pub(crate) fn start(command: &mut Command, input: &[u8]) -> Child {
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    for piece in input.chunks(1000) {
        // Who has the whole script, or refuses it, may close its input.
        if stdin.write_all(piece).is_err() {
            break;
        }
    }
    child
}

/// Waits for it.
#[track_caller]
pub(crate) fn end(mut child: Child) -> Ended {
    let until = Instant::now() + SOON;
    while child.try_wait().unwrap().is_none() {
        if Instant::now() > until {
            child.kill().unwrap();
            panic!("the script does not end: {:?}", child.wait_with_output());
        }
        thread::sleep(Duration::from_millis(10));
    }
    let output = child.wait_with_output().unwrap();
    Ended { code: output.status.code(), said: String::from_utf8_lossy(&output.stderr).into_owned() }
}

/// A program that must succeed; what it printed.
#[track_caller]
pub(crate) fn tool(command: &mut Command) -> String {
    let output = command.stdin(Stdio::null()).output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}
