//! The real TLS: who is believed, and who is not.

use std::sync::Arc;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, date_time_ymd};
use serde_json::json;
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        RootCertStore, ServerConfig,
        crypto::aws_lc_rs,
        pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer},
    },
};

use super::*;

fn authority() -> CertifiedIssuer<'static, KeyPair> {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

fn trusting(authority: &CertifiedIssuer<'_, KeyPair>) -> Trust {
    let mut roots = RootCertStore::empty();
    roots.add(authority.der().clone()).unwrap();
    Trust::only(roots)
}

/// What a server shows: for which name, until which year, and by whom.
fn server(authority: &CertifiedIssuer<'_, KeyPair>, name: &str, until: i32) -> TlsAcceptor {
    let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
    params.not_before = date_time_ymd(2000, 1, 1);
    params.not_after = date_time_ymd(until, 1, 1);
    let key = KeyPair::generate().unwrap();
    let certificate = params.signed_by(&key, authority).unwrap();
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], key)
        .unwrap();
    TlsAcceptor::from(Arc::new(config))
}

async fn serve(desk: &Desk, acceptor: TlsAcceptor) -> Service {
    let desk = desk.clone();
    Service::start(Arc::new(move |stream| {
        let (desk, acceptor) = (desk.clone(), acceptor.clone());
        Box::pin(async move {
            let Ok(stream) = acceptor.accept(stream).await else { return };
            let data = json!({"secret_key": "new-secret-0123456789", "host_exists": true});
            desk.attend(stream, &|_: &Asked| (200, json!({"ok": true, "data": data}))).await;
        })
    }))
    .await
}

#[tokio::test]
async fn a_service_with_a_certificate_for_its_name_is_believed() {
    let (authority, desk) = (authority(), Desk::default());
    for name in ["127.0.0.1", "localhost"] {
        let service = serve(&desk, server(&authority, name, 4000)).await;
        let mut host = Host::fresh(&format!("https://{name}:{}/v0", service.port));
        let setup = host.setup.take().unwrap();
        let client = ControlPlane::begin(setup, trusting(&authority), quick());
        until_registered(&client).await;
        assert!(host.accepts("new-secret-0123456789"));
        desk.until_asked("/ping", 1).await;
    }
    assert_eq!(desk.asked("/init")[0].headers["x-api-key"], "ak-canary");
}

#[tokio::test]
async fn others_do_not_even_hear_who_calls() {
    let (ours, theirs, desk) = (authority(), authority(), Desk::default());
    let believed = [
        ("another name", server(&ours, "localhost", 4000), trusting(&ours)),
        ("an old certificate", server(&ours, "127.0.0.1", 2020), trusting(&ours)),
        ("another authority", server(&theirs, "127.0.0.1", 4000), trusting(&ours)),
        ("an authority that this system does not know", server(&theirs, "127.0.0.1", 4000), Trust::system()),
    ];
    for (what, acceptor, trust) in believed {
        let service = serve(&desk, acceptor).await;
        let mut host = Host::registered(&format!("https://127.0.0.1:{}/v0", service.port));
        let before = host.files();
        let client = ControlPlane::begin(host.setup.take().unwrap(), trust, quick());
        let (code, reason) = settled(&client).await.unwrap();
        assert_eq!(code, "control_plane_tls", "{what}: {reason}");
        assert!(desk.asked.lock().unwrap().is_empty(), "{what}");
        assert_eq!(host.files(), before, "{what}");
    }
}
