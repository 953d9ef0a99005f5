//! Whether frps is the one it should be, when the owner has given a CA.

use std::{fs, os::unix::fs::PermissionsExt, path::Path};

use base64::{Engine, engine::general_purpose::STANDARD};
use qudata_tunnel::TunnelState;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};

use crate::{
    frps::{Frps, Options},
    local::echo,
    site::{Site, all_up, is_down, tcp, until},
};

/// A CA, and a certificate of it for 127.0.0.1.
fn certificates(dir: &Path, name: &str) -> (std::path::PathBuf, std::path::PathBuf, std::path::PathBuf) {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca_key = KeyPair::generate().unwrap();
    let ca = params.self_signed(&ca_key).unwrap();
    let issuer = Issuer::new(params, ca_key);
    let key = KeyPair::generate().unwrap();
    let leaf =
        CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap().signed_by(&key, &issuer).unwrap();
    let path = |end: &str| dir.join(format!("{name}-{end}.pem"));
    let write = |end: &str, text: String| {
        fs::write(path(end), text).unwrap();
        fs::set_permissions(path(end), fs::Permissions::from_mode(0o644)).unwrap();
        path(end)
    };
    let certificate = "CERTIFICATE";
    (
        write("ca", pem(certificate, ca.der())),
        write("cert", pem(certificate, leaf.der())),
        write("key", pem("PRIVATE KEY", &key.serialize_der())),
    )
}

fn pem(label: &str, der: &[u8]) -> String {
    format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", STANDARD.encode(der))
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs frps and frpc"]
async fn orig_f7_only_the_right_frps_is_joined() {
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let (right_ca, cert, key) = certificates(dir.path(), "right");
    let (wrong_ca, _, _) = certificates(dir.path(), "wrong");
    let frps = Frps::with(&Options { token: "token", tls: Some((&cert, &key)) });
    let mut site = Site::new(&frps, "agent", "token");
    site.setup.server.ca = Some(wrong_ca);
    let routes = vec![tcp("vm.22", frps.tcp(0), echo().await)];
    let tunnel = site.start(routes.clone());
    until(&tunnel, "the distrust", |s| is_down(s, "frps_untrusted")).await;
    let TunnelState::Down { reason, .. } = tunnel.status().borrow().state.clone() else { panic!() };
    assert!(reason.contains("certificate"), "{reason}");
    drop(tunnel);
    site.setup.server.ca = Some(right_ca.clone());
    let tunnel = site.start(routes.clone());
    until(&tunnel, "the route", |s| all_up(s, 1)).await;
    tunnel.stop().await.unwrap();
    // A CA that frpc's user may not read.
    fs::set_permissions(&right_ca, fs::Permissions::from_mode(0o600)).unwrap();
    if fs::read(&right_ca).is_ok() && site.setup.uid == 60_101 {
        let tunnel = site.start(routes);
        until(&tunnel, "the complaint", |s| is_down(s, "frps_untrusted")).await;
        let TunnelState::Down { reason, .. } = tunnel.status().borrow().state.clone() else { panic!() };
        println!("a CA that cannot be read: {reason}");
        tunnel.stop().await.unwrap();
    }
}
