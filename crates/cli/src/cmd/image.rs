//! `image build`, `image list`, `image verify`, `image remove`. Works on the host's folders, with or without the agent.

mod progress;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use qudata_agent_core::{
    paths::Paths,
    settings::{FirmwareKind, LoadFrom, Settings},
};
use qudata_image::{
    BuildError, BuildWish, Claims, Customisation, ImageId, Listing, Owner, Place, SourceWish, Start, Store,
    StoreError,
};
use qudata_vfio::topology;

use self::progress::ProgressLine;
use super::{
    Context,
    serve::{LOG_FILTER, LOG_FORMAT},
};
use crate::{
    args::image::{Build, Image, Remove, Which},
    confirm,
    exit::{Exit, Failure},
    render::{
        image::{self as render, Listed},
        line,
    },
    units::size,
};

const NVIDIA: u16 = 0x10de;

/// Any of them.
pub(super) async fn run(cx: Context<'_>, command: Image) -> Result<Exit, Failure> {
    match command {
        Image::Build(mut wish) => {
            let settings = settings(wish.config.file.take())?;
            build(cx, &settings, *wish).await
        }
        Image::List(config) => list(cx, &settings(config.file)?).await,
        Image::Verify(wish) => verify(cx, &settings(wish.config.file)?, &wish.which).await,
        Image::Remove(mut wish) => {
            let settings = settings(wish.config.file.take())?;
            remove(cx, &settings, &wish).await
        }
    }
}

/// The settings that the agent would have if it was started with this file.
fn settings(file: Option<PathBuf>) -> Result<Settings, Failure> {
    let mut from = LoadFrom::host(file.as_deref(), Vec::new()).map_err(anyhow::Error::new)?;
    // How the agent logs is no setting.
    from.env.retain(|(name, _)| name != LOG_FORMAT && name != LOG_FILTER);
    Ok(from.load().map_err(anyhow::Error::new)?)
}

async fn build(cx: Context<'_>, settings: &Settings, wish: Build) -> Result<Exit, Failure> {
    std::fs::create_dir_all(&settings.log_dir)
        .with_context(|| format!("cannot create {}", settings.log_dir.display()))?;
    let prune = wish.prune;
    let wish = plan(settings, wish)?;
    let mut progress = ProgressLine::new(cx.screen);
    let built = {
        let mut told = |now| progress.show(&now);
        tokio::select! {
            built = qudata_image::build(&wish, &mut told) => Some(built),
            _ = tokio::signal::ctrl_c() => None,
        }
    };
    progress.end();
    let Some(built) = built else {
        store(settings)?.tidy().map_err(anyhow::Error::new)?;
        return Err(Failure::new(
            Exit::Failed,
            "stopped. No image was made; a download is kept, the same command goes on with it",
        ));
    };
    let record = built.map_err(failure)?;
    let got = store(settings)?.pinned(&settings.base_image).map_err(anyhow::Error::new)?;
    let current = got.as_ref() == Some(&record.id);
    if cx.screen.json {
        cx.screen.print_json(&record)?;
    } else {
        cx.screen.print(&render::show(&cx.screen.out, &record, current))?;
    }
    if !current {
        cx.screen.tell(&pinned(&settings.base_image));
    }
    // Only now: an image that cannot be removed does not hide the one that was made.
    if prune {
        match store(settings)?.prune(&claims(settings)) {
            Ok(removed) if cx.screen.json => drop(removed),
            Ok(removed) => removed.iter().for_each(|id| cx.screen.tell(&format!("removed image {id}"))),
            Err(error) => return Err(refused(cx, error).await),
        }
    }
    Ok(Exit::Done)
}

/// The sentence for a host whose settings do not follow the current image.
fn pinned(base_image: &Path) -> String {
    format!(
        "this host's settings pin another image: as long as base_image (QUDATA_BASE_IMAGE) is {}, new instances still get \
         that one. Take the setting away and restart the agent",
        line(&base_image.display().to_string())
    )
}

