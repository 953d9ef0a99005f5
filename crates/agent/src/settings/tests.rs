//! Settings by table: every key, every layer, every refusal.

use std::{collections::BTreeSet, io, path::Path};

use proptest::prelude::*;
use secrecy::ExposeSecret;

use super::*;

fn from<'a>(file: &str, env: &[(&str, &str)]) -> LoadFrom<'a> {
    LoadFrom {
        file: Some(SettingsFile { path: "/etc/qudata/agent.toml".into(), text: file.into() }),
        env: env.iter().map(|(name, value)| (name.into(), value.into())).collect(),
        flags: Vec::new(),
        read: &|_| Err(io::ErrorKind::NotFound.into()),
        exists: &|_| false,
    }
}

fn load(file: &str, env: &[(&str, &str)]) -> Result<Settings, Vec<String>> {
    let mut from = from(file, env);
    from.flags.push(("standalone", "true".into()));
    problems(Settings::load(&from))
}

fn problems(result: Result<Settings, SettingsError>) -> Result<Settings, Vec<String>> {
    result.map_err(|e| e.problems.iter().map(ToString::to_string).collect())
}

fn refusals(file: &str, env: &[(&str, &str)]) -> Vec<String> {
    load(file, env).expect_err("must be refused")
}

#[test]
fn defaults_are_those_of_the_original() {
    let s = load("", &[]).unwrap();
    assert_eq!(s.listen.to_string(), "127.0.0.1");
    assert_eq!((s.vm_cpus, s.vm_memory, s.vm_storage_gb), (4, ByteSize::from_gib(8), 50));
    assert_eq!((s.accel, s.firmware, s.tunnel), (Accel::Kvm, FirmwareKind::Uefi, TunnelKind::None));
    assert_eq!(s.base_image, Path::new("/var/lib/qudata/images/qudata-base.qcow2"));
    assert_eq!(s.management_key, Path::new("/var/lib/qudata/.ssh/management_key"));
    assert_eq!(s.ovmf_code, Path::new("/usr/share/OVMF/OVMF_CODE_4M.fd"));
    assert!(s.api_key.is_none() && s.gpu_pci_addrs.is_empty() && s.agent_port.is_none());
}

/// Documentation that differs from the code is worse than none.
#[test]
fn documented_defaults_are_the_real_ones() {
    let real = format!("{:?}", load("", &[]).unwrap());
    for key in keys::KEYS {
        if key.default.is_empty() || key.default.contains(['<', ' ', '$']) {
            continue;
        }
        let again = load("", &[(&key.env(), key.default)]).unwrap_or_else(|e| panic!("{}: {e:?}", key.name));
        assert_eq!(format!("{again:?}"), real, "{}", key.name);
    }
}

#[test]
fn the_names_of_the_original_exist() {
    let known: BTreeSet<String> = describe().into_iter().map(|doc| doc.env).collect();
    for name in [
        "API_KEY",
        "GPU_PCI_ADDRS",
        "BASE_IMAGE",
        "DEBUG",
        "SERVICE_URL",
        "FRP_SERVER",
        "FRP_TOKEN",
        "FRP_CA",
        "PUBLIC_ADDRESS",
        "DATA_DIR",
        "LOG_DIR",
        "FRPC_BINARY",
        "FRPC_CONFIG",
        "QEMU_BINARY",
        "OVMF_CODE",
        "OVMF_VARS",
        "IMAGE_DIR",
        "VM_RUN_DIR",
        "GPU_PCI_ADDR",
        "MANAGEMENT_KEY",
        "VM_CPUS",
        "VM_MEMORY",
        "STANDALONE",
        "AGENT_PORT",
        "ACCEL",
        "TUNNEL",
        "LISTEN",
    ] {
        assert!(known.contains(&format!("QUDATA_{name}")), "{name}");
    }
    assert_eq!(known.len(), keys::KEYS.len(), "names are unique");
}

