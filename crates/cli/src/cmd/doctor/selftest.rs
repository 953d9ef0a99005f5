//! `doctor selftest`: an instance with each free GPU, the GPU looked at from inside, everything gone again. Used by
//! `doctor` and by `install`.
//!
//! ```text
//! create ─▶ ready ─▶ log in: gpu_seen, nvidia_smi ─┐
//!    └─ any failure, interruption ─────────────────┴─▶ deleted ─▶ gpu_back
//! ```
//! An order whose answer is lost may have become an instance, which would keep its GPU: it is looked for by its name.

mod aftermath;
mod interruption;
#[cfg(test)]
mod tests;

use std::time::Duration;

use hyper::Method;
use qudata_api::{Created, GpuState, GpuView, HostView, InstanceState, InstanceView};
use qudata_doctor::{Finding, Verdict};
use qudata_host::pci::PciAddress;
use serde::Serialize;
use tokio::time::{Instant, sleep};
use uuid::Uuid;

use self::interruption::Interruption;
use super::guest::Guest;
use crate::{
    client::Agent,
    exit::{Exit, Failure},
    pick::pick_gpu,
    render::line,
    units::duration,
};

const CREATE: &str = "selftest.create";
const READY: &str = "selftest.ready";
const GPU_SEEN: &str = "selftest.gpu_seen";
const NVIDIA_SMI: &str = "selftest.nvidia_smi";

/// How often the agent is asked meanwhile; it answers from memory.
const LOOK: Duration = Duration::from_millis(500);
/// An agent that is restarted is back within some seconds.
const RESTART: Duration = Duration::from_secs(30);
/// NVIDIA's vendor id, as the API writes it.
const NVIDIA: &str = "10de";

/// What is to be tried.
pub(crate) struct SelftestWish<'a> {
    /// GPUs by their address; none: all that are free.
    pub(crate) gpus: Vec<PciAddress>,
    /// The instances are kept.
    pub(crate) keep: bool,
    /// How long each may take until it is ready.
    pub(crate) timeout: Duration,
    /// Is told each finding as soon as it is made.
    pub(crate) tell: &'a dyn Fn(&Finding),
}

/// What came of it.
#[derive(Debug, Serialize)]
pub(crate) struct SelftestReport {
    /// Nothing failed, and at least one instance was tried.
    pub(crate) passed: bool,
    /// The GPUs that were tried.
    pub(crate) gpus: Vec<String>,
    /// Everything that was found, in the order in which it happened.
    pub(crate) findings: Vec<Finding>,
    /// Instances that were kept.
    pub(crate) kept: Vec<String>,
}

/// Tries each GPU, one after the other.
///
/// # Errors
/// When the agent cannot be reached, a GPU that was named does not exist, or somebody interrupts; the instance of the
/// moment is deleted all the same. What fails about a GPU is a finding.
pub(crate) async fn selftest(agent: &Agent, wish: SelftestWish<'_>) -> Result<SelftestReport, Failure> {
    let mut interruption = Interruption::listen()?;
    let host: HostView = agent.get("/host").await?;
    let known: Vec<GpuView> = agent.get("/gpus").await?;
    let mut test = Test { agent, wish: &wish, host, findings: Vec::new(), kept: Vec::new() };
    let targets = test.targets(&known)?;
    let mut tried = Vec::new();
    let any = known.is_empty() || !targets.is_empty();
    let trials = if known.is_empty() { vec![None] } else { targets.into_iter().map(Some).collect() };
    for gpu in trials {
        tried.extend(gpu.map(|gpu: &GpuView| gpu.address.clone()));
        test.one(gpu, &mut interruption).await?;
    }
    let passed = any && test.findings.iter().all(|finding| finding.verdict != Verdict::Fail);
    Ok(SelftestReport { passed, gpus: tried, findings: test.findings, kept: test.kept })
}

/// The body of the order: everything that is not said is as for a renter who says nothing.
#[derive(Serialize)]
struct Order<'a> {
    name: &'a str,
    ssh_enabled: bool,
    ssh_pubkeys: [&'a str; 1],
    #[serde(skip_serializing_if = "Option::is_none")]
    gpu_addrs: Option<[&'a str; 1]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    gpus: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tunnel_token: Option<&'a str>,
}

struct Test<'a> {
    agent: &'a Agent,
    wish: &'a SelftestWish<'a>,
    host: HostView,
    findings: Vec<Finding>,
    kept: Vec<String>,
}

/// One instance of the test.
struct Trial<'a> {
    gpu: Option<&'a GpuView>,
    name: String,
    /// Known once the order is answered.
    id: Option<Uuid>,
    /// The order was sent, and what became of it is not known.
    is_open: bool,
}

impl Trial<'_> {
    fn path(&self) -> Option<String> {
        self.id.map(|id| format!("/instances/{id}"))
    }
}

