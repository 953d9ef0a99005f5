//! What is said to the control plane and what it answers. Owns the bodies and the checks of replies: wrong types are
//! refused, fields that this version does not know are not looked at, so that the service may grow.

use std::net::Ipv4Addr;

use qudata_api::{Sample, Status};
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{
    instance::{record::Sealed, spec::check_tunnel_token},
    secret::AgentSecret,
};

/// Numbers beyond this are not exact in JSON for many readers.
const LARGEST_NUMBER: u64 = 1 << 53;

/// `POST /init`.
#[derive(Debug, Serialize)]
pub(super) struct InitBody {
    pub(super) agent_id: Uuid,
    pub(super) agent_port: u16,
    /// 0.0.0.0 where it is not known.
    pub(super) address: Ipv4Addr,
    pub(super) fingerprint: String,
    pub(super) pid: u32,
    pub(super) version: &'static str,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(super) test_mode: bool,
}

/// A reply with a 2xx status that is not what the call answers. Never quotes the reply: it may hold secrets.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum ReplyError {
    /// No JSON, or not of the right shape.
    #[error("the reply to {call} is not what the contract says ({what}, line {line}, column {column})")]
    Shape {
        /// The call.
        call: &'static str,
        /// What kind of fault it is.
        what: &'static str,
        /// Where.
        line: usize,
        /// Where.
        column: usize,
    },
    /// The status is a success, the reply says that it is none.
    #[error("the reply to {call} says that it failed, with a status that says it did not")]
    NotOk {
        /// The call.
        call: &'static str,
    },
    /// `secret_key` cannot be a secret.
    #[error(
        "secret_key in the reply to /init is refused: 16 to 512 printable characters without spaces are allowed"
    )]
    Secret,
    /// `tunnel_token` cannot stand in a domain.
    #[error("tunnel_token in the reply to /init is refused: {}", crate::instance::spec::TUNNEL_TOKEN_FORM)]
    TunnelToken,
    /// `secret_key` is empty, and there is no saved one.
    #[error("the reply to /init says to use the saved secret, and none is saved")]
    NoSecret,
}

#[derive(Deserialize)]
struct InitReply {
    ok: bool,
    #[serde(default)]
    data: Option<InitFields>,
}

/// As in the original, a field that is absent or null has the value of nothing.
#[derive(Deserialize)]
#[allow(dead_code, reason = "the types of fields that nothing depends on are checked all the same")]
struct InitFields {
    #[serde(default)]
    agent_created: Option<bool>,
    #[serde(default)]
    emergency_reinit: Option<bool>,
    #[serde(default)]
    host_exists: Option<bool>,
    #[serde(default)]
    secret_key: Option<SecretString>,
    #[serde(default)]
    tunnel_token: Option<SecretString>,
    #[serde(default)]
    instance_running: Option<bool>,
}

/// What `/init` answered, checked.
#[derive(Debug)]
pub(super) struct Welcome {
    /// None: the saved one stays.
    pub(super) secret: Option<AgentSecret>,
    /// None: the saved one stays.
    pub(super) tunnel_token: Option<Sealed>,
    pub(super) host_exists: bool,
    pub(super) emergency_reinit: bool,
    pub(super) instance_running: bool,
}

impl Welcome {
    pub(super) fn parse(body: &[u8]) -> Result<Self, ReplyError> {
        let call = "/init";
        let reply: InitReply = serde_json::from_slice(body).map_err(|error| shape(call, &error))?;
        let fields = reply.data.filter(|_| reply.ok).ok_or(ReplyError::NotOk { call })?;
        let given = |text: &Option<SecretString>| {
            text.clone().filter(|text: &SecretString| !text.expose_secret().is_empty())
        };
        let secret = given(&fields.secret_key)
            .map(|text| AgentSecret::parse(text.expose_secret()).ok_or(ReplyError::Secret));
        let tunnel_token = given(&fields.tunnel_token)
            .map(|text| check_tunnel_token(text.expose_secret()).ok_or(ReplyError::TunnelToken));
        Ok(Self {
            secret: secret.transpose()?,
            tunnel_token: tunnel_token.transpose()?,
            host_exists: fields.host_exists.unwrap_or_default(),
            emergency_reinit: fields.emergency_reinit.unwrap_or_default(),
            instance_running: fields.instance_running.unwrap_or_default(),
        })
    }
}

