//! A made-up host: a tree of files, and commands that change it as the real ones would. A command that is not known here
//! fails the test. The gate ends the "program" at any effect.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeSet,
    fs, io,
    path::PathBuf,
    rc::Rc,
};

use qudata_agent_core::control_plane::ServiceUrl;
use qudata_host::pci::PciAddress;
use qudata_testkit::pci::{Device, FakeHost};
use secrecy::SecretString;

pub(super) use super::tree::{differences, tree};
use crate::{
    cmdline,
    error::SetupError,
    files::{Files, Gate},
    hands::{Answer, Hands, Order, OrderError},
    install::{self, Job, Outcome},
    observe::Observed,
    outside::{KeyVerdict, Means, Outside, PartFailure, Person, Tenant, Tick, Tried},
    places,
    plan::Plan,
    progress::Event,
    uninstall::{self, Left, Removal},
    wish::Wish,
};

pub(super) const GPU: &str = "0000:65:00.0";
pub(super) const KEY: &str = "ak-canary";
pub(super) const DEB: &str = "/dist/qudata-agent_1.0_amd64.deb";

/// Counts effects, and from a number on lets none happen: the program is dead.
#[derive(Debug, Default)]
pub(super) struct Fuse {
    left: Cell<Option<u32>>,
    pub(super) passed: Cell<u32>,
    pub(super) blown: Cell<bool>,
}

impl Fuse {
    fn burn(&self) -> io::Result<()> {
        match self.left.get() {
            Some(0) => {
                self.blown.set(true);
                return Err(io::Error::other("the power was cut"));
            }
            Some(left) => self.left.set(Some(left - 1)),
            None => {}
        }
        self.passed.set(self.passed.get() + 1);
        Ok(())
    }
}

#[derive(Debug)]
struct FuseGate(Rc<Fuse>);

impl Gate for FuseGate {
    fn pass(&self, _effect: &str) -> io::Result<()> {
        self.0.burn()
    }

    /// These power cuts end the program and leave the page cache alone: hundreds of hosts a minute instead of ten.
    fn settle(&self, _file: &fs::File) -> io::Result<()> {
        Ok(())
    }

    fn settle_all(&self, _dir: &fs::File) -> io::Result<()> {
        Ok(())
    }
}

/// The host and everything around it.
#[derive(Debug)]
pub(super) struct World {
    pub(super) host: FakeHost,
    pub(super) fuse: Rc<Fuse>,
    pub(super) packages: RefCell<BTreeSet<String>>,
    /// Unpacked, and not configured.
    pub(super) half: RefCell<BTreeSet<String>>,
    /// What somebody asked apt for, and what `dpkg --verify` shows.
    pub(super) manual: RefCell<Vec<String>>,
    pub(super) verified: RefCell<String>,
    pub(super) version: RefCell<Option<String>>,
    /// Of the agent's unit.
    pub(super) environment: RefCell<String>,
    pub(super) active: Cell<bool>,
    /// Rules of the agent are in the firewall.
    pub(super) rules: Cell<bool>,
    /// It was started without the control plane.
    pub(super) alone: Cell<bool>,
    pub(super) tenants: RefCell<Vec<Tenant>>,
    pub(super) verdict: RefCell<KeyVerdict>,
    pub(super) answer: Cell<Option<bool>>,
    pub(super) selftest: RefCell<Result<(), String>>,
    pub(super) apt_says: RefCell<Option<String>>,
    pub(super) commands: RefCell<Vec<String>>,
    pub(super) events: RefCell<Vec<Event>>,
    pub(super) needed_by_owner: RefCell<Option<String>>,
    /// Nobody answers while the agent does not run.
    pub(super) silent: Cell<bool>,
    /// Comes while the owner counts down, or as the last order before the agent is stopped.
    pub(super) latecomer: RefCell<Option<Tenant>>,
    /// An instance's folder appears as the last of the list is taken back.
    pub(super) straggler: Cell<bool>,
    boots: Cell<u32>,
}

