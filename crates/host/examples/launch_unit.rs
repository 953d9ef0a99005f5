//! Starts the launch that it reads as JSON from standard input as a unit of systemd, says "started", and waits to be
//! killed: the agent of the crash tests.
#![allow(clippy::unwrap_used, reason = "a test program")]

use std::io::Read;

use qudata_host::launch::{Launch, Launcher};

#[tokio::main]
async fn main() {
    let mut wish = String::new();
    std::io::stdin().read_to_string(&mut wish).unwrap();
    let launch: Launch = serde_json::from_str(&wish).unwrap();
    let launcher = Launcher::systemd().await.unwrap();
    println!("asking");
    let process = launcher.launch(&launch).await.unwrap();
    println!("started");
    process.exited().await.unwrap();
}
