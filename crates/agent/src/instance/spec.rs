//! From a create call's body to a validated wish. Pure: what depends on the host (free memory, taken names) is decided
//! by admission. Every refusal names the field, the value and what is allowed.

use std::collections::BTreeSet;

use qudata_api::{CreateBody, ErrorCode, NumberText};
use qudata_guest::{keys::GuestKey, seed::UserData};
use qudata_host::{pci::PciAddress, size::ByteSize};
use secrecy::ExposeSecret;

use super::record::Sealed;
use crate::refusal::Refusal;

/// The guest's SSH port.
pub const SSH_PORT: u16 = 22;
const MAX_PORTS: usize = 32;
const MAX_KEYS: usize = 64;
const MAX_GPUS: u32 = 64;
const MIN_MEMORY: ByteSize = ByteSize::from_mib(256);
const MAX_MEMORY: ByteSize = ByteSize::from_gib(64 * 1024);
const MAX_STORAGE_GIB: u64 = 1 << 20;
const MAX_CPUS: u32 = 1024;

/// Which GPUs are wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GpuWish {
    /// All free ones, as the original gives them.
    AllFree,
    /// That many.
    Count(u32),
    /// These.
    Addresses(Vec<PciAddress>),
}

/// A create call's body, checked for form. `None` means: the default, shrunk to what the host has free.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wish {
    /// Name asked for.
    pub name: Option<String>,
    /// vCPUs.
    pub cpus: Option<u32>,
    /// RAM.
    pub memory: Option<ByteSize>,
    /// Size of the disk.
    pub storage: Option<ByteSize>,
    /// Guest ports to publish.
    pub ports: BTreeSet<u16>,
    /// GPUs.
    pub gpus: GpuWish,
    /// The renter's keys.
    pub ssh_keys: Vec<String>,
    /// cloud-init user-data.
    pub user_data: Option<Sealed>,
    /// Domain label of the tunnel.
    pub tunnel_token: Option<Sealed>,
    /// What was accepted and is not honoured.
    pub warnings: Vec<String>,
}

impl Wish {
    /// Checks a body.
    ///
    /// # Errors
    /// The first field that is not allowed.
    pub fn from_body(body: &CreateBody, token_required: bool) -> Result<Self, Refusal> {
        let mut warnings: Vec<String> = body
            .legacy_fields()
            .into_iter()
            .map(|field| {
                format!("{field} was accepted and is not honoured: instances are virtual machines, not containers; use user_data")
            })
            .collect();
        let ssh_keys = ssh_keys(body)?;
        Ok(Self {
            name: body.name.as_deref().map(name).transpose()?,
            cpus: body.cpus.as_ref().map(cpus).transpose()?,
            memory: body.memory.as_ref().map(memory).transpose()?,
            storage: body.storage_gb.as_ref().map(storage).transpose()?,
            ports: ports(body, &mut warnings)?,
            gpus: gpus(body)?,
            ssh_keys,
            user_data: user_data(body)?,
            tunnel_token: tunnel_token(body, token_required)?,
            warnings,
        })
    }
}

fn name(name: &str) -> Result<String, Refusal> {
    let inner = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    let ends = |c: Option<char>| c.is_some_and(|c| c != '-');
    let fine = (1..=63).contains(&name.len())
        && name.chars().all(inner)
        && ends(name.chars().next())
        && ends(name.chars().next_back());
    let allowed = "1 to 63 lower-case letters, digits and dashes are, not starting or ending with a dash";
    fine.then(|| name.to_owned()).ok_or_else(|| Refusal::field("name", name, allowed))
}

/// A whole number in its only spelling: no sign, no leading zero, no blanks.
fn whole(text: &NumberText) -> Option<u64> {
    let text = text.to_string();
    let number: u64 = text.parse().ok()?;
    (number.to_string() == text).then_some(number)
}

fn cpus(text: &NumberText) -> Result<u32, Refusal> {
    let refuse =
        || Refusal::field("cpus", text, format!("a whole number from 1 to {MAX_CPUS} is, for example \"8\""));
    let number = whole(text).and_then(|n| u32::try_from(n).ok());
    number.filter(|n| (1..=MAX_CPUS).contains(n)).ok_or_else(refuse)
}

