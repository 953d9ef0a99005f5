//! packaging/install.sh, the real one, driven as owners and attackers drive it: through a pipe, from a web server that may
//! lie, break off or be away, from files, and cut anywhere.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests: what is not as expected stops the story"
)]

mod site;

use std::{
    fs,
    os::unix::{
        fs::{PermissionsExt, symlink},
        process::CommandExt,
    },
    process::Command,
    thread,
    time::{Duration, Instant},
};

use site::{PACKAGE, SOON, Site, answer, end, run, start, tool};

const SUMS: &str = "SHA256SUMS";
const SIGNATURE: &str = "SHA256SUMS.sig";

/// Half of a file under the length of all of it, as a broken connection leaves it.
fn broken_off(site: &Site, name: &str) -> Vec<u8> {
    let body = fs::read(site.release(name)).unwrap();
    answer("200 OK", &format!("Content-Length: {}\r\n", body.len()), &body[..body.len() / 2])
}

#[test]
fn one_line_verifies_and_hands_over_and_the_key_is_in_no_command_line() {
    let site = Site::new();
    let server = site.serve(&[]);
    let ended = site.pipe(&server.url, &["ak-only-in-this-test", "--gpus", "all", "--set", "region=a b"]);
    ended.handed_over(&site);
    let home = site.noted("home");
    let home = home.trim();
    let argv = site.noted("argv");
    let words: Vec<&str> = argv.lines().skip_while(|word| *word != "install").collect();
    let package = format!("{home}/{PACKAGE}");
    assert_eq!(words, ["install", "--package", &package, "--gpus", "all", "--set", "region=a b"]);
    assert!(argv.contains(&format!("{home}/root/usr/bin/qudata-agent")), "{argv}");
    assert!(home.starts_with("/var/lib/qudata-install."), "{home}");
    assert_eq!(site.noted("mode").trim(), "700 0");
    assert_eq!(site.noted("umask").trim(), "0022", "what the program makes has the usual modes");
    assert_eq!(site.noted("stdin").trim(), "/dev/null");
    let env = site.noted("env");
    assert!(env.lines().any(|line| line == "QUDATA_API_KEY=ak-only-in-this-test"), "{env}");
    assert!(!site.out("seen").exists(), "the key was seen: {}", site.noted("seen"));
    assert_eq!(server.asked(), [SUMS, SIGNATURE, PACKAGE]);
}

#[test]
fn the_address_of_another_release_goes_no_further_than_the_script() {
    let site = Site::new();
    let server = site.serve(&[]);
    let mut bash = site.bash("", &["-s", "--", "--plan"]);
    bash.env("QUDATA_RELEASE_URL", format!("{}/", server.url))
        .env("QUDATA_API_KEY", "ak-from-the-environment");
    run(bash, site.script("https://nobody.invalid").as_bytes()).handed_over(&site);
    let env = site.noted("env");
    assert!(
        !env.contains("QUDATA_RELEASE_URL") && env.contains("QUDATA_API_KEY=ak-from-the-environment"),
        "{env}"
    );
    let folder = site.release("");
    fs::remove_file(site.out("ran")).unwrap();
    site.pipe(&format!("file://{}", folder.display()), &[]).handed_over(&site);
}

#[test]
fn without_curl_wget_does_it() {
    let site = Site::new();
    let server = site.serve(&[]);
    let (real, bin) = (site.out("real"), site.out("bin"));
    let before = format!(
        "mkdir {real} {bin}; mount --bind /usr/bin {real}; ln -s -t {bin} {real}/*; rm {bin}/curl; mount --bind {bin} /usr/bin",
        real = real.display(),
        bin = bin.display()
    );
    run(site.bash(&before, &["-s"]), site.script(&server.url).as_bytes()).handed_over(&site);
    let script = site.script("http://127.0.0.1:1");
    // Empty here: what was mounted on it was mounted for the script alone.
    fs::remove_dir(real).unwrap();
    fs::remove_dir_all(bin).unwrap();
    fs::remove_file(site.out("ran")).unwrap();
    run(site.bash(&before, &["-s"]), script.as_bytes()).refused(&site, "mirror_down");
}

#[test]
fn what_the_key_in_the_script_did_not_sign_is_not_run() {
    let site = Site::new();
    let other = site.release("other.pem");
    tool(Command::new("openssl").args(["genpkey", "-algorithm", "ed25519", "-out"]).arg(&other));
    site.sign(&other);
    let server = site.serve(&[]);
    site.pipe(&server.url, &[]).refused(&site, "bad_signature");
    assert!(!server.asked().contains(&PACKAGE.to_owned()), "nothing more is fetched");
    site.sign(&site.key());
    fs::write(site.release(SUMS), fs::read_to_string(site.release(SUMS)).unwrap() + "\n").unwrap();
    site.pipe(&server.url, &[]).refused(&site, "bad_signature");
    fs::write(site.release(SIGNATURE), "").unwrap();
    site.pipe(&server.url, &[]).refused(&site, "bad_signature");
}