/// A value for each key, and whether it shows in the settings.
const VALUES: &[(&str, &str, bool)] = &[
    ("standalone", "1", true),
    ("debug", "true", true),
    ("listen", "0.0.0.0", true),
    ("agent_port", "15001", true),
    ("accel", "tcg", true),
    ("firmware", "direct", true),
    ("tunnel", "none", true),
    ("launcher", "detached", true),
    ("data_dir", "/d", true),
    ("log_dir", "/l", true),
    ("vm_run_dir", "/r", true),
    ("image_dir", "/i", true),
    ("base_image", "/b", true),
    ("qemu_binary", "/q", true),
    ("qemu_img", "/q", true),
    ("passt_binary", "/p", true),
    ("ovmf_code", "/c", true),
    ("ovmf_vars", "/v", true),
    ("vm_cpus", "2", true),
    ("vm_memory", "512M", true),
    ("vm_storage_gb", "10", true),
    ("gpu_pci_addrs", "65:00.0,0000:66:00.0", true),
    ("gpu_pci_addr", "67:00.0", true),
    ("gpu_after", "vfio", true),
    ("gpu_no_mmap", "true", true),
    ("api_key", "ak-1", true),
    ("api_key_file", "/k", false),
    ("service_url", "https://x.example/v0/", true),
    ("public_address", "203.0.113.7", true),
    ("location_city", "Санкт-Петербург", true),
    ("location_country", "RU", true),
    ("test_mode", "true", true),
    ("management_key", "/m", true),
    ("frpc_binary", "/f", true),
    ("frpc_config", "/f", true),
    ("frp_server", "frps.example", true),
    ("frp_port", "7001", true),
    ("frp_token", "t", true),
    ("frp_token_file", "/t", false),
    ("frp_ca", "/ca", true),
    ("after_reboot", "stop", true),
    ("ready_timeout", "30", true),
    ("vm_uid_base", "800000", true),
    ("egress_allow", "10.0.0.0/8, fd00::1", true),
    ("disk_cache", "writeback", true),
    ("cpu_overcommit", "2", true),
    ("host_reserve_memory", "0", true),
    ("host_reserve_disk", "1T", true),
    ("ssh_ports", "2000-2001", true),
    ("app_ports", "3000-3001", true),
    ("management_ports", "4000-4000", true),
    ("region", "eu-1", true),
];

#[test]
fn every_key_works_in_file_and_environment() {
    assert_eq!(VALUES.len(), keys::KEYS.len(), "a key is missing here");
    for &(key, value, visible) in VALUES {
        let alone = |file: &str, env: &[(&str, &str)]| {
            let mut from = from(file, env);
            from.read = &|_| Ok(b"ak-2\n".to_vec());
            from.flags.push(("tunnel", "none".into()));
            if key == "tunnel" {
                from.flags.clear();
            }
            problems(Settings::load(&from)).map(|s| format!("{s:?} {}", s.api_key.is_some()))
        };
        let by_file = alone(&format!("{key} = \"{value}\""), &[]).unwrap();
        let by_env = alone("", &[(&keys::env_name(key), value)]).unwrap();
        assert_eq!(by_file, by_env, "{key}");
        let without = alone("tunnel = \"none\"", &[]).unwrap();
        assert!(!visible || key == "tunnel" || by_file != without, "{key} has no effect");
    }
}

#[test]
fn the_environment_wins_over_the_file_and_a_flag_over_both() {
    let mut from = from(
        "accel = \"tcg\"\nvm_cpus = 2\nfirmware = \"bios\"",
        &[("QUDATA_VM_CPUS", "3"), ("QUDATA_FIRMWARE", "uefi")],
    );
    from.flags = vec![("standalone", "true".into()), ("firmware", "direct".into())];
    let s = Settings::load(&from).unwrap();
    assert_eq!((s.accel, s.vm_cpus, s.firmware), (Accel::Tcg, 3, FirmwareKind::Direct));
}

#[test]
fn toml_values_may_be_typed() {
    let s = load(
        "debug = true\nvm_cpus = 16\ngpu_pci_addrs = [\"65:00.0\", \"66:00.0\"]\negress_allow = []\nagent_port = 15001",
        &[],
    )
    .unwrap();
    assert!(s.debug && s.egress_allow.is_empty());
    assert_eq!((s.vm_cpus, s.gpu_pci_addrs.len(), s.agent_port), (16, 2, Some(15001)));
}

#[test]
fn an_empty_variable_is_not_set() {
    let s =
        load("vm_cpus = 2", &[("QUDATA_API_KEY", ""), ("QUDATA_VM_CPUS", ""), ("QUDATA_GPU_PCI_ADDRS", "")])
            .unwrap();
    assert!(s.api_key.is_none() && s.gpu_pci_addrs.is_empty());
    assert_eq!(s.vm_cpus, 2);
}

#[test]
fn one_gpu_and_several_add_up() {
    let s = load("gpu_pci_addrs = [\"66:00.0\", \"65:00.0\"]", &[("QUDATA_GPU_PCI_ADDR", "0000:65:00.0")])
        .unwrap();
    let texts: Vec<_> = s.gpu_pci_addrs.iter().map(ToString::to_string).collect();
    assert_eq!(texts, ["0000:66:00.0", "0000:65:00.0"], "the owner's order is kept");
}

