//! Reserved huge pages that starting VMs were promised and have not taken yet. Owns the promises; `instance::hardware`
//! asks for one, and gives it back when QEMU has answered, which has taken its pages by then.
//!
//! The kernel gives pages to whoever comes first. Without this, two VMs that start at once (all of them, after a reboot)
//! see the same free pages, and the second one's QEMU ends.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use qudata_host::causes::chain;
use qudata_qemu::memory::{
    HugepagePools, MemoryPlan, MemoryWish, PagesTaken, observe_hugepages, plan_memory,
};
use tokio::{
    sync::watch,
    time::{Instant, timeout_at},
};

/// Clearing a terabyte takes half a minute. After this other memory is taken.
const PATIENCE: Duration = Duration::from_secs(120);

/// All promises of this host; clones share them.
#[derive(Debug, Clone)]
pub struct Pages {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    root: PathBuf,
    patience: Duration,
    open: Mutex<Open>,
    /// Told when a promise has ended.
    ended: watch::Sender<()>,
}

#[derive(Debug, Default)]
struct Open {
    last: u64,
    promises: BTreeMap<u64, PagesTaken>,
}

/// Pages for one VM. Held until its QEMU has taken them, or has failed to.
#[derive(Debug)]
pub struct Promise {
    pages: Pages,
    number: u64,
}

impl Pages {
    /// Of the host whose file system is at `root`.
    pub fn of(root: impl Into<PathBuf>) -> Self {
        Self::with(root.into(), PATIENCE)
    }

    fn with(root: PathBuf, patience: Duration) -> Self {
        let (open, ended) = (Mutex::default(), watch::Sender::new(()));
        Self { inner: Arc::new(Inner { root, patience, open, ended }) }
    }

    /// Chooses what backs a machine's RAM. Where the reserved pages are enough only if those that others were promised
    /// are counted twice, it waits until those are taken, and looks again. `waits` is called when it does, once.
    pub async fn plan(&self, wish: MemoryWish, waits: impl FnOnce()) -> (MemoryPlan, Option<Promise>) {
        let end = Instant::now() + self.inner.patience;
        let mut ended = self.inner.ended.subscribe();
        let mut waits = Some(waits);
        loop {
            ended.mark_unchanged();
            if let Some(planned) = self.try_plan(wish, Instant::now() >= end) {
                return planned;
            }
            if let Some(tell) = waits.take() {
                tell();
            }
            // Over in either case: the next look decides.
            let _ = timeout_at(end, ended.changed()).await;
        }
    }

    /// None: not before others have taken theirs.
    fn try_plan(&self, wish: MemoryWish, at_once: bool) -> Option<(MemoryPlan, Option<Promise>)> {
        // Held over the look, so that what a VM took before its promise ended is seen as taken.
        let mut open = self.open();
        // Without a look at the pools there is ordinary memory still.
        let pools = observe_hugepages(&self.inner.root).unwrap_or_else(|error| {
            tracing::warn!(error = %chain(&error), "huge pages are not used");
            HugepagePools::default()
        });
        let plan = plan_memory(wish, &pools.clone().beside(open.promises.values().copied()));
        match plan.takes(wish.ram) {
            Some(taken) => {
                open.last += 1;
                let number = open.last;
                open.promises.insert(number, taken);
                Some((plan, Some(Promise { pages: self.clone(), number })))
            }
            None if at_once || plan == plan_memory(wish, &pools) => Some((plan, None)),
            None => None,
        }
    }

    fn open(&self) -> MutexGuard<'_, Open> {
        self.inner.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Promise {
    fn drop(&mut self) {
        self.pages.open().promises.remove(&self.number);
        self.pages.inner.ended.send_replace(());
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use qudata_host::size::ByteSize;
    use qudata_qemu::memory::{Backing, HugePage};

    use super::*;

    const RESERVED: Backing = Backing::Reserved(HugePage::Gib1);

    fn free(root: &Path, pages: u64) {
        let pool = root.join("sys/kernel/mm/hugepages/hugepages-1048576kB");
        std::fs::create_dir_all(&pool).unwrap();
        std::fs::write(pool.join("free_hugepages"), format!("{pages}\n")).unwrap();
        std::fs::write(pool.join("resv_hugepages"), "0\n").unwrap();
    }

    fn wish(gib: u64) -> MemoryWish {
        MemoryWish { ram: ByteSize::from_gib(gib), passthrough: true, node: None }
    }

    fn never() {
        panic!("it waits");
    }

    #[tokio::test]
    async fn two_starts_do_not_count_on_the_same_pages() {
        let root = tempfile::tempdir().unwrap();
        free(root.path(), 10);
        let pages = Pages::of(root.path());
        let (first, promise) = pages.plan(wish(6), never).await;
        assert_eq!(first.backing, RESERVED);
        // What fits beside it needs not wait, nor does what would not fit without it.
        let (second, _second) = pages.plan(wish(4), never).await;
        assert_eq!(second.backing, RESERVED);
        assert_eq!(pages.plan(wish(11), never).await.0.backing, Backing::Transparent);
        // What would fit if the first had not been promised them waits until it has taken them.
        let (tell, told) = tokio::sync::oneshot::channel();
        let waiting = tokio::spawn({
            let pages = pages.clone();
            async move { pages.plan(wish(5), || tell.send(()).unwrap()).await }
        });
        told.await.expect("it does not say that it waits");
        assert!(!waiting.is_finished());
        free(root.path(), 4);
        drop(promise);
        assert_eq!(waiting.await.unwrap().0.backing, Backing::Transparent);
    }

    #[tokio::test]
    async fn pages_of_a_start_that_failed_go_to_the_next() {
        let root = tempfile::tempdir().unwrap();
        free(root.path(), 6);
        let pages = Pages::of(root.path());
        let (_, promise) = pages.plan(wish(6), never).await;
        let (second, _) = tokio::join!(pages.plan(wish(6), || {}), async { drop(promise) });
        assert_eq!(second.0.backing, RESERVED);
    }

    #[tokio::test]
    async fn a_start_that_hangs_holds_the_next_one_for_a_while_only() {
        let root = tempfile::tempdir().unwrap();
        free(root.path(), 6);
        let pages = Pages::with(root.path().to_owned(), Duration::from_millis(50));
        let (_, _promise) = pages.plan(wish(6), never).await;
        assert_eq!(pages.plan(wish(6), || {}).await.0.backing, Backing::Transparent);
    }
}
