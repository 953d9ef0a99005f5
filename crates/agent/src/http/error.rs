//! Refusals as HTTP answers. The only place that knows which code has which status.

use axum::{
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use qudata_api::{ErrorBody, ErrorCode};

use crate::refusal::Refusal;

/// What callers are told of a defect; what happened is in the log.
const DEFECT: &str = "the agent could not do this because of a defect of its own; its log says what happened";

/// The status of a code.
pub(super) fn status(code: ErrorCode) -> StatusCode {
    match code {
        ErrorCode::MalformedBody | ErrorCode::InvalidField => StatusCode::BAD_REQUEST,
        ErrorCode::SecretMissing => StatusCode::UNAUTHORIZED,
        ErrorCode::Forbidden => StatusCode::FORBIDDEN,
        ErrorCode::NoSuchInstance | ErrorCode::NoSuchGpu | ErrorCode::NoSuchPath => StatusCode::NOT_FOUND,
        ErrorCode::MethodNotAllowed => StatusCode::METHOD_NOT_ALLOWED,
        ErrorCode::RequestTimeout => StatusCode::REQUEST_TIMEOUT,
        ErrorCode::AmbiguousInstance
        | ErrorCode::WrongState
        | ErrorCode::GpuTaken
        | ErrorCode::GpuUnfit
        | ErrorCode::PortTaken => StatusCode::CONFLICT,
        ErrorCode::BodyTooLarge => StatusCode::PAYLOAD_TOO_LARGE,
        ErrorCode::HeaderTooLarge => StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
        ErrorCode::Internal | ErrorCode::HostFault => StatusCode::INTERNAL_SERVER_ERROR,
        ErrorCode::GuestFault => StatusCode::BAD_GATEWAY,
        ErrorCode::Busy => StatusCode::SERVICE_UNAVAILABLE,
        ErrorCode::NoGpu | ErrorCode::NoMemory | ErrorCode::NoDisk | ErrorCode::NoCpus => {
            StatusCode::INSUFFICIENT_STORAGE
        }
    }
}

/// The body of a refusal. The sentence of a defect stays here: it may name what is nobody's business.
pub(super) fn body(refusal: Refusal) -> ErrorBody {
    match refusal.code {
        ErrorCode::Internal => {
            tracing::error!(error = %refusal.sentence, "a call met a defect");
            ErrorBody::new(refusal.code, DEFECT)
        }
        code => ErrorBody::new(code, refusal.sentence),
    }
}

/// A body as bytes.
pub(super) fn json(value: &impl serde::Serialize) -> Vec<u8> {
    serde_json::to_vec(value).unwrap_or_else(|error| {
        tracing::error!(%error, "an answer cannot be written as JSON");
        format!(r#"{{"ok":false,"error":"{DEFECT}","code":"internal"}}"#).into_bytes()
    })
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let status = status(self.code);
        let mut response = (status, json(&body(self))).into_response();
        let kind = HeaderValue::from_static("application/json");
        response.headers_mut().insert(header::CONTENT_TYPE, kind);
        response
    }
}

/// An answer after which nothing more is read from this connection.
pub(super) fn last_words(refusal: Refusal) -> Response {
    let mut response = refusal.into_response();
    response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    response
}

/// [`last_words`] as bytes, for connections that never got as far as HTTP.
pub(super) fn raw_last_words(refusal: Refusal) -> Vec<u8> {
    let status = status(refusal.code);
    let body = json(&body(refusal));
    let mut bytes = format!(
        "HTTP/1.1 {} {}\r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
        status.as_str(),
        status.canonical_reason().unwrap_or_default(),
        body.len()
    )
    .into_bytes();
    bytes.extend(body);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_defect_says_nothing_about_the_host() {
        let said = body(Refusal::new(ErrorCode::Internal, "cannot open /var/lib/qudata/agent.redb"));
        assert_eq!(said.error, DEFECT);
        let said = body(Refusal::new(ErrorCode::NoDisk, "3 GiB are free"));
        assert_eq!(said.error, "3 GiB are free");
    }

    #[test]
    fn raw_words_have_the_right_length() {
        let text = String::from_utf8(raw_last_words(Refusal::busy("64 connections are open"))).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with("HTTP/1.1 503 Service Unavailable\r\n"), "{head}");
        assert!(head.contains(&format!("content-length: {}", body.len())), "{head}");
        assert_eq!(serde_json::from_str::<ErrorBody>(body).unwrap().code, ErrorCode::Busy);
    }
}