#[test]
fn a_table_in_the_file_is_another_spelling_of_the_names() {
    for text in ["gpu.after = \"vfio\"", "[gpu]\nafter = \"vfio\"", "gpu_after = \"vfio\""] {
        assert_eq!(load(text, &[]).unwrap().gpu_after, AfterUse::Vfio, "{text}");
    }
    let said = refusals("gpu.afer = 1", &[]).join("\n");
    assert!(said.contains("gpu.afer is no setting") && said.contains("gpu_after"), "{said}");
    let said = refusals("gpu.after = \"never\"", &[]).join("\n");
    assert!(said.contains("gpu.after") && said.contains("host or vfio"), "{said}");
}

#[test]
fn a_mistyped_name_is_refused_with_the_nearest() {
    for (name, meant) in [
        ("QUDATA_ACEL", "QUDATA_ACCEL"),
        ("QUDATA_GPU_PCI_ADRS", "QUDATA_GPU_PCI_ADDR"),
        ("QUDATA_accel", "QUDATA_ACCEL"),
        ("QUDATA_VM_CPU", "QUDATA_VM_CPUS"),
    ] {
        let said = refusals("", &[(name, "canary")]).join("\n");
        assert!(said.contains(name) && said.contains(&format!("did you mean {meant}")), "{said}");
        assert!(!said.contains("canary"), "the value of an unknown name may be a secret: {said}");
    }
    let said = refusals("acel = \"kvm\"", &[]).join("\n");
    assert!(said.contains("acel is no setting (/etc/qudata/agent.toml): did you mean accel?"), "{said}");
    let said = refusals("", &[("QUDATA_SOMETHING_ELSE_ALTOGETHER", "1")]).join("\n");
    assert!(said.contains("is no setting") && !said.contains("did you mean"), "{said}");
    assert!(load("", &[("PATH", "/bin"), ("QUDATAX", "1")]).is_ok());
}

#[test]
fn malformed_values_are_refused_with_key_value_and_what_is_allowed() {
    for (key, value, allowed) in [
        ("standalone", "yes", "true, false, 1 or 0"),
        ("debug", "TRUE", "true, false, 1 or 0"),
        ("listen", "localhost", "an IP address"),
        ("agent_port", "0", "1 to 65535"),
        ("agent_port", "70000", "1 to 65535"),
        ("accel", "xen", "kvm or tcg"),
        ("firmware", "UEFI", "uefi, bios or direct"),
        ("tunnel", "ssh", "frp or none"),
        ("launcher", "docker", "auto, systemd or detached"),
        ("data_dir", "relative", "an absolute path"),
        ("data_dir", "/a/../b", "an absolute path"),
        ("vm_cpus", "0", "1 to 1024"),
        ("vm_cpus", "+4", "1 to 1024"),
        ("vm_cpus", "4.5", "1 to 1024"),
        ("vm_memory", "lots", "512M"),
        ("vm_memory", "7", "512M"),
        ("vm_storage_gb", "-1", "1 to"),
        ("gpu_pci_addr", "65", "PCI address"),
        ("gpu_after", "free", "host or vfio"),
        ("gpu_pci_addrs", "65:00.0,65:00.0", "each once"),
        ("service_url", "internal.qudata.ai", "https address"),
        ("service_url", "ftp://x", "https address"),
        ("service_url", "http://x.example", "https address"),
        ("public_address", "::1", "an IPv4 address"),
        ("location_city", " x", "64 characters"),
        ("test_mode", "yes", "true, false"),
        ("frp_server", "a b", "host name"),
        ("frp_server", "{{.Envs.X}}", "host name"),
        ("frp_port", "0", "1 to 65535"),
        ("frp_ca", "ca.pem", "an absolute path"),
        ("after_reboot", "resume", "start or stop"),
        ("ready_timeout", "0", "1 to 86400"),
        ("vm_uid_base", "0", "10000 to"),
        ("egress_allow", "10.0.0.0/33", "networks"),
        ("egress_allow", "lan", "networks"),
        ("disk_cache", "unsafe", "none or writeback"),
        ("ssh_ports", "10000", "two ports"),
        ("ssh_ports", "200-100", "two ports"),
        ("ssh_ports", "1-100", "two ports"),
        ("region", "Ru1", "lower-case"),
        ("region", "-a", "lower-case"),
    ] {
        for said in
            [refusals(&format!("{key} = \"{value}\""), &[]), refusals("", &[(&keys::env_name(key), value)])]
        {
            let said = said.join("\n");
            assert!(
                said.to_lowercase().contains(key) && said.contains(value) && said.contains(allowed),
                "{said}"
            );
        }
    }
    let said = refusals("vm_cpus = 1.5\naccel = [\"kvm\"]\n[debug]\nx = 1", &[]);
    assert_eq!(said.len(), 3, "{said:?}");
}

