//! What travels on a QMP socket: lines of JSON, bounded, and the four kinds of message they hold. Called by
//! [`super::client`]. Tolerant: what a newer QEMU adds is skipped, never an error.

use std::io;

use serde::Deserialize;
use serde_json::{Map, Value};
use tokio::io::{AsyncRead, AsyncReadExt};

use super::event::QmpEvent;

/// Longest message accepted from QEMU. The longest we ask for is a part of the console ring, about a third of this.
pub const FRAME_LIMIT: usize = 1 << 20;
const READ_SIZE: usize = 8 << 10;
/// What an error shows of a message that is no JSON.
const EXCERPT: usize = 80;

/// QEMU's version, as its greeting and `query-version` tell it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct QemuVersion {
    /// The three numbers.
    pub qemu: VersionNumber,
    /// The distribution's name of the build; may be empty.
    pub package: String,
}

/// Major, minor and micro version.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(default)]
pub struct VersionNumber {
    /// 7 of 7.2.22.
    pub major: u32,
    /// 2 of 7.2.22.
    pub minor: u32,
    /// 22 of 7.2.22.
    pub micro: u32,
}

/// QEMU said no.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) class: String,
    pub(super) desc: String,
}

/// One message from QEMU.
#[derive(Debug, PartialEq)]
pub(super) enum Message {
    Greeting(QemuVersion),
    Event(QmpEvent),
    /// `id` is absent when QEMU could not even parse what we sent.
    Reply {
        id: Option<u64>,
        result: Result<Value, Refusal>,
    },
    /// JSON of a kind we do not know.
    Unknown,
}

/// Why no further frame can be read.
#[derive(Debug)]
pub(super) enum FrameError {
    TooLong,
    Io(io::Error),
}

/// Cuts a byte stream into lines. Cancel-safe: what was read stays in the buffer.
#[derive(Debug)]
pub(super) struct FrameReader<R> {
    input: R,
    buffer: Vec<u8>,
    /// Bytes of `buffer` known to hold no line end, so that a long frame is scanned once.
    scanned: usize,
}

impl<R: AsyncRead + Unpin> FrameReader<R> {
    pub(super) fn new(input: R) -> Self {
        Self { input, buffer: Vec::new(), scanned: 0 }
    }

    /// The next line that is not blank; `None` at the end of the stream (an unfinished line is dropped with it).
    pub(super) async fn next(&mut self) -> Result<Option<Vec<u8>>, FrameError> {
        loop {
            while let Some(line) = self.take_line() {
                if line.len() > FRAME_LIMIT {
                    return Err(FrameError::TooLong);
                }
                if !line.trim_ascii().is_empty() {
                    return Ok(Some(line));
                }
            }
            if self.buffer.len() > FRAME_LIMIT {
                return Err(FrameError::TooLong);
            }
            self.buffer.reserve(READ_SIZE);
            if self.input.read_buf(&mut self.buffer).await.map_err(FrameError::Io)? == 0 {
                return Ok(None);
            }
        }
    }

    fn take_line(&mut self) -> Option<Vec<u8>> {
        let unscanned = self.buffer.get(self.scanned..).unwrap_or_default();
        let Some(offset) = unscanned.iter().position(|byte| *byte == b'\n') else {
            self.scanned = self.buffer.len();
            return None;
        };
        let end = self.scanned + offset;
        self.scanned = 0;
        let line = self.buffer.drain(..=end).collect();
        Some(line)
    }
}

/// What a frame means; the error is an excerpt of a frame that is not a JSON object.
pub(super) fn parse(frame: &[u8]) -> Result<Message, String> {
    let mut fields: Map<String, Value> = serde_json::from_slice(frame).map_err(|_| excerpt(frame))?;
    if let Some(mut greeting) = fields.remove("QMP") {
        let version = greeting.get_mut("version").map(Value::take).unwrap_or_default();
        return Ok(Message::Greeting(serde_json::from_value(version).unwrap_or_default()));
    }
    if let Some(Value::String(name)) = fields.remove("event") {
        return Ok(Message::Event(QmpEvent::new(name, fields.remove("data"), fields.get("timestamp"))));
    }
    let id = fields.get("id").and_then(Value::as_u64);
    if let Some(result) = fields.remove("return") {
        return Ok(Message::Reply { id, result: Ok(result) });
    }
    if let Some(error) = fields.remove("error") {
        let text = |key: &str| error.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
        return Ok(Message::Reply { id, result: Err(Refusal { class: text("class"), desc: text("desc") }) });
    }
    Ok(Message::Unknown)
}

/// One command as bytes; `Value::Null` means no arguments.
pub(super) fn render(command: &str, arguments: &Value, id: u64) -> Vec<u8> {
    let mut fields = Map::new();
    fields.insert("execute".to_owned(), Value::from(command));
    if !arguments.is_null() {
        fields.insert("arguments".to_owned(), arguments.clone());
    }
    fields.insert("id".to_owned(), Value::from(id));
    let mut frame = Value::Object(fields).to_string().into_bytes();
    frame.push(b'\n');
    frame
}

