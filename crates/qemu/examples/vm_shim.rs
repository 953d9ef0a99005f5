//! A program that is nothing but the launcher's shim, for the tests of launching QEMU.

fn main() -> std::process::ExitCode {
    qudata_host::shim::main().into()
}