/// An Intel server with GRUB on Debian 12, its IOMMU on in the firmware and off in the kernel.
pub(super) fn world(devices: Vec<Device>) -> World {
    let host = FakeHost::with(devices).unwrap();
    let file = |path: &str, text: &str| host.file(path, text).unwrap();
    file("etc/os-release", "ID=debian\nVERSION_ID=\"12\"\nPRETTY_NAME=\"Debian GNU/Linux 12 (bookworm)\"\n");
    file("proc/cpuinfo", "vendor_id\t: GenuineIntel\nflags\t\t: fpu vmx sse\n");
    file("proc/meminfo", "MemTotal:       65536000 kB\n");
    file("proc/self/exe", "the program");
    file("proc/cmdline", "BOOT_IMAGE=/vmlinuz root=/dev/sda1 ro quiet\n");
    file("proc/sys/kernel/random/boot_id", "boot-0\n");
    file("sys/firmware/acpi/tables/DMAR", "");
    file("dev/kvm", "");
    file(
        "etc/default/grub",
        "GRUB_DEFAULT=0\nGRUB_CMDLINE_LINUX_DEFAULT=\"quiet\"\nGRUB_CMDLINE_LINUX=\"\"\n",
    );
    file("boot/grub/grub.cfg", "menuentry 'Debian' {\n\tlinux /vmlinuz root=/dev/sda1 ro quiet\n}\n");
    file("usr/sbin/update-grub", "");
    file("etc/group", "root:x:0:\n");
    file("etc/gshadow", "root:*::\n");
    file("etc/group-", "older\n");
    file("dist/qudata-agent_1.0_amd64.deb", "");
    for dir in [
        "run/systemd/system",
        "etc/systemd/system/multi-user.target.wants",
        "var/lib",
        "var/log",
        "etc/udev/rules.d",
        "etc/kernel",
    ] {
        fs::create_dir_all(host.path(dir)).unwrap();
    }
    World {
        host,
        fuse: Rc::default(),
        packages: RefCell::new(["libc6", "owner-tool"].map(str::to_owned).into()),
        half: RefCell::default(),
        manual: RefCell::default(),
        verified: RefCell::default(),
        version: RefCell::default(),
        environment: RefCell::default(),
        active: Cell::new(false),
        alone: Cell::new(false),
        rules: Cell::new(false),
        tenants: RefCell::default(),
        verdict: RefCell::new(KeyVerdict::Accepted),
        answer: Cell::new(None),
        selftest: RefCell::new(Ok(())),
        apt_says: RefCell::default(),
        commands: RefCell::default(),
        events: RefCell::default(),
        needed_by_owner: RefCell::default(),
        silent: Cell::new(false),
        latecomer: RefCell::default(),
        straggler: Cell::new(false),
        boots: Cell::new(0),
    }
}

/// One GPU, no IOMMU group yet.
pub(super) fn usual() -> World {
    world(vec![Device::gpu(GPU)])
}

pub(super) fn wish() -> Wish {
    Wish { package: Some(PathBuf::from(DEB)), ..Wish::default() }
}

impl World {
    pub(super) fn file(&self, path: &str, text: &str) {
        self.host.file(path.trim_start_matches('/'), text).unwrap();
    }

    pub(super) fn text(&self, path: &str) -> Option<String> {
        fs::read_to_string(self.host.path(path.trim_start_matches('/'))).ok()
    }

    /// The next power cut comes after so many effects.
    pub(super) fn cut_after(&self, effects: Option<u32>) {
        self.fuse.left.set(effects);
        self.fuse.blown.set(false);
        self.fuse.passed.set(0);
    }

    pub(super) fn files(&self) -> Files {
        Files::below(self.host.root(), Box::new(FuseGate(self.fuse.clone())))
    }