/// What is built, from words and settings.
pub(super) fn plan(settings: &Settings, wish: Build) -> Result<BuildWish, Failure> {
    if wish.config.file.is_some() {
        return Err(Failure::new(Exit::Usage, "--config is no option here: the settings are known"));
    }
    let keyring = wish.keyring.map(std::path::absolute).transpose().context("--keyring")?;
    let customise = if wish.no_customise {
        None
    } else {
        Some(Customisation {
            driver: wish.driver,
            gpus: nvidia_gpus(settings)?,
            packages: wish.packages,
            jupyter: wish.jupyter,
            container_toolkit: wish.container_toolkit,
        })
    };
    Ok(BuildWish {
        source: SourceWish {
            from: wish.from,
            mirror: wish.mirror,
            checksums: wish.checksums,
            signature: wish.signature,
            keyring,
            digest: wish.sha256.or(wish.sha512),
        },
        customise,
        size: wish.size,
        place: place(settings),
    })
}

/// The host's side of a build.
pub(super) fn place(settings: &Settings) -> Place {
    let start = match settings.firmware {
        FirmwareKind::Uefi => {
            Start::Uefi { code: settings.ovmf_code.clone(), vars: settings.ovmf_vars.clone() }
        }
        FirmwareKind::Bios => Start::Bios,
        FirmwareKind::Direct => Start::Direct,
    };
    // The number before those of the instances' users: nobody else's, and of no instance.
    let id = settings.vm_uid_base.saturating_sub(1);
    Place {
        image_dir: settings.image_dir.clone(),
        qemu: settings.qemu_binary.clone(),
        qemu_img: settings.qemu_img.clone(),
        start,
        accel: settings.accel,
        user: rustix::process::geteuid().is_root().then_some(Owner { uid: id, gid: id }),
        log: settings.log_dir.join("image-build.log"),
        instances: instances(settings),
        reserve_memory: settings.host_reserve_memory,
        reserve_disk: settings.host_reserve_disk,
    }
}

/// Device ids of the NVIDIA GPUs that may be rented out.
fn nvidia_gpus(settings: &Settings) -> Result<Vec<u16>, Failure> {
    let topology = topology::observe(Path::new("/")).map_err(anyhow::Error::new)?;
    let named = &settings.gpu_pci_addrs;
    let gpus = topology.gpus(named).into_iter().map(|gpu| gpu.address);
    let rented = gpus.filter(|address| named.is_empty() || named.contains(address));
    let device = |address| topology.devices.get(&address);
    Ok(rented
        .filter_map(device)
        .filter(|device| device.vendor == NVIDIA)
        .map(|device| device.device)
        .collect())
}

async fn list(cx: Context<'_>, settings: &Settings) -> Result<Exit, Failure> {
    let store = store(settings)?;
    let Listing { images, damaged } = store.list().map_err(anyhow::Error::new)?;
    let current = [store.current(), store.pinned(&settings.base_image)];
    let [current, pinned] = current.map(|id| id.map_err(anyhow::Error::new));
    let (current, pinned) = (current?, pinned?);
    let uses = match store.uses(&claims(settings)) {
        Ok(uses) => uses,
        Err(error) => return Err(refused(cx, error).await),
    };
    let names = names(cx).await;
    let listed: Vec<_> = images
        .into_iter()
        .map(|record| Listed {
            current: [&current, &pinned].into_iter().flatten().any(|id| *id == record.id),
            used_by: named(store.users(&record.id, &uses), &names),
            record,
        })
        .collect();
    if cx.screen.json {
        cx.screen.print_json(&listed)?;
    } else {
        cx.screen.print(&render::table(&cx.screen.out, &listed))?;
    }
    let undecided: Vec<_> = uses.into_iter().filter(|u| u.backing.is_none()).map(|u| u.instance).collect();
    if !undecided.is_empty() {
        let who = named(undecided, &names).join(", ");
        cx.screen.tell(&format!("which image these use cannot be told yet, none can be removed: {who}"));
    }
    for image in &damaged {
        cx.screen.tell(&format!("image {} is damaged: {}", image.id, line(&image.reason)));
    }
    Ok(if damaged.is_empty() { Exit::Done } else { Exit::Failed })
}

