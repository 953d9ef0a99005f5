//! Kernel parameters: what the boot loader will say, what the kernel was told, and what is missing. Pure; called by
//! `observe` and `plan`.

/// A parameter with the file that it stands in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Word {
    /// The parameter, for example `iommu=pt`.
    pub text: String,
    /// Where it stands.
    pub file: String,
}

/// The parameters before `--`, which ends the kernel's own.
#[must_use]
pub fn words(line: &str) -> Vec<String> {
    line.split_ascii_whitespace().take_while(|word| *word != "--").map(str::to_owned).collect()
}

/// The value that counts: of several the last.
#[must_use]
pub fn value<'a>(words: impl IntoIterator<Item = &'a str>, name: &str) -> Option<&'a str> {
    let given = |word: &'a str| word.strip_prefix(name)?.strip_prefix('=');
    words.into_iter().filter_map(given).last()
}

/// The parameters that GRUB's settings say, in the order in which their files are read. Shell is not run: assignments of
/// the two known variables are understood, with quotes and with the variables themselves in them.
#[must_use]
pub fn grub_words(files: &[(String, String)]) -> Vec<Word> {
    let (mut always, mut default) = (Vec::new(), Vec::new());
    for (file, text) in files {
        for line in text.replace("\\\n", " ").lines() {
            let line = line.trim().trim_start_matches("export ").trim_start();
            let Some((name, rest)) = line.split_once('=') else { continue };
            let (name, adds) = name.strip_suffix('+').map_or((name, false), |name| (name, true));
            let value = unquote(rest);
            let mut words = Vec::new();
            for word in value.split_ascii_whitespace() {
                match word.trim_start_matches('$').trim_matches(['{', '}']) {
                    "GRUB_CMDLINE_LINUX_DEFAULT" if word.starts_with('$') => words.extend(default.clone()),
                    "GRUB_CMDLINE_LINUX" if word.starts_with('$') => words.extend(always.clone()),
                    _ => words.push(Word { text: word.to_owned(), file: file.clone() }),
                }
            }
            let target = match name {
                "GRUB_CMDLINE_LINUX" => &mut always,
                "GRUB_CMDLINE_LINUX_DEFAULT" => &mut default,
                _ => continue,
            };
            if adds {
                target.extend(words);
            } else {
                *target = words;
            }
        }
    }
    always.extend(default);
    always
}

/// The value of an assignment without its quotes and without what follows it.
fn unquote(rest: &str) -> String {
    let rest = rest.trim();
    for quote in ['"', '\''] {
        if let Some(inner) = rest.strip_prefix(quote) {
            return inner.split(quote).next().unwrap_or_default().to_owned();
        }
    }
    rest.split_whitespace().next().unwrap_or_default().to_owned()
}

/// The kernel's parameters in a generated `grub.cfg`: of its first entry, which is the one that is started.
#[must_use]
pub fn grub_cfg_words(text: &str) -> Option<Vec<String>> {
    text.lines().find_map(|line| {
        let mut parts = line.split_ascii_whitespace();
        let is_linux = matches!(parts.next(), Some("linux" | "linuxefi" | "linux16"));
        is_linux.then(|| parts.skip(1).map(str::to_owned).collect())
    })
}

/// The kernel's parameters in an entry of systemd-boot.
#[must_use]
pub fn entry_words(text: &str) -> Vec<String> {
    let options = text.lines().filter_map(|line| line.trim_start().strip_prefix("options"));
    options.filter(|rest| rest.starts_with([' ', '\t'])).flat_map(words).collect()
}

/// An entry of systemd-boot without these parameters; everything else in it stays as it is.
#[must_use]
pub fn entry_without(text: &str, params: &[String]) -> String {
    let line = |line: &str| {
        let is_options =
            line.trim_start().strip_prefix("options").is_some_and(|rest| rest.starts_with([' ', '\t']));
        let gone = |word: &&str| is_options && params.iter().any(|param| param == word);
        line.split(' ').filter(|word| !gone(word)).collect::<Vec<_>>().join(" ")
    };
    text.split('\n').map(line).collect::<Vec<_>>().join("\n")
}

