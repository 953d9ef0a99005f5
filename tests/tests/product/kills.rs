//! Random kill -9 of the agent while instances are created, paused, restarted and deleted. No VM that nobody deleted may
//! be touched, and in the end nothing is left.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use qudata_testkit::agent::{TestAgent, TestInstance};
use qudata_tests::{SOON, blank_agent, small};
use serde_json::{Value, json};

/// More would only fill the machine.
const MOST: usize = 3;

#[test]
fn twenty_random_kills_touch_no_vm() {
    random_kills(number("QUDATA_TEST_QUICK_KILLS").unwrap_or(20));
}

#[test]
fn slow_two_hundred_random_kills_touch_no_vm() {
    random_kills(number("QUDATA_TEST_KILLS").unwrap_or(200));
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().and_then(|text| text.parse().ok())
}

/// What the renters know of their instances.
#[derive(Default)]
struct Tenants {
    /// Instances nobody asked to delete, with the QEMU process once it was seen.
    living: BTreeMap<String, Option<(u32, u64)>>,
    /// Instances whose DELETE was sent and may have been received.
    doomed: BTreeSet<String>,
    /// How often a known QEMU process was found untouched after a kill.
    survivals: u64,
}

fn random_kills(rounds: u64) {
    let clock = || u64::from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().subsec_nanos());
    let seed = number("QUDATA_TEST_SEED").unwrap_or_else(clock);
    eprintln!("QUDATA_TEST_SEED={seed}");
    let agent = blank_agent();
    let mut baseline = agent.baseline();
    let tenants = Mutex::new(Tenants::default());
    let mut dice = Dice(seed);
    for round in 0..rounds {
        let dead = AtomicBool::new(false);
        let mut renter = Dice(dice.roll(u64::MAX));
        thread::scope(|scope| {
            scope.spawn(|| {
                loop {
                    if dead.load(Ordering::Relaxed) || act(&agent, &tenants, &mut renter).is_err() {
                        break;
                    }
                }
            });
            thread::sleep(Duration::from_millis(dice.roll(250)));
            agent.kill9();
            dead.store(true, Ordering::Relaxed);
        });
        agent.restart();
        check(&agent, &mut tenants.lock().unwrap(), round);
    }
    let survivals = tenants.into_inner().unwrap().survivals;
    assert!(survivals > rounds / 4, "only {survivals} VMs met a kill in {rounds} rounds: nothing was proven");
    for id in agent.ids() {
        agent.delete(&TestInstance::known(&id));
    }
    assert_eq!(agent.vm_processes(), []);
    agent.assert_clean(&mut baseline);
}

/// One random act of a renter; fails when the agent is gone.
fn act(agent: &TestAgent, tenants: &Mutex<Tenants>, dice: &mut Dice) -> std::io::Result<()> {
    let ids: Vec<String> = tenants.lock().unwrap().living.keys().cloned().collect();
    let call = |method: &str, path: &str, body: Value| {
        agent.client().call(method, path, Some(&body).filter(|body| !body.is_null()))
    };
    let id = usize::try_from(dice.roll(100)).unwrap();
    let Some(id) = ids.get(id % MOST) else {
        let reply = call("POST", "/instances", small())?;
        assert!(reply.status < 500, "create: {}", reply.text());
        if let Some(id) = reply.data()["id"].as_str() {
            tenants.lock().unwrap().living.insert(id.to_owned(), None);
        }
        return Ok(());
    };
    let path = format!("/instances/{id}");
    let reply = match dice.roll(8) {
        0 | 1 => call("PUT", &path, json!({ "command": "stop" }))?,
        2 | 3 => call("PUT", &path, json!({ "command": "start" }))?,
        4 => call("PUT", &path, json!({ "command": "restart" }))?,
        5 => {
            let mut tenants = tenants.lock().unwrap();
            tenants.living.remove(id);
            tenants.doomed.insert(id.clone());
            drop(tenants);
            call("DELETE", &path, Value::Null)?
        }
        _ => call("GET", &path, Value::Null)?,
    };
    assert!(reply.status < 500, "{}", reply.text());
    Ok(())
}

/// After a restart: who lived lives, by the same process; who was being made is finished or gone without a trace.
fn check(agent: &TestAgent, tenants: &mut Tenants, round: u64) {
    let listed: BTreeSet<String> = agent.ids().into_iter().collect();
    for (id, qemu) in &tenants.living {
        assert!(qemu.is_none() || listed.contains(id), "round {round}: {id} was forgotten");
    }
    tenants.doomed.retain(|id| listed.contains(id));
    tenants.living.retain(|id, _| listed.contains(id));
    for id in &listed {
        let Some(process) = settled(agent, id, round) else { continue };
        // A DELETE that was never received leaves the instance as it was.
        tenants.doomed.remove(id);
        if let Some(known) = tenants.living.insert(id.clone(), Some(process)).flatten() {
            assert_eq!(known, process, "round {round}: {id} has another QEMU");
            tenants.survivals += 1;
        }
    }
}

/// The QEMU process of an instance, once its bring-up or its end that was under way is over; none when it has ended.
fn settled(agent: &TestAgent, id: &str, round: u64) -> Option<(u32, u64)> {
    let vm = TestInstance::known(id);
    let deadline = Instant::now() + SOON;
    loop {
        let reply = agent.get(&vm);
        if reply.status == 404 {
            return None;
        }
        let state = reply.data()["state"].as_str().unwrap_or_default().to_owned();
        let qemu = agent.process_of(&vm, "qemu-system");
        if let ("booting" | "paused" | "rebooting", Some(qemu)) = (state.as_str(), qemu) {
            return Some(qemu.identity());
        }
        assert!(Instant::now() < deadline && state != "failed", "round {round}: {}", reply.text());
        thread::sleep(Duration::from_millis(20));
    }
}

/// SplitMix64: the same seed, the same story.
struct Dice(u64);

impl Dice {
    /// A number below `sides`.
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % sides
    }
}