/// Where and of what kind, but not the text: serde quotes values.
fn shape(call: &'static str, error: &serde_json::Error) -> ReplyError {
    let what = match error.classify() {
        serde_json::error::Category::Data => "a field is missing or has another type",
        serde_json::error::Category::Eof => "it ends in the middle",
        serde_json::error::Category::Syntax | serde_json::error::Category::Io => "it is not JSON",
    };
    ReplyError::Shape { call, what, line: error.line(), column: error.column() }
}

/// The oldest instance, for `/stats`.
#[derive(Debug, Clone, PartialEq)]
pub struct StatsInput {
    /// Its status.
    pub status: Status,
    /// What its guest last said of itself.
    pub sample: Option<Sample>,
}

/// `POST /stats`. The types are those of the original's service: the temperature is a whole number.
#[derive(Debug, PartialEq, Serialize)]
pub(super) struct StatsBody {
    gpu_util: f64,
    gpu_temp: u16,
    cpu_util: f64,
    ram_util: f64,
    mem_util: f64,
    inet_in: u64,
    inet_out: u64,
    status: Status,
}

impl StatsBody {
    /// Figures of an instance. What the guest has not said is 0; what it has said is bounded once more here, whatever the
    /// sampler let through.
    pub(super) fn of(input: &StatsInput) -> Self {
        let sample = input.sample.as_ref();
        let percent = |value: Option<f64>| bounded(value, 100.0);
        let celsius = bounded(sample.and_then(|s| s.gpu_celsius), 150.0);
        let bytes = |value: Option<u64>| value.unwrap_or_default().min(LARGEST_NUMBER);
        Self {
            gpu_util: percent(sample.and_then(|s| s.gpu_percent)),
            gpu_temp: format!("{celsius:.0}").parse().unwrap_or_default(),
            cpu_util: percent(sample.and_then(|s| s.cpu_percent)),
            ram_util: percent(sample.map(|s| s.ram_percent)),
            mem_util: percent(sample.and_then(|s| s.gpu_memory_percent)),
            inet_in: bytes(sample.map(|s| s.net_rx_bytes)),
            inet_out: bytes(sample.map(|s| s.net_tx_bytes)),
            status: input.status,
        }
    }

    /// The last instance has gone.
    pub(super) fn destroyed() -> Self {
        Self::of(&StatsInput { status: Status::Destroyed, sample: None })
    }
}

