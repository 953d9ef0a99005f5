//! The child's side of the door: a process of one thread that may be lost to the kernel. Called by the binary.

use std::io::{self, BufWriter, Read, Write};

use super::{Batch, Outcome};
use crate::sysfs::SysfsKernel;

/// A list for one GPU is a few hundred bytes.
const BATCH_CAP: u64 = 1 << 20;

/// Reads a list of steps as JSON from standard input, carries it out and writes one line per step. The value is the exit
/// status to end with: 0 when every step succeeded.
pub fn child_main() -> u8 {
    match work(io::stdin().lock(), io::stdout().lock()) {
        Ok(true) => 0,
        // The line of the failed step tells the rest.
        Ok(false) => 1,
        // Not JSON, or nobody listens any more: then nothing more may be done either.
        Err(_) => 2,
    }
}

fn work(input: impl Read, output: impl Write) -> io::Result<bool> {
    let mut output = BufWriter::new(output);
    let mut text = Vec::new();
    // An agent that dies half-way leaves half a list, which is no JSON: then nothing is done.
    input.take(BATCH_CAP).read_to_end(&mut text)?;
    let batch: Batch = serde_json::from_slice(&text)?;
    let kernel = SysfsKernel::new(batch.root);
    for op in &batch.ops {
        if op.may_hang() {
            // So that the agent knows which step it waits for. Fails when it gave up or died: the next step is not ours
            // to take then.
            output.flush()?;
        }
        let outcome = Outcome::of(&kernel, op);
        serde_json::to_writer(&mut output, &outcome)?;
        output.write_all(b"\n")?;
        if !matches!(outcome, Outcome::Done(_)) {
            output.flush()?;
            return Ok(false);
        }
    }
    output.flush()?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TWO_STEPS: &str = r#"{"root":"/nowhere","ops":[
        {"ExpectDriver":{"address":"0000:01:00.0","driver":null}},
        {"ExpectDriver":{"address":"0000:01:00.0","driver":null}}]}"#;

    #[test]
    fn a_list_stops_at_its_first_failure() {
        let mut output = Vec::new();
        assert!(!work(TWO_STEPS.as_bytes(), &mut output).unwrap());
        let text = String::from_utf8(output).unwrap();
        assert_eq!(text.lines().count(), 1);
        assert!(text.contains("NotFound"), "{text}");
    }

    #[test]
    fn half_a_list_is_no_list() {
        let mut output = Vec::new();
        assert!(work(&TWO_STEPS.as_bytes()[..TWO_STEPS.len() - 1], &mut output).is_err());
        assert!(output.is_empty());
    }

    struct Closed;

    impl Write for Closed {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::BrokenPipe.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn the_next_step_is_not_taken_when_nobody_listens_any_more() {
        let root = tempfile::tempdir().unwrap();
        let file = |address: &str| root.path().join(format!("sys/bus/pci/devices/{address}/driver_override"));
        let addresses = ["0000:01:00.0", "0000:01:00.1"];
        for address in addresses {
            std::fs::create_dir_all(file(address).parent().unwrap()).unwrap();
            std::fs::write(file(address), "").unwrap();
        }
        let op = |address: &str| serde_json::json!({"Override": {"address": address, "driver": "vfio-pci"}});
        let list = serde_json::json!({"root": root.path(), "ops": addresses.map(op)});
        assert!(work(list.to_string().as_bytes(), Closed).is_err());
        let written = addresses.map(|address| std::fs::read_to_string(file(address)).unwrap());
        assert_eq!(written, ["vfio-pci", ""]);
    }
}
