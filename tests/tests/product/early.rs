//! A renter who does not wait: connections before the guest is up.

use std::{io::ErrorKind, thread, time::Duration};

use qudata_tests::{AT_ONCE, SOON, blank_agent, knock, small};

/// Debian 12's passt spins at 100 % of a core while a connection waits for a guest that does not answer. So nobody gets
/// through to it before the guest is ready.
#[test]
fn early_connections_are_refused_at_once_and_cost_nothing() {
    let agent = blank_agent();
    let mut baseline = agent.baseline();
    let vm = agent.create(&small());
    agent.wait_for_phase(&vm, "booting", SOON);
    let before = agent.passt(&vm).cpu;
    for _ in 0..10 {
        for guest_port in [22, 8000] {
            let (stream, took) = knock(vm.port(guest_port));
            let refused = stream.as_ref().is_err_and(|e| e.kind() == ErrorKind::ConnectionRefused);
            assert!(refused && took < AT_ONCE, "guest port {guest_port}: {stream:?} after {took:?}");
        }
        thread::sleep(Duration::from_millis(200));
    }
    let used = agent.passt(&vm).cpu - before;
    assert!(used < Duration::from_millis(300), "passt used {used:?} of CPU time in two seconds");
    agent.delete(&vm);
    agent.assert_clean(&mut baseline);
}
