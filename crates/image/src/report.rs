//! What the script inside the machine says through its port: lines of words. Pure; called by `boot`.
//!
//! ```text
//! step NAME              the next part of the work
//! alive                  nothing happened, but it works on
//! fact NAME VALUE…       something for the manifest
//! package NAME VERSION
//! failed STEP STATUS     it gave up; the log has the reason
//! done NONCE             everything succeeded; nothing follows
//! ```

/// Longest line.
const LINE_MAX: usize = 4096;
/// More packages than any image has.
const PACKAGES_MAX: usize = 20_000;

/// What was said so far.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Report {
    pub(crate) step: Option<String>,
    pub(crate) facts: Vec<(String, String)>,
    pub(crate) packages: Vec<(String, String)>,
    pub(crate) failed: Option<(String, String)>,
    /// The nonce that it ended with.
    pub(crate) done: Option<String>,
    /// Something else than a beat came after the end: the machine started again.
    pub(crate) after_done: bool,
    line: Vec<u8>,
}

impl Report {
    /// Takes the next bytes; true when a new step has begun.
    pub(crate) fn add(&mut self, bytes: &[u8]) -> bool {
        let mut stepped = false;
        for byte in bytes {
            if *byte != b'\n' {
                if self.line.len() < LINE_MAX {
                    self.line.push(*byte);
                }
                continue;
            }
            let line = String::from_utf8_lossy(&std::mem::take(&mut self.line)).into_owned();
            stepped |= self.take(line.trim_end());
        }
        stepped
    }

    fn take(&mut self, line: &str) -> bool {
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        let pair = || rest.split_once(' ').map(|(a, b)| (a.to_owned(), b.to_owned()));
        if self.done.is_some() {
            self.after_done |= word != "alive";
            return false;
        }
        match word {
            "step" => self.step = Some(rest.to_owned()),
            "fact" => self.facts.extend(pair()),
            "package" if self.packages.len() < PACKAGES_MAX => self.packages.extend(pair()),
            "failed" => self.failed = pair().or_else(|| Some((rest.to_owned(), String::new()))),
            "done" => self.done = Some(rest.to_owned()),
            // A word of a newer script means nothing here, and a beat only that it lives.
            _ => {}
        }
        word == "step"
    }

    /// A fact by its name.
    pub(crate) fn fact(&self, name: &str) -> Option<String> {
        self.facts.iter().find(|(n, _)| n == name).map(|(_, value)| value.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_come_in_pieces() {
        let mut report = Report::default();
        assert!(!report.add(b"step pack"));
        assert!(report.add(b"ages\nalive\nfact kernel 6.1 x\npackage a 1\npackage b\nfai"));
        assert!(!report.add(b"led driver 100\n"));
        assert_eq!(report.step.as_deref(), Some("packages"));
        assert_eq!(report.fact("kernel").as_deref(), Some("6.1 x"));
        assert_eq!(report.packages, [("a".to_owned(), "1".to_owned())]);
        assert_eq!(report.failed, Some(("driver".to_owned(), "100".to_owned())));
    }

    #[test]
    fn nothing_but_beats_may_follow_the_end() {
        let mut report = Report::default();
        report.add(b"done abc\nalive\n");
        assert_eq!((report.done.as_deref(), report.after_done), (Some("abc"), false));
        report.add(b"step start\n");
        assert!(report.after_done && report.step.is_none());
    }

    #[test]
    fn endless_lines_are_cut() {
        let mut report = Report::default();
        report.add(&vec![b'x'; 1 << 20]);
        report.add(b"\ndone n\n");
        assert_eq!(report.done.as_deref(), Some("n"));
    }
}