/// The parameters of the running kernel that a boot loader's settings would hold: what the loader itself adds is left out.
#[must_use]
pub fn of_running(line: &str) -> Vec<String> {
    let loader = |word: &String| ["BOOT_IMAGE=", "initrd="].iter().any(|start| word.starts_with(start));
    words(line).into_iter().filter(|word| !loader(word)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(files: &[(&str, &str)]) -> Vec<String> {
        let files: Vec<_> = files.iter().map(|(f, t)| ((*f).to_owned(), (*t).to_owned())).collect();
        grub_words(&files).into_iter().map(|word| word.text).collect()
    }

    #[test]
    fn grubs_settings_are_read_as_grub_reads_them() {
        let owner = "# GRUB_CMDLINE_LINUX=\"old\"\nGRUB_DEFAULT=0\nGRUB_CMDLINE_LINUX_DEFAULT=\"quiet splash\" # c\n\
                     GRUB_CMDLINE_LINUX='iommu=pt intel_iommu=on'\n";
        assert_eq!(texts(&[("a", owner)]), ["iommu=pt", "intel_iommu=on", "quiet", "splash"]);
        let more = "GRUB_CMDLINE_LINUX_DEFAULT=\"$GRUB_CMDLINE_LINUX_DEFAULT x=1\"";
        assert_eq!(texts(&[("a", owner), ("b", more)]).last().unwrap(), "x=1");
        let other = "GRUB_CMDLINE_LINUX_DEFAULT+=\" y\"\nGRUB_CMDLINE_LINUX=z";
        assert_eq!(texts(&[("a", owner), ("b", other)]), ["z", "quiet", "splash", "y"]);
        assert_eq!(texts(&[("a", "GRUB_CMDLINE_LINUX=\"a \\\n b\"")]), ["a", "b"]);
    }

    #[test]
    fn a_word_says_where_it_stands() {
        let files = [("/a".to_owned(), "GRUB_CMDLINE_LINUX=\"iommu=off\"".to_owned())];
        assert_eq!(grub_words(&files), [Word { text: "iommu=off".into(), file: "/a".into() }]);
    }

    #[test]
    fn the_last_value_counts() {
        let line = words("ro iommu=off xiommu=1 iommu=pt -- iommu=off");
        assert_eq!(value(line.iter().map(String::as_str), "iommu"), Some("pt"));
        assert_eq!(value(line.iter().map(String::as_str), "intel_iommu"), None);
    }

    #[test]
    fn entries_of_both_loaders() {
        let cfg =
            "menuentry 'x' {\n\tlinux\t/vmlinuz root=/dev/vda ro quiet\n\tinitrd /i\n}\n linux /old single\n";
        assert_eq!(grub_cfg_words(cfg).unwrap(), ["root=/dev/vda", "ro", "quiet"]);
        assert_eq!(grub_cfg_words("set x=1\n"), None);
        assert_eq!(
            entry_words("title x\noptions root=a ro\noptions-x y\noptions  z\n"),
            ["root=a", "ro", "z"]
        );
        assert_eq!(of_running("BOOT_IMAGE=/v root=a ro"), ["root=a", "ro"]);
    }

    #[test]
    fn an_entry_without_parameters_is_otherwise_as_it_was() {
        let params = ["intel_iommu=on", "iommu=pt"].map(str::to_owned);
        let entry = |line: &str| format!("title  a  b\nversion 6.9\n{line}\nlinux /a iommu=pt\n");
        for (before, after) in [
            ("options    root=a  ro intel_iommu=on iommu=pt", "options    root=a  ro"),
            ("options intel_iommu=on root=a iommu=pt2", "options root=a iommu=pt2"),
            ("options\troot=a iommu=pt quiet", "options\troot=a quiet"),
            ("options root=a ro ", "options root=a ro "),
        ] {
            assert_eq!(entry_without(&entry(before), &params), entry(after));
        }
        assert_eq!(entry_without("options ro iommu=pt", &params), "options ro");
    }
}
