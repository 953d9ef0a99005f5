//! What routes take from a request: JSON bodies, queries, ids. Owns the sentences about what is wrong with them, which
//! name the field and what is expected and never repeat a value: it may be a password in the wrong place.

use axum::{
    Json,
    body::Bytes,
    extract::{FromRequest, FromRequestParts, Path, Query, Request, rejection::JsonRejection},
    http::request::Parts,
};
use qudata_api::ErrorCode;
use qudata_host::pci::PciAddress;
use serde::{Deserialize, de::DeserializeOwned};
use utoipa::IntoParams;
use uuid::Uuid;

use crate::refusal::Refusal;

/// Longest sentence about a body; names of fields come from outside.
const SENTENCE: usize = 400;

/// A JSON body. Its content type is not looked at, as the original does not.
pub(super) struct JsonBody<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for JsonBody<T> {
    type Rejection = Refusal;

    async fn from_request(request: Request, state: &S) -> Result<Self, Refusal> {
        let OptionalBody(body) = OptionalBody::from_request(request, state).await?;
        body.map(Self).ok_or_else(|| {
            Refusal::new(ErrorCode::MalformedBody, "the body is empty; it must be a JSON object")
        })
    }
}

/// A JSON body that may be left out.
pub(super) struct OptionalBody<T>(pub(super) Option<T>);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for OptionalBody<T> {
    type Rejection = Refusal;

    async fn from_request(request: Request, state: &S) -> Result<Self, Refusal> {
        let bytes = Bytes::from_request(request, state)
            .await
            .map_err(|_| Refusal::new(ErrorCode::MalformedBody, "the body cannot be read"))?;
        if bytes.trim_ascii().is_empty() {
            return Ok(Self(None));
        }
        parse(&bytes).map(|body| Self(Some(body)))
    }
}

fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Refusal> {
    // serde would take an array for an object's fields in order, and nobody means that.
    if bytes.trim_ascii_start().first() != Some(&b'{') {
        return Err(Refusal::new(ErrorCode::MalformedBody, "the body must be a JSON object"));
    }
    match Json::from_bytes(bytes) {
        Ok(Json(body)) => Ok(body),
        Err(JsonRejection::JsonDataError(error)) => Err(describe_data(&error.body_text())),
        Err(rejection) => {
            let position = rejection.body_text();
            let position = position.rfind(" at line ").and_then(|at| position.get(at..)).unwrap_or_default();
            Err(Refusal::new(ErrorCode::MalformedBody, format!("the body is not JSON: it breaks{position}")))
        }
    }
}

/// How serde begins its sentences about data.
const BEGINNINGS: [&str; 9] = [
    "invalid type: ",
    "invalid value: ",
    "invalid length ",
    "unknown field ",
    "unknown variant ",
    "missing field ",
    "duplicate field ",
    "data did not match any variant ",
    "UUID parsing failed",
];

/// Turns `<preamble>: <field path>: <what serde says>` into a sentence without values.
fn describe_data(text: &str) -> Refusal {
    // The path ends where serde's sentence begins; a field's name can only make it begin early, which shows less.
    let found = BEGINNINGS.iter().filter_map(|b| text.find(b).map(|at| (at, *b))).min();
    let Some((at, beginning)) = found else {
        return Refusal::new(ErrorCode::MalformedBody, "the body is not of the expected form");
    };
    let (path, said) = text.split_at(at);
    let path = path.trim_end_matches(": ").rsplit(": ").next().unwrap_or_default();
    let path = if path.contains(' ') { "" } else { path };
    let (said, position) = said.rfind(" at line ").map_or((said, ""), |at| said.split_at(at));
    let (code, said) = match beginning {
        "invalid type: " | "invalid value: " => (ErrorCode::MalformedBody, without_value(said)),
        "data did not match any variant " => {
            (ErrorCode::MalformedBody, "a number, or a text with a number in it, is expected".to_owned())
        }
        "UUID parsing failed" => {
            (ErrorCode::InvalidField, "an id such as GET /instances shows is expected".to_owned())
        }
        "unknown variant " => (ErrorCode::InvalidField, said.to_owned()),
        _ => (ErrorCode::MalformedBody, said.to_owned()),
    };
    let place = if path.is_empty() || said.contains('`') && !beginning.contains("variant") {
        String::new()
    } else {
        format!("{path}: ")
    };
    let sentence: String = format!("{place}{said}{position}").chars().take(SENTENCE).collect();
    Refusal::new(code, sentence)
}

/// `invalid type: string "hunter2", expected a boolean` becomes `a boolean is expected, not a string`.
fn without_value(said: &str) -> String {
    let after = said.split_once(": ").map_or(said, |(_, after)| after);
    let kind = after.split(['"', '`', ',']).next().unwrap_or_default().trim();
    // The value may have these words in it: what is expected stands after their last occurrence.
    let expected = after.rsplit(", expected ").next().unwrap_or_default();
    let expected = if expected.starts_with("struct ") { "an object" } else { expected };
    format!("{expected} is expected, not {}", if kind.is_empty() { "this" } else { kind })
}

/// The id in the path.
pub(super) struct Id(pub(super) Uuid);

impl<S: Send + Sync> FromRequestParts<S> for Id {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Refusal> {
        let text =
            Path::<String>::from_request_parts(parts, state).await.map(|Path(text)| text).unwrap_or_default();
        let refuse = |_| Refusal::field("id", &text, "an id such as GET /instances shows is");
        Uuid::try_parse(&text).map(Self).map_err(refuse)
    }
}

/// The PCI address in the path.
pub(super) struct GpuAddress(pub(super) PciAddress);