#[test]
fn all_problems_are_told_at_once_and_overridden_ones_too() {
    let said = refusals("accel = \"xen\"\nfoo = 1", &[("QUDATA_ACCEL", "tcg"), ("QUDATA_VM_CPUS", "many")]);
    assert_eq!(said.len(), 3, "{said:?}");
    let shown = SettingsError { problems: said.into_iter().map(Problem).collect() }.to_string();
    assert_eq!(shown.lines().count(), 4, "{shown}");
}

#[test]
fn secrets_are_never_in_an_error() {
    for file in [
        "api_key = \"canary\"",
        "api_key = canary",
        "api_key = \"ak-canary\napi_key = \"ak-canary\"",
        "api_key = [\"ak-canary\"]",
        "api_key = \"ak-canary\"\napi_key = \"ak-canary\"",
        "api_key = \"ak-canary x\"",
    ] {
        let error = Settings::load(&from(file, &[])).unwrap_err();
        let said = format!("{error} {error:?} {:?}", from(file, &[]));
        assert!(!said.contains("canary"), "{said}");
        assert!(said.contains("api_key") || said.contains("line "), "{said}");
    }
    let error = Settings::load(&from("", &[("QUDATA_API_KEY", "canary")])).unwrap_err().to_string();
    assert!(error.contains("QUDATA_API_KEY") && !error.contains("canary"), "{error}");
    let error = Settings::load(&from("frp_token = \"canary canary\"", &[])).unwrap_err().to_string();
    assert!(error.contains("frp_token") && !error.contains("canary"), "{error}");
    let both = "api_key = \"ak-canary\"\nfrp_token = \"canary\"";
    let debug = format!("{:?}", load(both, &[]).unwrap());
    assert!(!debug.contains("canary"), "{debug}");
}

#[test]
fn a_file_that_is_no_toml_is_refused_with_the_line() {
    let said = refusals("accel = \"tcg\"\nvm cpus = 4\n", &[]).join("\n");
    assert!(said.contains("/etc/qudata/agent.toml, line 2"), "{said}");
}

#[test]
fn the_api_key_comes_from_the_strongest_place() {
    let read = |path: &Path| match path.to_str() {
        Some("/k") => Ok(b"ak-file\n".to_vec()),
        Some("/c/api_key") => Ok(b"ak-credential".to_vec()),
        Some("/bad") => Ok(b"canary".to_vec()),
        _ => Err(io::Error::from(io::ErrorKind::NotFound)),
    };
    let key = |env: &[(&str, &str)]| {
        let mut from = from("tunnel = \"none\"", env);
        from.read = &read;
        problems(Settings::load(&from)).map(|s| s.api_key.map(|k| k.expose_secret().to_owned()))
    };
    let credentials = ("CREDENTIALS_DIRECTORY", "/c");
    assert_eq!(key(&[]).unwrap(), None);
    assert_eq!(key(&[credentials]).unwrap().as_deref(), Some("ak-credential"));
    assert_eq!(key(&[("CREDENTIALS_DIRECTORY", "/empty")]).unwrap(), None);
    assert_eq!(key(&[credentials, ("QUDATA_API_KEY_FILE", "/k")]).unwrap().as_deref(), Some("ak-file"));
    assert_eq!(
        key(&[("QUDATA_API_KEY_FILE", "/k"), ("QUDATA_API_KEY", "ak-env")]).unwrap().as_deref(),
        Some("ak-env")
    );
    let said = key(&[("QUDATA_API_KEY_FILE", "/missing")]).unwrap_err().join("\n");
    assert!(said.contains("QUDATA_API_KEY_FILE") && said.contains("/missing"), "{said}");
    let said = key(&[("QUDATA_API_KEY_FILE", "/bad")]).unwrap_err().join("\n");
    assert!(said.contains("ak-") && !said.contains("canary"), "{said}");
}

