#!/bin/sh
# The life of the package in a fresh tree of a system: run there by `cargo xtask dist --prove`, as root, with the package's
# path. Ends at the first thing that is not as it should be. No systemd runs here; where the scripts would call it, a
# stand-in writes down what it was asked.
set -eu
package=$1
needrestart=/etc/needrestart/conf.d/qudata-agent.conf
export DEBIAN_FRONTEND=noninteractive

fail() {
    echo "prove: $1" >&2
    exit 1
}
there() { [ -e "$1" ] || fail "$1 should be there after $2"; }
gone() { [ ! -e "$1" ] || fail "$1 should be gone after $2"; }

# Dependencies, all of them, from this system's own archive.
apt-get install --simulate --no-install-recommends "$package" >/var/tmp/plan || fail "dependencies are missing"
for name in qudata-agent qemu-system-x86 qemu-utils ovmf passt nftables openssh-client libnss-systemd gpgv curl; do
    grep -q "^Inst $name " /var/tmp/plan || dpkg-query --show --showformat='${db:Status-Status}' "$name" | grep -qx installed ||
        fail "apt would not install $name"
done

# Before the package: apt does nothing while its dependencies are not there.
apt-get install --yes --quiet --no-install-recommends needrestart >/var/tmp/log 2>&1 || { cat /var/tmp/log >&2; fail "apt-get install needrestart"; }

# First installation: unpacked and prepared, nothing enabled, nothing asked.
install() { dpkg --force-depends --install "$package" </dev/null >/var/tmp/log 2>&1 || { cat /var/tmp/log >&2; fail "dpkg --install"; }; }
install
[ "$(qudata-agent --version)" = "qudata-agent $(dpkg-query --show --showformat='${Version}' qudata-agent | tr '~' -)" ] || fail "the agent does not run here"
/usr/lib/qudata/frpc --version >/dev/null || fail "frpc does not run here"
getent group qudata >/dev/null || fail "there is no group qudata"
[ "$(stat --format='%a %U %G' /etc/qudata)" = '751 root qudata' ] || fail "/etc/qudata is $(stat --format='%a %U %G' /etc/qudata)"
gone /etc/systemd/system/multi-user.target.wants/qudata-agent.service 'a first installation'
gone /etc/qudata/agent.toml 'a first installation'
[ "$(dpkg-query --show --showformat='${Conffiles}' qudata-agent | awk 'NF { print $1 }')" = "$needrestart" ] || fail "there are other conffiles, which may ask"
dpkg --verify qudata-agent || fail "files differ from their checksums"

# needrestart, with the settings of both packages, restarts the agent but no VM.
leaves_alone() {
    perl -e 'our (%nrconf, $LOGPREF) = (blacklist_rc => [], verbosity => 0);
        eval do { local (@ARGV, $/) = "/etc/needrestart/needrestart.conf"; <> }; die $@ if $@;
        exit !grep { $ARGV[0] =~ /$_/ } @{$nrconf{blacklist_rc}}' "$1"
}
leaves_alone qudata-vm-0198c1de-7d3c-7000-8000-0123456789ab-1-qemu.service || fail "needrestart would end a tenant's VM"
! leaves_alone qudata-agent.service || fail "needrestart would leave an outdated agent running"

# An upgrade restarts the agent, if it runs, and nothing else. An owner's settings stay.
mkdir -p /run/systemd/system /var/tmp/fake
for name in deb-systemd-invoke systemctl; do
    printf '#!/bin/sh\necho "%s $*" >>/var/tmp/asked\n' "$name" >"/var/tmp/fake/$name"
    chmod 755 "/var/tmp/fake/$name"
done
real=$PATH
PATH=/var/tmp/fake:$PATH
echo 'debug = true' >/etc/qudata/agent.toml
echo ak-secret >/etc/qudata/api_key
: >/var/tmp/asked
install
[ "$(cat /var/tmp/asked)" = 'systemctl --system daemon-reload
deb-systemd-invoke try-restart qudata-agent.service' ] || fail "an upgrade asked systemd for: $(cat /var/tmp/asked)"
grep -qx 'debug = true' /etc/qudata/agent.toml || fail "an upgrade changed the settings"

# Removal keeps everything an owner or a tenant may miss, and stops the agent.
mkdir -p /var/lib/qudata/instances/one /var/lib/qudata/images /var/log/qudata
echo disk >/var/lib/qudata/instances/one/disk.qcow2
: >/var/tmp/asked
dpkg --remove qudata-agent </dev/null >/var/tmp/log 2>&1 || fail "dpkg --remove: $(cat /var/tmp/log)"
grep -qx 'deb-systemd-invoke stop qudata-agent.service' /var/tmp/asked || fail "a removal leaves the agent running: $(cat /var/tmp/asked)"
gone /usr/bin/qudata-agent removal
there /var/lib/qudata/instances/one/disk.qcow2 removal
there /etc/qudata/api_key removal
there $needrestart removal
PATH=$real
rm -rf /run/systemd

# Purge without a word: settings and key go, disks stay.
purge() { dpkg --purge qudata-agent </dev/null >/var/tmp/log 2>&1 || { cat /var/tmp/log >&2; fail "dpkg --purge"; }; }
purge
there /var/lib/qudata/instances/one/disk.qcow2 'a purge without a yes'
grep -q 'are kept' /var/tmp/log || fail "a purge does not say what it keeps: $(cat /var/tmp/log)"
gone /etc/qudata 'a purge'
gone $needrestart 'a purge'
gone /var/log/qudata 'a purge'

# Purge with a yes, while somebody holds a disk open: it stays.
yes() { echo 'qudata-agent qudata-agent/remove_data boolean true' | debconf-set-selections; }
yes
install
tail -f /var/lib/qudata/instances/one/disk.qcow2 >/dev/null &
tenant=$!
sleep 1
purge
kill "$tenant"
there /var/lib/qudata/instances/one/disk.qcow2 'a purge under a running machine'

# Purge with a yes, while what the installation changed is not taken back: all stays.
yes
install
mkdir -p /var/lib/qudata/setup
echo '{}' >/var/lib/qudata/setup/manifest.json
purge
there /var/lib/qudata/instances/one/disk.qcow2 'a purge before an uninstall'
rm -r /var/lib/qudata/setup

# Purge with a yes, and nobody there.
yes
install
purge
gone /var/lib/qudata 'a purge with a yes'

# A preseeded no is a no.
mkdir -p /var/lib/qudata/instances/two
echo 'qudata-agent qudata-agent/remove_data boolean false' | debconf-set-selections
install
purge
there /var/lib/qudata/instances/two 'a purge with a no'
echo "prove: all is as it should be" >&2
