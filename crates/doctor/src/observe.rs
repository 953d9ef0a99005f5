//! Looks at the host: everything at once, everything within one deadline. Called by [`crate::examine`].
//!
//! Files are read by threads of their own and programs by children: whatever hangs in the kernel is left there and told
//! as such. A process that has left a thread there cannot end, so nobody may wait for this one: see [`crate::apart`].
//! (The runtime's own threads, which look up a name for [`outside`], the CLI does not wait for.)

mod agent;
mod asked;
mod gpus;
mod host;
mod image;
mod outside;
mod processor;
mod software;
mod systemd;

use std::{
    future::Future,
    io,
    path::{Path, PathBuf},
    thread,
};

use qudata_agent_core::settings::Settings;
use qudata_host::{causes::chain, command::ToolError};
use tokio::{
    sync::oneshot,
    time::{Instant, timeout_at},
};

use crate::{
    Scope,
    observed::{AgentLook, Observed, Seen, Unseen},
};

/// So many times as long a second look may take.
const MORE_PATIENCE: u32 = 2;

/// Who looks.
#[derive(Debug, Clone)]
struct Look {
    root: PathBuf,
    settings: Settings,
    scope: Scope,
    end: Instant,
}

/// Everything there is to see.
pub(crate) async fn observe(settings: &Settings, scope: &Scope) -> Observed {
    let look = Look {
        root: scope.root.clone(),
        settings: settings.clone(),
        scope: scope.clone(),
        end: Instant::now() + scope.patience,
    };
    let (processor, pci, programs, files, host, systemd, outside, agent) = tokio::join!(
        processor::observe(&look),
        gpus::observe(&look),
        software::programs(&look),
        software::files(&look),
        host::observe(&look),
        systemd::observe(&look),
        outside::observe(&look),
        agent::observe(&look),
    );
    // These would be failures, and all of this at once is a load itself: they are asked again, without the rest.
    let again = look.again();
    let processor = async {
        match processor.guest_code {
            Err(Unseen::Late(_)) => processor::observe(&again).await,
            Ok(_) | Err(_) => processor,
        }
    };
    let agent = async {
        match agent {
            AgentLook::Unseen(Unseen::Late(_)) => agent::observe(&again).await,
            seen => seen,
        }
    };
    let (processor, agent) = tokio::join!(processor, agent);
    Observed {
        settings: look.settings.clone(),
        settings_read: scope.settings.clone(),
        is_root: rustix::process::geteuid().is_root(),
        processor: processor.processor,
        kvm: processor.kvm,
        guest_code: processor.guest_code,
        firmware_iommu: host.firmware_iommu,
        pci,
        kernel: host.kernel,
        programs,
        files,
        capacity: host.capacity,
        hugepages: host.hugepages,
        memlock: host.memlock,
        cgroup: host.cgroup,
        systemd: systemd.systemd,
        nss: systemd.nss,
        outside,
        agent,
    }
}

impl Look {
    /// A second look, beginning now, which may take longer.
    fn again(&self) -> Self {
        let more = self.scope.patience.saturating_mul(MORE_PATIENCE);
        let scope = Scope { patience: self.scope.patience.saturating_add(more), ..self.scope.clone() };
        Self { scope, end: Instant::now() + more, ..self.clone() }
    }

    /// A path of the host below the root of this look.
    fn under(&self, path: &Path) -> PathBuf {
        self.root.join(path.strip_prefix("/").unwrap_or(path))
    }

    fn late(&self) -> Unseen {
        Unseen::Late(self.scope.patience)
    }

    /// Why a program did not tell what it was asked for. One that is slow on a busy host is not a broken one.
    fn untold(&self, error: &ToolError) -> Unseen {
        match error {
            ToolError::TimedOut { .. } => self.late(),
            ToolError::Start { .. } | ToolError::Failed { .. } | ToolError::Output { .. } => {
                Unseen::Failed(chain(error))
            }
        }
    }

    /// Waits until the end at most.
    async fn by_end<T>(&self, work: impl Future<Output = Seen<T>>) -> Seen<T> {
        timeout_at(self.end, work).await.unwrap_or_else(|_| Err(self.late()))
    }

    /// What `read` answers on a thread of its own, begun at once. The thread is left alone when it does not come back.
    fn read<T, F>(&self, read: F) -> impl Future<Output = Seen<T>> + use<T, F>
    where
        T: Send + 'static,
        F: FnOnce(&Self) -> Seen<T> + Send + 'static,
    {
        let (tell, told) = oneshot::channel();
        let look = self.clone();
        // Nobody waits any more: then the answer is too late.
        let begun = thread::Builder::new().name("doctor".into()).spawn(move || drop(tell.send(read(&look))));
        let (end, late) = (self.end, self.late());
        async move {
            begun.map_err(|error| Unseen::Failed(format!("no thread can be started: {error}")))?;
            match timeout_at(end, told).await {
                Ok(Ok(seen)) => seen,
                Ok(Err(_)) => Err(Unseen::Failed("the look ended early".to_owned())),
                Err(_) => Err(late),
            }
        }
    }
}

/// Text of a file.
fn text(path: &Path) -> Seen<String> {
    std::fs::read(path)
        .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
        .map_err(|error| unreadable(path, &error))
}

/// Text of a file that not every host has; none: this one has not.
fn text_if_any(path: &Path) -> Seen<Option<String>> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(Some(String::from_utf8_lossy(&bytes).into_owned())),
        Err(error) if is_absent(&error) => Ok(None),
        Err(error) => Err(unreadable(path, &error)),
    }
}

/// Whether a file is there. One that cannot be seen is no file that is missing.
fn is_file(path: &Path) -> Seen<bool> {
    match std::fs::metadata(path) {
        Ok(found) => Ok(found.is_file()),
        Err(error) if is_absent(&error) => Ok(false),
        Err(error) => Err(unreadable(path, &error)),
    }
}

/// It, or a folder above it, is not there.
fn is_absent(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

/// Why a file was not read.
fn unreadable(path: &Path, error: &io::Error) -> Unseen {
    let what = format!("cannot read {}", path.display());
    match error.kind() {
        io::ErrorKind::PermissionDenied => Unseen::Denied(what),
        _ => Unseen::Failed(format!("{what}: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use qudata_agent_core::settings::LoadFrom;

    use super::*;

    pub(super) fn look(patience: Duration) -> Look {
        let from = LoadFrom {
            file: None,
            env: Vec::new(),
            flags: Vec::new(),
            read: &|_| Err(io::ErrorKind::NotFound.into()),
            exists: &|_| false,
        };
        let scope = Scope { patience, ..Scope::default() };
        Look {
            root: scope.root.clone(),
            settings: Settings::load(&from).unwrap(),
            end: Instant::now() + patience,
            scope,
        }
    }

    #[tokio::test]
    async fn what_hangs_is_left_alone_and_told() {
        let look = look(Duration::from_millis(100));
        let begun = Instant::now();
        let hung = look.read(|_| {
            thread::sleep(Duration::from_secs(60));
            Ok(())
        });
        let (hung, quick) = tokio::join!(hung, look.read(|_| Ok(7)));
        assert_eq!((hung, quick), (Err(Unseen::Late(Duration::from_millis(100))), Ok(7)));
        assert!(begun.elapsed() < Duration::from_secs(10));
    }

    #[tokio::test]
    async fn a_look_that_dies_says_so() {
        let look = look(Duration::from_secs(10));
        let seen: Seen<()> = look.read(|_| panic!("the look's own fault")).await;
        assert!(matches!(&seen, Err(Unseen::Failed(why)) if why.contains("early")), "{seen:?}");
    }
}