impl Test<'_> {
    fn found(&mut self, trial: &Trial<'_>, id: &'static str, verdict: Verdict, text: (String, Option<&str>)) {
        let (sentence, remedy) = text;
        self.push(Finding {
            id,
            subject: trial.gpu.map(|gpu| line(&gpu.address)),
            verdict,
            line: line(&sentence),
            remedy: remedy.map(str::to_owned),
        });
    }

    fn push(&mut self, finding: Finding) {
        (self.wish.tell)(&finding);
        self.findings.push(finding);
    }

    /// The GPUs that can be tried. Those that cannot are told, unless their owner leaves them out.
    fn targets<'g>(&mut self, known: &'g [GpuView]) -> Result<Vec<&'g GpuView>, Failure> {
        let chosen: Vec<&GpuView> = if self.wish.gpus.is_empty() {
            let left_out = |gpu: &&GpuView| gpu.refusal.as_ref().is_some_and(|refusal| refusal.by_choice);
            known.iter().filter(|gpu| !left_out(gpu)).collect()
        } else {
            self.wish.gpus.iter().map(|address| pick_gpu(known, *address)).collect::<Result<_, _>>()?
        };
        let mut targets = Vec::new();
        for gpu in chosen {
            match obstacle(gpu) {
                None => targets.push(gpu),
                Some(finding) => self.push(finding),
            }
        }
        Ok(targets)
    }

    /// From the order to the last trace. An interruption is an error, after everything was cleared away.
    async fn one(&mut self, gpu: Option<&GpuView>, interruption: &mut Interruption) -> Result<(), Failure> {
        let name = format!("selftest-{}", Uuid::new_v4().simple().to_string().get(..8).unwrap_or_default());
        let mut trial = Trial { gpu, name, id: None, is_open: false };
        let done = tokio::select! {
            done = self.try_out(&mut trial) => Some(done),
            () = interruption.happens() => None,
        };
        if trial.is_open {
            self.find(&mut trial).await;
        }
        if self.wish.keep {
            self.kept.extend(trial.id.map(|_| trial.name.clone()));
        } else {
            self.clear_away(&trial).await;
        }
        if let Some(done) = done {
            return done;
        }
        let state = match (trial.id, self.wish.keep) {
            (None, _) if trial.is_open => {
                format!("whether the instance {} was made is not known", trial.name)
            }
            (None, _) => "no instance was made".to_owned(),
            (Some(_), true) => format!("the instance {} is kept", trial.name),
            (Some(_), false) => format!("the instance {} was deleted", trial.name),
        };
        Err(Failure::new(Exit::TimedOut, format!("the self-test was interrupted; {state}")))
    }

    /// Up to what is seen from inside. Ends early at the first failure.
    async fn try_out(&mut self, trial: &mut Trial<'_>) -> Result<(), Failure> {
        let guest = Guest::prepare().await?;
        let begun = Instant::now();
        if !self.create(trial, guest.public_key()).await {
            return Ok(());
        }
        let Some(view) = self.wait_ready(trial, begun).await else { return Ok(()) };
        self.look_inside(trial, &guest, &view).await;
        Ok(())
    }

    async fn create(&mut self, trial: &mut Trial<'_>, key: &str) -> bool {
        let order = Order {
            name: &trial.name,
            ssh_enabled: true,
            ssh_pubkeys: [key],
            gpu_addrs: trial.gpu.map(|gpu| [gpu.address.as_str()]),
            gpus: trial.gpu.is_none().then_some(0),
            // A label that nobody else has; gone with the instance.
            tunnel_token: (self.host.tunnel == "frp").then_some(&trial.name),
        };
        trial.is_open = true;
        match self.agent.send::<Created>(Method::POST, "/instances", &order).await {
            Ok(created) => {
                (trial.id, trial.is_open) = (Some(created.id), false);
                self.found(
                    trial,
                    CREATE,
                    Verdict::Pass,
                    (format!("instance {} is accepted", trial.name), None),
                );
                true
            }
            Err(failure) => {
                trial.is_open = !refuses(failure.exit);
                let remedy = "run `qudata-agent doctor`, which says what is in the way";
                self.found(trial, CREATE, Verdict::Fail, (failure.sentence, Some(remedy)));
                false
            }
        }
    }

    async fn wait_ready(&mut self, trial: &Trial<'_>, begun: Instant) -> Option<InstanceView> {
        let path = trial.path()?;
        let mut silent_since = None;
        let why = loop {
            match self.agent.get::<InstanceView>(&path).await {
                Ok(view) => {
                    silent_since = None;
                    match view.state {
                        InstanceState::Running => {
                            let took =
                                duration(u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX));
                            self.found(trial, READY, Verdict::Pass, (format!("ready after {took}"), None));
                            return Some(view);
                        }
                        InstanceState::Failed | InstanceState::Stopped | InstanceState::Deleting => {
                            break view.reason.unwrap_or_else(|| "it ended before it was ready".to_owned());
                        }
                        InstanceState::Provisioning
                        | InstanceState::Booting
                        | InstanceState::Rebooting
                        | InstanceState::Paused
                        | InstanceState::Unresponsive => {}
                    }
                }
                Err(failure) if failure.exit == Exit::NotFound => break "somebody deleted it".to_owned(),
                Err(failure) => {
                    if silent_since.get_or_insert_with(Instant::now).elapsed() > RESTART {
                        break failure.sentence;
                    }
                }
            }
            if begun.elapsed() > self.wish.timeout {
                break format!("not ready after {} s", self.wish.timeout.as_secs());
            }
            sleep(LOOK).await;
        };
        let remedy = "try it again with --keep and read `qudata-agent instance console NAME` and `journalctl -u qudata-agent`";
        self.found(trial, READY, Verdict::Fail, (why, Some(remedy)));
        None
    }

    async fn look_inside(&mut self, trial: &Trial<'_>, guest: &Guest, view: &InstanceView) {
        let remedy =
            "try it again with --keep and log in: `qudata-agent instance ssh NAME`, then `lspci` and `dmesg`";
        let devices = match guest.devices(view).await {
            Ok(devices) => devices,
            Err(why) => {
                let why = format!("cannot look from inside: {why}");
                return self.found(trial, GPU_SEEN, Verdict::Fail, (why, Some(remedy)));
            }
        };
        let Some(gpu) = trial.gpu else {
            let seen = format!("logged in, {} devices; there is no GPU to look for", devices.len());
            return self.found(trial, GPU_SEEN, Verdict::Pass, (seen, None));
        };
        let is_it = |id: &str, wanted: &Option<String>| wanted.as_ref().is_some_and(|wanted| id == wanted);
        let seen =
            devices.iter().find(|d| is_it(&d.vendor, &gpu.vendor_id) && is_it(&d.device, &gpu.device_id));
        match seen {
            Some(device) => {
                let text = format!("the guest sees it at {} with class {}", device.address, device.class);
                self.found(trial, GPU_SEEN, Verdict::Pass, (text, None));
            }
            None => {
                let text = format!("the guest has {} devices and this one is not among them", devices.len());
                return self.found(trial, GPU_SEEN, Verdict::Fail, (text, Some(remedy)));
            }
        }
        if gpu.vendor_id.as_deref() == Some(NVIDIA) {
            self.ask_nvidia(trial, guest, view).await;
        }
    }

    async fn ask_nvidia(&mut self, trial: &Trial<'_>, guest: &Guest, view: &InstanceView) {
        match guest.nvidia_smi(view).await {
            Ok(Some(list)) => self.found(trial, NVIDIA_SMI, Verdict::Pass, (list, None)),
            Ok(None) => {
                let remedy =
                    "renters install it themselves, or `qudata-agent image build --driver distro` puts it in";
                let text = "the image has no NVIDIA driver (no nvidia-smi)".to_owned();
                self.found(trial, NVIDIA_SMI, Verdict::Warn, (text, Some(remedy)));
            }
            Err(why) => {
                let remedy = "does the driver of the image know this card? Look at `dmesg | grep -i nvrm` in the guest";
                self.found(trial, NVIDIA_SMI, Verdict::Fail, (why, Some(remedy)));
            }
        }
    }
}