async fn verify(cx: Context<'_>, settings: &Settings, which: &Which) -> Result<Exit, Failure> {
    let store = store(settings)?;
    let id = pick(&store, &which.id)?;
    let record = store.verify(&id).map_err(anyhow::Error::new)?;
    if cx.screen.json {
        cx.screen.print_json(&record)?;
    } else {
        cx.screen.print(&format!("image {id} is as it was published ({})\n", size(record.size)))?;
    }
    Ok(Exit::Done)
}

async fn remove(cx: Context<'_>, settings: &Settings, wish: &Remove) -> Result<Exit, Failure> {
    let store = store(settings)?;
    let id = pick(&store, &wish.which.id)?;
    let claims = claims(settings);
    // Before anybody is asked whether he wants what cannot be.
    if let Err(error) = store.check_unused(&id, &claims) {
        return Err(refused(cx, error).await);
    }
    confirm::consent(wish.yes, &format!("Remove image {id}?\nNo instance uses it; it can be built again."))?;
    match store.remove(&id, &claims) {
        Ok(()) => {
            cx.screen.print(&format!("image {id} is removed\n"))?;
            Ok(Exit::Done)
        }
        Err(error) => Err(refused(cx, error).await),
    }
}

/// Names the instances as people know them.
async fn refused(cx: Context<'_>, error: StoreError) -> Failure {
    let error = match error {
        StoreError::InUse { id, instances } => {
            StoreError::InUse { id, instances: named(instances, &names(cx).await) }
        }
        StoreError::Undecided { id, instances } => {
            StoreError::Undecided { id, instances: named(instances, &names(cx).await) }
        }
        other => other,
    };
    let exit = match &error {
        StoreError::Current { .. }
        | StoreError::Pinned { .. }
        | StoreError::InUse { .. }
        | StoreError::Undecided { .. }
        | StoreError::Users(_)
        | StoreError::Lock(_) => Exit::Refused,
        StoreError::NoSuchImage { .. } => Exit::NotFound,
        _ => Exit::Failed,
    };
    let code = error.code();
    Failure::new(exit, format!("[{code}] {:#}", anyhow::Error::new(error)))
}

/// The stable code, and the whole story.
pub(super) fn failure(error: BuildError) -> Failure {
    let exit = if error.code() == "busy" { Exit::Refused } else { Exit::Failed };
    let code = error.code();
    Failure::new(exit, format!("[{code}] {:#}", anyhow::Error::new(error)))
}

fn store(settings: &Settings) -> Result<Store, Failure> {
    Ok(Store::open(&settings.image_dir).map_err(anyhow::Error::new)?)
}

/// What the agent of these settings needs of the images.
fn claims(settings: &Settings) -> Claims {
    Claims { instances: instances(settings), base_image: settings.base_image.clone() }
}

/// The folder of the instances' folders.
fn instances(settings: &Settings) -> PathBuf {
    Paths::new(&settings.data_dir, &settings.vm_run_dir, &settings.log_dir).instances()
}

/// Ids and names of the agent's instances. Nothing where it does not run: ids serve as well.
async fn names(cx: Context<'_>) -> BTreeMap<String, String> {
    let instances = cx.agent.instances().await.unwrap_or_default();
    instances.into_iter().map(|instance| (instance.id.to_string(), line(&instance.name))).collect()
}

fn named(ids: Vec<String>, names: &BTreeMap<String, String>) -> Vec<String> {
    ids.into_iter().map(|id| names.get(&id).cloned().unwrap_or(id)).collect()
}

