//! The first head of a connection, before hyper sees it: whole or not, and well-formed. Pure. Used by `front`, because
//! hyper answers a bad head without a body, and a slow one not at all.

use axum::http::{HeaderName, HeaderValue, Method, Uri};
use qudata_api::ErrorCode;

use super::limits::Limits;
use crate::refusal::Refusal;

/// Looks for the end of a head that arrives in pieces; no byte is looked at twice.
#[derive(Debug, Default)]
pub(super) struct EndSearch {
    at: usize,
    line_is_empty: bool,
    begun: bool,
}

impl EndSearch {
    /// Length of the head with its empty line, once it is whole. `bytes` is all that has arrived so far.
    pub(super) fn advance(&mut self, bytes: &[u8]) -> Option<usize> {
        for byte in bytes.iter().skip(self.at) {
            self.at += 1;
            match byte {
                b'\n' if self.begun && self.line_is_empty => return Some(self.at),
                b'\n' => self.line_is_empty = true,
                b'\r' => {}
                _ => (self.begun, self.line_is_empty) = (true, false),
            }
        }
        None
    }
}

/// Checks a whole head.
///
/// # Errors
/// With what the caller should be told.
pub(super) fn check(head: &[u8], limits: &Limits) -> Result<(), Refusal> {
    let malformed =
        |what: &str| Refusal::new(ErrorCode::MalformedBody, format!("this is no HTTP/1.1 request: {what}"));
    let mut lines = head
        .split(|byte| *byte == b'\n')
        .map(|line| line.strip_suffix(b"\r").unwrap_or(line))
        .skip_while(|line| line.is_empty())
        .take_while(|line| !line.is_empty());
    request_line(lines.next().unwrap_or_default()).map_err(malformed)?;
    let mut framing = Framing::default();
    for (count, line) in lines.enumerate() {
        if count >= limits.head_lines {
            let sentence = format!("more than {} header lines; send fewer", limits.head_lines);
            return Err(Refusal::new(ErrorCode::HeaderTooLarge, sentence));
        }
        header_line(line, &mut framing).map_err(malformed)?;
    }
    framing.check().map_err(malformed)
}

fn request_line(line: &[u8]) -> Result<(), &'static str> {
    let mut words = line.split(|byte| *byte == b' ');
    let (Some(method), Some(target), Some(version), None) =
        (words.next(), words.next(), words.next(), words.next())
    else {
        return Err("the first line must be \"METHOD /path HTTP/1.1\"");
    };
    Method::from_bytes(method).map_err(|_| "the method is not a word")?;
    if version != b"HTTP/1.1" && version != b"HTTP/1.0" {
        return Err("only HTTP/1.1 and HTTP/1.0 are spoken here");
    }
    Uri::try_from(target).map(drop).map_err(|_| "the path has characters that must be percent-encoded")
}

/// How the end of the body is told. Two ways at once, or one way twice, are how requests are smuggled past a proxy.
#[derive(Default)]
struct Framing {
    lengths: usize,
    chunked: usize,
}

impl Framing {
    fn check(&self) -> Result<(), &'static str> {
        if self.lengths + self.chunked > 1 {
            return Err("send one Content-Length or one Transfer-Encoding");
        }
        Ok(())
    }
}

