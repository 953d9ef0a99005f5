use super::*;

fn address(text: &str) -> PciAddress {
    text.parse().unwrap()
}

fn bar(size: u64, is_64bit: bool, prefetchable: bool) -> MemoryBar {
    MemoryBar { size: ByteSize::from_bytes(size), is_64bit, prefetchable }
}

fn function(at: &str, bars: &[MemoryBar]) -> PassthroughFunction {
    PassthroughFunction { address: address(at), bars: bars.to_vec() }
}

fn slot(bars: &[MemoryBar]) -> PassthroughSlot {
    PassthroughSlot::new(vec![function("0000:65:00.0", bars)], false).unwrap()
}

#[test]
fn only_what_hardware_can_have_is_a_slot() {
    let one = function("0000:65:00.0", &[]);
    for count in [0, 9] {
        let error = PassthroughSlot::new(vec![one.clone(); count], false).unwrap_err();
        assert_eq!(error, PassthroughSlotError::Count { count });
    }
    assert!(PassthroughSlot::new(vec![one; 8], false).is_ok());
    for size in [0, 3 << 20, 32 << 40] {
        let odd = function("0000:65:00.1", &[bar(1 << 20, true, true), bar(size, true, true)]);
        let error = PassthroughSlot::new(vec![odd], false).unwrap_err();
        assert!(error.to_string().starts_with("GPU function 0000:65:00.1 has a BAR of "), "{error}");
    }
}

#[test]
fn windows_are_powers_of_two_and_by_kind() {
    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;
    let sizes = |slot: &PassthroughSlot| {
        let reserve = slot.low_reserve().map(|size| size.bytes());
        (slot.high_window().bytes(), slot.low_window().bytes(), reserve)
    };
    for (bars, expected) in [
        (vec![], (0, 2 * MIB, None)),
        (vec![bar(16 * MIB, true, true)], (16 * MIB, 2 * MIB, None)),
        (vec![bar(4096, true, true)], (MIB, 2 * MIB, None)),
        (vec![bar(128 * GIB, true, true), bar(16 * MIB, true, true)], (256 * GIB, 2 * MIB, None)),
        // A bridge has no other way for what is not both 64-bit and prefetchable.
        (vec![bar(16 * MIB, false, false)], (0, 16 * MIB, Some(16 * MIB))),
        (vec![bar(16 * MIB, true, false), bar(MIB, false, true)], (0, 32 * MIB, Some(32 * MIB))),
        (vec![bar(2 * MIB, false, false)], (0, 2 * MIB, None)),
    ] {
        assert_eq!(sizes(&slot(&bars)), expected, "{bars:?}");
    }
    let two = vec![
        function("0000:01:00.0", &[bar(16 * MIB, false, false)]),
        function("0000:01:00.1", &[bar(16 << 10, false, false)]),
    ];
    assert_eq!(sizes(&PassthroughSlot::new(two, false).unwrap()), (0, 32 * MIB, Some(32 * MIB)));
}

#[test]
fn old_software_and_large_bars_make_a_warning() {
    let version = |text: &str| text.parse::<VersionNumber>().unwrap();
    let kernel = |text: &str| text.parse::<KernelVersion>().unwrap();
    let large = slot(&[bar(16 << 20, true, true), bar(128 << 30, true, true)]);
    let slots = [large.clone(), slot(&[bar(8 << 30, true, true)]), large.clone()];
    for (linux, qemu, warned) in [
        ("6.1", "7.2", true),
        ("6.12", "9.1.50", true),
        ("6.11", "10.0", true),
        ("6.12", "9.2.0", false),
        ("7.0", "11.0", false),
    ] {
        let warning = warn_of_slow_bars(&slots, kernel(linux), version(qemu));
        assert_eq!(warning.is_some(), warned, "{linux} {qemu}");
    }
    let warning = warn_of_slow_bars(&slots, kernel("6.1.0-56-amd64"), version("7.2.22")).unwrap();
    assert_eq!((warning.gpus.len(), warning.seconds), (2, 60));
    assert_eq!(
        warning.to_string(),
        "the start will take about 60 s longer: the memory of GPU 0000:65:00.0, 0000:65:00.0 is mapped page by page by \
         Linux 6.1 with QEMU 7.2; update to Linux 6.12 and QEMU 9.2 or newer, or leave that memory unmapped (slower, no \
         direct transfers between GPUs)"
    );
    let small = [slot(&[bar(8 << 30, true, true), bar(8 << 30, true, true)])];
    assert_eq!(warn_of_slow_bars(&small, kernel("5.15"), version("6.2")), None, "no BAR of 16 GiB");
    let unmapped = PassthroughSlot::new(large.functions().to_vec(), true).unwrap();
    assert_eq!(warn_of_slow_bars(&[unmapped], kernel("5.15"), version("6.2")), None);
}
