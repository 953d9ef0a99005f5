//! Fake hosts for the tests of what acts: cards, a kernel that reacts, and a door to it.
#![allow(dead_code, reason = "each test binary uses its share")]

use std::{io, path::Path, sync::Arc, time::Duration};

use qudata_host::pci::PciAddress;
use qudata_testkit::pci::{Device, FakeHost, react::FakeKernel};
use qudata_vfio::{
    door::Door,
    health::Baseline,
    plan::{AfterUse, BindPlan, BindPolicy, GiveBackPlan, plan_bind, plan_give_back},
    sysfs::{SysfsKernel, Writes},
    topology::{self, Gpu, Topology},
};

pub(crate) const GPU: &str = "0000:01:00.0";
pub(crate) const AUDIO: &str = "0000:01:00.1";
pub(crate) const TWIN: &str = "0000:02:00.0";
pub(crate) const PORT: &str = "0000:00:01.0";

/// Long enough for a slow machine, short enough for a test of a hang.
pub(crate) const SHORT: Duration = Duration::from_millis(300);

#[derive(Debug)]
struct Reacting(Arc<FakeKernel>);

impl Writes for Reacting {
    fn write_at(&self, file: &Path, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.0.write_at(file, offset, bytes)
    }
}

/// A fake host and what is known of it.
#[derive(Debug)]
pub(crate) struct Lab {
    pub(crate) kernel: Arc<FakeKernel>,
    pub(crate) door: Door,
    pub(crate) topology: Topology,
}

impl Lab {
    pub(crate) fn of(devices: Vec<Device>) -> Self {
        let kernel = Arc::new(FakeKernel::new(FakeHost::with(devices).unwrap()));
        let root = kernel.host().root().to_owned();
        let real = SysfsKernel::with(root.clone(), Arc::new(Reacting(kernel.clone())));
        let topology = topology::observe(&root).unwrap();
        Self { kernel, door: Door::InProcess(Arc::new(real)), topology }
    }

    /// Two identical data-centre cards below ports of their own.
    pub(crate) fn twins() -> Self {
        Self::of(vec![
            Device::bridge(PORT, 1),
            Device::gpu(GPU).under(PORT).group(7),
            Device::bridge("0000:00:02.0", 2),
            Device::gpu(TWIN).under("0000:00:02.0").group(8),
        ])
    }

    /// One graphics card with its audio function; only the first can be reset alone.
    pub(crate) fn with_audio() -> Self {
        Self::of(vec![
            Device::bridge(PORT, 1),
            Device::gpu(GPU).under(PORT).group(7),
            Device::audio(AUDIO).under(PORT).group(7),
        ])
    }

    pub(crate) fn gpu(&self, address: &str) -> Gpu {
        self.topology.gpu(pci(address)).unwrap()
    }

    pub(crate) fn look(&mut self) {
        self.topology = topology::observe(self.kernel.host().root()).unwrap();
    }

    pub(crate) fn plan(&self, address: &str) -> BindPlan {
        let mut plan = plan_bind(&self.topology, &self.gpu(address), &BindPolicy::default()).unwrap();
        // Programs of the vendor are another test's business.
        plan.quieting = None;
        plan
    }

    pub(crate) fn plan_back(&self, plan: &BindPlan, after: AfterUse) -> GiveBackPlan {
        plan_give_back(&self.topology, &plan.gpu, &plan.originals(), after)
    }

    /// Lets what hangs go on and waits for its threads, so that the fake host is removed with the test.
    pub(crate) fn settle(&self) {
        [GPU, AUDIO, TWIN].iter().for_each(|address| self.kernel.repair(address));
        let Door::InProcess(kernel) = &self.door else { return };
        while Arc::strong_count(kernel) > 1 {
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub(crate) fn baseline(&self, address: &str) -> Baseline {
        Baseline::of(&self.topology, &self.gpu(address))
    }

    pub(crate) fn driver(&self, address: &str) -> Option<String> {
        self.kernel.host().driver_of(address)
    }
}

/// A thread that has just sent its last outcome still holds the fake host, which nobody removes once the process ends.
impl Drop for Lab {
    fn drop(&mut self) {
        let Door::InProcess(kernel) = &self.door else { return };
        let end = std::time::Instant::now() + Duration::from_secs(1);
        while Arc::strong_count(kernel) > 1 && std::time::Instant::now() < end {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

pub(crate) fn pci(address: &str) -> PciAddress {
    address.parse().unwrap()
}

pub(crate) fn driver(name: &str) -> Option<String> {
    Some(name.to_owned())
}