    pub(super) fn with<T>(&self, work: impl FnOnce(Means<'_>) -> T) -> T {
        let files = self.files();
        work(Means { files: &files, hands: self, outside: self, person: self })
    }

    pub(super) fn look(&self, wish: Wish) -> Result<(Observed, Plan), SetupError> {
        let key = SecretString::from(KEY);
        self.with(|means| install::look(means, &Job { wish: Some(wish), key: Some(&key), root: true }))
    }

    pub(super) fn install(&self, wish: Wish) -> Result<Outcome, SetupError> {
        let key = SecretString::from(KEY);
        self.with(|means| install::install(means, &Job { wish: Some(wish), key: Some(&key), root: true }))
    }

    pub(super) fn go_on(&self) -> Result<Outcome, SetupError> {
        self.with(|means| install::install(means, &Job { wish: None, key: None, root: true }))
    }

    pub(super) fn uninstall(&self, purge: bool) -> Result<Left, SetupError> {
        self.with(|means| uninstall::uninstall(means, Removal { purge, yes: true, root: true }))
    }

    /// The host starts again: `/run` is empty, and the kernel is told what the boot loader says.
    pub(super) fn reboot(&self) {
        self.boots.set(self.boots.get() + 1);
        self.file("proc/sys/kernel/random/boot_id", &format!("boot-{}\n", self.boots.get()));
        let words = cmdline::grub_cfg_words(&self.text("boot/grub/grub.cfg").unwrap()).unwrap();
        self.file("proc/cmdline", &format!("BOOT_IMAGE=/vmlinuz {}\n", words.join(" ")));
        let _ = fs::remove_dir_all(self.host.path("run/systemd/system"));
        fs::create_dir_all(self.host.path("run/systemd/system")).unwrap();
        self.active.set(self.wanted(places::AGENT_UNIT).exists());
        self.alone.set(false);
        self.rules.set(false);
        if words.contains(&"intel_iommu=on".to_owned()) {
            self.iommu_on();
        }
    }

    pub(super) fn iommu_on(&self) {
        for (group, entry) in fs::read_dir(self.host.path("sys/bus/pci/devices")).unwrap().enumerate() {
            let link = entry.unwrap().path().join("iommu_group");
            if !link.exists() {
                self.host.link(link, format!("sys/kernel/iommu_groups/{group}")).unwrap();
                fs::create_dir_all(self.host.path(format!("sys/kernel/iommu_groups/{group}"))).unwrap();
            }
        }
    }

    /// Whether the removal that was cut off can be finished: nothing is left of it, or a program is there.
    pub(super) fn can_be_taken_back(&self) -> bool {
        let program = self.version.borrow().is_some() || self.text(places::PROGRAM).is_some();
        program || self.text(places::MANIFEST).is_none()
    }

    fn wanted(&self, unit: &str) -> PathBuf {
        self.host.path(format!("etc/systemd/system/multi-user.target.wants/{unit}"))
    }

    fn act(&self, order: &Order, work: impl FnOnce() -> Answer) -> Result<Answer, OrderError> {
        let cut = |source| OrderError::Start { command: order.to_string(), source };
        self.fuse.burn().map_err(cut)?;
        let answer = work();
        self.fuse.burn().map_err(cut)?;
        Ok(answer)
    }

    fn systemctl(&self, words: &[&str]) -> Answer {
        match *words {
            ["--quiet", "is-enabled", unit] => told(self.wanted(unit).exists()),
            ["--quiet", "is-active", _] => told(self.active.get()),
            ["show", "-p", "Environment", "--value", _] => said(&self.environment.borrow()),
            ["cat", _] => told(self.version.borrow().is_some()),
            ["daemon-reload" | "reboot"] | ["stop", "--", _] => said(""),
            ["enable", unit] => {
                fs::write(self.wanted(unit), "").unwrap();
                said("")
            }
            ["disable", "--quiet" | "--now", unit] | ["disable", unit] => {
                let _ = fs::remove_file(self.wanted(unit));
                if unit == places::AGENT_UNIT {
                    self.active.set(false);
                }
                said("")
            }
            ["start" | "restart", _] => {
                let alone = self.text(places::SELFTEST_DROP_IN).is_some();
                self.alone.set(alone);
                self.rules.set(true);
                self.active.set(true);
                said("")
            }
            ["stop", _] => {
                self.tenants.borrow_mut().extend(self.latecomer.take());
                self.active.set(false);
                said("")
            }
            _ => panic!("unscripted: systemctl {words:?}"),
        }
    }

    fn apt_install(&self, order: &Order) -> Result<Answer, OrderError> {
        if let Some(words) = self.apt_says.borrow().clone() {
            return Ok(Answer { code: Some(100), out: String::new(), err: words });
        }
        self.act(order, || {
            self.half.borrow_mut().insert("qemu-system-x86".into());
            said("dlstatus:1:50.0:Fetching\n")
        })?;
        self.act(order, || {
            self.configure();
            self.packages.borrow_mut().extend(["passt", "qudata-agent"].map(str::to_owned));
            self.version.replace(Some("1.0".into()));
            self.file("usr/share/qudata/agent.toml", "# defaults\n");
            self.file("usr/lib/qudata/frpc", "");
            fs::create_dir_all(self.host.path("etc/qudata")).unwrap();
            if !self.text("etc/group").unwrap().contains("qudata") {
                self.file("etc/group-", "root:x:0:\n");
                self.file("etc/group", "root:x:0:\n_ssh:x:101:\nqudata:x:997:\n");
            }
            said("pmstatus:qudata-agent:100.0:Installed\n")
        })
    }

    fn configure(&self) {
        let half = self.half.take();
        self.packages.borrow_mut().extend(half);
    }

    fn purge(&self, names: &[&str]) -> Answer {
        for name in names {
            self.packages.borrow_mut().remove(*name);
            self.half.borrow_mut().remove(*name);
            if *name == "qudata-agent" {
                self.version.replace(None);
                let logs = self.text(places::MANIFEST).is_none().then_some("var/log/qudata");
                for dir in ["usr/share/qudata", "usr/lib/qudata", "etc/qudata"].into_iter().chain(logs) {
                    let _ = fs::remove_dir_all(self.host.path(dir));
                }
                for dir in ["usr/share", "usr/lib"] {
                    let _ = fs::remove_dir(self.host.path(dir));
                }
            }
        }
        said("")
    }

    /// What the real one does: all settings in order into the first entry.
    fn update_grub(&self) -> Answer {
        let mut texts = vec![("a".to_owned(), self.text("etc/default/grub").unwrap())];
        let dir = self.host.path("etc/default/grub.d");
        let mut names: Vec<_> =
            fs::read_dir(dir).map(|d| d.flatten().map(|e| e.path()).collect()).unwrap_or_default();
        names.sort();
        let names = names.into_iter().filter(|path: &PathBuf| path.extension().is_some_and(|e| e == "cfg"));
        texts.extend(names.map(|path| ("b".to_owned(), fs::read_to_string(path).unwrap())));
        let words: Vec<String> = cmdline::grub_words(&texts).into_iter().map(|word| word.text).collect();
        let cfg =
            format!("menuentry 'Debian' {{\n\tlinux /vmlinuz root=/dev/sda1 ro {}\n}}\n", words.join(" "));
        self.file("boot/grub/grub.cfg", &cfg);
        said("")
    }

    fn kernel_install(&self) -> Answer {
        let line = self.text("etc/kernel/cmdline").unwrap();
        self.file("boot/efi/loader/entries/a.conf", &format!("linux /a\noptions {line}"));
        said("")
    }
}

pub(super) fn said(out: &str) -> Answer {
    Answer { code: Some(0), out: out.into(), err: String::new() }
}

fn told(yes: bool) -> Answer {
    Answer { code: Some(i32::from(!yes)), out: String::new(), err: String::new() }
}

impl Hands for World {
    fn run(&self, order: &Order, heard: &mut dyn FnMut(&str)) -> Result<Answer, OrderError> {
        let words: Vec<&str> = order.args.iter().map(String::as_str).collect();
        assert!(!order.to_string().contains(KEY), "the key is in {order}");
        self.commands.borrow_mut().push(order.to_string());
        let (program, words) = match (order.program, words.as_slice()) {
            ("sh", ["-c", script, program, words @ ..]) if script.contains("Status-Fd=3") => {
                (*program, words)
            }
            (program, words) => (program, words),
        };
        match program {
            "debconf-set-selections"
            | "dpkg"
            | "apt-mark"
            | "dpkg-deb"
            | "dpkg-query"
            | "apt-cache"
            | "apt-get" => self.packaging((program, words), order, heard),
            _ => self.system((program, words), order),
        }
    }
}

impl World {
    fn packaging(
        &self,
        command: (&str, &[&str]),
        order: &Order,
        heard: &mut dyn FnMut(&str),
    ) -> Result<Answer, OrderError> {
        match command {
            ("dpkg-query", ["-W", "-f", _, "qudata-agent"]) => Ok(match &*self.version.borrow() {
                Some(version) => said(&format!("installed {version}")),
                None => told(false),
            }),
            ("dpkg-query", ["-W", "-f", _]) => {
                let lines = self
                    .packages
                    .borrow()
                    .iter()
                    .map(|name| format!("installed {name}\n"))
                    .collect::<String>();
                let half = self.half.borrow();
                let half = half.iter().map(|name| format!("unpacked {name}\n")).collect::<String>();
                Ok(said(&format!("{lines}{half}config-files gone\n")))
            }
            ("dpkg-deb", ["-f", DEB, "Recommends"]) => {
                Ok(said("pci.ids, not-here (>= 2) | other, was-here\n"))
            }
            ("apt-cache", ["policy", "pci.ids", "not-here", "was-here"]) => {
                let there = "was-here:\n  Installed: 1\n  Candidate: 1\n";
                let text = "pci.ids:\n  Installed: (none)\n  Candidate: 1\nnot-here:\n  Candidate: (none)\n";
                Ok(said(&format!("{text}{there}")))
            }
            ("dpkg-deb", ["-f", DEB, ..]) => Ok(said("Package: qudata-agent\nVersion: 1.0\n")),
            ("dpkg", ["--configure", "-a"]) => self.act(order, || {
                self.configure();
                said("")
            }),
            ("dpkg", ["--verify", ..]) => Ok(said(&self.verified.borrow())),
            ("apt-mark", ["showmanual"]) => Ok(said(&self.manual.borrow().join("\n"))),
            ("apt-get", ["update", ..]) => self.act(order, || said("")),
            ("debconf-set-selections", []) => self.act(order, || said("")),
            ("apt-get", ["-s", "install", words @ ..]) if words.contains(&"--no-remove") => {
                Ok(said("Inst qemu-system-x86 (1)\nInst passt [0] (1)\nInst qudata-agent (1.0)\n"))
            }
            ("apt-get", ["install", words @ ..]) if words.contains(&"--no-remove") => {
                assert!(
                    !words.contains(&"not-here")
                        && !words.contains(&"was-here")
                        && words.contains(&"pci.ids") == words.contains(&DEB)
                );
                let answer = self.apt_install(order)?;
                answer.out.lines().for_each(heard);
                Ok(answer)
            }
            ("apt-get", words) => self.take_away(words, order),
            _ => panic!("unscripted: {order}"),
        }
    }

