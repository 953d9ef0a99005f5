//! The steps of an installation but the reboot: what each does. Called by `install`, in order.

use secrecy::{ExposeSecret, SecretString};

use super::{Job, leftovers};
use crate::{
    boot,
    error::{Code, SetupError},
    hands::{must, order},
    ledger::{Ledger, NewFile},
    manifest::Entry,
    observe::{self, Observed},
    outside::{KeyVerdict, Means, PartFailure, Tick, Tried},
    packages, places,
    plan::{self, Change, FileChange, Plan},
    progress::{Course, End, Event, Step},
    wish::Wish,
};

/// One run.
#[derive(Debug)]
pub(super) struct Run<'a, 'm> {
    pub(super) means: Means<'m>,
    pub(super) job: &'a Job<'a>,
    pub(super) wish: &'a Wish,
    pub(super) ledger: &'a mut Ledger<'m>,
}

impl Run<'_, '_> {
    /// The host and the plan as they are now.
    pub(super) fn look(&self, course: &Course<'_>) -> Result<(Observed, Plan), SetupError> {
        let observed =
            observe::observe(self.means, self.wish, self.job.key.map(ExposeSecret::expose_secret))?;
        let kept = (course.kept.tested.as_ref(), course.kept.image.as_deref());
        let plan = plan::plan(&observed, self.wish, kept)?;
        Ok((observed, plan))
    }

    pub(super) fn preflight(&mut self, course: &mut Course<'_>) -> Result<End, SetupError> {
        let (observed, plan) = self.look(course)?;
        for (address, why) in &plan.chosen.left_out {
            course.note(format!("GPU {address} is left out: {why}"));
        }
        let gpus: Vec<String> = plan.chosen.gpus.iter().map(|gpu| gpu.address.to_string()).collect();
        course.note(format!(
            "GPUs to rent out: {}",
            if gpus.is_empty() { "none".into() } else { gpus.join(", ") }
        ));
        if let KeyVerdict::Unreachable(why) =
            check_key(self.means, &observed, self.offline(), key(self.means, self.job)?.as_ref())?
        {
            course
                .warn(format!("the control plane does not answer ({why}); the agent registers when it does"));
        }
        Ok(End::Done)
    }

    /// The control plane need not answer: so the owner said, or the host goes on by itself after its restart, when nobody is
    /// there to say it and the network may still be coming up.
    fn offline(&self) -> bool {
        self.wish.offline || self.job.wish.is_none()
    }

    pub(super) fn package(&mut self, course: &mut Course<'_>) -> Result<End, SetupError> {
        let (_, plan) = self.look(course)?;
        let Some(Change::Package { file, .. }) = plan.of(Step::Package).next() else {
            // Cut off after apt was done and before what came with it was written down.
            let open = self.ledger.manifest.packages().is_some_and(|(_, _, done)| !done);
            if open {
                return self.apt(course, None);
            }
            packages::note_groups(self.means, self.ledger)?;
            return Ok(End::Already);
        };
        let noted = self.ledger.manifest.entries.iter().any(|entry| matches!(entry, Entry::Groups { .. }));
        if !noted {
            let mut before = Vec::new();
            for path in places::GROUP_FILES {
                before.push((path.to_owned(), self.ledger.back_up(path, false)?));
            }
            self.ledger.note(Entry::Groups { added: Vec::new(), before })?;
        }
        self.apt(course, file.as_deref())
    }

    fn apt(&mut self, course: &Course<'_>, file: Option<&str>) -> Result<End, SetupError> {
        let mut tick = ticker(course, Step::Package);
        packages::install(self.means, self.ledger, file, &mut tick)?;
        packages::note_groups(self.means, self.ledger)?;
        Ok(End::Done)
    }