#[test]
fn another_package_than_the_signed_one_is_not_run() {
    let site = Site::new();
    let server = site.serve(&[]);
    let mut bytes = fs::read(site.release(PACKAGE)).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(site.release(PACKAGE), bytes).unwrap();
    site.pipe(&server.url, &[]).refused(&site, "bad_checksum");
}

#[test]
fn a_list_that_names_no_package_or_two_is_refused() {
    let site = Site::new();
    let server = site.serve(&[]);
    let line = fs::read_to_string(site.release(SUMS)).unwrap();
    let path = line.replace(PACKAGE, &format!("../{PACKAGE}"));
    for sums in [line.replace("amd64", "arm64"), format!("{line}{}", line.replace("1.2.3", "1.2.4")), path] {
        fs::write(site.release(SUMS), &sums).unwrap();
        site.sign(&site.key());
        site.pipe(&server.url, &[]).refused(&site, "bad_release");
    }
}

#[test]
fn a_download_that_breaks_off_says_so() {
    let site = Site::new();
    for name in [SUMS, PACKAGE] {
        let server = site.serve(&[(name, broken_off(&site, name))]);
        site.pipe(&server.url, &[]).refused(&site, "download_truncated");
    }
    // Without a length nobody can see that it broke off, but for the checksum.
    let half = fs::read(site.release(PACKAGE)).unwrap();
    let server = site.serve(&[(PACKAGE, answer("200 OK", "", &half[..half.len() / 2]))]);
    site.pipe(&server.url, &[]).refused(&site, "bad_checksum");
}

#[test]
fn a_server_that_is_away_or_has_nothing_says_which() {
    let site = Site::new();
    site.pipe("http://127.0.0.1:1", &[]).refused(&site, "mirror_down");
    let server = site.serve(&[(SIGNATURE, answer("404 Not Found", "Content-Length: 0\r\n", b""))]);
    let ended = site.pipe(&server.url, &[]);
    ended.refused(&site, "download_failed");
    assert!(ended.said.contains("404") && ended.said.contains(&server.url), "{}", ended.said);
}

#[test]
fn nobody_can_lead_the_script_to_plain_http_or_fill_the_disk() {
    let site = Site::new();
    let away = site.serve(&[]);
    let header = format!("Location: {}/{SUMS}\r\nContent-Length: 0\r\n", away.url);
    let server = site.serve(&[(SUMS, answer("302 Found", &header, b""))]);
    site.pipe(&server.url, &[]).refused(&site, "download_failed");
    assert!(away.asked().is_empty());
    let server = site.serve(&[(SUMS, answer("200 OK", "Content-Length: 99999999999\r\n", b"x"))]);
    site.pipe(&server.url, &[]).refused(&site, "download_failed");
}

#[test]
fn an_address_that_proves_nothing_is_refused() {
    let site = Site::new();
    for url in
        ["http://example.org", "http://127.0.0.1.example.org", "http://127.0.0.1@example.org", "ftp://x", ""]
    {
        site.pipe(url, &[]).refused(&site, "bad_url");
    }
}

#[test]
fn half_a_script_does_nothing() {
    let site = Site::new();
    let server = site.serve(&[]);
    let script = site.script(&server.url);
    // The end is where half a line could be a command.
    let last = script.trim_end().len();
    let cuts = (0..last).filter(|cut| cut % 200 == 0 || *cut + 120 > last);
    for cut in cuts {
        run(site.bash("", &["-s", "--", "ak-key"]), &script.as_bytes()[..cut]);
        assert!(
            server.asked().is_empty() && !site.out("ran").exists(),
            "cut after {cut} bytes it did something"
        );
        site.swept();
    }
    site.pipe(&server.url, &[]).handed_over(&site);
}

#[test]
fn a_file_installs_offline() {
    let site = Site::new();
    let file = site.release(PACKAGE).display().to_string();
    let nowhere = "https://nobody.invalid";
    site.pipe(nowhere, &["--from", &file, "ak-key", "--plan"]).handed_over(&site);
    assert!(site.noted("argv").ends_with("\n--plan\n"), "{}", site.noted("argv"));
    fs::remove_file(site.out("ran")).unwrap();
    // Its neighbours are needed, or a word that they are not.
    fs::remove_file(site.release(SIGNATURE)).unwrap();
    site.pipe(nowhere, &[&format!("--from={file}")]).refused(&site, "download_failed");
    let ended = site.pipe(nowhere, &["--unsigned", "--from", &file]);
    ended.handed_over(&site);
    assert!(ended.said.contains("nobody has checked"), "{}", ended.said);
    assert!(!site.noted("argv").contains("--unsigned"), "{}", site.noted("argv"));
}

