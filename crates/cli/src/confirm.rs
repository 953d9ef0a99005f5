//! The question before something is lost. Owns when it is asked and what counts as yes; used by `instance delete`,
//! `instance restart`, `gpu quarantine` and `gpu release`.

use std::io::{BufRead, IsTerminal, Write};

use crate::exit::{Exit, Failure};

/// Asks on the terminal unless `yes` was given. Returns only when it may be done.
pub(crate) fn consent(yes: bool, question: &str) -> Result<(), Failure> {
    let stdin = std::io::stdin();
    // The question goes to standard error, the answer comes from standard input: both must be a person's.
    let person = stdin.is_terminal() && std::io::stderr().is_terminal();
    decide(yes, person, question, stdin.lock(), std::io::stderr().lock())
}

fn decide(
    yes: bool,
    person: bool,
    question: &str,
    mut answers: impl BufRead,
    mut asking: impl Write,
) -> Result<(), Failure> {
    if yes {
        return Ok(());
    }
    if !person {
        let first = question.lines().next().unwrap_or_default();
        return Err(Failure::new(
            Exit::Usage,
            format!("{first} There is no terminal to ask on: say --yes if that is meant."),
        ));
    }
    let mut answer = String::new();
    let asked = write!(asking, "{question}\nGo on? [y/N] ")
        .and_then(|()| asking.flush())
        .and_then(|()| answers.read_line(&mut answer));
    let agreed = matches!(answer.trim().to_ascii_lowercase().as_str(), "y" | "yes");
    match asked {
        Ok(_) if agreed => Ok(()),
        _ => Err(Failure::new(Exit::Failed, "nothing was done")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(yes: bool, person: bool, text: &str) -> (Option<Exit>, String) {
        let mut asked = Vec::new();
        let result = decide(yes, person, "Delete one?\nAll is lost.", text.as_bytes(), &mut asked);
        (result.err().map(|f| f.exit), String::from_utf8(asked).unwrap())
    }

    #[test]
    fn only_a_clear_yes_is_yes() {
        for text in ["y\n", "Y\n", "yes\n", " YES \n", "y"] {
            assert_eq!(answer(false, true, text).0, None, "{text:?}");
        }
        for text in ["", "\n", "n\n", "no\n", "yy\n", "yes please\n", "ja\n"] {
            assert_eq!(answer(false, true, text).0, Some(Exit::Failed), "{text:?}");
        }
    }

    #[test]
    fn the_question_is_shown_whole() {
        assert_eq!(answer(false, true, "n\n").1, "Delete one?\nAll is lost.\nGo on? [y/N] ");
    }

    #[test]
    fn without_a_terminal_only_the_option_counts() {
        assert_eq!(answer(false, false, "y\n"), (Some(Exit::Usage), String::new()));
        assert_eq!(answer(true, false, ""), (None, String::new()));
        assert_eq!(answer(true, true, "n\n"), (None, String::new()), "not even asked");
    }
}
