#!/bin/sh
# Runs inside the new root, after the packages. The result must carry no identity: no host key, no machine id, no password.
set -eu

# Nothing here is worth waiting for at boot, and nothing runs by itself while a renter's job does.
for unit in systemd-networkd-wait-online.service systemd-network-generator.service systemd-modules-load.service \
    systemd-binfmt.service proc-sys-fs-binfmt_misc.automount sys-fs-fuse-connections.mount sys-kernel-config.mount \
    sys-kernel-debug.mount sys-kernel-tracing.mount systemd-pstore.service systemd-update-utmp.service \
    apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer e2scrub_reap.service fstrim.timer \
    man-db.timer getty@tty1.service; do
    ln -sf /dev/null "/etc/systemd/system/$unit"
done
# The disk of a renter is no place for a journal that fills it.
mkdir -p /etc/systemd/journald.conf.d
printf '[Journal]\nStorage=volatile\nRuntimeMaxUse=32M\n' >/etc/systemd/journald.conf.d/qudata.conf
systemctl enable --quiet systemd-networkd.service systemd-resolved.service ssh.service
systemctl set-default --quiet multi-user.target

passwd --quiet --lock root
rm -f /etc/ssh/ssh_host_*
: >/etc/machine-id
rm -f /var/lib/dbus/machine-id /var/lib/systemd/random-seed
echo localhost >/etc/hostname
printf '127.0.0.1 localhost\n::1 localhost\n' >/etc/hosts
ln -sf ../run/systemd/resolve/stub-resolv.conf /etc/resolv.conf
rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin /var/log/journal /tmp/* /var/tmp/*
find /var/log -type f -delete

# A vendor tree newer than these stamps makes systemd rebuild its databases at the first boot.
touch /etc/.updated /var/.updated
