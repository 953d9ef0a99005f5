//! A program that is nothing but the child of the door, for the tests of it.

fn main() -> std::process::ExitCode {
    qudata_vfio::door::child_main().into()
}
