//! From a fresh server to a GPU host and back: the one line, its refusals, power cuts, uninstall. Called through the table.
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::agent;
use crate::gpu;
use crate::machine::Machine;
use crate::owner::{self, State};
use crate::shape::slot;
use crate::tenant::{Order, Tenant};
use crate::voice::say;

const QUICK: Duration = Duration::from_secs(60);
/// Self-test and start of the agent after a restart of the server.
const CONTINUED: Duration = Duration::from_secs(900);
/// On an emulated server with neighbours its guest of some instructions is not always done in time.
const DOCTOR: &str = "for i in 1 2 3 4 5; do qudata-agent doctor --json >/tmp/lab-doctor && break; sleep 10; done; cat /tmp/lab-doctor";
const UNINSTALL: Duration = Duration::from_secs(600);
const RESTART: Duration = Duration::from_secs(600);

/// A provider whose image switches the IOMMU off: the server must restart once.
const IOMMU_OFF: &str = r#"mkdir -p /etc/default/grub.d
echo 'GRUB_CMDLINE_LINUX="$GRUB_CMDLINE_LINUX intel_iommu=off"' >/etc/default/grub.d/10-provider.cfg
update-grub >/dev/null 2>&1 && sync"#;

fn iommu_off(machine: &mut Machine) -> Result<()> {
    machine.remote.must(IOMMU_OFF, QUICK)?;
    machine.reset_hard()?;
    let groups = machine.remote.must("ls /sys/kernel/iommu_groups | wc -l", QUICK)?;
    ensure!(groups.trim() == "0", "the IOMMU is on");
    Ok(())
}

/// The installation is finished: nothing is left to continue, the agent runs and answers.
fn wait_until_installed(machine: &Machine) -> Result<()> {
    let until = Instant::now() + CONTINUED;
    loop {
        let left = machine.remote.run("[ -e /etc/systemd/system/qudata-install.service ]", QUICK)?;
        if !left.status.success() {
            break;
        }
        let log = || machine.remote.run("tail -n 30 /var/log/qudata/install.log", QUICK).map(|o| o.stdout);
        ensure!(Instant::now() < until, "the installation does not end: {}", log()?);
        std::thread::sleep(Duration::from_secs(3));
    }
    agent::wait_until_it_answers(machine)
}

/// Both GPUs are for rent, and an instance gets one.
fn ensure_rents(machine: &Machine, name: &str) -> Result<()> {
    for slot in [slot::A, slot::B] {
        gpu::wait_for(machine, &gpu::only(machine, slot)?, "free", QUICK)?;
    }
    let tenant = Tenant::order(machine, &Order { name, gpus: Some(1), ..Order::default() })?;
    tenant.wait_until_ready()?;
    let classes = tenant.pci_classes()?;
    ensure!(classes.iter().any(|class| class == "0x038000"), "the guest sees {classes:?}");
    tenant.delete().map(drop)
}

fn uninstall(machine: &Machine, words: &str) -> Result<()> {
    machine.remote.must(&format!("qudata-agent uninstall --yes {words}"), UNINSTALL).map(drop)
}

/// One line, one restart by itself, a host that rents; the same line again; and back.
pub(super) fn fresh(machine: &mut Machine) -> Result<()> {
    owner::prepare(machine)?;
    iommu_off(machine)?;
    let before = State::of(machine)?;
    let planned = owner::types(machine, "--iommu on --plan")?;
    ensure!(planned.status.success(), "--plan failed: {}", planned.stderr.trim());
    ensure!(
        planned.stdout.contains("intel_iommu=on"),
        "the plan is silent about the IOMMU: {}",
        planned.stdout
    );
    State::of(machine)?.ensure_same(&before, &[]).context("after --plan")?;

    let (boot, started) = (machine.boot_id()?, Instant::now());
    // It ends with the server.
    let _ = owner::types(machine, "--iommu on --yes")?;
    machine.await_reboot(&boot, RESTART).context("the server should restart by itself")?;
    wait_until_installed(machine)?;
    say(format!("installed after {} s, with a restart", started.elapsed().as_secs()));
    let log = machine.remote.must("cat /var/log/qudata/install.log", QUICK)?;
    for slot in [slot::A, slot::B] {
        let address = gpu::only(machine, slot)?;
        ensure!(log.contains(&address), "the log does not name {address}: {log}");
    }
    ensure!(!log.contains(&owner::key()), "the key is in the log");
    ensure_rents(machine, "first")?;

    let installed = State::of(machine)?;
    let again = owner::types(machine, "--iommu on --yes")?;
    ensure!(again.status.success(), "the same line again failed: {}", again.stderr.trim());
    State::of(machine)?
        .ensure_same(&installed, &["file var/lib/qudata", "sha256 var/lib/qudata", "process "])
        .context("after the same line again")?;

    uninstall(machine, "--purge")?;
    machine.reset_hard()?;
    State::of(machine)?.ensure_same(&before, &[]).context("after uninstall")
}