/// Whether the agent said no to an order: then there is no instance. Any other failure may have come after the instance was
/// made.
fn refuses(exit: Exit) -> bool {
    match exit {
        Exit::Usage | Exit::NotFound | Exit::Refused | Exit::NoCapacity => true,
        Exit::Done | Exit::Failed | Exit::Unreachable | Exit::TimedOut => false,
    }
}

/// Why a GPU is not tried.
fn obstacle(gpu: &GpuView) -> Option<Finding> {
    let address = line(&gpu.address);
    let (verdict, why, remedy) = match (gpu.state, &gpu.refusal) {
        (GpuState::Free, None) => return None,
        (GpuState::Free, Some(refusal)) => {
            (Verdict::Fail, format!("not tried: {}", refusal.message), refusal.remedy.clone())
        }
        (GpuState::Quarantined, _) => (
            Verdict::Fail,
            format!("not tried, it is quarantined: {}", gpu.why.as_deref().unwrap_or("no reason is known")),
            format!("when that is dealt with: `qudata-agent gpu release {address}`"),
        ),
        _ => (
            Verdict::Warn,
            "not tried: an instance has it".to_owned(),
            "try it when the instance is gone".to_owned(),
        ),
    };
    Some(Finding {
        id: CREATE,
        subject: Some(address),
        verdict,
        line: line(&why),
        remedy: Some(line(&remedy)),
    })
}