    fn take_away(&self, words: &[&str], order: &Order) -> Result<Answer, OrderError> {
        match words {
            ["-s", "-y", "purge", names @ ..] => {
                let mut out: String = names.iter().map(|name| format!("Purg {name} [1.0]\n")).collect();
                if names.contains(&"qemu-system-x86") {
                    out.extend(self.needed_by_owner.borrow().iter().map(|name| format!("Remv {name} [2]\n")));
                }
                Ok(said(&out))
            }
            ["-s", "-y", "autoremove", ..] => Ok(said("Purg qudata-agent [1.0]\nPurg passt [1]\n")),
            ["remove", "-y", "-o", _, names @ ..] => self.act(order, || {
                self.packages.borrow_mut().retain(|name| !names.contains(&name.as_str()));
                self.version.replace(None);
                said("")
            }),
            ["purge", "-y", "-o", _, names @ ..] => self.act(order, || self.purge(names)),
            _ => panic!("unscripted: {order}"),
        }
    }

    fn system(&self, command: (&str, &[&str]), order: &Order) -> Result<Answer, OrderError> {
        match command {
            ("groupdel", [name @ ("qudata" | "_ssh")]) => self.act(order, || {
                if self.straggler.get() {
                    self.file("var/lib/qudata/instances/0c-1/disk.qcow2", "theirs");
                }
                let text = self.text("etc/group").unwrap();
                self.file("etc/group-", &text);
                let left = text.lines().filter(|line| !line.starts_with(&format!("{name}:")));
                self.file("etc/group", &left.map(|line| format!("{line}\n")).collect::<String>());
                said("")
            }),
            ("systemctl", words) if matches!(words.first(), Some(&"--quiet" | &"show")) => {
                Ok(self.systemctl(words))
            }
            ("systemctl", words) => self.act(order, || self.systemctl(words)),
            ("nft", ["list", "table", "inet", _]) => Ok(told(self.rules.get())),
            ("nft", ["delete", "table", "inet", _]) => self.act(order, || {
                self.rules.set(false);
                said("")
            }),
            ("update-grub", []) => self.act(order, || self.update_grub()),
            ("kernel-install", ["add", ..]) => self.act(order, || self.kernel_install()),
            _ => panic!("unscripted: {order}"),
        }
    }
}

impl Outside for World {
    fn tenants(&self) -> Option<Vec<Tenant>> {
        if self.silent.get() && !self.active.get() {
            return None;
        }
        Some(self.tenants.borrow().clone())
    }