/// From 0 to `most`, with two decimals; anything that is no number is 0.
fn bounded(value: Option<f64>, most: f64) -> f64 {
    let value = value.filter(|value| value.is_finite()).unwrap_or_default();
    (value.clamp(0.0, most) * 100.0).round() / 100.0
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;
    use proptest::prelude::*;

    use super::*;

    fn parse(text: &str) -> Result<Welcome, ReplyError> {
        Welcome::parse(text.as_bytes())
    }

    #[test]
    fn the_services_reply_is_understood() {
        let welcome = parse(
            r#"{"ok":true,"data":{"agent_created":true,"emergency_reinit":false,"host_exists":true,
            "secret_key":"sk-0123456789abcdef","tunnel_token":"abc-1","instance_running":true,"new":{"a":[1]}},"more":1}"#,
        )
        .unwrap();
        assert!(welcome.secret.unwrap().matches(b"sk-0123456789abcdef"));
        assert_eq!(welcome.tunnel_token.unwrap().open(), "abc-1");
        assert!(welcome.host_exists && welcome.instance_running && !welcome.emergency_reinit);
        for little in [
            r#"{"ok":true,"data":{}}"#,
            r#"{"ok":true,"data":{"secret_key":"","tunnel_token":"","host_exists":null}}"#,
        ] {
            let welcome = parse(little).unwrap();
            assert!(welcome.secret.is_none() && welcome.tunnel_token.is_none() && !welcome.host_exists);
        }
    }

    #[test]
    fn other_replies_are_refused_without_a_word_of_them() {
        let long = format!(r#"{{"ok":true,"data":{{"secret_key":"{}"}}}}"#, "canary".repeat(2000));
        let deep = "[".repeat(100_000);
        for (text, said) in [
            ("", "ends in the middle"),
            ("<html>canary</html>", "not JSON"),
            ("{\"ok\":true,\"data\":{", "ends in the middle"),
            ("\"canary\"", "another type"),
            ("[]", "another type"),
            (r#"{"ok":"canary","data":{}}"#, "another type"),
            (r#"{"data":{}}"#, "missing"),
            (r#"{"ok":false,"data":{}}"#, "says that it failed"),
            (r#"{"ok":true}"#, "says that it failed"),
            (r#"{"ok":true,"data":"canary"}"#, "another type"),
            (r#"{"ok":true,"data":{"host_exists":"canary"}}"#, "another type"),
            (r#"{"ok":true,"data":{"host_exists":1}}"#, "another type"),
            (r#"{"ok":true,"data":{"secret_key":1234567890123456}}"#, "another type"),
            (r#"{"ok":true,"data":{"secret_key":["canary"]}}"#, "another type"),
            (r#"{"ok":true,"data":{"agent_created":"canary"}}"#, "another type"),
            (r#"{"ok":true,"data":{"instance_running":1e999}}"#, "not JSON"),
            (r#"{"ok":true,"data":{"secret_key":"canary"}}"#, "secret_key"),
            (r#"{"ok":true,"data":{"secret_key":"canary canary canary canary"}}"#, "secret_key"),
            (r#"{"ok":true,"data":{"secret_key":"canary-canary-canary\r\nX-Evil: 1"}}"#, "secret_key"),
            (r#"{"ok":true,"data":{"secret_key":"canary-canary-canary-\u00e9"}}"#, "secret_key"),
            (r#"{"ok":true,"data":{"tunnel_token":"canary\"\n[[proxies]]"}}"#, "tunnel_token"),
            (
                r#"{"ok":true,"data":{"secret_key":"canary-canary-canary","secret_key":"canary-canary-canary"}}"#,
                "another type",
            ),
            (long.as_str(), "secret_key"),
            (deep.as_str(), "another type"),
        ] {
            let error = parse(text).expect_err(text);
            let printed = format!("{error} {error:?}");
            assert!(printed.contains(said), "{text:.80}: {printed}");
            assert!(!printed.contains("canary"), "{printed}");
        }
    }

    fn sample() -> Sample {
        Sample {
            at: Timestamp::UNIX_EPOCH,
            cpu_percent: Some(12.345),
            ram_percent: 50.0,
            net_rx_bytes: 1,
            net_tx_bytes: 2,
            gpu_percent: Some(99.0),
            gpu_celsius: Some(61.5),
            gpu_memory_percent: Some(7.0),
        }
    }

    #[test]
    fn figures_have_the_names_and_types_of_the_contract() {
        let body = StatsBody::of(&StatsInput { status: Status::Running, sample: Some(sample()) });
        assert_eq!(
            serde_json::to_string(&body).unwrap(),
            r#"{"gpu_util":99.0,"gpu_temp":62,"cpu_util":12.35,"ram_util":50.0,"mem_util":7.0,"inet_in":1,"inet_out":2,"status":"running"}"#
        );
        let last = serde_json::to_value(StatsBody::destroyed()).unwrap();
        assert_eq!((&last["status"], &last["cpu_util"]), (&"destroyed".into(), &0.0.into()));
    }

    fn any_number() -> impl Strategy<Value = f64> {
        prop_oneof![any::<f64>(), Just(f64::NAN), Just(f64::INFINITY), Just(-1.0), Just(1e308)]
    }

    proptest! {
        #[test]
        fn no_guest_can_make_a_figure_that_is_none(numbers in proptest::collection::vec(any_number(), 5), bytes in any::<u64>()) {
            let sample = Sample {
                cpu_percent: Some(numbers[0]),
                ram_percent: numbers[1],
                gpu_percent: Some(numbers[2]),
                gpu_celsius: Some(numbers[3]),
                gpu_memory_percent: Some(numbers[4]),
                net_rx_bytes: bytes,
                ..sample()
            };
            let body = StatsBody::of(&StatsInput { status: Status::Running, sample: Some(sample) });
            for percent in [body.cpu_util, body.ram_util, body.gpu_util, body.mem_util] {
                prop_assert!((0.0..=100.0).contains(&percent));
            }
            prop_assert!(body.gpu_temp <= 150 && body.inet_in <= LARGEST_NUMBER);
            prop_assert!(serde_json::to_string(&body).is_ok_and(|text| !text.contains("null")));
        }

        #[test]
        fn any_bytes_are_a_reply(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = Welcome::parse(&bytes);
        }
    }
}
