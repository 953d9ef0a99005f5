//! A builder that the tests end at any moment: `build_image IMAGES SOURCE LOG [customise]`.

use std::{env, path::PathBuf};

use qudata_host::size::ByteSize;
use qudata_image::{
    Accel, BuildWish, Customisation, DriverWish, Location, Owner, Place, Source, SourceWish, Start, build,
};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let words: Vec<PathBuf> = env::args_os().skip(1).map(PathBuf::from).collect();
    let [images, source, log, more @ ..] = words.as_slice() else {
        return Err("three paths are needed".into());
    };
    let customisation = Customisation { driver: DriverWish::None, ..Customisation::default() };
    let root = rustix::process::geteuid().is_root();
    let wish = BuildWish {
        source: SourceWish::from(Source::Place(Location::File(source.clone()))),
        customise: (!more.is_empty()).then_some(customisation),
        size: None,
        place: Place {
            image_dir: images.clone(),
            qemu: "/usr/bin/qemu-system-x86_64".into(),
            qemu_img: "/usr/bin/qemu-img".into(),
            start: Start::Bios,
            accel: Accel::Tcg,
            user: root.then_some(Owner { uid: 719_999, gid: 719_999 }),
            log: log.clone(),
            instances: images.with_extension("instances"),
            reserve_memory: ByteSize::default(),
            reserve_disk: ByteSize::default(),
        },
    };
    build(&wish, &mut |_| ()).await?;
    Ok(())
}
