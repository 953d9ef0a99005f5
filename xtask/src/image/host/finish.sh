#!/bin/sh
# Runs inside the new root, after the packages. The result carries no key: those come with each run on the disk `lab`.
set -eu

# Nothing here is worth waiting for at boot, and nothing runs by itself while a scenario measures.
for unit in systemd-networkd-wait-online.service systemd-network-generator.service systemd-pstore.service \
    systemd-update-utmp.service systemd-timesyncd.service systemd-binfmt.service proc-sys-fs-binfmt_misc.automount \
    proc-sys-fs-binfmt_misc.mount apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer \
    e2scrub_reap.service fstrim.timer man-db.timer nftables.service getty@tty1.service; do
    ln -sf /dev/null "/etc/systemd/system/$unit"
done
systemctl enable --quiet systemd-networkd.service ssh.service
systemctl set-default --quiet multi-user.target

passwd --quiet --lock root
rm -f /etc/ssh/ssh_host_*
mkdir -p /lab
# A journal that survives a hard reset tells what happened before it.
mkdir -p /var/log/journal
# QEMU's user-mode network answers DNS here.
echo 'nameserver 10.0.2.3' >/etc/resolv.conf
echo host >/etc/hostname
printf '127.0.0.1 localhost host\n::1 localhost\n' >/etc/hosts
# radeon hangs on the emulated card; a scenario that wants that loads it.
echo 'blacklist radeon' >/etc/modprobe.d/lab.conf
rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin /tmp/* /var/tmp/*

# A vendor tree newer than these stamps makes systemd rebuild its databases at the first boot.
touch /etc/.updated /var/.updated
