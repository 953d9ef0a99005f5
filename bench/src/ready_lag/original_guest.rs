//! The original's way to notice that a guest is up, on a guest that this process boots: QEMU as the agent would start it,
//! but on SLIRP, and `ssh` forked by a two-second ticker until it succeeds. SLIRP accepts connections for a guest that
//! is not up, so a probe that comes too early hangs until its timeout. Called by the parent module.

use std::{
    env,
    ffi::OsString,
    net::TcpListener,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use jiff::Timestamp;
use qudata_guest::{
    keys::{GuestKey, HostKey},
    seed::{Seed, SeedSpec, StaticNetwork},
};
use qudata_qemu::{
    argv::plan_argv,
    firmware,
    machine::{Accel, CacheMode, Disk, MacAddress, Machine, NetworkDevice},
    memory::MemoryPlan,
};
use uuid::Uuid;

use super::{BOOT, MEMORY, truth};
use crate::{
    original::{Keys, QMP_PAUSE, Qemu, make_overlay, place},
    samples::millis,
};

const TICK: Duration = Duration::from_secs(2);
const TIMEOUT: Duration = Duration::from_secs(5);
/// Runs of ssh between finding the guest up and the end of the create call.
const SETUP_RUNS: usize = 3;

/// One boot, in milliseconds.
#[derive(Debug)]
pub(super) struct Boot {
    /// From sshd listening to the first ssh that succeeded.
    pub(super) lag: f64,
    /// What the set-up runs took after that.
    pub(super) setup: f64,
    /// Runs of ssh until one succeeded.
    pub(super) tries: usize,
}

pub(super) fn boot(keys: &Keys) -> Result<Boot> {
    let place = place()?;
    let port = free_port()?;
    let machine = machine(place.path(), keys)?;
    let mut command = Command::new("qemu-system-x86_64");
    command.args(on_slirp(plan_argv(&machine), port)?);
    let mut qemu = Qemu::start(&mut command, &place.path().join("log"))?;
    thread::sleep(QMP_PAUSE);
    let (tries, found) = find(&mut qemu, keys, port)?;
    let setup = Instant::now();
    for _ in 0..SETUP_RUNS {
        if !keys.logs_in(port, TIMEOUT) {
            bail!("a set-up run of ssh failed");
        }
    }
    let setup = millis(setup.elapsed());
    let listening = truth::ask(keys, port)?;
    let lag = listening.millis_until(truth::host_seconds(found));
    eprintln!("bench: the original's way: lag {lag:.0} ms, {tries} runs of ssh");
    Ok(Boot { lag, setup, tries })
}

/// Its loop: how often it tried, and when it knew.
fn find(qemu: &mut Qemu, keys: &Keys, port: u16) -> Result<(usize, Timestamp)> {
    let start = Instant::now();
    let mut next = TICK;
    for tries in 1.. {
        if start.elapsed() > BOOT {
            break;
        }
        thread::sleep(next.saturating_sub(start.elapsed()));
        let began = start.elapsed();
        qemu.check()?;
        if keys.logs_in(port, TIMEOUT) {
            return Ok((tries, Timestamp::now()));
        }
        next = next_tick(began, start.elapsed());
    }
    bail!("the guest was not up within {BOOT:?}")
}

/// When a loop that worked from `began` to `now` goes on. A ticker keeps one tick that nobody was there to take, and
/// drops the others.
fn next_tick(began: Duration, now: Duration) -> Duration {
    let ticks = |at: Duration| at.as_nanos() / TICK.as_nanos();
    if ticks(now) > ticks(began) {
        return now;
    }
    let next = u32::try_from(ticks(now) + 1).unwrap_or(u32::MAX);
    TICK.saturating_mul(next)
}

fn machine(place: &Path, keys: &Keys) -> Result<Machine> {
    let image = PathBuf::from(env::var_os("QUDATA_TEST_IMAGE").context("QUDATA_TEST_IMAGE is not set")?);
    let path = |name: &str| place.join(name);
    let uuid = Uuid::new_v4();
    let mac = MacAddress::of(uuid);
    make_overlay(&image, &path("disk.qcow2"), "3G")?;
    write_seed(keys, mac, &path("seed.iso"))?;
    Ok(Machine {
        uuid,
        name: "original".to_owned(),
        accel: Accel::Tcg,
        cpus: 1,
        memory: MEMORY.parse().context("the size of the guest's RAM")?,
        backing: MemoryPlan::default(),
        firmware: firmware::find_boot_files(&image)?,
        disk: Disk { overlay: path("disk.qcow2"), cache: CacheMode::Direct },
        seed: path("seed.iso"),
        network: NetworkDevice { socket: path("unused.sock"), mac },
        passthrough: Vec::new(),
        mmio: None,
        qmp_socket: path("qmp.sock"),
        ready_socket: path("ready.sock"),
        power_socket: path("power.sock"),
    })
}

fn write_seed(keys: &Keys, mac: MacAddress, to: &Path) -> Result<()> {
    let key = GuestKey::parse(&keys.public)?;
    let seed = Seed::render(&SeedSpec {
        instance_id: "original",
        hostname: "original",
        host_key: &HostKey::generate()?,
        management_key: &key,
        ssh_keys: &[],
        user_data: None,
        network: StaticNetwork::behind_backend(mac.bytes(), 1500),
    });
    seed.write_iso(to).context("writing the seed")
}

/// The agent's arguments with the original's network in place of passt, and without waiting for a word over QMP.
fn on_slirp(arguments: Vec<OsString>, port: u16) -> Result<Vec<OsString>> {
    let mut replaced = 0;
    let mut changed = Vec::new();
    for argument in arguments {
        if argument == "-S" {
            continue;
        }
        if argument.to_string_lossy().starts_with("stream,") {
            replaced += 1;
            changed.push(format!("user,id=net,hostfwd=tcp:127.0.0.1:{port}-:22").into());
        } else {
            changed.push(argument);
        }
    }
    if replaced != 1 {
        bail!("the agent's command line has {replaced} networks, not one");
    }
    Ok(changed)
}

fn free_port() -> Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_late_loop_goes_on_at_once_and_then_with_the_clock() {
        let millis = Duration::from_millis;
        for (began, now, next) in [
            (2000, 2300, 4000),
            (2000, 7000, 7000),
            (7000, 7300, 8000),
            (7000, 8100, 8100),
            (7000, 12_000, 12_000),
        ] {
            assert_eq!(next_tick(millis(began), millis(now)), millis(next), "{began} {now}");
        }
    }

    #[test]
    fn only_the_network_and_the_wait_are_changed() {
        let before: Vec<OsString> =
            ["-S", "-netdev", "stream,id=net,server=off", "-m", "1G"].map(Into::into).into();
        let after = on_slirp(before, 2222).unwrap();
        assert_eq!(after, ["-netdev", "user,id=net,hostfwd=tcp:127.0.0.1:2222-:22", "-m", "1G"]);
        assert!(on_slirp(vec!["-S".into()], 2222).is_err());
    }
}
