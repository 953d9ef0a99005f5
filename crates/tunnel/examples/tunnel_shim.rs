//! A program that is nothing but the shim, for the tests of the tunnel.

fn main() -> std::process::ExitCode {
    qudata_host::shim::main().into()
}
