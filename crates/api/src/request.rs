//! Bodies of calls. Accepts everything the original's platform sends and refuses every other field by name.

use std::fmt;

use secrecy::SecretString;
use serde::{Deserialize, Serialize, Serializer};
use utoipa::ToSchema;
use uuid::Uuid;

/// A number that the platform writes as a string (`"8"`) and people write as a number (`8`). Kept as text: what is
/// allowed is decided where the meaning is known.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(untagged)]
pub enum NumberText {
    /// `"8"`.
    Text(String),
    /// `8`.
    Number(i64),
}

impl fmt::Display for NumberText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Text(text) => f.write_str(text),
            Self::Number(number) => write!(f, "{number}"),
        }
    }
}

impl Serialize for NumberText {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

/// A value that is accepted and never looked at, printed or kept: it may hold a password.
#[derive(Clone, Deserialize, ToSchema)]
#[serde(transparent)]
#[schema(value_type = serde_json::Value)]
pub struct Opaque(serde_json::Value);

impl Opaque {
    /// Whether there is anything in it; the platform sends empty strings and lists for what it does not use.
    pub fn is_empty(&self) -> bool {
        match &self.0 {
            serde_json::Value::Null => true,
            serde_json::Value::String(s) => s.is_empty(),
            serde_json::Value::Array(a) => a.is_empty(),
            serde_json::Value::Object(o) => o.is_empty(),
            serde_json::Value::Bool(_) | serde_json::Value::Number(_) => false,
        }
    }
}

impl fmt::Debug for Opaque {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Opaque")
    }
}

/// `POST /instances`.
#[derive(Debug, Clone, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateBody {
    /// Domain label of the renter's tunnel; required when the tunnel is frp.
    #[schema(value_type = Option<String>)]
    pub tunnel_token: Option<SecretString>,
    /// Whether port 22 is published; default true when 22 is among `ports` or `ssh_pubkeys` are given.
    pub ssh_enabled: Option<bool>,
    /// Guest ports to publish: 1 to 65535, unique, at most 32.
    #[serde(default)]
    pub ports: Option<Vec<NumberText>>,
    /// Disk size in GiB; default 50.
    pub storage_gb: Option<NumberText>,
    /// vCPUs.
    pub cpus: Option<NumberText>,
    /// RAM, for example `32G`.
    pub memory: Option<NumberText>,
    /// Number of GPUs. With neither this nor `gpu_addrs`: all free ones.
    pub gpus: Option<u32>,
    /// GPUs by PCI address.
    pub gpu_addrs: Option<Vec<String>>,
    /// Name, unique on the host: 1 to 63 lower-case letters, digits and dashes.
    pub name: Option<String>,
    /// OpenSSH public keys that may log in as root.
    pub ssh_pubkeys: Option<Vec<String>>,
    /// cloud-init user-data: `#cloud-config`, a `#!` script or a MIME multipart.
    #[schema(value_type = Option<String>)]
    pub user_data: Option<SecretString>,
    /// Legacy: container image. Accepted, reported in `warnings`.
    pub image: Option<Opaque>,
    /// Legacy: tag of the container image. Accepted, reported in `warnings`.
    pub image_tag: Option<Opaque>,
    /// Legacy: container registry. Accepted, reported in `warnings`.
    pub registry: Option<Opaque>,
    /// Legacy: registry login. Accepted, reported in `warnings`.
    pub login: Option<Opaque>,
    /// Legacy: registry password. Accepted, never kept, reported in `warnings`.
    pub password: Option<Opaque>,
    /// Legacy: environment of the container. Accepted, reported in `warnings`.
    pub env_variables: Option<Opaque>,
    /// Legacy: command of the container. Accepted, reported in `warnings`.
    pub command: Option<Opaque>,
}

impl CreateBody {
    /// The legacy fields that carry something, by name.
    pub fn legacy_fields(&self) -> Vec<&'static str> {
        let fields = [
            ("image", &self.image),
            ("image_tag", &self.image_tag),
            ("registry", &self.registry),
            ("login", &self.login),
            ("password", &self.password),
            ("env_variables", &self.env_variables),
            ("command", &self.command),
        ];
        fields
            .into_iter()
            .filter(|(_, value)| value.as_ref().is_some_and(|v| !v.is_empty()))
            .map(|(name, _)| name)
            .collect()
    }
}

/// What `PUT` does to an instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Command {
    /// Let a paused VM go on, or boot a stopped one.
    Start,
    /// Pause the VM; memory is kept.
    Stop,
    /// Reset the VM.
    Restart,
}

/// `PUT /instances` and `PUT /instances/{id}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CommandBody {
    /// `start`, `stop` or `restart`.
    pub command: Command,
    /// Which instance; needed only when there are several.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub id: Option<Uuid>,
}

/// `POST /ssh` and `DELETE /ssh`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SshKeyBody {
    /// One OpenSSH public key, `ssh-ed25519 AAAA… comment`.
    pub ssh_pubkey: String,
    /// Which instance; needed only when there are several.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub id: Option<Uuid>,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PLATFORM: &str = r#"{"image":"pytorch","image_tag":"2.4","registry":"","login":"","password":"hunter2",
        "env_variables":{},"command":"","tunnel_token":"abc","ssh_enabled":true,"ports":["22","8888"],
        "storage_gb":100,"cpus":"8","memory":"32G"}"#;

    #[test]
    fn the_platforms_body_is_understood_and_its_password_never_printed() {
        let body: CreateBody = serde_json::from_str(PLATFORM).unwrap();
        assert_eq!(body.legacy_fields(), ["image", "image_tag", "password"]);
        assert_eq!(body.cpus, Some(NumberText::Text("8".into())));
        let printed = format!("{body:?}");
        assert!(!printed.contains("hunter2") && !printed.contains("abc"), "{printed}");
    }

    #[test]
    fn an_unknown_field_is_named() {
        let error = serde_json::from_str::<CreateBody>(r#"{"cpu":"8"}"#).unwrap_err().to_string();
        assert!(error.contains("`cpu`"), "{error}");
    }

    proptest! {
        #[test]
        fn bodies_never_panic(text in ".{0,200}") {
            let _ = serde_json::from_str::<CreateBody>(&text);
            let _ = serde_json::from_str::<CommandBody>(&text);
        }
    }
}