#[test]
fn a_file_that_is_not_the_released_one_is_not_run() {
    let site = Site::new();
    let renamed = site.release("qudata-agent_9.9.9_amd64.deb");
    fs::copy(site.release(PACKAGE), &renamed).unwrap();
    site.pipe("", &["--from", &renamed.display().to_string()]).refused(&site, "bad_checksum");
    let odd = site.release("x.deb").display().to_string();
    site.pipe("", &["--from", &odd]).refused(&site, "bad_option");
    fs::write(site.release(PACKAGE), "no package").unwrap();
    let file = site.release(PACKAGE).display().to_string();
    site.pipe("", &["--from", &file]).refused(&site, "bad_checksum");
    site.pipe("", &["--from", &file, "--unsigned"]).refused(&site, "bad_release");
}

#[test]
fn words_that_make_no_sense_are_refused() {
    let site = Site::new();
    site.pipe("", &["--from"]).refused(&site, "bad_option");
    site.pipe("", &["--unsigned"]).refused(&site, "bad_option");
}

#[test]
fn nobody_but_root_gets_anywhere() {
    let site = Site::new();
    let mut command = Command::new("setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups", "bash", "-s"]);
    run(command, site.script("https://nobody.invalid").as_bytes()).refused(&site, "not_root");
}

#[test]
fn a_link_in_its_way_leads_it_nowhere_and_no_umask_opens_its_folder() {
    let site = Site::new();
    let victim = tempfile::tempdir().unwrap();
    fs::write(victim.path().join("precious"), "1").unwrap();
    symlink(victim.path(), site.lib().join("qudata-install.AAAAAAAAAA")).unwrap();
    fs::create_dir(site.lib().join("qudata-install.BBBBBBBBBB")).unwrap();
    let server = site.serve(&[]);
    run(site.bash("umask 000", &["-s"]), site.script(&server.url).as_bytes()).handed_over(&site);
    assert_eq!(site.noted("mode").trim(), "700 0");
    assert!(victim.path().join("precious").exists(), "what a link led to was removed");
}

#[test]
fn two_at_once_are_one_too_many_and_no_signal_takes_the_folder_from_under_the_program() {
    let site = Site::new();
    let server = site.serve(&[]);
    fs::write(site.out("wait"), "").unwrap();
    let first = start(&mut site.bash("", &["-s"]), site.script(&server.url).as_bytes());
    let until = Instant::now() + SOON;
    while !site.out("ran").exists() {
        assert!(Instant::now() < until, "the program was not started");
        thread::sleep(Duration::from_millis(10));
    }
    let home = fs::read_dir(site.lib()).unwrap().next().unwrap().unwrap().path();
    assert_eq!(fs::metadata(&home).unwrap().permissions().mode() & 0o777, 0o700);
    let second = site.pipe(&server.url, &[]);
    assert!(second.code == Some(1) && second.said.contains("install.sh: [busy] "), "{second:?}");
    let pid = first.id().to_string();
    tool(Command::new("kill").args(["-TERM", &pid]));
    thread::sleep(Duration::from_millis(300));
    assert!(home.join(PACKAGE).exists(), "a signal to the one that waits took the package away");
    fs::remove_file(site.out("wait")).unwrap();
    end(first).handed_over(&site);
}

#[test]
fn a_server_that_goes_down_under_it_finds_nothing_of_it_when_it_comes_up() {
    let site = Site::new();
    let server = site.serve(&[]);
    fs::write(site.out("storm"), "").unwrap();
    for _ in 0..5 {
        let mut command = site.bash("", &["-s"]);
        let child = start(command.process_group(0), site.script(&server.url).as_bytes());
        end(child).handed_over(&site);
    }
}

#[test]
fn a_server_that_goes_down_while_it_downloads_finds_nothing_either() {
    let site = Site::new();
    let server = site.serve(&[]);
    let before = r#"dpkg-deb() (
    trap '' TERM HUP
    setsid bash -c 'for i in {1..500}; do kill -TERM -- "-$0"; kill -HUP -- "-$0"; sleep 0.001; done' \
        "$(ps -o pgid= $$ | tr -d ' ')" >/dev/null 2>&1 &
    sleep 0.3
    exit 1
)
export -f dpkg-deb"#;
    let mut command = site.bash(before, &["-s"]);
    let ended = end(start(command.process_group(0), site.script(&server.url).as_bytes()));
    assert_ne!(ended.code, Some(0), "{ended:?}");
    site.untouched();
}
