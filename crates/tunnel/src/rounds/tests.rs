use super::*;

#[test]
fn a_frpc_that_may_carry_sessions_is_not_given_up_for_less_than_long_silence() {
    let (short, long, attempt) = (Duration::from_secs(60), Duration::from_secs(120), "x");
    let admin = |error| PublishError::Admin(error);
    let refused = || std::io::Error::from(std::io::ErrorKind::ConnectionRefused);
    assert!(!is_lost(&admin(AdminError::Late { attempt }), short));
    assert!(is_lost(&admin(AdminError::Late { attempt }), long));
    assert!(is_lost(&admin(AdminError::Connect { attempt, source: refused() }), long));
    assert!(is_lost(&admin(AdminError::Stranger), Duration::ZERO));
    let no = AdminError::Refused { attempt, status: 500, words: "disk full".into() };
    assert!(!is_lost(&admin(no), long));
    assert!(!is_lost(&PublishError::Read(refused()), long));
}

fn pause_of(rounds: &Rounds) -> Duration {
    match rounds.next() {
        Next::After(pause) => pause,
        Next::Restart | Next::GiveUp(_) => panic!("another round comes next"),
    }
}

#[test]
fn a_retry_that_is_due_hurries_nobody_without_a_session() {
    let route = crate::definition::tests::tcp("a", 1, 2);
    let mut rounds = Rounds::new();
    rounds.settling = Some(SETTLING.len());
    rounds.retries.insert(route.name.clone(), Retry { at: Instant::now(), ..first_retry(&route) });
    rounds.link = Link::Up;
    assert!(pause_of(&rounds) <= Duration::from_millis(20));
    rounds.link = Link::Down;
    assert_eq!(pause_of(&rounds), GLANCE_WHEN_DOWN);
    rounds.link = Link::Pending;
    assert_eq!(pause_of(&rounds), Duration::from_secs(1));
}