fn header_line(line: &[u8], framing: &mut Framing) -> Result<(), &'static str> {
    let colon = line.iter().position(|byte| *byte == b':').ok_or("a header line has no colon")?;
    let (name, value) = line.split_at(colon);
    let value = value.strip_prefix(b":").unwrap_or(value).trim_ascii();
    let name =
        HeaderName::from_bytes(name).map_err(|_| "a header's name has characters that are not allowed")?;
    HeaderValue::from_bytes(value).map_err(|_| "a header's value has control characters")?;
    if name == axum::http::header::CONTENT_LENGTH {
        framing.lengths += 1;
        let number = std::str::from_utf8(value).ok().filter(|text| text.bytes().all(|b| b.is_ascii_digit()));
        number.and_then(|text| text.parse::<u64>().ok()).ok_or("Content-Length is no number")?;
    }
    if name == axum::http::header::TRANSFER_ENCODING {
        framing.chunked += 1;
        if !value.eq_ignore_ascii_case(b"chunked") {
            return Err("the only Transfer-Encoding understood is chunked");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn end(bytes: &[u8]) -> Option<usize> {
        EndSearch::default().advance(bytes)
    }

    #[test]
    fn a_head_ends_at_its_first_empty_line() {
        assert_eq!(end(b"GET / HTTP/1.1\r\na: b\r\n\r\nbody"), Some(24));
        assert_eq!(end(b"GET / HTTP/1.1\n\nbody"), Some(16));
        assert_eq!(
            end(b"\r\n\r\nGET / HTTP/1.1\r\n\r\n"),
            Some(22),
            "empty lines before a request are skipped"
        );
        assert_eq!(end(b"GET / HTTP/1.1\r\na: b\r\n"), None);
    }

    #[test]
    fn good_heads_pass() {
        for head in [
            "GET / HTTP/1.1\r\n\r\n",
            "\r\nGET /a%20b?c=d HTTP/1.0\r\nHost: x\r\n\r\n",
            "OPTIONS * HTTP/1.1\r\n\r\n",
            "GET http://host/path HTTP/1.1\r\n\r\n",
            "POST / HTTP/1.1\r\nContent-Length:  12 \r\nX: é\r\n\r\n",
            "POST / HTTP/1.1\r\nTransfer-Encoding: Chunked\r\nx:\r\n\r\n",
        ] {
            assert_eq!(check(head.as_bytes(), &Limits::default()), Ok(()), "{head:?}");
        }
    }

    #[test]
    fn bad_heads_are_refused_with_the_reason() {
        for (head, reason) in [
            ("GET /\r\n\r\n", "first line"),
            ("GET  / HTTP/1.1\r\n\r\n", "first line"),
            ("PRI * HTTP/2.0\r\n\r\n", "only HTTP/1.1"),
            ("G@T / HTTP/1.1\r\n\r\n", "method"),
            ("GET /\u{1}< HTTP/1.1\r\n\r\n", "percent-encoded"),
            ("GET / HTTP/1.1\r\nno colon\r\n\r\n", "colon"),
            ("GET / HTTP/1.1\r\na: b\r\n folded: c\r\n\r\n", "name"),
            ("GET / HTTP/1.1\r\na : b\r\n\r\n", "name"),
            ("GET / HTTP/1.1\r\na: b\u{0}\r\n\r\n", "control"),
            ("POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n", "no number"),
            ("POST / HTTP/1.1\r\nContent-Length:\r\n\r\n", "no number"),
            ("POST / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n", "one Content-Length"),
            (
                "POST / HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
                "one Content-Length",
            ),
            ("POST / HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\n", "chunked"),
        ] {
            let refusal = check(head.as_bytes(), &Limits::default()).unwrap_err();
            assert!(refusal.sentence.contains(reason), "{head:?}: {refusal}");
        }
        let many = format!("GET / HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(101));
        assert_eq!(check(many.as_bytes(), &Limits::default()).unwrap_err().code, ErrorCode::HeaderTooLarge);
    }

    proptest! {
        #[test]
        fn pieces_make_no_difference(bytes in "[a\r\n: ]{0,60}", cut in 0usize..60) {
            let bytes = bytes.as_bytes();
            let cut = cut.min(bytes.len());
            let mut search = EndSearch::default();
            let in_pieces = search.advance(&bytes[..cut]).or_else(|| search.advance(bytes));
            prop_assert_eq!(in_pieces, end(bytes));
        }

        #[test]
        fn checking_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = check(&bytes, &Limits::default());
        }
    }
}