/// What the README tells an owner to type, word for word but for the image and what emulation needs.
pub(super) fn from_a_folder(machine: &mut Machine) -> Result<()> {
    owner::prepare(machine)?;
    let before = State::of(machine)?;
    let line = format!(
        "cd {} && bash install.sh --from qudata-agent_*_amd64.deb --standalone {} {}",
        owner::DIST,
        owner::IMAGE,
        owner::EMULATED
    );
    machine.remote.must(&line, owner::INSTALL)?;
    wait_until_installed(machine)?;

    let report: serde_json::Value = serde_json::from_str(&machine.remote.must(DOCTOR, CONTINUED)?)?;
    let failed = |finding: &&serde_json::Value| finding.get("verdict").is_some_and(|v| v == "fail");
    let faults: Vec<_> =
        report.get("findings").and_then(|f| f.as_array()).into_iter().flatten().filter(failed).collect();
    ensure!(faults.is_empty(), "the doctor finds fault: {faults:?}");
    say(format!("the doctor took {:?} ms", report.get("took_ms")));
    let tested = machine.remote.must("qudata-agent doctor selftest", CONTINUED)?;
    for slot in [slot::A, slot::B] {
        let address = gpu::only(machine, slot)?;
        ensure!(tested.contains(&address), "the self-test is silent about {address}: {tested}");
    }
    machine.remote.must("qudata-agent image list", QUICK)?;

    let said = machine.remote.must("qudata-agent uninstall", UNINSTALL)?;
    ensure!(said.contains("/var/lib/qudata is kept"), "it does not say what is kept: {said}");
    machine.reset_hard()?;
    let data = ["dir var/lib/qudata", "file var/lib/qudata", "link var/lib/qudata", "sha256 var/lib/qudata"];
    State::of(machine)?.ensure_same(&before, &data).context("after uninstall")?;
    machine.remote.must("ls /var/lib/qudata/images/*.qcow2", QUICK).context("the images are kept").map(drop)
}

/// Steps and for how long they run before the power fails. The long ones are hit early and late: while a package is
/// unpacked and configured, before the self-test has touched a GPU and while its VM holds them.
const CUTS: [(&str, Duration); 8] = [
    ("package", Duration::from_millis(200)),
    ("package", Duration::from_millis(3000)),
    ("settings", Duration::from_millis(100)),
    ("boot", Duration::from_millis(1500)),
    ("image", Duration::from_millis(700)),
    ("selftest", Duration::from_millis(700)),
    ("selftest", Duration::from_millis(15_000)),
    ("agent", Duration::from_millis(700)),
];

/// The power is cut in every step, and the same line is typed again: it finishes.
pub(super) fn power_cuts(machine: &mut Machine) -> Result<()> {
    owner::prepare(machine)?;
    let before = State::of(machine)?;
    for (step, after) in CUTS {
        let line = format!("{step}: begun");
        let earlier = times(machine, &line)?;
        owner::begins(machine, "--yes")?;
        cut_at(machine, &line, earlier, after)
            .with_context(|| format!("{} ms into step {step}", after.as_millis()))?;
        say(format!("the power failed {} ms into step {step}", after.as_millis()));
    }
    let said = owner::types(machine, "--yes")?;
    ensure!(said.status.success(), "it does not finish: {}", said.stderr.trim());
    wait_until_installed(machine)?;
    let zeroes = machine.remote.run("grep -qaP '\\x00' /var/log/qudata/install.log", QUICK)?;
    ensure!(zeroes.status.code() == Some(1), "the power cuts left zeroes in the log, or there is none");
    ensure_rents(machine, "after-cuts")?;
    cut_off_uninstall(machine)?;
    machine.reset_hard()?;
    State::of(machine)?.ensure_same(&before, &[]).context("after uninstall")
}

