//! What an owner does on a fresh server: types the one line, cuts the power, looks whether anything changed. Called by the
//! stories of an installation.
use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use qudata_testkit::control_plane::Terms;
use qudata_testkit::tool::Output;

use crate::machine::Machine;
use crate::remote::quoted;

const QUICK: Duration = Duration::from_secs(60);
/// Reading and hashing a whole server takes a minute of an emulated processor.
const LOOK: Duration = Duration::from_secs(300);
/// The goal for an installation whose image is at hand is ten minutes; a busy machine gets twice that.
pub(crate) const INSTALL: Duration = Duration::from_secs(1200);
/// Where the release and the control plane listen.
pub(crate) const RELEASE: &str = "127.0.0.1:8480";
const SERVICE: &str = "127.0.0.1:8490";
/// The release as it is handed out; a story may damage it.
pub(crate) const DIST: &str = "/srv/release";

/// Starts the world outside: it must be there after a restart of the server as well, so it is part of what the server was.
pub(crate) fn prepare(machine: &Machine) -> Result<()> {
    let unit = format!(
        "[Unit]\\nRequiresMountsFor=/lab\\n[Service]\\nExecStart=/lab/qudata-lab-outside {DIST} {RELEASE} {SERVICE}\\n\
         [Install]\\nWantedBy=multi-user.target\\n"
    );
    let script = format!(
        "set -e; [ -d /lab/dist ] || {{ echo 'there is no release: it needs frp, see cargo xtask frp' >&2; exit 1; }}; mkdir -p {DIST}; cp /lab/dist/* {DIST}/; printf '{unit}' >/etc/systemd/system/lab-outside.service; \
         install -d -m 700 /root/.ssh; install -m 600 /lab/tenant /root/.ssh/id_ed25519; \
         install -m 644 /lab/tenant.pub /root/.ssh/id_ed25519.pub; systemctl daemon-reload; \
         systemctl enable --quiet --now lab-outside; apt-get -qq update; \
         for i in $(seq 50); do curl -fs http://{RELEASE}/SHA256SUMS >/dev/null && exit 0; sleep 0.2; done; exit 1"
    );
    machine.remote.must(&script, LOOK).context("preparing the server")?;
    Ok(())
}

/// The image of the lab.
pub(crate) const IMAGE: &str = "--image /lab/images/quick.qcow2";
/// What an emulated server needs: OVMF does not run there, and a boot takes minutes.
pub(crate) const EMULATED: &str = "--set firmware=direct --set ready_timeout=900";

/// The line an owner types, with these words behind it.
pub(crate) fn line(key: &str, words: &str) -> String {
    // A story may name another one.
    let image = if words.contains("--image") { "" } else { IMAGE };
    format!(
        "curl -fsSL http://{RELEASE}/install.sh | QUDATA_RELEASE_URL=http://{RELEASE} bash -s -- {key} \
         --service-url http://{SERVICE}/v0 {image} --set tunnel=none {EMULATED} {words}"
    )
}

/// A key that the control plane accepts.
pub(crate) fn key() -> String {
    Terms::default().api_key
}

/// Types it and waits until it ends, or until the server restarts.
pub(crate) fn types(machine: &Machine, words: &str) -> Result<Output> {
    types_with(machine, &key(), words)
}

/// The same with another key.
pub(crate) fn types_with(machine: &Machine, key: &str, words: &str) -> Result<Output> {
    machine.remote.run(&format!("set -o pipefail; {}", line(key, words)), INSTALL)
}

/// Types it where nobody waits, so that the power may be cut at any moment.
pub(crate) fn begins(machine: &Machine, words: &str) -> Result<()> {
    let script = format!(
        "systemctl reset-failed lab-line 2>/dev/null; systemd-run --quiet --collect --unit=lab-line bash -c {}",
        quoted(&format!("set -o pipefail; {}", line(&key(), words)))
    );
    machine.remote.must(&script, QUICK).map(drop)
}

/// It must be refused with this code.
pub(crate) fn refused(machine: &Machine, words: &str, code: &str) -> Result<()> {
    let said = types(machine, words)?;
    refusal(&said, code)
}

