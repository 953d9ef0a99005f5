//! The words of `doctor`.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueHint};
use qudata_host::pci::PciAddress;

/// See [`super::Command::Doctor`].
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct Doctor {
    #[command(subcommand)]
    pub(crate) command: Option<Trial>,
    /// Say what a check is about and what to do when it fails; without an id: list all checks
    #[arg(long, value_name = "ID", conflicts_with_all = ["quiet", "strict", "config"])]
    pub(crate) explain: Option<Option<String>>,
    /// Show only what is not as it should be
    #[arg(long, short)]
    pub(crate) quiet: bool,
    /// Exit with 1 also for warnings
    #[arg(long)]
    pub(crate) strict: bool,
    /// Settings file [default: /etc/qudata/agent.toml, if it exists]
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) config: Option<PathBuf>,
}

/// What is more than a look.
#[derive(Debug, Subcommand)]
pub(crate) enum Trial {
    /// Boot an instance with each free GPU, look at the GPU from inside, and delete the instance
    ///
    /// Instances and GPUs of renters are left alone. Without any GPU an instance without one is tried.
    Selftest(Selftest),
}

#[derive(Debug, Args)]
pub(crate) struct Selftest {
    /// GPU to try, by its PCI address; may be given several times [default: all that are free]
    #[arg(long = "gpu", value_name = "ADDRESS")]
    pub(crate) gpus: Vec<PciAddress>,
    /// Keep the instances
    #[arg(long)]
    pub(crate) keep: bool,
    /// How long each instance may take until it is ready
    #[arg(long, value_name = "SECONDS", default_value_t = 900, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) timeout: u32,
}
