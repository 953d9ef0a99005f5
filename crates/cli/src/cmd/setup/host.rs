//! What `qudata-setup` needs from elsewhere: the agent's API, the self-test, the builder of images, the control plane's word
//! about a key. Called by `install` and `uninstall`.

use std::time::Duration;

use clap::Parser;
use qudata_agent_core::{
    control_plane::{Answer, ReachError, ServiceUrl, reach},
    settings::LoadFrom,
};
use qudata_api::{HostView, InstanceView, Teardown};
use qudata_doctor::{Finding, Verdict};
use qudata_host::{causes::chain, pci::PciAddress};
use qudata_image::BuildWish;
use qudata_setup::{
    SecretString,
    outside::{KeyVerdict, Outside, PartFailure, Tenant, Tick, Tried},
    wish::Wish,
};
use tokio::{
    runtime::Handle,
    time::{Instant, sleep},
};

use crate::{
    args::{Command, CommandLine, image::Image},
    client::Agent,
    cmd::{
        doctor::selftest::{SelftestWish, selftest},
        image,
    },
    exit::{Exit, Failure},
    render::line,
};

/// The agent adopts, looks at every GPU and asks the control plane at its start.
const START: Duration = Duration::from_secs(120);
/// So long a first registration may take before it is only told.
const REGISTRATION: Duration = Duration::from_secs(30);
const PAUSE: Duration = Duration::from_millis(500);
/// Guests of the self-test boot on hosts of all kinds, emulated ones included.
const READY: Duration = Duration::from_secs(1800);
/// How long an instance may take to go.
const GONE: Duration = Duration::from_secs(180);
/// The codes of the builder; a word of anybody else's is none.
const BUILD_CODES: [&str; 7] = [
    "memory_too_small",
    "disk_too_small",
    "busy",
    "mirror_down",
    "download_truncated",
    "bad_signature",
    "bad_checksum",
];

/// This host, seen through the agent.
#[derive(Debug)]
pub(super) struct Host {
    agent: Agent,
    handle: Handle,
}

impl Host {
    pub(super) fn new(agent: Agent, handle: Handle) -> Self {
        Self { agent, handle }
    }

    async fn works(&self, registered: bool) -> Result<Vec<String>, Failure> {
        let begun = Instant::now();
        loop {
            let host: Result<HostView, Failure> = self.agent.get("/host").await;
            match host {
                Ok(host) => {
                    let link = host.control_plane.as_ref().filter(|_| registered);
                    let waits = link.is_some_and(|link| link.state != "up") && begun.elapsed() < REGISTRATION;
                    if !waits {
                        let said = |problem: &qudata_api::Problem| {
                            line(&format!("{}: {}; {}", problem.code, problem.message, problem.remedy))
                        };
                        return Ok(host.problems.iter().map(said).collect());
                    }
                }
                Err(failure) if begun.elapsed() > START => return Err(failure),
                Err(_) => {}
            }
            sleep(PAUSE).await;
        }
    }

    async fn end(&self, id: &str) -> Result<(), Failure> {
        let path = format!("/instances/{id}");
        let teardown: Teardown = self.agent.delete(&path).await?;
        if !teardown.complete {
            let left = teardown.residues.join("; ");
            return Err(Failure::new(Exit::Failed, format!("not all of it could be removed: {left}")));
        }
        let begun = Instant::now();
        loop {
            match self.agent.get::<InstanceView>(&path).await {
                Err(failure) if failure.exit == Exit::NotFound => return Ok(()),
                Err(failure) => return Err(failure),
                Ok(_) if begun.elapsed() > GONE => {
                    return Err(Failure::new(Exit::TimedOut, "it is still being removed"));
                }
                Ok(_) => sleep(PAUSE).await,
            }
        }
    }
}

impl Outside for Host {
    fn tenants(&self) -> Option<Vec<Tenant>> {
        let instances = self.handle.block_on(self.agent.instances()).ok()?;
        let tenant = |view: InstanceView| Tenant {
            id: view.id.to_string(),
            name: line(&view.name),
            gpus: view.gpus.iter().filter_map(|text| text.parse().ok()).collect(),
        };
        Some(instances.into_iter().map(tenant).collect())
    }

    fn delete(&self, id: &str) -> Result<(), String> {
        self.handle.block_on(self.end(id)).map_err(|failure| failure.sentence)
    }

    fn agent_works(&self, registered: bool) -> Result<Vec<String>, String> {
        self.handle.block_on(self.works(registered)).map_err(|failure| failure.sentence)
    }

    fn selftest(&self, gpus: &[PciAddress]) -> Result<Tried, String> {
        let wish = SelftestWish { gpus: gpus.to_vec(), keep: false, timeout: READY, tell: &|_| {} };
        let report = self.handle.block_on(selftest(&self.agent, wish)).map_err(|failure| failure.sentence)?;
        let said = |finding: &Finding| {
            let subject = finding.subject.as_deref().map(|subject| format!(" {subject}")).unwrap_or_default();
            format!("{}{subject}: {}", finding.id, finding.line)
        };
        if report.passed {
            let gpus = report.gpus.iter().filter_map(|text| text.parse().ok()).collect();
            return Ok(Tried { seen: report.findings.iter().map(said).collect(), gpus });
        }
        let failed = report.findings.iter().filter(|finding| finding.verdict == Verdict::Fail);
        let told = failed.map(|finding| match &finding.remedy {
            Some(remedy) => format!("{} ({remedy})", said(finding)),
            None => said(finding),
        });
        let told: Vec<String> = told.collect();
        Err(if told.is_empty() { "no GPU could be tried".to_owned() } else { told.join("; ") })
    }