/// The power is cut while apt takes the packages away, and the program that was kept finishes.
fn cut_off_uninstall(machine: &mut Machine) -> Result<()> {
    let line = "The packages go now";
    let begin = "systemd-run --quiet --collect --unit=lab-line qudata-agent uninstall --yes --purge";
    machine.remote.must(begin, QUICK)?;
    cut_at(machine, line, 0, Duration::from_secs(4)).context("while the packages go")?;
    let left = machine.remote.must(
        "dpkg-query -W -f '${Package} ${db:Status-Status}\\n' 'qemu*' passt qudata-agent 2>/dev/null || true",
        QUICK,
    )?;
    say(format!("the power failed while the packages went; left: {}", left.trim().replace('\n', ", ")));
    machine.remote.must("/var/lib/qudata/setup/qudata-agent uninstall --yes --purge", UNINSTALL).map(drop)
}

/// How often the log has this line; it keeps what earlier lines did.
fn times(machine: &Machine, line: &str) -> Result<u32> {
    let script = format!("grep -cs '^{line}' /var/log/qudata/install.log || true");
    let count = machine.remote.must(&script, QUICK)?;
    Ok(count.trim().parse().unwrap_or(0))
}

/// Waits until the log has the line once more than `earlier`, cuts the power `after` that and waits for the server.
fn cut_at(machine: &mut Machine, line: &str, earlier: u32, after: Duration) -> Result<()> {
    let script = format!(
        "for i in $(seq 6000); do [ \"$(grep -cs '^{line}' /var/log/qudata/install.log)\" -gt {earlier} ] 2>/dev/null && exit 0; \
         systemctl is-active --quiet lab-line || exit 1; sleep 0.1; done; exit 1"
    );
    let seen = machine.remote.run(&script, CONTINUED)?;
    if !seen.status.success() {
        let log = machine
            .remote
            .run("tail -n 20 /var/log/qudata/install.log; journalctl -u lab-line -n 20", QUICK)?;
        anyhow::bail!("{line:?} is not in the log: {}", log.stdout);
    }
    std::thread::sleep(after);
    machine.reset_hard()
}

/// An owner's own boot parameters and VFIO settings are left as they are.
pub(super) fn owners_own(machine: &mut Machine) -> Result<()> {
    owner::prepare(machine)?;
    let own = r#"sed -i 's/^GRUB_CMDLINE_LINUX=.*/GRUB_CMDLINE_LINUX="console=ttyS0 no_timer_check iommu=pt intel_iommu=on,sm_off mitigations=off"/' /etc/default/grub
echo 'options vfio-pci disable_vga=1' >/etc/modprobe.d/mine.conf
update-grub >/dev/null 2>&1 && sync"#;
    machine.remote.must(own, QUICK)?;
    machine.reset_hard()?;
    let before = State::of(machine)?;
    let command_line = machine.remote.must("cat /proc/cmdline", QUICK)?;
    let said = owner::types(machine, "--yes")?;
    ensure!(said.status.success(), "the installation failed: {}", said.stderr.trim());
    wait_until_installed(machine)?;
    machine.reset_hard()?;
    ensure!(machine.remote.must("cat /proc/cmdline", QUICK)? == command_line, "the command line has changed");
    agent::wait_until_it_answers(machine)?;
    let after = State::of(machine)?;
    for file in ["sha256 etc/default/grub", "sha256 etc/modprobe.d/mine.conf"] {
        let changed = after.changes_since(&before, &[]);
        ensure!(!changed.iter().any(|line| line.contains(file)), "{file} has changed");
    }
    uninstall(machine, "--purge")?;
    machine.reset_hard()?;
    State::of(machine)?.ensure_same(&before, &[]).context("after uninstall")
}

