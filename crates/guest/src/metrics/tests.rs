//! Answers of good, odd and hostile guests; the command itself runs in a real shell.

use super::*;
use proptest::prelude::*;

const GOOD: &str = "Welcome to my guest\nqudata-metrics\ncpu 100 0 50 800 50 0 0 0 0 0\nMemTotal: 8000 kB\n\
                    MemAvailable: 6000 kB\nnet 1000 200\nnet 5 6\ngpu 87, 61, 40000, 80000\n\
                    gpu [N/A], 55, [N/A], 80000\n";

fn later() -> String {
    GOOD.replace("cpu 100 0 50 800 50", "cpu 160 0 70 880 90")
}

#[test]
fn two_readings_make_a_sample() {
    let mut sampler = MetricsSampler::default();
    let first = sampler.take(parse(GOOD.as_bytes()).unwrap());
    assert_eq!(first.cpu_util, None);
    assert_eq!((first.inet_in, first.inet_out), (1005, 206));
    assert!((first.ram_util - 25.0).abs() < 1e-9);
    assert_eq!(
        first.gpus,
        [
            GpuMetrics { util: Some(87), temp: Some(61), mem_util: Some(50.0) },
            GpuMetrics { util: None, temp: Some(55), mem_util: None },
        ]
    );
    let second = sampler.take(parse(later().as_bytes()).unwrap());
    // 80 busy of 200 ticks.
    assert!((second.cpu_util.unwrap() - 40.0).abs() < 1e-9);
}

#[test]
fn a_reboot_between_two_readings_gives_no_percentage_and_no_error() {
    let mut sampler = MetricsSampler::default();
    sampler.take(parse(later().as_bytes()).unwrap());
    assert_eq!(sampler.take(parse(GOOD.as_bytes()).unwrap()).cpu_util, None);
    assert!(sampler.take(parse(later().as_bytes()).unwrap()).cpu_util.is_some());
}

#[test]
fn nonsense_is_refused_by_the_name_of_its_field() {
    for (from, to, field) in [
        ("cpu 100", "cpu -1", "cpu"),
        ("cpu 100", "cpu NaN", "cpu"),
        ("cpu 100 0", "cpu 18446744073709551615 1", "cpu"),
        ("cpu 100 0 50 800 50 0 0 0 0 0", "cpu 1 2 3", "cpu"),
        ("cpu 100", "cpu 1 1 1 1 1 1 1 1\ncpu 100", "cpu"),
        ("cpu 100", "cpuX 100", "line"),
        ("qudata-metrics\n", "", "start"),
        ("MemTotal: 8000 kB\n", "", "memory total"),
        ("MemTotal: 8000 kB", "MemTotal: 8000 MB", "memory total"),
        ("MemTotal: 8000 kB", "MemTotal: inf kB", "memory total"),
        ("MemTotal: 8000 kB", "MemTotal: 0 kB", "memory"),
        ("MemAvailable: 6000 kB", "MemAvailable: 8001 kB", "memory"),
        ("net 1000 200", "net -1000 200", "network bytes in"),
        ("net 1000 200", "net 1000 1e9", "network bytes out"),
        ("net 5 6", "net 18446744073709551615 6", "network bytes in"),
        ("net 5 6", "net 5", "network counters"),
        ("gpu 87", "gpu 101", "gpu utilisation"),
        ("gpu 87", "gpu NaN", "gpu utilisation"),
        (" 61,", " 300,", "gpu temperature"),
        (" 61,", " -4,", "gpu temperature"),
        ("40000, 80000", "80001, 80000", "gpu memory"),
        ("40000, 80000", "0, 0", "gpu memory"),
        ("40000, 80000", "80000", "gpu"),
    ] {
        let answer = GOOD.replacen(from, to, 1);
        assert_ne!(answer, GOOD, "{from}");
        match parse(answer.as_bytes()) {
            Err(MetricsError::Field { field: found, .. }) => assert_eq!(found, field, "{to}"),
            other => panic!("{to}: {other:?}"),
        }
    }
    assert!(matches!(parse(b"qudata-metrics\n\xff"), Err(MetricsError::Field { field: "encoding", .. })));
    let long = format!("qudata-metrics\n{}", "net 1 1\n".repeat(4000));
    assert!(matches!(parse(long.as_bytes()), Err(MetricsError::TooLarge { .. })));
    let gpus = format!("{GOOD}{}", "gpu 1, 1, 1, 1\n".repeat(40));
    assert!(matches!(parse(gpus.as_bytes()), Err(MetricsError::Field { field: "line", .. })));
}

#[test]
fn the_command_is_understood_by_a_real_shell() {
    let output = std::process::Command::new("bash").args(["-c", COMMAND]).output().unwrap();
    assert!(output.status.success());
    let reading = parse(&output.stdout).unwrap();
    assert!(reading.cpu.total > 0);
    assert!(reading.ram_util > 0.0 && reading.ram_util <= 100.0);
}

fn sane(percentage: f64) -> bool {
    percentage.is_finite() && (0.0..=100.0).contains(&percentage)
}

fn hostile() -> impl Strategy<Value = String> {
    let number = || prop_oneof![any::<u64>().prop_map(|n| n.to_string()), "[-+]?(NaN|inf|[0-9]{1,22}|1e9)"];
    (proptest::collection::vec(number(), 16), 0..16usize).prop_map(|(n, dropped)| {
        let mut lines = vec![
            "qudata-metrics".to_owned(),
            format!("cpu {} {} {} {} 0 0 0 0", n[0], n[1], n[2], n[3]),
            format!("MemTotal: {} kB", n[4]),
            format!("MemAvailable: {} kB", n[5]),
            format!("net {} {}", n[6], n[7]),
            format!("gpu {}, {}, {}, {}", n[8], n[9], n[10], n[11]),
        ];
        if dropped < lines.len() {
            lines.remove(dropped);
        }
        lines.join("\n")
    })
}

proptest! {
    #[test]
    fn any_bytes_are_parsed_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        let _ = parse(&bytes);
    }

    #[test]
    fn no_bad_number_ever_comes_out(first in hostile(), second in hostile()) {
        let mut sampler = MetricsSampler::default();
        for answer in [first, second] {
            if let Ok(reading) = parse(answer.as_bytes()) {
                let sample = sampler.take(reading);
                prop_assert!(sane(sample.ram_util));
                prop_assert!(sample.cpu_util.is_none_or(sane));
                prop_assert!(sample.gpus.iter().all(|gpu| gpu.mem_util.is_none_or(sane)));
            }
        }
    }

    #[test]
    fn small_counters_are_always_accepted(n in proptest::collection::vec(0u64..1_000_000, 5)) {
        let total = n[4] + 1;
        let answer = format!(
            "qudata-metrics\ncpu {} {} {} {} 0 0 0 0\nMemTotal: {total} kB\nMemAvailable: {} kB\n",
            n[0], n[1], n[2], n[3], total.min(n[4])
        );
        prop_assert!(parse(answer.as_bytes()).is_ok());
    }
}