    pub(super) fn settings(&mut self, course: &mut Course<'_>) -> Result<End, SetupError> {
        let (observed, plan) = self.look(course)?;
        // The service could not be asked before the package brought what to ask with.
        check_key(self.means, &observed, self.offline(), key(self.means, self.job)?.as_ref())?;
        let mut changed = false;
        if plan.of(Step::Settings).next().is_some() {
            course.kept.restart_owed = true;
            course.save()?;
        }
        for change in plan.of(Step::Settings) {
            if let Change::File(file) = change {
                changed |= self.write(file)?;
            }
        }
        if changed {
            self.reload()?;
        }
        Ok(if changed { End::Done } else { End::Already })
    }

    pub(super) fn write(&mut self, file: &FileChange) -> Result<bool, SetupError> {
        let mut look = self.means.files.mine(file.mode);
        if file.group {
            // Without the group nobody but root reads it, which is as good.
            look.gid = observe::group(self.means.files, places::GROUP)?.unwrap_or(look.gid);
        }
        let key = self.job.key.filter(|_| file.secret);
        let text = key.map(|key| format!("{}\n", key.expose_secret()));
        let bytes = text.as_deref().unwrap_or(&file.text).as_bytes();
        self.ledger.put(&NewFile { path: file.path, bytes, look, secret: file.secret })
    }

    pub(super) fn boot(&mut self, course: &mut Course<'_>) -> Result<End, SetupError> {
        let (_, plan) = self.look(course)?;
        let mut end = End::Already;
        for change in plan.of(Step::Boot) {
            match change {
                Change::File(file) => {
                    self.write(file)?;
                    course.note(format!("{} is written", file.path));
                    end = End::Done;
                }
                Change::Regenerate { params, loader } => {
                    boot::regenerate(self.means, self.ledger, params)?;
                    course.note(format!("{loader} passes {} from the next start on", params.join(" ")));
                    end = End::Done;
                }
                Change::Package { .. }
                | Change::Image { .. }
                | Change::Reboot { .. }
                | Change::Selftest { .. }
                | Change::Enable => {}
            }
        }
        Ok(end)
    }

    pub(super) fn image(&mut self, course: &mut Course<'_>) -> Result<End, SetupError> {
        let (_, plan) = self.look(course)?;
        if plan.of(Step::Image).next().is_none() {
            return Ok(End::Already);
        }
        // On disk before there is a new image, which nothing has tried.
        course.kept.tested = None;
        course.save()?;
        let built = {
            let mut tick = ticker(course, Step::Image);
            self.means.outside.build_image(self.wish, &mut tick)
        };
        let id = built.map_err(|PartFailure { code, text }| {
            SetupError::new(Code::Image(code), "the base image could not be built", text)
        })?;
        course.note(format!("base image {id} is there"));
        course.kept.image.clone_from(&self.wish.image);
        Ok(End::Done)
    }

    pub(super) fn selftest(&mut self, course: &mut Course<'_>) -> Result<End, SetupError> {
        if self.wish.skip_selftest {
            course.warn("no VM was tried out, as asked; `qudata-agent doctor selftest` does it");
            return Ok(End::Skipped);
        }
        let (mut observed, mut plan) = self.look(course)?;
        if self.clear_leftovers(course, &observed)? {
            (observed, plan) = self.look(course)?;
        }
        if let Some(text) = crate::text::later(&plan) {
            course.note(text);
        }
        let Some(Change::Selftest { gpus }) = plan.of(Step::Selftest).next() else {
            return Ok(End::Already);
        };
        leftovers::expect(self.means, &observed.tenants)?;
        let tested = if observed.tenants.is_empty() {
            self.selftest_alone(gpus)
        } else {
            // Tenants are reached through the control plane and the tunnel: the agent stays as it is.
            self.means.outside.selftest(gpus)
        };
        let tried = tested.map_err(|why| {
            let what = format!("a VM was tried out and did not pass: {why}");
            let remedy = "Find out why with `qudata-agent doctor`; or install without: --skip-selftest.";
            SetupError::new(Code::SelftestFailed, what, remedy).next("qudata-agent doctor")
        })?;
        leftovers::forget(self.means)?;
        for line in tried.seen {
            course.note(line);
        }
        // What was rented out meanwhile is tried another time.
        let known = plan::still_tested(&observed, &plan, course.kept.tested.as_ref());
        let mut known = known.unwrap_or_else(|| plan::to_be_tested(&observed, &plan));
        known.gpus.extend(tried.gpus.iter().map(ToString::to_string));
        course.kept.tested = Some(known);
        Ok(End::Done)
    }

