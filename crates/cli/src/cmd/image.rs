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
    BuildError, BuildWish, Customisation, DiskUse, ImageId, Listing, Owner, Place, SourceWish, Start, Store,
    StoreError, in_use,
};
use qudata_vfio::topology;

use self::progress::ProgressLine;
use super::Context;
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
    let settings = LoadFrom::host(None, Vec::new()).map_err(anyhow::Error::new)?;
    let settings = settings.load().map_err(anyhow::Error::new)?;
    match command {
        Image::Build(wish) => build(cx, &settings, *wish).await,
        Image::List => list(cx, &settings).await,
        Image::Verify(which) => verify(cx, &settings, &which).await,
        Image::Remove(wish) => remove(cx, &settings, &wish).await,
    }
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
    if cx.screen.json {
        cx.screen.print_json(&record)?;
    } else {
        cx.screen.print(&render::show(&cx.screen.out, &record))?;
    }
    // Only now: an image that cannot be removed does not hide the one that was made.
    if prune {
        match store(settings)?.prune(&instances(settings)) {
            Ok(removed) if cx.screen.json => drop(removed),
            Ok(removed) => removed.iter().for_each(|id| cx.screen.tell(&format!("removed image {id}"))),
            Err(error) => return Err(refused(cx, error).await),
        }
    }
    Ok(Exit::Done)
}

/// What is built, from words and settings.
pub(super) fn plan(settings: &Settings, wish: Build) -> Result<BuildWish, Failure> {
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
    let (current, uses) = (store.current().map_err(anyhow::Error::new)?, uses(settings)?);
    let names = names(cx).await;
    let listed: Vec<_> = images
        .into_iter()
        .map(|record| Listed {
            current: current.as_ref() == Some(&record.id),
            used_by: named(store.users(&record.id, &uses), &names),
            record,
        })
        .collect();
    if cx.screen.json {
        cx.screen.print_json(&listed)?;
    } else {
        cx.screen.print(&render::table(&cx.screen.out, &listed))?;
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
    let instances = instances(settings);
    // Before anybody is asked whether he wants what cannot be.
    if let Err(error) = store.check_unused(&id, &instances) {
        return Err(refused(cx, error).await);
    }
    confirm::consent(wish.yes, &format!("Remove image {id}?\nNo instance uses it; it can be built again."))?;
    match store.remove(&id, &instances) {
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
        | StoreError::InUse { .. }
        | StoreError::Undecided { .. }
        | StoreError::Lock(_) => Exit::Refused,
        StoreError::NoSuchImage { .. } => Exit::NotFound,
        _ => Exit::Failed,
    };
    Failure::new(exit, format!("{:#}", anyhow::Error::new(error)))
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

fn uses(settings: &Settings) -> Result<Vec<DiskUse>, Failure> {
    Ok(in_use(&instances(settings)).context("cannot tell which images are in use")?)
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
