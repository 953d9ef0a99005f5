#!/bin/sh
# Runs inside the new root, after the packages. Keys come with each run on the disk `lab`.
set -eu

# Nothing that begins by itself while a scenario compares the server with what it was.
for unit in systemd-networkd-wait-online.service systemd-network-generator.service apt-daily.timer \
    apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer e2scrub_reap.service fstrim.timer man-db.timer \
    getty@tty1.service; do
    ln -sf /dev/null "/etc/systemd/system/$unit"
done
systemctl enable --quiet systemd-networkd.service ssh.service
systemctl set-default --quiet multi-user.target

passwd --quiet --lock root
rm -f /etc/ssh/ssh_host_*
mkdir -p /lab /var/log/journal
# QEMU's user-mode network answers DNS here.
echo 'nameserver 10.0.2.3' >/etc/resolv.conf
echo host >/etc/hostname
printf '127.0.0.1 localhost host\n::1 localhost\n' >/etc/hosts
rm -rf /var/cache/apt/*.bin /tmp/*
find /var/tmp -mindepth 1 ! -name first-boot.sh -delete
