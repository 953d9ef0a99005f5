//! The processors, from `/proc/cpuinfo` and cpufreq. Part of `facts`.

use std::path::Path;

use super::{read_text, unknown};

/// A server with a thousand CPUs has so much to say.
const MOST: u64 = 8 << 20;
/// A name is cut to so many characters.
const NAME: usize = 120;

/// The processors of the host.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Cpu {
    pub(super) name: String,
    /// Logical ones.
    pub(super) cores: u32,
    /// The highest frequency, in GHz.
    pub(super) ghz: f64,
}

pub(super) fn observe(root: &Path) -> Cpu {
    let text = read_text(&root.join("proc/cpuinfo"), MOST).unwrap_or_default();
    let most =
        read_text(&root.join("sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq"), 64).unwrap_or_default();
    parse(&text, &most)
}

/// `most` is cpufreq's highest frequency in kHz, where the host has cpufreq. Otherwise the name often tells, and at last
/// the frequency of the moment.
fn parse(cpuinfo: &str, most: &str) -> Cpu {
    let field = |wanted: &'static str| {
        cpuinfo.lines().filter_map(move |line| {
            let (name, value) = line.split_once(':')?;
            (name.trim() == wanted).then_some(value.trim())
        })
    };
    let cores = u32::try_from(field("processor").count()).unwrap_or(u32::MAX);
    let name: String = field("model name")
        .next()
        .unwrap_or_default()
        .chars()
        .filter(|c| !c.is_control())
        .take(NAME)
        .collect();
    let from_kernel = sensible(most.trim().parse::<f64>().ok().map(|khz| khz / 1e6));
    let from_name = || sensible(name.rsplit_once('@')?.1.trim().strip_suffix("GHz")?.trim().parse().ok());
    let current = || {
        let ghz = |text: &str| sensible(text.parse::<f64>().ok().map(|mhz| mhz / 1e3));
        field("cpu MHz").filter_map(ghz).reduce(f64::max)
    };
    let ghz = from_kernel.or_else(from_name).or_else(current);
    Cpu { cores, ghz: ghz.unwrap_or_else(|| unknown("the frequency of the processors")), name }
}

fn sensible(ghz: Option<f64>) -> Option<f64> {
    ghz.filter(|ghz| (0.1..=20.0).contains(ghz))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_cores_and_frequencies() {
        let epyc = "processor\t: 0\nmodel name\t: AMD EPYC 7763 64-Core Processor\ncpu MHz\t\t: 2445.4\n\
            processor\t: 1\nmodel name\t: AMD EPYC 7763 64-Core Processor\ncpu MHz\t\t: 3245.1\n";
        let cpu = parse(epyc, "3529052\n");
        assert_eq!((cpu.name.as_str(), cpu.cores), ("AMD EPYC 7763 64-Core Processor", 2));
        assert!((cpu.ghz - 3.529).abs() < 0.001, "{cpu:?}");
        assert!((parse(epyc, "").ghz - 3.2451).abs() < 0.001, "without cpufreq: the fastest of the moment");
        let xeon =
            "processor : 0\nmodel name : Intel(R) Xeon(R) Platinum 8273CL CPU @ 2.20GHz\ncpu MHz : 800.0\n";
        assert!((parse(xeon, "").ghz - 2.2).abs() < 0.001);
    }

    #[test]
    fn what_is_no_figure_is_none() {
        for (cpuinfo, most) in [
            ("", ""),
            ("cpu MHz : NaN", "inf"),
            ("cpu MHz : 1e300", "-1"),
            ("model name : x @ 99999GHz", "0"),
        ] {
            assert_eq!(parse(cpuinfo, most).ghz, 0.0, "{cpuinfo} {most}");
        }
        let long = format!("model name : a\u{1b}[2J{}", "x".repeat(1000));
        let name = parse(&long, "").name;
        assert!(name.len() == NAME && !name.contains('\u{1b}'), "{name}");
    }

    proptest! {
        #[test]
        fn any_text_is_a_processor(cpuinfo in ".{0,200}", most in ".{0,20}") {
            prop_assert!((0.0..=20.0).contains(&parse(&cpuinfo, &most).ghz));
        }
    }
}
