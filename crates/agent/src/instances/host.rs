//! The host as callers see it.

use qudata_api::HostView;
use qudata_host::{capacity::HostCapacity, size::ByteSize};

use super::{Inner, Instances};
use crate::inventory::plan_free;

impl Instances {
    /// The host and what is free on it.
    pub fn host(&self) -> HostView {
        let Inner { site, started_at, port, .. } = &*self.inner;
        let (settings, taken) = (&site.settings, self.taken());
        let none = ByteSize::default();
        let observed = HostCapacity::observe(&settings.data_dir).unwrap_or(HostCapacity {
            cpus: 0,
            memory_total: none,
            memory_available: none,
            disk_total: none,
            disk_free: none,
        });
        let free = plan_free(&observed, &taken, &site.limits());
        let outside = self.inner.outside.get().cloned().unwrap_or_default();
        HostView {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            started_at: *started_at,
            standalone: settings.standalone,
            accel: settings.accel.to_string(),
            firmware: settings.firmware.to_string(),
            tunnel: settings.tunnel.to_string(),
            tunnel_link: outside.tunnel_link(&site.public_host()),
            control_plane: outside.control_plane_link(&settings.service_url.to_string()),
            listen: settings.listen.to_string(),
            port: *port,
            cpus: observed.cpus,
            memory_total: observed.memory_total.bytes(),
            memory_free: free.memory.bytes(),
            disk_total: observed.disk_total.bytes(),
            disk_free: free.disk.bytes(),
            instances: taken.len(),
            problems: self
                .problems()
                .iter()
                .cloned()
                .chain(site.gpus.problems())
                .chain(outside.problems())
                .collect(),
        }
    }
}
