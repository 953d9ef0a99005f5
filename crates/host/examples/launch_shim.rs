//! A program that is nothing but the shim, for the tests of launching.

fn main() -> std::process::ExitCode {
    qudata_host::shim::main().into()
}
