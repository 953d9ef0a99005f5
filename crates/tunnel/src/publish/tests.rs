//! Against an admin server in the test whose answers are scripted by the name of the route.

use std::{
    collections::BTreeMap,
    net::Ipv4Addr,
    sync::{Arc, Mutex},
};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{
    Method, Request, Response, StatusCode, body::Incoming, server::conn::http1, service::service_fn,
};
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;

use super::*;
use crate::{
    config::{Abilities, AdminAccess},
    definition::tests::tcp,
    plan::plan_changes,
};

/// A store; names that begin with `hang` are never answered, with `bad` are refused, with `lost` are taken and answered
/// with an error.
type Store = Arc<Mutex<BTreeMap<String, serde_json::Value>>>;

async fn fake_admin() -> (Admin, Store) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let store = Store::default();
    let shared = store.clone();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let store = shared.clone();
            let answer = service_fn(move |request| answer(store.clone(), request));
            tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(stream), answer));
        }
    });
    (Admin::new(&AdminAccess::generate(port)), store)
}

async fn answer(store: Store, request: Request<Incoming>) -> Result<Response<Full<Bytes>>, hyper::Error> {
    let (head, body) = request.into_parts();
    let body = body.collect().await?.to_bytes();
    let name = match head.method {
        Method::POST => {
            serde_json::from_slice::<serde_json::Value>(&body).unwrap()["name"].as_str().unwrap().into()
        }
        _ => head.uri.path().rsplit('/').next().unwrap().to_owned(),
    };
    if name.starts_with("hang") {
        std::future::pending::<()>().await;
    }
    let (status, text) = match head.method {
        Method::GET => {
            let all: Vec<_> = store.lock().unwrap().values().cloned().collect();
            (StatusCode::OK, serde_json::json!({ "proxies": all }).to_string())
        }
        _ if name.starts_with("bad") => (StatusCode::BAD_REQUEST, "validation error".to_owned()),
        Method::POST => {
            let route = serde_json::from_slice(&body).unwrap();
            let before = store.lock().unwrap().insert(name.clone(), route);
            match before {
                Some(_) => (StatusCode::CONFLICT, "already exists".to_owned()),
                None if name.starts_with("lost") => (StatusCode::INTERNAL_SERVER_ERROR, String::new()),
                None => (StatusCode::OK, "{}".to_owned()),
            }
        }
        Method::DELETE => match store.lock().unwrap().remove(&name) {
            Some(_) => (StatusCode::OK, String::new()),
            None => (StatusCode::NOT_FOUND, "not found".to_owned()),
        },
        other => panic!("{other}"),
    };
    Ok(Response::builder().status(status).body(Full::new(text.into())).unwrap())
}

fn publication(known: bool) -> Publication {
    let setup = crate::config::tests::setup();
    let abilities = Abilities { store: true, token_file: true };
    let config = Config::plan(&setup, abilities, AdminAccess::generate(1)).unwrap();
    let file = ConfigFile { frpc: "/bin/true".into(), path: "/none".into(), uid: 0, gid: 0 };
    if known { Publication::empty(file, config) } else { Publication::unknown(file, config) }
}

fn wanted(routes: &[Route]) -> Wanted {
    routes.iter().map(|route| (route.name.clone(), route.clone())).collect()
}

fn names(store: &Store) -> Vec<String> {
    store.lock().unwrap().keys().cloned().collect()
}

#[tokio::test]
async fn one_that_hangs_and_one_that_is_refused_do_not_hold_up_the_others() {
    let (admin, store) = fake_admin().await;
    let mut publication = publication(true);
    let wanted = wanted(&[tcp("a", 1, 1), tcp("bad", 2, 2), tcp("hang", 3, 3), tcp("z", 4, 4)]);
    let changes = plan_changes(&wanted, &Definitions::new(), &Default::default());
    let applied = tokio::spawn(async move {
        let outcome = publication.apply(&admin, &changes).await;
        (publication, admin, outcome)
    });
    // Both are there long before the one that hangs is given up.
    while names(&store) != ["a", "z"] {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(!applied.is_finished());
    let (mut publication, admin, outcome) = applied.await.unwrap();
    assert!(matches!(outcome, Err(PublishError::Admin(AdminError::Late { .. }))));
    assert_eq!(publication.rejection(&"bad".parse().unwrap()), Some("validation error"));
    // Whether the one that hung is there is not known, so frpc is asked.
    let known = publication.observe(&admin).await.unwrap();
    assert_eq!(known.keys().map(ProxyName::as_str).collect::<Vec<_>>(), ["a", "z"]);
    // What was refused is left alone until it changes.
    publication.reconsider(&wanted);
    assert!(publication.rejection(&"bad".parse().unwrap()).is_some());
    let mut changed = wanted;
    changed.insert("bad".parse().unwrap(), tcp("bad", 9, 9));
    publication.reconsider(&changed);
    assert_eq!(publication.rejection(&"bad".parse().unwrap()), None);
}

#[tokio::test]
async fn an_answer_that_was_lost_does_not_lose_the_route() {
    let (admin, store) = fake_admin().await;
    let mut publication = publication(true);
    let wanted = wanted(&[tcp("lost", 1, 1)]);
    let changes = plan_changes(&wanted, &Definitions::new(), &Default::default());
    assert!(publication.apply(&admin, &changes).await.is_err());
    assert_eq!(names(&store), ["lost"]);
    let known = publication.observe(&admin).await.unwrap();
    assert!(plan_changes(&wanted, &known, &Default::default()).is_empty(), "it is there");
}

#[tokio::test]
async fn what_a_running_frpc_has_is_learned_from_it_and_what_is_foreign_removed() {
    let (admin, store) = fake_admin().await;
    let ours =
        serde_json::to_value(StoreProxy::of(&Defined { route: tcp("ours", 1, 2), attempt: 4 })).unwrap();
    let foreign = serde_json::json!({"name": "foreign", "type": "udp"});
    store.lock().unwrap().extend([("ours".to_owned(), ours), ("foreign".to_owned(), foreign)]);
    let mut publication = publication(false);
    let known = publication.observe(&admin).await.unwrap();
    assert_eq!(known.into_values().collect::<Vec<_>>(), [Defined { route: tcp("ours", 1, 2), attempt: 4 }]);
    assert_eq!(names(&store), ["ours"]);
}

#[tokio::test]
async fn what_frpc_has_is_asked_anew_when_it_is_reconciled() {
    let (admin, store) = fake_admin().await;
    let mut publication = publication(true);
    let route = serde_json::to_value(StoreProxy::of(&Defined { route: tcp("a", 1, 2), attempt: 0 })).unwrap();
    store.lock().unwrap().insert("a".to_owned(), route);
    assert!(publication.observe(&admin).await.unwrap().is_empty());
    publication.reconcile(&admin).await.unwrap();
    assert_eq!(publication.observe(&admin).await.unwrap().len(), 1);
}

#[tokio::test]
async fn a_route_that_changes_is_removed_before_it_is_added() {
    let (admin, store) = fake_admin().await;
    let mut publication = publication(true);
    for port in [1, 2] {
        let wanted = wanted(&[tcp("a", port, 5)]);
        let known = publication.observe(&admin).await.unwrap();
        let changes = plan_changes(&wanted, &known, &Default::default());
        // The fake answers 409 to a name it has.
        publication.apply(&admin, &changes).await.unwrap();
    }
    assert_eq!(store.lock().unwrap()["a"]["tcp"]["remotePort"], 2);
}