/// A refusal names its code and what to do next.
pub(crate) fn refusal(said: &Output, code: &str) -> Result<()> {
    ensure!(!said.status.success(), "it was accepted: {}", said.stdout.trim());
    ensure!(said.stderr.contains(&format!("[{code}]")), "not refused with {code}: {}", said.stderr.trim());
    ensure!(said.stderr.contains("Next:"), "the refusal does not say what to do: {}", said.stderr.trim());
    Ok(())
}

/// Everything of a server that an installation could change: one line for each file, package, unit, driver and listener.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct State(BTreeMap<String, String>);

/// Left out: what a running system rewrites by itself (clocks, seeds, logs, caches of apt and dpkg) and the server's mounts.
const LOOK_AT: &str = r#"
cd /
find boot etc usr opt root home srv var -xdev \
  \( -path var/log -o -path var/cache -o -path var/lib/apt -o -path var/lib/dpkg -o -path var/lib/systemd \
     -o -path var/tmp -o -path var/backups -o -path root/.cache -o -path etc/ld.so.cache \) -prune -o \
  \( -type f -printf 'file %p\t%m %u:%g %s\n' -o -type l -printf 'link %p\t%l\n' -o -type d -printf 'dir %p\t%m %u:%g\n' \)
find boot etc opt root home srv usr/local usr/bin usr/lib/systemd -xdev -type f ! -path etc/ld.so.cache -print0 | xargs -0 sha256sum \
  | sed 's/^\([0-9a-f]*\)  \(.*\)$/sha256 \2\t\1/'
dpkg-query -W -f 'package ${Package}\t${Version} ${db:Status-Abbrev}\n'
apt-mark showmanual | sed 's/$/\tmanual/;s/^/mark /'
systemctl list-unit-files --no-legend --no-pager | awk '{print "unit " $1 "\t" $2}'
for d in /sys/bus/pci/devices/*; do
  printf 'pci %s\t%s %s\n' "$(basename $d)" "$(basename "$(readlink $d/driver)")" "$(cat $d/driver_override)"
done
ss -Hltun | awk '{print "listener " $1 " " $5 "\t"}'
nft list tables 2>/dev/null | sed 's/^/nft /;s/$/\t/'
pgrep -a 'qemu|passt|frpc|qudata-agent' | sed 's/^[0-9]* /process /;s/$/\t/'
true
"#;

impl State {
    /// Looks at the server.
    pub(crate) fn of(machine: &Machine) -> Result<Self> {
        let text = machine.remote.must(LOOK_AT, LOOK).context("looking at the server")?;
        let pair = |line: &str| {
            let (name, value) = line.split_once('\t').unwrap_or((line, ""));
            (name.to_owned(), value.to_owned())
        };
        let state: BTreeMap<_, _> = text.lines().map(pair).collect();
        ensure!(state.len() > 1000, "the server shows {} things only", state.len());
        Ok(Self(state))
    }

    /// Everything that is not as it was, but for what `allowed` names by its beginning.
    pub(crate) fn changes_since(&self, before: &Self, allowed: &[&str]) -> Vec<String> {
        let mut changes = Vec::new();
        for (name, value) in &self.0 {
            match before.0.get(name) {
                None => changes.push(format!("+ {name} {value}")),
                Some(old) if old != value => changes.push(format!("! {name}: was {old}, is {value}")),
                Some(_) => {}
            }
        }
        let gone = before.0.iter().filter(|(name, _)| !self.0.contains_key(*name));
        changes.extend(gone.map(|(name, value)| format!("- {name} {value}")));
        changes.retain(|line| {
            !allowed.iter().any(|allowed| line.get(2..).is_some_and(|l| l.starts_with(allowed)))
        });
        changes
    }

    /// Nothing has changed.
    pub(crate) fn ensure_same(&self, before: &Self, allowed: &[&str]) -> Result<()> {
        let changes = self.changes_since(before, allowed);
        if changes.is_empty() {
            return Ok(());
        }
        let shown: Vec<&str> = changes.iter().map(String::as_str).take(40).collect();
        bail!("{} things changed:\n  {}", changes.len(), shown.join("\n  "))
    }
}
