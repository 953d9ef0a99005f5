//! The client against the service of `testkit`, which was written from the contract and not from the client: each call is
//! judged there, field by field.

use std::time::Instant as StdInstant;

use qudata_testkit::control_plane::{ControlPlane as Service, Signed, Terms};

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_call_is_as_the_contract_says() {
    let terms = Terms { api_key: "ak-canary".into(), ..Terms::default() };
    let first = terms.secret.clone();
    let service = Service::start(terms);
    let mut host = Host::fresh(&service.url());
    // The real machine, so that its facts are judged too.
    host.setup.as_mut().unwrap().look.root = "/".into();
    host.setup.as_mut().unwrap().look.gpus = Some(Vec::new());
    host.setup.as_mut().unwrap().look.location.region = "ru1".into();
    *host.stats.lock().unwrap() = Some(StatsInput { status: qudata_api::Status::Running, sample: None });
    let began = StdInstant::now();
    let client = host.start();
    tokio::task::block_in_place(|| {
        service.wait_for_registration(SOON);
        service.wait_for_status("running", began, SOON);
    });
    assert!(host.accepts(&first));
    // A restore from an old copy: the secret is not known any more.
    let second = "second-secret-0123456789";
    service.forget(second);
    until("the second secret", || host.accepts(second)).await;
    *host.stats.lock().unwrap() = None;
    tokio::task::block_in_place(|| service.wait_for_status("destroyed", began, SOON));
    until_registered(&client).await;
    let called = |path: &str| service.calls().iter().any(|call| call.path == path && call.status == 200);
    until("a ping", || called("/ping")).await;
    assert!(called("/init/host"));
    assert_eq!(service.complaints(), Vec::<String>::new());
    let calls = service.calls();
    assert!(
        calls.iter().any(|call| call.path == "/ping") && calls.iter().any(|call| call.path == "/init/host")
    );
    let keyed = calls.iter().filter(|call| call.signed == Signed::ApiKey).count();
    assert_eq!(keyed, 2, "the first registration and the one after the loss");
}
