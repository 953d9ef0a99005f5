//! The commands, one file each. Owns which function a command line goes to and the runtime it gets; called by `main`.

mod change;
mod console;
mod create;
mod doctor;
mod documents;
mod events;
mod gpu;
mod image;
mod inspect;
mod key;
mod probe_kvm;
mod serve;
mod setup;
mod ssh;

use crate::{
    args::{Command, CommandLine, Instance},
    client::Agent,
    exit::{Exit, Failure},
    screen::Screen,
};

/// What every command on the agent gets.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Context<'a> {
    pub(crate) agent: &'a Agent,
    pub(crate) screen: &'a Screen,
}

/// Runs the command to its end.
pub(crate) fn run(line: CommandLine, screen: &Screen) -> Result<Exit, Failure> {
    let named = line.global.socket.clone();
    let agent = Agent::at(line.global.socket);
    let cx = Context { agent: &agent, screen };
    match line.command {
        Command::Serve(wish) => serve::run(wish),
        Command::Instance(command) => on_one_thread(instance(cx, command)),
        Command::Gpu(command) => on_one_thread(gpu::run(cx, command)),
        Command::Status => on_one_thread(inspect::status(cx)),
        Command::Doctor(wish) => on_one_thread(doctor::run(cx, wish, named)),
        Command::Image(command) => on_one_thread(image::run(cx, command)),
        Command::Install(wish) => on_one_thread(setup::install(cx, wish)),
        Command::Uninstall(wish) => on_one_thread(setup::uninstall(cx, wish)),
        Command::Settings => documents::settings(screen),
        Command::Completions { shell } => documents::completions(screen, shell),
        Command::Man { dir } => documents::man(&dir),
        Command::ProbeKvm { qemu } => on_one_thread(probe_kvm::run(screen, &qemu)),
    }
}

async fn instance(cx: Context<'_>, command: Instance) -> Result<Exit, Failure> {
    match command {
        Instance::Create(wish) => create::run(cx, wish).await,
        Instance::List => inspect::list(cx).await,
        Instance::Show(which) => inspect::show(cx, &which).await,
        Instance::Ssh(wish) => ssh::run(cx, wish).await,
        Instance::Console(wish) => console::run(cx, &wish).await,
        Instance::Start(which) => change::start(cx, &which).await,
        Instance::Stop(which) => change::stop(cx, &which).await,
        Instance::Restart(wish) => change::restart(cx, &wish).await,
        Instance::Delete(wish) => change::delete(cx, &wish).await,
        Instance::Events(wish) => events::run(cx, &wish).await,
        Instance::Key(command) => key::run(cx, &command).await,
    }
}

/// A client waits for one thing at a time.
fn on_one_thread(work: impl Future<Output = Result<Exit, Failure>>) -> Result<Exit, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|e| anyhow::Error::new(e).context("cannot start the runtime"))?;
    let done = runtime.block_on(work);
    // What the answer does not need is not waited for: a resolver that hangs takes half a minute.
    runtime.shutdown_background();
    done
}