#[test]
fn the_frp_token_is_looked_for_as_the_api_key_is() {
    let read = |path: &Path| match path.to_str() {
        Some("/t") => Ok(b"from-file\n".to_vec()),
        Some("/c/frp_token") => Ok(b"from-credential".to_vec()),
        Some("/bad") => Ok(b"canary canary".to_vec()),
        _ => Err(io::Error::from(io::ErrorKind::NotFound)),
    };
    let token = |env: &[(&str, &str)]| {
        let mut from = from("", env);
        from.read = &read;
        problems(Settings::load(&from)).map(|s| s.frp_token.map(|t| t.expose_secret().to_owned()))
    };
    assert_eq!(token(&[]).unwrap(), None);
    assert_eq!(token(&[("CREDENTIALS_DIRECTORY", "/c")]).unwrap().as_deref(), Some("from-credential"));
    assert_eq!(token(&[("QUDATA_FRP_TOKEN_FILE", "/t")]).unwrap().as_deref(), Some("from-file"));
    let both = [("QUDATA_FRP_TOKEN_FILE", "/t"), ("QUDATA_FRP_TOKEN", "given")];
    assert_eq!(token(&both).unwrap().as_deref(), Some("given"));
    let said = token(&[("QUDATA_FRP_TOKEN_FILE", "/bad")]).unwrap_err().join("\n");
    assert!(said.contains("QUDATA_FRP_TOKEN_FILE") && !said.contains("canary"), "{said}");
}

#[test]
fn ssh_ports_behind_a_tunnel_are_those_of_the_tunnel_server() {
    let read = |file| problems(Settings::load(&from(file, &[])));
    let said = read("ssh_ports = \"9000-9100\"").unwrap_err().join("\n");
    assert!(said.contains("QUDATA_SSH_PORTS (9000-9100)") && said.contains("10000 to 15000"), "{said}");
    // Routes lead to 127.0.0.1: what the owner has there must not be published under a tenant's name.
    let said = read("listen = \"10.0.0.5\"").unwrap_err().join("\n");
    assert!(said.contains("QUDATA_LISTEN=10.0.0.5") && read("listen = \"0.0.0.0\"").is_ok(), "{said}");
    let without = read("ssh_ports = \"9000-9100\"\ntunnel = \"none\"").unwrap();
    assert_eq!(without.ssh_ports.first, 9000);
}

#[test]
fn standalone_means_no_tunnel_and_frp_is_the_default_otherwise() {
    assert_eq!(Settings::load(&from("", &[])).unwrap().tunnel, TunnelKind::Frp);
    assert_eq!(Settings::load(&from("", &[("QUDATA_TUNNEL", "none")])).unwrap().tunnel, TunnelKind::None);
    let said = refusals("tunnel = \"frp\"", &[]).join("\n");
    assert!(said.contains("QUDATA_STANDALONE=true excludes QUDATA_TUNNEL=frp"), "{said}");
}

#[test]
fn the_tunnel_server_is_that_of_the_region_unless_it_is_named() {
    let server = |env: &[(&str, &str)]| Settings::load(&from("", env)).unwrap().frp_server();
    assert_eq!(server(&[]), "agent.ru1.qudata.ai");
    assert_eq!(server(&[("QUDATA_REGION", "eu-1")]), "agent.eu-1.qudata.ai");
    let named = [("QUDATA_REGION", "eu-1"), ("QUDATA_FRP_SERVER", "2001:db8::1")];
    assert_eq!(server(&named), "2001:db8::1");
    let location = load("location_city = \"Riga\"\nregion = \"eu-1\"", &[]).unwrap().location();
    assert_eq!((location.city.as_str(), location.region.as_str()), ("Riga", "eu-1"));
}

#[test]
fn overlapping_port_ranges_are_refused() {
    let said = refusals("", &[("QUDATA_APP_PORTS", "14000-20000")]).join("\n");
    assert!(
        said.contains("QUDATA_SSH_PORTS (10000-15000) and QUDATA_APP_PORTS (14000-20000) overlap"),
        "{said}"
    );
}

#[test]
fn the_newest_ovmf_that_exists_is_taken() {
    let mut from = from("tunnel = \"none\"", &[]);
    from.exists = &|path| path.ends_with("OVMF_CODE.fd");
    assert_eq!(Settings::load(&from).unwrap().ovmf_code, Path::new("/usr/share/OVMF/OVMF_CODE.fd"));
}

#[test]
fn only_the_default_file_may_be_missing() {
    let error = LoadFrom::host(Some(Path::new("/nonexistent/agent.toml")), Vec::new()).unwrap_err();
    assert_eq!(error.to_string(), "cannot read the settings file /nonexistent/agent.toml");
}

proptest! {
    #[test]
    fn no_file_and_no_value_panics_or_echoes_an_api_key(text in ".{0,200}", value in "[^\0]{0,40}") {
        let _ = load(&text, &[]);
        for key in keys::KEYS {
            let _ = load("", &[(&key.env(), &value)]);
        }
        let canary = format!("canary{value}");
        if let Err(said) = load("", &[("QUDATA_API_KEY", &canary)]) {
            prop_assert!(!said.join("\n").contains("canary"));
        }
    }
}
