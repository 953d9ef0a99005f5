//! A few running guests that several benchmarks share: booting them is most of the time a run takes. Called by
//! `get_under_create`, `footprint` and `recovery`.

use std::{env, path::Path, time::Duration};

use anyhow::{Context, Result};
use qudata_testkit::agent::{Image, Setup, TestAgent, TestInstance};

use crate::{
    create::{self, Ordered},
    original::Keys,
    samples::{Samples, between},
    timeline::Timeline,
};

/// All of them boot at once, in emulation.
const BOOT: Duration = Duration::from_secs(600);
/// RAM of each.
const MEMORY: &str = "640M";

/// What benchmarks share.
#[derive(Debug)]
pub(crate) struct Lab {
    pub(crate) quick: bool,
    pub(crate) fleet: Option<Fleet>,
}

impl Lab {
    pub(crate) fn new(quick: bool) -> Self {
        Self { quick, fleet: None }
    }

    /// How many guests: four, as the goals say.
    pub(crate) fn size(&self) -> usize {
        if self.quick { 2 } else { 4 }
    }

    /// The guests, booted now if nobody needed them before.
    pub(crate) fn fleet(&mut self) -> Result<&Fleet> {
        if self.fleet.is_none() {
            eprintln!("bench: booting {} guests", self.size());
            let site = Site::open()?;
            let boots = site.boot(self.size())?;
            self.fleet = Some(site.with(boots)?);
        }
        self.fleet.as_ref().context("no guests")
    }
}

/// An agent that has no guests yet.
#[derive(Debug)]
pub(crate) struct Site {
    pub(crate) agent: TestAgent,
    keys: Keys,
}

/// Guests of one agent, all running.
#[derive(Debug)]
pub(crate) struct Fleet {
    pub(crate) agent: TestAgent,
    pub(crate) instances: Vec<TestInstance>,
    /// POST to `ready` of each, all at once, in milliseconds.
    pub(crate) boot: Samples,
}

/// One guest that has booted.
#[derive(Debug)]
pub(crate) struct Booted {
    ordered: Ordered,
    millis: f64,
}

impl Site {
    pub(crate) fn open() -> Result<Self> {
        Ok(Self { agent: Setup::new(Image::Direct).start(), keys: Keys::make()? })
    }

    /// Orders `size` guests at once.
    pub(crate) fn order(&self, size: usize) -> Result<Vec<Ordered>> {
        let wish = create::guest(&self.keys.public, MEMORY);
        (0..size).map(|_| create::order(&self.agent, &wish)).collect()
    }

    /// Orders `size` guests at once and waits until the last one is ready.
    pub(crate) fn boot(&self, size: usize) -> Result<Vec<Booted>> {
        let client = self.agent.client();
        let wait = |ordered: Ordered| {
            let ready = Timeline::until(client, &ordered.id, "ready", BOOT)?.at("ready")?;
            Ok(Booted { millis: between(ordered.sent, ready), ordered })
        };
        self.order(size)?.into_iter().map(wait).collect()
    }

    pub(crate) fn with(self, booted: Vec<Booted>) -> Result<Fleet> {
        let boot = Samples::new(booted.iter().map(|guest| guest.millis).collect()).context("no guests")?;
        let instances = booted.into_iter().map(|guest| TestInstance::known(&guest.ordered.id)).collect();
        Ok(Fleet { agent: self.agent, instances, boot })
    }
}

/// The built agent.
pub(crate) fn binary() -> Result<std::path::PathBuf> {
    let path = env::var_os("QUDATA_TEST_AGENT").context("QUDATA_TEST_AGENT is not set")?;
    Ok(Path::new(&path).to_owned())
}
