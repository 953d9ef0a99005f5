//! The restart of the host: whether it may be done now, the unit that goes on after it, and what it means when it did not
//! help. Called by `install`.

use super::running::Run;
use crate::{
    error::{Code, SetupError},
    ledger::{NewFile, Undone},
    manifest::Entry,
    observe::Observed,
    places,
    plan::{Plan, off_in_firmware},
    progress::{Course, End},
    wish::RebootWay,
};

/// How long the owner can stop it.
const COUNTDOWN: u32 = 30;

impl Run<'_, '_> {
    /// True: the host is being restarted.
    pub(super) fn reboot(&mut self, course: &mut Course<'_>) -> Result<(End, bool), SetupError> {
        let (observed, plan) = self.look(course)?;
        let Some(why) = plan.reboot().map(str::to_owned) else {
            let was = course.kept.reboot_wanted_in.take();
            if was.is_some() {
                course.save()?;
            }
            return Ok((if was.is_some() { End::Done } else { End::Already }, false));
        };
        let wanted_in = course.kept.reboot_wanted_in.clone();
        if wanted_in.as_ref().is_some_and(|boot| *boot != observed.boot_id) {
            // The host goes on trying at every start, but it is not restarted a second time.
            return Err(in_vain(&observed, &plan));
        }
        self.arrange_continuation()?;
        course.kept.reboot_wanted_in = Some(observed.boot_id.clone());
        course.save()?;
        course.note(format!("This host has to be restarted: {why}."));
        self.may_reboot(course, &observed)?;
        self.no_newcomers(&observed)?;
        course.note("This host is restarted now and the installation goes on by itself.");
        self.systemctl(&["reboot"], Code::HostFault)?;
        Ok((End::Done, true))
    }

    fn may_reboot(&self, course: &Course<'_>, observed: &Observed) -> Result<(), SetupError> {
        let yes = self.wish.yes;
        let tenants = observed.tenants.len();
        let not_now = |what: String| Err(not_now(what));
        if tenants > 0 && !yes {
            let names: Vec<&str> = observed.tenants.iter().map(|tenant| tenant.name.as_str()).collect();
            let what = format!(
                "a restart is needed, and {tenants} instance(s) run on this host ({}), which it would interrupt",
                names.join(", ")
            );
            return not_now(what);
        }
        match self.wish.reboot {
            RebootWay::Never => not_now("a restart is needed, and --reboot=never was asked".into()),
            RebootWay::Ask if !yes => match self.means.person.ask("Restart this host now?") {
                Some(true) => Ok(()),
                Some(false) => not_now("a restart is needed, and was put off".into()),
                None => not_now("a restart is needed, and there is no terminal to ask on".into()),
            },
            RebootWay::Auto | RebootWay::Ask => {
                if self.means.person.count_down(COUNTDOWN, "This host is restarted") {
                    Ok(())
                } else {
                    course.note("The restart was stopped.");
                    not_now("a restart is needed, and was stopped".into())
                }
            }
        }
    }

    /// The agent takes orders while somebody thinks about the question: who came since is nobody that was agreed to.
    fn no_newcomers(&self, observed: &Observed) -> Result<(), SetupError> {
        let mut now = self.means.tenants(&observed.settings.data_dir)?;
        now.retain(|tenant| !observed.tenants.iter().any(|known| known.id == tenant.id));
        if now.is_empty() {
            return Ok(());
        }
        let names: Vec<String> =
            now.iter().map(|tenant| format!("{} ({})", tenant.name, tenant.id)).collect();
        let what = format!(
            "this host was not restarted: since that was agreed to, {} instance(s) came that it would interrupt: {}",
            now.len(),
            names.join(", ")
        );
        Err(not_now(what))
    }

    /// The unit is in the list like every other file, so that `uninstall` finds it also when the host never comes so far.
    fn arrange_continuation(&mut self) -> Result<(), SetupError> {
        let bytes = places::CONTINUE_TEXT.as_bytes();
        let look = self.means.files.mine(0o644);
        self.ledger.put(&NewFile { path: places::CONTINUE_FILE, bytes, look, secret: false })?;
        self.ledger.note(Entry::Unit { name: places::CONTINUE_UNIT.into() })?;
        self.reload()?;
        self.systemctl(&["enable", places::CONTINUE_UNIT], Code::HostFault)
    }

    /// At the end: nothing is left to go on with.
    pub(super) fn forget_continuation(&mut self, course: &mut Course<'_>) -> Result<(), SetupError> {
        let is_unit = |entry: &Entry| matches!(entry, Entry::Unit { name } if name == places::CONTINUE_UNIT);
        let is_file =
            |entry: &Entry| matches!(entry, Entry::File { path, .. } if path == places::CONTINUE_FILE);
        if self.ledger.manifest.entries.iter().any(is_unit) {
            if self.means.files.exists(places::CONTINUE_FILE) {
                self.systemctl(&["disable", places::CONTINUE_UNIT], Code::HostFault)?;
            }
            self.ledger.manifest.entries.retain(|entry| !is_unit(entry));
            self.ledger.save()?;
        }
        let Some(Entry::File { path, before, after, secret, .. }) =
            self.ledger.manifest.entries.iter().find(|entry| is_file(entry)).cloned()
        else {
            return Ok(());
        };
        if let Undone::Kept(why) = self.ledger.restore(&path, before.as_ref(), &after, secret)? {
            course.warn(why);
        }
        self.ledger.manifest.entries.retain(|entry| !is_file(entry));
        // Without telling systemd: it may be this unit that runs, and without its file its time would be up at once. What
        // is left in systemd's memory is not started any more.
        self.ledger.save()
    }
}

fn not_now(what: String) -> SetupError {
    let remedy = format!(
        "Restart it when it suits you: the installation goes on by itself, and {} shows how far it is.",
        places::LOG
    );
    SetupError::new(Code::RebootNeeded, what, remedy).next("sudo systemctl reboot")
}

/// It was restarted for this, and it did not help.
fn in_vain(observed: &Observed, plan: &Plan) -> SetupError {
    if observed.iommu_works() {
        let what = "nouveau has a GPU again after the restart, although a udev rule keeps it off";
        let remedy =
            "It is loaded from the initramfs, before udev's rules: take nouveau out of it, and restart.";
        return SetupError::new(Code::NouveauBound, what, remedy)
            .next("lsinitramfs /boot/initrd.img-$(uname -r) | grep nouveau");
    }
    let told = plan.params.iter().all(|param| observed.running.contains(param));
    if !told {
        let what = format!("this host was restarted, and its kernel was not told {}", plan.params.join(" "));
        let remedy = "It was started by another boot loader or another entry than the one that was set up: add the \
                      parameters there.";
        return SetupError::new(Code::BootloaderFailed, what, remedy).next("cat /proc/cmdline");
    }
    if observed.firmware.flatten().is_none() {
        return off_in_firmware(observed.maker);
    }
    let what = "the firmware offers an IOMMU, the kernel was told to use it, and it does not";
    let remedy =
        "The kernel's log says why; mostly a table of the firmware is wrong, and an update of it helps.";
    SetupError::new(Code::IommuOff, what, remedy).next("sudo dmesg | grep -i -e DMAR -e AMD-Vi -e IOMMU")
}
