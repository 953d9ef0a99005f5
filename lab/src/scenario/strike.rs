//! SIGKILL of the agent at every step boundary of create and delete with a real GPU. Called through the table.
//!
//! A boundary is a system call by which a step becomes true: a commit reaching the disk, a file or directory taking its
//! name or losing it, a program being started. strace reports each as it returns, and the agent is killed at the n-th, for
//! n = 1, 2, … until it gets through with the whole operation.
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::agent::{self, Baseline};
use crate::gpu;
use crate::machine::Machine;
use crate::remote::quoted;
use crate::scenario::gpu::{ensure_returned, rent};
use crate::shape::slot;
use crate::tenant::{Order, Tenant};
use crate::voice::say;

const QUICK: Duration = Duration::from_secs(60);
const BOOTING: Duration = Duration::from_secs(120);
/// More boundaries than any operation has: something does not count then.
const MOST: u32 = 150;
/// Environment variable with the boundary to begin at, for whoever goes on where a run was cut off.
const FROM: &str = "QUDATA_LAB_STRIKE_FROM";
const BOUNDARIES: &str =
    "fsync,fdatasync,rename,renameat,renameat2,unlink,unlinkat,mkdir,mkdirat,clone,clone3,vfork,execve";

/// A strike that waits for its moment.
struct Strike<'a> {
    machine: &'a Machine,
    agent: u32,
}

impl<'a> Strike<'a> {
    /// Kills the agent at the `n`-th boundary from now on.
    fn arm(machine: &'a Machine, n: u32) -> Result<Self> {
        let agent = agent::pid(machine)?;
        let strike =
            format!("[ $(head -n {n} | wc -l) -eq {n} ] && kill -9 {agent} && touch /run/lab-struck");
        let script = format!(
            "rm -f /run/lab-struck; echo {} >/run/lab-strike; systemd-run --quiet --collect --unit=lab-strike \
             strace -f -qq -e signal=none -e trace={BOUNDARIES} -p {agent} -o '|sh /run/lab-strike' \
             && for i in $(seq 100); do grep -qs 'TracerPid:.0$' /proc/{agent}/task/*/status || exit 0; sleep 0.1; done; exit 1",
            quoted(&strike)
        );
        machine.remote.must(&script, QUICK).context("arming a strike")?;
        Ok(Self { machine, agent })
    }

    /// Ends the watching; whether it struck. The next agent answers then.
    fn disarm(self) -> Result<bool> {
        let Self { machine, agent } = self;
        let said = machine.remote.must(
            "systemctl stop lab-strike 2>/dev/null; [ -e /run/lab-struck ] && echo struck || echo missed",
            QUICK,
        )?;
        let struck = said.trim() == "struck";
        if struck {
            agent::wait_for_the_next(machine, agent)?;
        }
        Ok(struck)
    }
}

/// Create, killed everywhere: what the next agent finds is brought up or undone, and can be deleted.
pub(super) fn create(machine: &mut Machine) -> Result<()> {
    everywhere(machine, |machine, n| {
        let strike = Strike::arm(machine, n)?;
        // Its caller may hear nothing, or a refusal: the agent dies under it.
        let order = Order { name: "struck", gpus: Some(1), ..Order::default() };
        let ordered = Tenant::order(machine, &order);
        if ordered.is_ok() {
            // Up to where the guest's own kernel has begun, or the agent was struck.
            let script = "for i in $(seq 60); do [ -e /run/lab-struck ] && exit 0; \
                 qudata-agent --json instance show struck 2>/dev/null | grep -q '\"booting\"' && exit 0; sleep 0.5; done; exit 0";
            machine.remote.must(script, BOOTING)?;
        }
        let struck = strike.disarm()?;
        if machine.remote.run("qudata-agent instance show struck --json", QUICK)?.status.success() {
            let tenant = Tenant::known(machine, "struck");
            tenant.wait_for("booting", BOOTING).context("an order that was accepted is brought up")?;
            tenant.delete()?;
        } else {
            ensure!(ordered.is_err(), "an order that was accepted is gone");
        }
        Ok(struck)
    })
}

/// Delete, killed everywhere: the next agent finishes it.
pub(super) fn delete(machine: &mut Machine) -> Result<()> {
    everywhere(machine, |machine, n| {
        let order = Order { name: "struck", gpus: Some(1), ..Order::default() };
        let tenant = Tenant::order(machine, &order)?;
        tenant.wait_for("booting", BOOTING)?;
        let strike = Strike::arm(machine, n)?;
        let answered =
            machine.remote.run("qudata-agent instance delete struck --yes", BOOTING)?.status.success();
        let struck = strike.disarm()?;
        ensure!(struck || answered, "DELETE failed without a strike");
        // Accepted before the strike: it is finished; not accepted: it can be said again.
        tenant.delete_if_there()?;
        Ok(struck)
    })
}

fn everywhere(machine: &mut Machine, story: impl Fn(&Machine, u32) -> Result<bool>) -> Result<()> {
    let machine = &*machine;
    let functions = rent(machine, &[slot::A])?.concat();
    let before = Baseline::take(machine)?;
    let drivers = gpu::drivers(machine, &functions)?;
    let from = match std::env::var(FROM) {
        Ok(text) => text.parse().with_context(|| format!("{FROM} is {text:?} and must be a number"))?,
        Err(_) => 1,
    };
    for n in from..=MOST {
        let struck = story(machine, n).with_context(|| format!("at boundary {n}"))?;
        ensure_returned(machine, &functions, &drivers).with_context(|| format!("at boundary {n}"))?;
        if !struck {
            say(format!("{} boundaries", n - 1));
            ensure!(n > 10, "only {} boundaries were seen", n - 1);
            return before.assert_clean(machine);
        }
    }
    bail!("{MOST} strikes were not enough")
}