    fn delete(&self, id: &str) -> Result<(), String> {
        if !self.tenants.borrow().iter().any(|tenant| tenant.id == id) {
            return Err("there is no such instance".into());
        }
        self.tenants.borrow_mut().retain(|tenant| tenant.id != id);
        let _ = fs::remove_dir_all(self.host.path(format!("var/lib/qudata/instances/{id}")));
        Ok(())
    }

    fn agent_works(&self, _registered: bool) -> Result<Vec<String>, String> {
        if self.active.get() { Ok(Vec::new()) } else { Err("it does not run".into()) }
    }

    fn selftest(&self, gpus: &[PciAddress]) -> Result<Tried, String> {
        let names: Vec<String> = gpus.iter().map(ToString::to_string).collect();
        self.commands.borrow_mut().push(format!("selftest {}", names.join(" ")));
        self.selftest.borrow().clone().map(|()| Tried { seen: vec!["seen".into()], gpus: gpus.to_vec() })
    }

    fn build_image(&self, _wish: &Wish, tick: &mut dyn FnMut(Tick)) -> Result<String, PartFailure> {
        let dead = |_| PartFailure { code: "image_failed", text: "cut".into() };
        self.fuse.burn().map_err(dead)?;
        tick(Tick { what: "fetched".into(), percent: Some(50) });
        self.file("var/lib/qudata/images/qudata-base.qcow2", "image");
        self.fuse.burn().map_err(dead)?;
        Ok("0123456789abcdef".into())
    }

    fn ask_about_key(&self, _url: &ServiceUrl, _key: &SecretString) -> KeyVerdict {
        self.verdict.borrow().clone()
    }
}

impl Person for World {
    fn tell(&self, event: &Event) {
        self.events.borrow_mut().push(event.clone());
    }

    fn ask(&self, _question: &str) -> Option<bool> {
        self.answer.get()
    }

    fn count_down(&self, _seconds: u32, _what: &str) -> bool {
        self.tenants.borrow_mut().extend(self.latecomer.take());
        self.answer.get() != Some(false)
    }
}
