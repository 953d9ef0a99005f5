#!/bin/sh
# Process 1 of the lab's quick guest. Emulation inside emulation is slow, and most of a boot is cloud-init's Python and
# systemd: here the same disk and the same kernel come up with the readiness script and sshd and nothing else. It reads the
# same seed. What a renter really gets is proven by the scenarios that boot the full guest.
# First run inside the initramfs (klibc's tools), then again inside the root file system.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
set -u

if [ "${1-}" != second ]; then
    mkdir -p /dev /proc /sys /root
    mount -t devtmpfs dev /dev
    mount -t proc proc /proc
    mount -t sysfs sys /sys
    for module in virtio_pci virtio_blk ext4; do modprobe "$module"; done
    until [ -b /dev/vda2 ]; do sleep 0.1; done
    mount -t ext4 -o rw /dev/vda2 /root
    cat /lab-init >/root/lab-init
    for place in dev proc sys; do mount -o move "/$place" "/root/$place"; done
    exec run-init /root /bin/sh /lab-init second </root/dev/console >/root/dev/console 2>&1
fi

mount -t tmpfs -o mode=755 run /run
mkdir -p /run/sshd /run/qudata-ready /run/systemd/resolve /dev/pts /run/seed
mount -t devpts devpts /dev/pts
for module in virtio_net virtio_console isofs button evdev; do modprobe -q "$module"; done
mount -t iso9660 -o ro /dev/vdb /run/seed
# What udev would name.
mkdir -p /dev/virtio-ports
for port in /sys/class/virtio-ports/*; do ln -s "../${port##*/}" "/dev/virtio-ports/$(cat "$port/name")"; done

# The seed is JSON; perl-base has no JSON, but strings are all that is needed here.
cat >/run/seed.pl <<'PERL'
use strict;
local $/;
sub text { open my $f, '<', shift or die; my $t = <$f>; $t }
sub plain { my $s = shift; $s =~ s/\\(u([0-9a-fA-F]{4})|.)/$1 eq 'n' ? "\n" : $1 eq 't' ? "\t" : defined $2 ? chr hex $2 : $1/ges; $s }
sub put { my ($path, $mode, $t) = @_; open my $f, '>', $path or die "$path: $!"; print $f $t; close $f; chmod $mode, $path }
my $string = qr/"((?:[^"\\]|\\.)*)"/s;
my ($user, $net) = (text('/run/seed/user-data'), text('/run/seed/network-config'));
$user =~ /"ed25519_private":\s*$string/ or die 'no host key';
put('/etc/ssh/ssh_host_ed25519_key', 0600, plain($1));
$user =~ /"ssh_authorized_keys":\s*\[(.*?)\]/s or die 'no keys';
my $keys = $1;
put('/root/.ssh/authorized_keys', 0600, join '', map { plain($_) . "\n" } $keys =~ /$string/g);
$user =~ /"qudata-ready",\s*$string/ or die 'no readiness script';
put('/run/ready.sh', 0755, plain($1));
my ($address) = $net =~ /"addresses":\s*\[\s*"([^"]+\/\d+)"/;
my ($via) = $net =~ /"via":\s*"([^"]+)"/;
my ($dns) = $net =~ /"nameservers":\s*\{\s*"addresses":\s*\[\s*"([^"]+)"/;
my ($mtu) = $net =~ /"mtu":\s*(\d+)/;
put('/run/systemd/resolve/stub-resolv.conf', 0644, "nameserver $dns\n");
put('/run/network', 0644, "address=$address\nvia=$via\nmtu=$mtu\n");
PERL
mkdir -p -m 700 /root/.ssh
perl /run/seed.pl || echo "lab: the seed could not be read"
. /run/network
ip link set lo up
ip link set eth0 mtu "$mtu" up
ip address add "$address" dev eth0
ip route add default via "$via"
/usr/sbin/sshd
(while :; do sh /run/ready.sh; sleep 1; done) &

# The power button is the only way in which the host asks a guest to end.
until [ -c /dev/input/event0 ]; do sleep 0.2; done
dd if=/dev/input/event0 of=/dev/null bs=24 count=1 2>/dev/null
echo "lab: power button"
sync
mount -o remount,ro / 2>/dev/null
echo o >/proc/sysrq-trigger
while :; do sleep 60; done