fn memory(text: &NumberText) -> Result<ByteSize, Refusal> {
    let allowed = format!("a size of at least {MIN_MEMORY} is, for example \"32G\"");
    let refuse = || Refusal::field("memory", text, &allowed);
    let size: ByteSize = text.to_string().parse().map_err(|_| refuse())?;
    // QEMU takes whole MiB.
    let whole = ByteSize::from_mib(size.mib());
    if (MIN_MEMORY..=MAX_MEMORY).contains(&whole) { Ok(whole) } else { Err(refuse()) }
}

fn storage(text: &NumberText) -> Result<ByteSize, Refusal> {
    let allowed = format!("a whole number of GiB from 1 to {MAX_STORAGE_GIB} is, for example 100");
    let gib = whole(text).filter(|n| (1..=MAX_STORAGE_GIB).contains(n));
    gib.map(ByteSize::from_gib).ok_or_else(|| Refusal::field("storage_gb", text, allowed))
}

fn ports(body: &CreateBody, warnings: &mut Vec<String>) -> Result<BTreeSet<u16>, Refusal> {
    let listed = body.ports.as_deref().unwrap_or_default();
    if listed.len() > MAX_PORTS {
        return Err(Refusal::field(
            "ports",
            format!("{} ports", listed.len()),
            format!("at most {MAX_PORTS} are"),
        ));
    }
    let mut ports = BTreeSet::new();
    for text in listed {
        let port = whole(text).and_then(|n| u16::try_from(n).ok()).filter(|p| *p > 0);
        let port = port.ok_or_else(|| Refusal::field("ports", text, "whole numbers from 1 to 65535 are"))?;
        if !ports.insert(port) {
            return Err(Refusal::field("ports", port, "each port may be listed once"));
        }
    }
    let keys_given = body.ssh_pubkeys.as_ref().is_some_and(|keys| !keys.is_empty());
    match body.ssh_enabled {
        Some(true) => _ = ports.insert(SSH_PORT),
        Some(false) if ports.remove(&SSH_PORT) => {
            warnings.push("port 22 is not published because ssh_enabled is false".to_owned());
        }
        None if keys_given => _ = ports.insert(SSH_PORT),
        Some(false) | None => {}
    }
    Ok(ports)
}

fn gpus(body: &CreateBody) -> Result<GpuWish, Refusal> {
    match (body.gpus, &body.gpu_addrs) {
        (Some(_), Some(_)) => Err(Refusal::field("gpus", "with gpu_addrs", "give one of the two")),
        (Some(count), None) if count > MAX_GPUS => Err(Refusal::field("gpus", count, "0 to 64 are")),
        (Some(count), None) => Ok(GpuWish::Count(count)),
        (None, None) => Ok(GpuWish::AllFree),
        (None, Some(texts)) => {
            let mut addresses = Vec::new();
            for text in texts {
                let address: PciAddress = text
                    .parse()
                    .map_err(|_| Refusal::field("gpu_addrs", text, "PCI addresses like 0000:65:00.0 are"))?;
                if addresses.contains(&address) {
                    return Err(Refusal::field("gpu_addrs", address, "each address may be listed once"));
                }
                addresses.push(address);
            }
            Ok(GpuWish::Addresses(addresses))
        }
    }
}

fn ssh_keys(body: &CreateBody) -> Result<Vec<String>, Refusal> {
    let texts = body.ssh_pubkeys.as_deref().unwrap_or_default();
    if texts.len() > MAX_KEYS {
        return Err(Refusal::field(
            "ssh_pubkeys",
            format!("{} keys", texts.len()),
            format!("at most {MAX_KEYS} are"),
        ));
    }
    texts.iter().map(|text| parse_key("ssh_pubkeys", text).map(|key| key.to_line())).collect()
}

/// Parses a renter's public key given in `field`.
pub(crate) fn parse_key(field: &'static str, text: &str) -> Result<GuestKey, Refusal> {
    GuestKey::parse(text).map_err(|e| Refusal::new(ErrorCode::InvalidField, format!("{field}: {e}")))
}