fn excerpt(frame: &[u8]) -> String {
    frame.get(..EXCERPT.min(frame.len())).unwrap_or_default().escape_ascii().to_string()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    async fn frames(chunks: &[&[u8]]) -> (Vec<String>, Result<Option<Vec<u8>>, FrameError>) {
        let mut script = tokio_chunks(chunks);
        let mut reader = FrameReader::new(&mut script);
        let mut seen = Vec::new();
        loop {
            match reader.next().await {
                Ok(Some(frame)) => seen.push(String::from_utf8_lossy(&frame).trim().to_owned()),
                end => return (seen, end),
            }
        }
    }

    /// A reader that gives exactly the chunks, one per read.
    fn tokio_chunks(chunks: &[&[u8]]) -> impl AsyncRead + Unpin + use<> {
        let mut all: Box<dyn AsyncRead + Unpin> = Box::new(tokio::io::empty());
        for chunk in chunks.iter().rev() {
            all = Box::new(io::Cursor::new(chunk.to_vec()).chain(all));
        }
        all
    }

    #[tokio::test]
    async fn torn_and_joined_lines_come_out_whole() {
        let (seen, end) = frames(&[b"{\"a\"", b":1}\r", b"\n{}\r\n\r\n \n{\"b\":", b"2}\n{unfinished"]).await;
        assert_eq!(seen, [r#"{"a":1}"#, "{}", r#"{"b":2}"#]);
        assert!(matches!(end, Ok(None)));
    }

    #[tokio::test]
    async fn the_limit_holds_with_and_without_a_line_end() {
        let mut longest = vec![b' '; FRAME_LIMIT - 1];
        longest.push(b'x');
        let longer = [longest.as_slice(), b"x"].concat();
        let (seen, end) = frames(&[&longest, b"\n"]).await;
        assert!(seen.is_empty() && matches!(end, Err(FrameError::TooLong)), "limit counts the line end");
        assert!(matches!(frames(&[&longer]).await.1, Err(FrameError::TooLong)));
        let (seen, end) = frames(&[&longest[1..], b"\n"]).await;
        assert!(seen == ["x"] && matches!(end, Ok(None)));
    }

    #[test]
    fn every_kind_of_message_is_told_apart() {
        let version = QemuVersion {
            qemu: VersionNumber { major: 7, minor: 2, micro: 22 },
            package: "Debian".to_owned(),
        };
        let refusal = Refusal { class: "GenericError".to_owned(), desc: "no".to_owned() };
        let table: [(&str, Message); 8] = [
            (
                r#"{"QMP":{"version":{"qemu":{"micro":22,"minor":2,"major":7},"package":"Debian"},"capabilities":["oob"]}}"#,
                Message::Greeting(version),
            ),
            (r#"{"QMP":7}"#, Message::Greeting(QemuVersion::default())),
            (r#"{"return":{},"id":4}"#, Message::Reply { id: Some(4), result: Ok(json!({})) }),
            (r#"{"return":null,"id":4,"new":1}"#, Message::Reply { id: Some(4), result: Ok(Value::Null) }),
            (r#"{"return":"x","id":"theirs"}"#, Message::Reply { id: None, result: Ok(json!("x")) }),
            (
                r#"{"error":{"class":"GenericError","desc":"no"},"id":5}"#,
                Message::Reply { id: Some(5), result: Err(refusal) },
            ),
            (r#"{"event":7}"#, Message::Unknown),
            (r#"{"news":{}}"#, Message::Unknown),
        ];
        for (frame, expected) in table {
            assert_eq!(parse(frame.as_bytes()).unwrap(), expected, "{frame}");
        }
        for frame in ["", "[]", "7", "{", "\u{1b}]0;x", "{\"a\":1} x"] {
            assert!(parse(frame.as_bytes()).is_err(), "{frame}");
        }
        assert_eq!(parse(b"\x1b[31m\xff").unwrap_err(), "\\x1b[31m\\xff", "an excerpt is safe to print");
    }

    #[test]
    fn a_command_is_one_line() {
        let frame = render("ringbuf-read", &json!({"device": "a\nb"}), 3);
        assert_eq!(frame.iter().filter(|byte| **byte == b'\n').count(), 1);
        assert_eq!(
            serde_json::from_slice::<Value>(&frame).unwrap(),
            json!({"execute": "ringbuf-read", "arguments": {"device": "a\nb"}, "id": 3})
        );
        assert_eq!(render("stop", &Value::Null, 1), b"{\"execute\":\"stop\",\"id\":1}\n");
    }

    proptest! {
        #[test]
        fn any_bytes_are_an_answer_or_an_error(frame in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = parse(&frame);
        }

        #[test]
        fn nesting_is_bounded(depth in 1usize..5000) {
            let _ = parse(format!("{{\"return\":{}{}", "[".repeat(depth), "]".repeat(depth)).as_bytes());
        }
    }
}
