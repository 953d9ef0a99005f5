//! Server-sent events as bytes come in. Owns the line format; pure; used by `events`.

/// Puts events together from pieces of the stream.
#[derive(Debug, Default)]
pub(crate) struct Decoder {
    line: Vec<u8>,
    event: String,
    data: String,
}

/// One event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Message {
    /// Its type; `message` when the stream names none.
    pub(crate) event: String,
    /// Its data; several lines are joined.
    pub(crate) data: String,
}

/// The agent's events are a few hundred bytes; this bounds what a broken stream can take.
const LINE_LIMIT: usize = 64 << 10;

impl Decoder {
    /// Takes the next piece and returns the events that it completes.
    pub(crate) fn feed(&mut self, piece: &[u8]) -> Vec<Message> {
        let mut messages = Vec::new();
        for byte in piece {
            match byte {
                b'\n' => messages.extend(self.end_of_line()),
                b'\r' => {}
                _ if self.line.len() < LINE_LIMIT => self.line.push(*byte),
                _ => {}
            }
        }
        messages
    }

    fn end_of_line(&mut self) -> Option<Message> {
        let line = std::mem::take(&mut self.line);
        let line = String::from_utf8_lossy(&line);
        if line.is_empty() {
            let (event, data) = (std::mem::take(&mut self.event), std::mem::take(&mut self.data));
            let event = if event.is_empty() { "message".to_owned() } else { event };
            return (!data.is_empty()).then_some(Message { event, data });
        }
        // A line that begins with a colon is a comment: the server shows that it is alive.
        let (field, value) = line.split_once(':').unwrap_or((&line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "event" => value.clone_into(&mut self.event),
            "data" if self.data.len() < LINE_LIMIT => {
                if !self.data.is_empty() {
                    self.data.push('\n');
                }
                self.data.push_str(value);
            }
            _ => {}
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const STREAM: &str = ": hello\n\nid: 1\nevent: phase\ndata: {\"a\":1}\n\nevent: phase\r\ndata:two\r\ndata: lines\r\n\r\ndata: x\n\n";

    fn expected() -> Vec<Message> {
        [("phase", "{\"a\":1}"), ("phase", "two\nlines"), ("message", "x")]
            .map(|(event, data)| Message { event: event.to_owned(), data: data.to_owned() })
            .to_vec()
    }

    #[test]
    fn an_event_is_told_only_when_it_is_whole() {
        let mut decoder = Decoder::default();
        assert_eq!(decoder.feed(b"event: phase\ndata: {}\n"), []);
        assert_eq!(decoder.feed(b"\n").len(), 1);
    }

    proptest! {
        #[test]
        fn pieces_do_not_matter(cuts in proptest::collection::vec(0..STREAM.len(), 0..8)) {
            let mut cuts = cuts;
            cuts.sort_unstable();
            let mut decoder = Decoder::default();
            let mut got = Vec::new();
            let mut from = 0;
            for cut in cuts.into_iter().chain([STREAM.len()]) {
                got.extend(decoder.feed(&STREAM.as_bytes()[from..cut]));
                from = cut;
            }
            prop_assert_eq!(got, expected());
        }

        #[test]
        fn noise_is_bounded(piece in proptest::collection::vec(any::<u8>(), 0..300)) {
            let mut decoder = Decoder::default();
            for _ in 0..3 {
                decoder.feed(&piece);
            }
        }
    }

    #[test]
    fn an_endless_line_takes_no_more_memory_than_the_limit() {
        let mut decoder = Decoder::default();
        for _ in 0..3 {
            decoder.feed(&vec![b'a'; LINE_LIMIT]);
        }
        assert_eq!(decoder.line.len(), LINE_LIMIT);
    }
}
