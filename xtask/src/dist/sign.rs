//! Checksums, their signature, and the install script that trusts nothing else. Called by the parent module.
use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};

use super::{INSTALLER, SIGNATURE, SUMS};
use crate::cargo;
use crate::tool::{self, say};

/// How the public half of every Ed25519 key begins in PEM (RFC 8410).
const ED25519: &str = "-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEA";

/// Puts install.sh, the sums and their signature beside the package.
pub(super) fn seal(dir: &Path, package: &str, key: Option<&Path>, url: Option<&str>) -> Result<()> {
    let temporary = dir.join("development-key.pem");
    let key = match key {
        Some(key) => key,
        None => {
            make(&temporary)?;
            say("WARNING: signed by a key that was made for this release alone and is gone now.");
            say(
                "         It proves nothing to anybody; a real release needs --signing-key (docs/release.md).",
            );
            &temporary
        }
    };
    let sealed = seal_with(dir, package, key, url);
    if temporary.exists() {
        fs::remove_file(&temporary).context("cannot remove the development key")?;
    }
    sealed
}

fn seal_with(dir: &Path, package: &str, key: &Path, url: Option<&str>) -> Result<()> {
    let public = public_half(key)?;
    let template = fs::read_to_string(cargo::root().join("packaging").join(INSTALLER))
        .context("cannot read packaging/install.sh")?;
    let script = render(&template, &public, url.unwrap_or_default())?;
    fs::write(dir.join(INSTALLER), script).context("cannot write install.sh")?;
    let mut sums = String::new();
    for name in [package, INSTALLER] {
        let bytes = fs::read(dir.join(name)).with_context(|| format!("cannot read {name}"))?;
        for byte in Sha256::digest(&bytes) {
            write!(sums, "{byte:02x}")?;
        }
        writeln!(sums, "  {name}")?;
    }
    fs::write(dir.join(SUMS), sums).context("cannot write SHA256SUMS")?;
    sign(key, &dir.join(SUMS), &dir.join(SIGNATURE))
}

/// A new private key.
fn make(file: &Path) -> Result<()> {
    tool::run(Command::new("openssl").args(["genpkey", "-algorithm", "ed25519", "-out"]).arg(file))
        .context("no key can be made")
}

/// The public half of a private key, in PEM.
fn public_half(key: &Path) -> Result<String> {
    let public = tool::output(Command::new("openssl").args(["pkey", "-pubout", "-in"]).arg(key))
        .with_context(|| format!("{} is no private key", key.display()))?;
    if !public.starts_with(ED25519) {
        bail!("{} is no Ed25519 key; make one with `openssl genpkey -algorithm ed25519`", key.display());
    }
    Ok(public.trim().to_owned())
}

fn sign(key: &Path, file: &Path, signature: &Path) -> Result<()> {
    let mut openssl = Command::new("openssl");
    openssl
        .args(["pkeyutl", "-sign", "-rawin", "-inkey"])
        .arg(key)
        .arg("-in")
        .arg(file)
        .arg("-out")
        .arg(signature);
    tool::run(&mut openssl).with_context(|| format!("{} cannot be signed", file.display()))
}

/// The script of one release.
fn render(template: &str, public: &str, url: &str) -> Result<String> {
    let mut script = template.to_owned();
    for (place, value) in [("'@PUBLIC_KEY@'", public), ("'@RELEASE_URL@'", url)] {
        if script.matches(place).count() != 1 {
            bail!("packaging/install.sh must have {place} once");
        }
        // Quoted there, so that nothing in it means anything to the shell.
        if value.contains('\'') {
            bail!("there must be no quote in {value}");
        }
        script = script.replace(place, &format!("'{value}'"));
    }
    Ok(script)
}

/// What `--release-url` takes; the same as install.sh takes from QUDATA_RELEASE_URL.
pub(super) fn release_url(text: &str) -> std::result::Result<String, String> {
    let here = ["http://127.", "http://localhost:", "http://localhost/", "http://[::1]"];
    let good = text.starts_with("https://")
        || text.starts_with("file:///")
        || here.iter().any(|h| text.starts_with(h));
    let plain = text.bytes().all(|byte| byte.is_ascii_graphic() && !b"'\"\\@".contains(&byte));
    if good && plain {
        return Ok(text.trim_end_matches('/').to_owned());
    }
    Err("it must be https://…, file:///…, or http:// on a loopback address, without a password".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_release_without_a_key_is_signed_by_one_that_nobody_has() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("p_1_amd64.deb"), "package").unwrap();
        seal(dir.path(), "p_1_amd64.deb", None, Some("https://example.org/r")).unwrap();
        let mut names: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["SHA256SUMS", "SHA256SUMS.sig", "install.sh", "p_1_amd64.deb"], "no key is left");
        tool::run(Command::new("sha256sum").args(["--check", "--strict", SUMS]).current_dir(dir.path()))
            .unwrap();
        assert_eq!(fs::metadata(dir.path().join(SIGNATURE)).unwrap().len(), 64, "a raw Ed25519 signature");
        let script = fs::read_to_string(dir.path().join(INSTALLER)).unwrap();
        assert!(script.contains(ED25519) && script.contains("'https://example.org/r'"), "{script}");
    }

    #[test]
    fn only_an_ed25519_key_signs() {
        let dir = tempfile::tempdir().unwrap();
        let key = dir.path().join("ec.pem");
        let curve = ["genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out"];
        tool::run(Command::new("openssl").args(curve).arg(&key)).unwrap();
        fs::write(dir.path().join("p"), "package").unwrap();
        let error = seal(dir.path(), "p", Some(&key), None).unwrap_err().to_string();
        assert!(error.contains("openssl genpkey -algorithm ed25519"), "{error}");
        assert!(!dir.path().join(SUMS).exists(), "nothing half-done");
    }

    #[test]
    fn addresses_that_prove_nothing_or_break_out_are_refused() {
        for good in ["https://example.org/release", "file:///mnt/usb", "http://127.0.0.1:8000/r/"] {
            assert!(release_url(good).is_ok(), "{good}");
        }
        for bad in
            ["http://example.org", "ftp://x", "https://a'b", "https://u:p@example.org", "https://a b", ""]
        {
            assert!(release_url(bad).is_err(), "{bad}");
        }
        assert!(render("'@PUBLIC_KEY@' '@RELEASE_URL@'", "key", "'; id; '").is_err());
        assert!(render("'@PUBLIC_KEY@'", "key", "").is_err());
    }
}