/// What is wrong with the release, the key or the disk: each its own code, and nothing half-done.
pub(super) fn refusals(machine: &mut Machine) -> Result<()> {
    owner::prepare(machine)?;
    let before = State::of(machine)?;
    let dist = owner::DIST;
    let stories = [
        ("bad_signature", format!("head -c 64 /dev/urandom >{dist}/SHA256SUMS.sig")),
        (
            "bad_checksum",
            format!("cd {dist} && printf x | dd of=$(ls *.deb) bs=1 seek=5000 conv=notrunc status=none"),
        ),
        ("bad_checksum", format!("cd {dist} && truncate -s -1000 *.deb")),
        ("download_failed", format!("rm {dist}/*.deb")),
    ];
    for (code, damage) in stories {
        machine.remote.must(&damage, QUICK)?;
        owner::refused(machine, "--yes", code).with_context(|| damage.clone())?;
        machine.remote.must(&format!("rm -f {dist}/*; cp /lab/dist/* {dist}/"), QUICK)?;
    }
    let said = owner::types_with(machine, "ak-ffffffffffffffffffffffffffffffff", "--yes")?;
    owner::refusal(&said, "bad_key")?;
    owner::refused(machine, "--yes --image /lab/images/none.qcow2", "image_failed")?;
    // Room for nothing.
    machine
        .remote
        .must("fallocate -l $(($(df --output=avail -B1 / | tail -1) - 1000000000)) /var/tmp/full", QUICK)?;
    owner::refused(machine, "--yes", "disk_too_small")?;
    machine.remote.must("rm /var/tmp/full", QUICK)?;
    State::of(machine)?.ensure_same(&before, &[]).context("after refusals")
}

/// Without a GPU.
pub(super) fn no_gpu(machine: &mut Machine) -> Result<()> {
    refused_for_its_hardware(machine, "no_gpu")
}

/// With the IOMMU switched off in the firmware.
pub(super) fn no_iommu(machine: &mut Machine) -> Result<()> {
    refused_for_its_hardware(machine, "iommu_off_in_firmware")
}

/// With its GPU in a group with another device.
pub(super) fn shared_group(machine: &mut Machine) -> Result<()> {
    refused_for_its_hardware(machine, "group_shared")
}

fn refused_for_its_hardware(machine: &Machine, code: &str) -> Result<()> {
    owner::prepare(machine)?;
    let before = State::of(machine)?;
    owner::refused(machine, "--yes", code)?;
    State::of(machine)?.ensure_same(&before, &[])
}

/// A new package under a running instance: the guest notices nothing.
pub(super) fn upgrade(machine: &mut Machine) -> Result<()> {
    owner::prepare(machine)?;
    let said = owner::types(machine, "--yes --skip-selftest")?;
    ensure!(said.status.success(), "the installation failed: {}", said.stderr.trim());
    wait_until_installed(machine)?;
    let tenant = Tenant::order(machine, &Order { name: "upgraded", gpus: Some(1), ..Order::default() })?;
    tenant.wait_until_ready()?;
    let (qemu, boot, uptime, old) =
        (tenant.qemu()?, tenant.boot_id()?, tenant.uptime()?, agent::pid(machine)?);
    // The same program under the next version.
    let script = "set -e; cd /tmp; rm -rf next; dpkg-deb -R /lab/dist/*.deb next; \
                  sed -i 's/^Version: .*/&+next/' next/DEBIAN/control; dpkg-deb -b --root-owner-group next next.deb >/dev/null; \
                  DEBIAN_FRONTEND=noninteractive apt-get -qq install -y ./next.deb >/dev/null; rm -rf next next.deb";
    machine.remote.must(script, UNINSTALL)?;
    agent::wait_for_the_next(machine, old)?;
    tenant.wait_for("running", QUICK)?;
    ensure!(tenant.qemu()? == qemu && tenant.boot_id()? == boot, "the instance was restarted");
    ensure!(tenant.uptime()? > uptime, "the guest's uptime does not grow");
    tenant.delete().map(drop)
}
