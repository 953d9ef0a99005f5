//! The last steps before a long-lived program runs, taken inside the process that will become it: own session, identity
//! file, limits, unprivileged user, no new privileges, exec. Called by the hidden subcommand of the agent's binary.
//!
//! Done in a small program of our own instead of between fork and exec, because that place allows almost nothing
//! safely and would need `unsafe`.

use std::{
    io::{self, Read, Write},
    os::unix::process::CommandExt,
    process::Command,
};

use rustix::{
    fs::Mode,
    process::{Gid, Resource, Rlimit, Uid, getrlimit, setpriority_process, setrlimit, setsid, umask},
};

use crate::{
    durable,
    launch::{Launch, identity_path},
    process::identity_of_self,
};

/// Reads a [`Launch`] as JSON from standard input and becomes its program. Returns only on failure, after the reason
/// was written to the report pipe (the former standard output); the value is the exit status to end with.
pub fn main() -> u8 {
    // Closed by exec: that is the sign of success.
    let report = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdout(), 3);
    let error = match become_program() {
        Ok(never) => match never {},
        Err(error) => error,
    };
    if let Ok(report) = report {
        let _ = std::fs::File::from(report).write_all(error.as_bytes());
    }
    127
}

fn become_program() -> Result<std::convert::Infallible, String> {
    let step = |what: &str, e: io::Error| format!("{what}: {e}");
    let mut wish = Vec::new();
    // An agent killed half-way leaves half a wish, which is no JSON: then nothing starts.
    io::stdin().take(1 << 20).read_to_end(&mut wish).map_err(|e| step("reading the launch", e))?;
    let launch: Launch = serde_json::from_slice(&wish).map_err(|e| format!("reading the launch: {e}"))?;
    let null = std::fs::File::open("/dev/null").map_err(|e| step("opening /dev/null", e))?;
    rustix::stdio::dup2_stdin(&null).map_err(|e| step("closing standard input", e.into()))?;
    rustix::stdio::dup2_stdout(rustix::stdio::stderr()).map_err(|e| step("opening the log", e.into()))?;
    setsid().map_err(|e| step("starting a session", e.into()))?;
    limit(&launch)?;
    let identity = identity_of_self(&launch.program).map_err(|e| step("identifying the process", e))?;
    let text = serde_json::to_vec(&identity).map_err(|e| format!("writing the identity: {e}"))?;
    let file = identity_path(&launch.dir, &launch.name);
    // Bound to this boot of the host, so it need not survive a power cut; a killed agent does not lose it.
    durable::publish(&file, &text, 0o600).map_err(|e| format!("{e}: {}", e.source))?;
    drop_privileges(&launch)?;
    // On failure the agent removes the identity file: without privileges this process cannot. Should the agent be gone
    // as well, the file names a process that is about to end.
    let error = Command::new(&launch.program)
        .args(&launch.args)
        .env_clear()
        .env("PATH", "/usr/bin:/bin")
        .env("LC_ALL", "C")
        .exec();
    Err(step("executing the program", error))
}

fn limit(launch: &Launch) -> Result<(), String> {
    let set = |resource, n: u64, what: &str| {
        setrlimit(resource, Rlimit { current: Some(n), maximum: Some(n) })
            .map_err(|e| format!("limiting {what}: {e}"))
    };
    // A core file would hold the tenant's memory.
    set(Resource::Core, 0, "core files")?;
    // Inside a container the agent may not raise the hard limit; what is there must do.
    let ceiling = getrlimit(Resource::Nofile).maximum.unwrap_or(launch.no_files);
    set(Resource::Nofile, launch.no_files.min(ceiling), "open files")?;
    if let Some(size) = launch.confinement.memlock {
        set(Resource::Memlock, size.bytes(), "locked memory")?;
    }
    setpriority_process(None, launch.nice).map_err(|e| format!("setting the niceness: {e}"))?;
    umask(Mode::from_raw_mode(0o077));
    Ok(())
}

fn drop_privileges(launch: &Launch) -> Result<(), String> {
    use rustix::thread::{set_no_new_privs, set_thread_groups, set_thread_res_gid, set_thread_res_uid};
    let fail = |what: &str, e: rustix::io::Errno| format!("{what}: {e}");
    // The shim has one thread, so what is set for the thread is set for the process that exec makes of it.
    let groups: Vec<Gid> = launch.groups.iter().map(|g| Gid::from_raw(*g)).collect();
    set_thread_groups(&groups).map_err(|e| fail("setting groups", e))?;
    let (uid, gid) = (Uid::from_raw(launch.uid), Gid::from_raw(launch.gid));
    set_thread_res_gid(gid, gid, gid).map_err(|e| fail("setting the group", e))?;
    set_thread_res_uid(uid, uid, uid).map_err(|e| fail("setting the user", e))?;
    set_no_new_privs(true).map_err(|e| fail("forbidding new privileges", e))
}