    /// Deletes what a self-test that was cut off left. True: something may be different now.
    fn clear_leftovers(&self, course: &Course<'_>, observed: &Observed) -> Result<bool, SetupError> {
        let Some(before) = leftovers::before(self.means)? else { return Ok(false) };
        if observed.tenants.is_empty() {
            return Ok(false);
        }
        let only_since = observed.tenants.iter().all(|tenant| !before.contains(&tenant.id));
        if !observed.active && !only_since {
            return Ok(false);
        }
        let started = if observed.active { Ok(()) } else { self.start_alone() };
        let cleared = started.and_then(|()| self.delete_leftovers(course, observed, &before));
        if !observed.active && cleared != Ok(true) {
            // Somebody else's after all, or it went wrong: the agent must not run alone.
            self.end_selftest()?;
        }
        cleared.map(|_| true).map_err(|why| {
            let what = format!("what an earlier self-test left cannot be deleted: {why}");
            let remedy = "Find out why with `qudata-agent doctor`.";
            SetupError::new(Code::SelftestFailed, what, remedy).next("qudata-agent doctor")
        })
    }

    /// True: there was nothing else.
    fn delete_leftovers(
        &self,
        course: &Course<'_>,
        observed: &Observed,
        before: &[String],
    ) -> Result<bool, String> {
        let mut only = true;
        for tenant in self.means.tenants(&observed.settings.data_dir).map_err(in_full)? {
            if leftovers::is_one(&tenant, before) {
                self.means.outside.delete(&tenant.id)?;
                course.note(format!("{}, left by a self-test that was cut off, is deleted", tenant.name));
            } else {
                only = false;
            }
        }
        Ok(only)
    }

    /// With the agent's own unit, and without the control plane: nobody else can order anything meanwhile.
    fn selftest_alone(&self, gpus: &[qudata_host::pci::PciAddress]) -> Result<Tried, String> {
        let tested = self.start_alone().and_then(|()| self.means.outside.selftest(gpus));
        // The agent stays up alone until the next step starts it for real; it must not be asked by anybody before.
        let back = self.end_selftest().map_err(in_full);
        tested.and_then(|seen| back.map(|()| seen))
    }

    fn start_alone(&self) -> Result<(), String> {
        let files = self.means.files;
        for dir in ["/run/systemd", "/run/systemd/system", places::SELFTEST_DIR] {
            files.make_dir(dir, 0o755).map_err(in_full)?;
        }
        let look = files.mine(0o644);
        files.write(places::SELFTEST_DROP_IN, places::SELFTEST_TEXT.as_bytes(), look).map_err(in_full)?;
        self.reload()
            .and_then(|()| self.systemctl(&["restart", places::AGENT_UNIT], Code::AgentFailed))
            .map_err(in_full)?;
        self.means.outside.agent_works(false).map(drop)
    }

    /// Takes the drop-in of a self-test away, also that of one that was cut off.
    fn end_selftest(&self) -> Result<(), SetupError> {
        if !self.means.files.exists(places::SELFTEST_DROP_IN) {
            return Ok(());
        }
        // The drop-in is the note that the agent runs alone: it goes last.
        self.systemctl(&["stop", places::AGENT_UNIT], Code::AgentFailed)?;
        self.means.files.remove(places::SELFTEST_DROP_IN)?;
        self.means.files.remove_empty_dir(places::SELFTEST_DIR)?;
        self.reload()
    }

