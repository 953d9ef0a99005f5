//! What a build tells while it runs. Made by `build`, shown by whoever called it.

/// Where a build is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Progress {
    /// A file comes over the network.
    Fetching {
        /// Bytes that are here, those of an earlier attempt among them.
        done: u64,
        /// Size of the file, as soon as the server has told it.
        total: Option<u64>,
    },
    /// A file is copied or its digest calculated.
    Reading {
        /// What for, as a verb.
        what: &'static str,
        /// Bytes so far.
        done: u64,
        /// Size of the file.
        total: u64,
    },
    /// The machine that customises the image starts.
    Booting {
        /// Whether it is emulated, which takes ten times as long.
        emulated: bool,
    },
    /// Work inside the machine.
    Step {
        /// Its name.
        name: String,
        /// Which of them, from 1.
        number: usize,
        /// How many there are.
        of: usize,
    },
    /// The finished disk is written whole.
    Packing,
    /// The finished disk is checked and published.
    Publishing,
}

impl Progress {
    /// A word or three for people.
    #[must_use]
    pub fn label(&self) -> String {
        match self {
            Self::Fetching { .. } => "fetching the image".to_owned(),
            Self::Reading { what, .. } => format!("{what} the image"),
            Self::Booting { emulated: false } => "booting it".to_owned(),
            Self::Booting { emulated: true } => "booting it in emulation".to_owned(),
            Self::Step { name, number, of } => format!("customising it: {name} ({number} of {of})"),
            Self::Packing => "packing it".to_owned(),
            Self::Publishing => "publishing it".to_owned(),
        }
    }

    /// How much of this part is done; none where nobody can know.
    #[must_use]
    pub fn percent(&self) -> Option<u8> {
        let share = |done: u64, total: u64| {
            let percent = u128::from(done) * 100 / u128::from(total.max(1));
            u8::try_from(percent.min(100)).ok()
        };
        match self {
            Self::Fetching { done, total } => total.and_then(|total| share(*done, total)),
            Self::Reading { done, total, .. } => share(*done, *total),
            Self::Step { .. } | Self::Booting { .. } | Self::Packing | Self::Publishing => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentages_are_real_or_absent() {
        let fetching = |done, total| Progress::Fetching { done, total }.percent();
        assert_eq!(fetching(50, Some(200)), Some(25));
        assert_eq!(fetching(300, Some(200)), Some(100));
        assert_eq!(fetching(0, Some(0)), Some(0));
        assert_eq!(fetching(50, None), None);
        assert_eq!(Progress::Packing.percent(), None);
    }
}