fn user_data(body: &CreateBody) -> Result<Option<Sealed>, Refusal> {
    let Some(text) = &body.user_data else { return Ok(None) };
    let text = text.expose_secret();
    if text.is_empty() {
        return Ok(None);
    }
    UserData::parse(text).map_err(|e| Refusal::new(ErrorCode::InvalidField, e.to_string()))?;
    Ok(Some(Sealed::new(text)))
}

fn tunnel_token(body: &CreateBody, required: bool) -> Result<Option<Sealed>, Refusal> {
    let token = body.tunnel_token.as_ref().map(|t| t.expose_secret()).filter(|t| !t.is_empty());
    let Some(token) = token else {
        if required {
            let sentence =
                "tunnel_token is missing; it is required because this host publishes ports through frp";
            return Err(Refusal::new(ErrorCode::InvalidField, sentence));
        }
        return Ok(None);
    };
    // The value is a secret and is not echoed.
    check_tunnel_token(token).map(Some).ok_or_else(|| {
        Refusal::new(ErrorCode::InvalidField, format!("tunnel_token is not allowed; {TUNNEL_TOKEN_FORM}"))
    })
}

/// What [`check_tunnel_token`] takes, as the end of a sentence.
pub(crate) const TUNNEL_TOKEN_FORM: &str =
    "1 to 190 letters, digits, dots, dashes and underscores are, beginning and ending with a letter or digit";