    pub(super) fn agent(&mut self, course: &mut Course<'_>) -> Result<End, SetupError> {
        self.end_selftest()?;
        let (observed, _) = self.look(course)?;
        let mut end = End::Already;
        if !observed.enabled {
            self.ledger.note(Entry::Unit { name: places::AGENT_UNIT.into() })?;
            self.systemctl(&["enable", places::AGENT_UNIT], Code::AgentFailed)?;
            end = End::Done;
        }
        // A running agent has read its settings: it is restarted when they changed, which its VMs do not notice.
        let stale = course.kept.restart_owed && observed.active;
        if !observed.active || stale {
            let verb = if stale { "restart" } else { "start" };
            self.systemctl(&[verb, places::AGENT_UNIT], Code::AgentFailed)?;
            end = End::Done;
        }
        if course.kept.restart_owed {
            course.kept.restart_owed = false;
            course.save()?;
        }
        Ok(end)
    }

    pub(super) fn verify(&mut self, course: &mut Course<'_>) -> Result<End, SetupError> {
        let (observed, _) = self.look(course)?;
        let registered = !observed.settings.standalone && !self.wish.offline;
        let said = self.means.outside.agent_works(registered).map_err(|why| {
            let remedy = "Look at the agent's log; it is started again by systemd meanwhile.";
            SetupError::new(Code::AgentFailed, format!("the agent does not work as it should: {why}"), remedy)
                .next("journalctl -u qudata-agent -n 50; qudata-agent status")
        })?;
        for line in said {
            course.warn(line);
        }
        Ok(End::Already)
    }

    pub(super) fn reload(&self) -> Result<(), SetupError> {
        self.systemctl(&["daemon-reload"], Code::HostFault)
    }

    pub(super) fn systemctl(&self, words: &[&str], code: Code) -> Result<(), SetupError> {
        let order =
            order("systemctl").args(words.iter().copied()).within(std::time::Duration::from_secs(240));
        must(self.means.hands, &order).map(drop).map_err(|cause| {
            let what = format!("`{order}` failed");
            let next = format!("journalctl -u {} -n 50", places::AGENT_UNIT);
            SetupError::new(code, what, "systemd says why.").next(next).because(cause)
        })
    }
}

fn in_full(error: SetupError) -> String {
    format!("{error}{}", error.causes())
}

/// Shows every tick, and writes down what is new or another tenth.
fn ticker<'c>(course: &'c Course<'_>, step: Step) -> impl FnMut(Tick) + 'c {
    let mut last = None;
    move |tick| {
        let mark = Some((tick.what.clone(), tick.percent.map(|percent| percent / 10)));
        let further = mark != last;
        last = mark;
        course.show(&Event::Tick(step.name(), tick, further));
    }
}

/// The key that was given, or the one on the host.
pub(super) fn key(means: Means<'_>, job: &Job<'_>) -> Result<Option<SecretString>, SetupError> {
    if let Some(key) = job.key {
        return Ok(Some(key.clone()));
    }
    Ok(means.files.text(places::API_KEY)?.map(|text| text.trim().into()))
}

/// Asks the service whether it takes the key, before anything is changed for nothing.
pub(super) fn check_key(
    means: Means<'_>,
    observed: &Observed,
    offline: bool,
    key: Option<&SecretString>,
) -> Result<KeyVerdict, SetupError> {
    let Some(key) = key.filter(|_| !observed.settings.standalone) else { return Ok(KeyVerdict::CannotAsk) };
    let url = &observed.settings.service_url;
    let verdict = means.outside.ask_about_key(url, key);
    match &verdict {
        KeyVerdict::Refused(status) => {
            let what = format!("the control plane at {url} refuses the API key (it answered {status})");
            let remedy = "Take the key from your account again: it may have been typed wrongly or withdrawn.";
            Err(SetupError::new(Code::BadKey, what, remedy).next("qudata-agent install --api-key-file FILE"))
        }
        KeyVerdict::Unreachable(why) if !offline => {
            let what = format!("the control plane at {url} does not answer: {why}");
            let remedy = "The agent calls it directly, never through a proxy: look at this host's network. Or go on without asking: \
                          --offline; the agent registers when it can.";
            Err(SetupError::new(Code::ControlPlaneUnreachable, what, remedy)
                .next("qudata-agent install --offline"))
        }
        KeyVerdict::Accepted | KeyVerdict::Unreachable(_) | KeyVerdict::CannotAsk => Ok(verdict),
    }
}
