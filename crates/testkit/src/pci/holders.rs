//! Who holds the devices of a fake host: processes with open files, device nodes, consoles. Called by tests of what
//! looks for holders.

use std::{fs, io, os::unix::fs::symlink, path::Path};

use super::FakeHost;

/// A process of a fake host.
#[derive(Debug, Clone)]
pub struct FakeProcess {
    /// Its id.
    pub pid: u32,
    /// `comm`.
    pub name: String,
    /// `cgroup`, the path of the only line of cgroup v2.
    pub cgroup: String,
    /// What its descriptors point to, from 0 on.
    pub files: Vec<String>,
}

impl FakeHost {
    /// Starts a process.
    ///
    /// # Errors
    /// When the tree cannot be made.
    pub fn add_process(&self, process: &FakeProcess) -> io::Result<()> {
        let dir = self.path(format!("proc/{}", process.pid));
        fs::create_dir_all(dir.join("fd"))?;
        fs::write(dir.join("comm"), format!("{}\n", process.name))?;
        fs::write(dir.join("cgroup"), format!("0::{}\n", process.cgroup))?;
        for (fd, file) in process.files.iter().enumerate() {
            symlink(file, dir.join("fd").join(fd.to_string()))?;
        }
        Ok(())
    }

    /// Gives a device what a DRM driver makes: `drm/cardN` and `drm/renderD(128+N)`.
    ///
    /// # Errors
    /// When the tree cannot be made.
    pub fn add_drm(&self, address: &str, card: u32) -> io::Result<()> {
        let drm = self.device_dir(address).join("drm");
        fs::create_dir_all(drm.join(format!("card{card}")))?;
        fs::create_dir_all(drm.join(format!("renderD{}", 128 + card)))
    }

    /// Gives a device a framebuffer `fbN`, as its DRM driver does.
    ///
    /// # Errors
    /// When the tree cannot be made.
    pub fn add_framebuffer(&self, address: &str, number: u32) -> io::Result<()> {
        self.framebuffer_in(&self.device_dir(address), number)
    }

    /// Adds the firmware's framebuffer `fbN`, which belongs to no device: `efi-framebuffer.0` has it.
    ///
    /// # Errors
    /// When the tree cannot be made.
    pub fn add_firmware_framebuffer(&self, number: u32) -> io::Result<()> {
        self.framebuffer_in(&self.path("sys/devices/platform/efi-framebuffer.0"), number)
    }

    fn framebuffer_in(&self, device: &Path, number: u32) -> io::Result<()> {
        let dir = device.join(format!("graphics/fb{number}"));
        fs::create_dir_all(&dir)?;
        self.link(format!("sys/class/graphics/fb{number}"), dir)
    }

    /// Gives a device a sound card, as `snd_hda_intel` does.
    ///
    /// # Errors
    /// When the tree cannot be made.
    pub fn add_sound_card(&self, address: &str, card: u32) -> io::Result<()> {
        fs::create_dir_all(self.device_dir(address).join(format!("sound/card{card}")))
    }

    /// Makes a module depend on another: `user` is among the `holders` of `module`.
    ///
    /// # Errors
    /// When the tree cannot be made.
    pub fn add_module_user(&self, module: &str, user: &str) -> io::Result<()> {
        fs::create_dir_all(self.path(format!("sys/module/{user}/holders")))?;
        self.link(format!("sys/module/{module}/holders/{user}"), format!("sys/module/{user}"))
    }

    /// Adds a VT console with its driver's name, for example `(M) frame buffer device`.
    ///
    /// # Errors
    /// When the tree cannot be made.
    pub fn add_console(&self, number: u32, name: &str, bound: bool) -> io::Result<()> {
        let dir = format!("sys/class/vtconsole/vtcon{number}");
        self.file(format!("{dir}/name"), format!("{name}\n"))?;
        self.file(format!("{dir}/bind"), format!("{}\n", u8::from(bound)))
    }
}