impl<S: Send + Sync> FromRequestParts<S> for GpuAddress {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Refusal> {
        let text =
            Path::<String>::from_request_parts(parts, state).await.map(|Path(text)| text).unwrap_or_default();
        let refuse = |_| Refusal::field("address", &text, "a PCI address such as 0000:65:00.0 is");
        text.parse().map(Self).map_err(refuse)
    }
}

/// A query of which every key is known: a misspelt `?id=` must not turn a call on one instance into one on another.
pub(super) struct QueryOf<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for QueryOf<T> {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Refusal> {
        match Query::<T>::from_request_parts(parts, state).await {
            Ok(Query(query)) => Ok(Self(query)),
            Err(rejection) => {
                let text = rejection.body_text();
                let said = text.split_once(": ").map_or(text.as_str(), |(_, said)| said);
                let sentence: String = format!("query: {said}").chars().take(SENTENCE).collect();
                Err(Refusal::new(ErrorCode::InvalidField, sentence))
            }
        }
    }
}

/// `?id=`.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct IdQuery {
    /// Which instance; needed only when there are several.
    pub(super) id: Option<Uuid>,
}

/// No query at all.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct NoQuery {}

/// `?tail=`.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct TailQuery {
    /// Only the last so many bytes.
    pub(super) tail: Option<usize>,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use qudata_api::{CommandBody, CreateBody, SshKeyBody};

    use super::*;

    fn create(text: &str) -> Refusal {
        parse::<CreateBody>(text.as_bytes()).expect_err(text)
    }

    #[test]
    fn sentences_name_the_field_and_what_is_expected() {
        for (body, sentence) in [
            (
                r#"{"ssh_enabled":"yes"}"#,
                "ssh_enabled: a boolean is expected, not string at line 1 column 20",
            ),
            (r#"{"ports":"22"}"#, "ports: a sequence is expected, not string at line 1 column 13"),
            (r#"{"tunnel_token":42}"#, "tunnel_token: a string is expected, not integer at line 1 column 18"),
            (
                r#"{"cpus":true}"#,
                "cpus: a number, or a text with a number in it, is expected at line 1 column 13",
            ),
            (r#"{"gpus":-1}"#, "gpus: u32 is expected, not integer at line 1 column 10"),
            ("[]", "the body must be a JSON object"),
            ("7", "the body must be a JSON object"),
            ("{", "the body is not JSON: it breaks at line 1 column 1"),
            (r#"{"name":"a","name":"b"}"#, "duplicate field `name` at line 1 column 18"),
        ] {
            let said = create(body);
            assert!(said.sentence.starts_with(sentence), "{body}: {said}");
            assert_eq!(said.code, ErrorCode::MalformedBody, "{body}");
        }
        let said = create(r#"{"cpu":"8"}"#).sentence;
        assert!(said.starts_with("unknown field `cpu`, expected one of `tunnel_token`"), "{said}");
    }

    #[test]
    fn commands_and_ids_are_fields() {
        let refuse = |text: &str| parse::<CommandBody>(text.as_bytes()).expect_err(text);
        let said = refuse(r#"{"command":"explode"}"#);
        assert_eq!(said.code, ErrorCode::InvalidField);
        assert!(
            said.sentence.contains("command: unknown variant `explode`, expected one of `start`"),
            "{said}"
        );
        let said = refuse(r#"{"command":"start","id":"x"}"#);
        assert_eq!(
            (said.code, said.sentence.starts_with("id: an id such as")),
            (ErrorCode::InvalidField, true),
            "{said}"
        );
        assert_eq!(refuse("{}").sentence, "missing field `command` at line 1 column 2");
    }

    /// A secret in the right field, in a wrong one, of a wrong type, or in broken JSON is in no sentence.
    #[test]
    fn values_are_never_repeated() {
        for body in [
            r#"{"ssh_enabled":"canary"}"#,
            r#"{"ssh_enabled":"x, expected canary"}"#,
            r#"{"ssh_enabled":"canary, expected x"}"#,
            r#"{"ssh_enabled":"unknown field `canary"}"#,
            r#"{"gpus":"canary"}"#,
            r#"{"gpu_addrs":"canary"}"#,
            r#"{"user_data":["canary"]}"#,
            r#"{"user_data":{"canary":1}}"#,
            r#"{"password":"canary}"#,
            r#"{"password":canary}"#,
            r#"{"password":"canary"}}"#,
            r#"{"password":"canary","password":"canary"}"#,
            r#"{"tunnel_token":"canary","nope":1}"#,
            r#""canary""#,
            "canary",
            "[\"canary\"]",
        ] {
            for said in
                [create(body).sentence, parse::<SshKeyBody>(body.as_bytes()).expect_err(body).sentence]
            {
                let in_a_name = body.contains(r#"{"canary":"#) && said.contains("unknown field");
                assert!(!said.contains("canary") || in_a_name, "{body}: {said}");
            }
        }
        let number = create(r#"{"tunnel_token":31337}"#).sentence;
        assert!(!number.contains("31337"), "{number}");
    }

    #[test]
    fn long_names_are_cut() {
        let body = format!(r#"{{"{}":1}}"#, "x".repeat(60_000));
        assert!(create(&body).sentence.len() <= SENTENCE);
    }

    proptest! {
        #[test]
        fn no_body_panics_or_is_repeated(field in "[a-z_]{1,12}", value in "[a-z \"`:,]{0,20}") {
            let body = serde_json::json!({ field: format!("canary{value}"), "ssh_enabled": format!("canary{value}") });
            if let Err(said) = parse::<CreateBody>(body.to_string().as_bytes()) {
                prop_assert!(!said.sentence.contains("canary"), "{}", said);
            }
        }
    }
}