    fn build_image(&self, wish: &Wish, tick: &mut dyn FnMut(Tick)) -> Result<String, PartFailure> {
        let failed =
            |failure: Failure| PartFailure { code: code_in(&failure.sentence), text: failure.sentence };
        let wish = build_wish(wish).map_err(failed)?;
        let mut told = |now: qudata_image::Progress| tick(Tick { what: now.label(), percent: now.percent() });
        let built = self.handle.block_on(qudata_image::build(&wish, &mut told));
        built.map(|record| record.id.to_string()).map_err(|error| failed(image::failure(error)))
    }

    fn ask_about_key(&self, url: &ServiceUrl, key: &SecretString) -> KeyVerdict {
        verdict(self.handle.block_on(reach(url, Some(key.clone()))))
    }
}

fn verdict(said: Result<Answer, ReachError>) -> KeyVerdict {
    match said {
        Ok(Answer::Accepted) => KeyVerdict::Accepted,
        Ok(Answer::Refused(status @ (401 | 403))) => KeyVerdict::Refused(status),
        Ok(Answer::Refused(status)) => KeyVerdict::Unreachable(format!("it answered {status}")),
        // The package brings them.
        Err(error) if error.trusts_nobody() => KeyVerdict::CannotAsk,
        Err(error) => KeyVerdict::Unreachable(line(&chain(&error))),
    }
}

/// As the command line of `image build` would have it, with the settings that the installation has written.
fn build_wish(wish: &Wish) -> Result<BuildWish, Failure> {
    let words = CommandLine::try_parse_from(build_words(wish));
    let command = words.map_err(|error| {
        let text = error.to_string();
        let first = text.lines().next().unwrap_or_default().trim_start_matches("error: ");
        Failure::new(Exit::Usage, format!("--image or --image-option: {first}"))
    })?;
    let Command::Image(Image::Build(build)) = command.command else {
        return Err(Failure::new(Exit::Usage, "--image-option is no option of `image build`"));
    };
    let mut from = LoadFrom::host(None, Vec::new()).map_err(anyhow::Error::new)?;
    // What this program was started with is not what the agent will be.
    from.env.clear();
    let settings = from.load().map_err(anyhow::Error::new)?;
    image::plan(&settings, *build)
}

/// A file is somebody's finished image and taken as it is, unless something is to be done to it.
fn build_words(wish: &Wish) -> Vec<String> {
    let mut words = ["qudata-agent", "image", "build"].map(str::to_owned).to_vec();
    if let Some(from) = &wish.image {
        words.extend(["--from".to_owned(), from.clone()]);
        if from.starts_with('/') && wish.image_options.is_empty() {
            words.push("--no-customise".to_owned());
        }
    }
    for option in &wish.image_options {
        words.push(match option.split_once('=') {
            Some((name, value)) => format!("--{name}={value}"),
            None => format!("--{option}"),
        });
    }
    words
}

fn code_in(text: &str) -> &'static str {
    let word = text.trim_start().strip_prefix('[').and_then(|rest| rest.split(']').next());
    BUILD_CODES.into_iter().find(|code| word == Some(code)).unwrap_or("image_failed")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_builders_code_is_kept_when_it_is_one() {
        assert_eq!(code_in(" [bad_checksum] it is not"), "bad_checksum");
        assert_eq!(code_in("[made_up] x"), "image_failed");
    }

    #[test]
    fn what_the_service_answers_to_a_key() {
        assert_eq!(verdict(Ok(Answer::Accepted)), KeyVerdict::Accepted);
        for status in [401, 403] {
            assert_eq!(verdict(Ok(Answer::Refused(status))), KeyVerdict::Refused(status));
        }
        for status in [301, 404, 429, 503] {
            let said = KeyVerdict::Unreachable(format!("it answered {status}"));
            assert_eq!(verdict(Ok(Answer::Refused(status))), said);
        }
    }

    #[test]
    fn a_file_is_taken_as_it_is_and_options_are_passed_on() {
        let wish = |image: &str, options: &[&str]| Wish {
            image: Some(image.into()),
            image_options: options.iter().map(|text| (*text).to_owned()).collect(),
            ..Wish::default()
        };
        let words = |wish: &Wish| build_words(wish).join(" ");
        assert_eq!(words(&wish("/a.qcow2", &[])), "qudata-agent image build --from /a.qcow2 --no-customise");
        assert_eq!(
            words(&wish("/a.qcow2", &["driver=none", "jupyter"])),
            "qudata-agent image build --from /a.qcow2 --driver=none --jupyter"
        );
        assert_eq!(words(&wish("debian-12", &[])), "qudata-agent image build --from debian-12");
        assert_eq!(words(&Wish::default()), "qudata-agent image build");
        let refused = build_wish(&wish("debian-12", &["colour=blue"])).unwrap_err();
        assert!(refused.sentence.contains("--colour"), "{refused}");
        let refused = build_wish(&wish("debian-12", &["help"])).unwrap_err();
        assert_eq!(refused.exit, Exit::Usage);
    }
}