/// The one image whose id begins so.
fn pick(store: &Store, beginning: &str) -> Result<ImageId, Failure> {
    let Listing { images, damaged } = store.list().map_err(anyhow::Error::new)?;
    let all = images.into_iter().map(|record| record.id).chain(damaged.into_iter().map(|image| image.id));
    let mut fitting = all.filter(|id| id.to_string().starts_with(beginning));
    match (fitting.next(), fitting.next()) {
        (Some(id), None) => Ok(id),
        (None, _) => Err(Failure::new(
            Exit::NotFound,
            format!("there is no image {beginning:?}: see `qudata-agent image list`"),
        )),
        (Some(_), Some(_)) => Err(Failure::new(
            Exit::Refused,
            format!("several images begin with {beginning:?}: write more of it"),
        )),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use qudata_agent_core::settings::SettingsFile;
    use qudata_host::size::ByteSize;

    use super::*;
    use crate::args::{Command, CommandLine};

    fn settings(text: &str) -> Settings {
        let file = Some(SettingsFile { path: "/agent.toml".into(), text: text.to_owned() });
        let (read, exists) = (|path: &Path| std::fs::read(path), |path: &Path| path.exists());
        let from = LoadFrom { file, env: Vec::new(), flags: Vec::new(), read: &read, exists: &exists };
        Settings::load(&from).unwrap()
    }

    fn build(words: &str) -> Build {
        let line = format!("qudata-agent image build --no-customise {words}");
        match CommandLine::try_parse_from(line.split_whitespace()).unwrap().command {
            Command::Image(Image::Build(build)) => *build,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_build_knows_what_renters_have_and_what_the_owner_keeps() {
        let settings = settings(
            "data_dir = \"/d\"\nhost_reserve_memory = \"3G\"\nhost_reserve_disk = \"5G\"\nbase_image = \"/own.qcow2\"\n",
        );
        let place = plan(&settings, build("")).unwrap().place;
        assert_eq!(place.instances, Path::new("/d/instances"));
        let reserves = (place.reserve_memory, place.reserve_disk);
        assert_eq!(reserves, (ByteSize::from_gib(3), ByteSize::from_gib(5)));
        let claims = claims(&settings);
        assert_eq!(claims.instances, place.instances);
        assert_eq!(claims.base_image, Path::new("/own.qcow2"));
    }

    #[test]
    fn settings_that_would_not_be_read_are_refused() {
        let refused = plan(&settings(""), build("--config /other.toml")).unwrap_err();
        assert_eq!(refused.exit, Exit::Usage);
        assert!(refused.sentence.contains("--config"), "{refused}");
    }

    #[test]
    fn the_file_that_is_named_is_the_one_that_is_read() {
        let named = super::settings(Some("/no/such/agent.toml".into())).unwrap_err();
        assert!(named.sentence.contains("/no/such/agent.toml"), "{named}");
    }

    #[tokio::test]
    async fn refusals_begin_with_their_code() {
        let screen = crate::screen::Screen::observe(false);
        let agent = crate::client::Agent::at(Some("/no/such/agent.sock".into()));
        let cx = Context { agent: &agent, screen: &screen };
        let id: ImageId = "0123456789abcdef".parse().unwrap();
        for (error, exit, code) in [
            (StoreError::Pinned { id: id.clone() }, Exit::Refused, "[image_current]"),
            (
                StoreError::Undecided { id: id.clone(), instances: vec!["a".into()] },
                Exit::Refused,
                "[uses_unknown]",
            ),
            (StoreError::NoSuchImage { id }, Exit::NotFound, "[no_such_image]"),
        ] {
            let failure = refused(cx, error).await;
            assert_eq!(failure.exit, exit, "{failure}");
            assert!(failure.sentence.starts_with(code), "{failure}");
        }
    }
}