/// A token that can stand in the names of a tunnel: with a port after it still a domain that the tunnel takes, and without
/// anything that means something in a configuration file.
pub(crate) fn check_tunnel_token(token: &str) -> Option<Sealed> {
    let edge = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
    let inner = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    let fine = token.len() <= 190
        && token.chars().all(inner)
        && edge(token.chars().next())
        && edge(token.chars().next_back());
    fine.then(|| Sealed::new(token))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const KEY: &str =
        "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJdD7y3aLq454yWBdwLWbieU1ebz9/cu7/QEXn9OIeZJ renter";

    fn wish(json: serde_json::Value) -> Result<Wish, Refusal> {
        Wish::from_body(&serde_json::from_value(json).unwrap(), false)
    }

    #[test]
    fn the_platforms_body() {
        let wish = wish(serde_json::json!({
            "image": "pytorch", "env_variables": {}, "tunnel_token": "abc", "ssh_enabled": true,
            "ports": ["22", "8888"], "storage_gb": 100, "cpus": "8", "memory": "32G"
        }))
        .unwrap();
        assert_eq!(wish.ports, BTreeSet::from([22, 8888]));
        assert_eq!((wish.cpus, wish.memory), (Some(8), Some(ByteSize::from_gib(32))));
        assert_eq!((wish.storage, wish.gpus), (Some(ByteSize::from_gib(100)), GpuWish::AllFree));
        assert_eq!(wish.warnings.len(), 1, "{:?}", wish.warnings);
    }

    // orig §1.6: cpus, memory, storage and ports reached the command line unchecked.
    #[test]
    fn each_bad_field_is_named() {
        let long = "x".repeat(64);
        let cases = [
            (serde_json::json!({"cpus": "0"}), "cpus"),
            (serde_json::json!({"cpus": "08"}), "cpus"),
            (serde_json::json!({"cpus": "8,sockets=2"}), "cpus"),
            (serde_json::json!({"cpus": -1}), "cpus"),
            (serde_json::json!({"memory": "32G -snapshot"}), "memory"),
            (serde_json::json!({"memory": "1M"}), "memory"),
            (serde_json::json!({"storage_gb": -5}), "storage_gb"),
            (serde_json::json!({"storage_gb": "10 "}), "storage_gb"),
            (serde_json::json!({"ports": ["0"]}), "ports"),
            (serde_json::json!({"ports": ["022"]}), "ports"),
            (serde_json::json!({"ports": ["65536"]}), "ports"),
            (serde_json::json!({"ports": ["80", 80]}), "ports"),
            (serde_json::json!({"ports": (1..=33).collect::<Vec<i32>>()}), "ports"),
            (serde_json::json!({"name": "-x"}), "name"),
            (serde_json::json!({"name": "Ü"}), "name"),
            (serde_json::json!({"name": long}), "name"),
            (serde_json::json!({"gpus": 1, "gpu_addrs": []}), "gpus"),
            (serde_json::json!({"gpu_addrs": ["x"]}), "gpu_addrs"),
            (serde_json::json!({"gpu_addrs": ["65:00.0", "0000:65:00.0"]}), "gpu_addrs"),
            (serde_json::json!({"ssh_pubkeys": ["."]}), "ssh_pubkeys"),
            (serde_json::json!({"ssh_pubkeys": [format!("{KEY}\n{KEY}")]}), "ssh_pubkeys"),
            (serde_json::json!({"user_data": "rm -rf /"}), "user_data"),
            (serde_json::json!({"tunnel_token": "a\"\n[[proxies]]"}), "tunnel_token"),
        ];
        for (body, field) in cases {
            let refusal = wish(body.clone()).expect_err(&body.to_string());
            assert_eq!(refusal.code, ErrorCode::InvalidField, "{body}");
            assert!(refusal.sentence.starts_with(field), "{body}: {}", refusal.sentence);
        }
    }

    #[test]
    fn ssh_enabled_decides_about_port_22() {
        let ports = |json| wish(json).unwrap().ports;
        assert_eq!(ports(serde_json::json!({"ssh_enabled": true})), BTreeSet::from([22]));
        assert_eq!(ports(serde_json::json!({"ssh_pubkeys": [KEY]})), BTreeSet::from([22]));
        assert_eq!(ports(serde_json::json!({"ports": ["80"]})), BTreeSet::from([80]));
        let off = wish(serde_json::json!({"ssh_enabled": false, "ports": ["22", "80"]})).unwrap();
        assert_eq!(off.ports, BTreeSet::from([80]));
        assert_eq!(off.warnings.len(), 1);
    }

    // orig F2: a token went into the tunnel's configuration unescaped.
    #[test]
    fn orig_f2_a_tunnel_token_that_is_more_than_a_name_is_refused() {
        let huge = "x".repeat(10 << 10);
        let long = "x".repeat(191);
        for attack in [
            "canary\"",
            "canary'",
            "canary\n",
            "canary\r\n[[proxies]]",
            "canary\"]\n[[proxies]]\nname = \"x",
            "{{ .Envs.X }}",
            "canary}",
            "canary{",
            "canary\\",
            "canary#",
            "canary$",
            "canary ",
            " canary",
            "canary\0",
            "canary\u{e9}",
            "\u{202e}canary",
            "canary/..",
            "-canary",
            "canary-",
            ".canary",
            "canary.",
            "canary:80",
            "canary,b",
            "*",
            huge.as_str(),
            long.as_str(),
        ] {
            let refusal = wish(serde_json::json!({"tunnel_token": attack})).expect_err(attack);
            assert_eq!(refusal.code, ErrorCode::InvalidField, "{attack}");
            let said = &refusal.sentence;
            assert!(
                said.starts_with("tunnel_token") && said.contains("190") && !said.contains("canary"),
                "{said}"
            );
        }
        let longest = "x".repeat(190);
        for fine in ["a", "A-b_c.d", "0", "abc.ru1.qudata.ai", longest.as_str()] {
            let wish = wish(serde_json::json!({"tunnel_token": fine})).unwrap();
            assert_eq!(wish.tunnel_token.unwrap().open(), fine);
        }
    }

    #[test]
    fn secrets_are_not_echoed() {
        let refusal = wish(serde_json::json!({"tunnel_token": "secret canary"})).unwrap_err();
        assert!(!refusal.sentence.contains("canary"), "{refusal}");
        let required = Wish::from_body(&CreateBody::default(), true).unwrap_err();
        assert!(required.sentence.starts_with("tunnel_token"), "{required}");
    }

    proptest! {
        #[test]
        fn what_passes_is_in_range(cpus in ".{0,8}", memory in ".{0,8}", port in any::<i64>()) {
            let body = serde_json::json!({"cpus": cpus, "memory": memory, "ports": [port]});
            if let Ok(wish) = wish(body) {
                prop_assert!((1..=MAX_CPUS).contains(&wish.cpus.unwrap()));
                prop_assert!(wish.memory.unwrap() >= MIN_MEMORY);
                prop_assert!(!wish.ports.contains(&0));
            }
        }
    }
}
