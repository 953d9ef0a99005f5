
# Runs once, as root, in the machine that makes a base image; the lines before this one set what was asked for. Whatever
# fails ends it: the trap reports the step, and the builder throws the disk away. Only the very end says "done".
set -eu
export DEBIAN_FRONTEND=noninteractive NEEDRESTART_MODE=l LC_ALL=C.UTF-8
exec 3>/dev/virtio-ports/ru.qudata.image
exec >/dev/virtio-ports/ru.qudata.log 2>&1 </dev/null
step=start

finish() {
    status=$?
    if [ "$finished" = no ]; then echo "failed $step $status" >&3; fi
    sync
    systemctl --no-block poweroff
}
finished=no
trap finish EXIT

begin() {
    step=$1
    echo "step $step" >&3
    echo "== $step"
}

fail() {
    echo "$1"
    exit 1
}

# Compiling a kernel module says nothing for minutes; the builder must not take that for a hung machine.
(while sleep 20; do echo alive >&3; done) &

get() {
    apt-get -q -y -o DPkg::Lock::Timeout=900 -o APT::Update::Error-Mode=any -o Acquire::Retries=3 \
        -o Dpkg::Use-Pty=0 -o Dpkg::Options::=--force-confold "$@" 3>&-
}

installed() {
    dpkg-query -W -f='${Package} ${db:Status-Status} ${Version}\n' "$@" | awk '$2 == "installed"'
}

present() {
    [ "$(dpkg-query -W -f='${db:Status-Status}' "$1" 2>/dev/null)" = installed ]
}

# The metapackages by which this system follows its kernel, such as linux-image-amd64 or linux-image-virtual.
kernel_packages() {
    installed 'linux-image-*' | awk '$1 !~ /^linux-image-(unsigned-)?[0-9]/ { print $1 }'
}

newest_kernel() {
    ls -v /lib/modules | tail -n 1
}

# The version of NVIDIA's driver that kernel $1 has, by the name inside of its modules: Debian's files are called after the
# kind of card (nvidia-current.ko), which modinfo does not know as nvidia.
driver_of() {
    find "/lib/modules/$1" -name 'nvidia*.ko*' | while read -r module; do
        if [ "$(modinfo -F name "$module")" = nvidia ]; then
            modinfo -F version "$module"
            break
        fi
    done
}

. /etc/os-release

index=old
update() {
    if [ "$index" = old ]; then get update; fi
    index=new
}

install_packages() {
    begin packages
    missing=
    for name in openssh-server cloud-guest-utils $PACKAGES; do
        if ! present "$name"; then missing="$missing $name"; fi
    done
    if [ -n "$missing" ]; then
        update
        get install --no-install-recommends $missing
    fi
}

# The archive's other components, where the system's own sources have main. Nobody else's sources are touched.
add_components() {
    for file in /etc/apt/sources.list /etc/apt/sources.list.d/*.list; do
        if [ -f "$file" ]; then
            sed -i -E "/^deb .* $VERSION_CODENAME[a-z-]* .*\\bmain\\b/ { /non-free-firmware/! s/\$/ contrib non-free non-free-firmware/ }" "$file"
        fi
    done
    for file in /etc/apt/sources.list.d/*.sources; do
        if [ -f "$file" ] && grep -qE "^Suites:.*\\b$VERSION_CODENAME" "$file"; then
            sed -i -E '/^Components:.*\bmain\b/ { /non-free-firmware/! s/$/ contrib non-free non-free-firmware/ }' "$file"
        fi
    done
    index=old
}

# Sets $modules for branch $1.
choose_modules() {
    if [ "$1" -lt "$DRIVER_LEAST" ]; then
        fail "the driver $1 does not know the GPUs of this host: at least $DRIVER_LEAST is needed"
    fi
    if [ "$1" -gt "$DRIVER_MOST" ]; then
        fail "the driver $1 does not serve the GPUs of this host any more: at most $DRIVER_MOST does"
    fi
    case $DRIVER_MODULES in
        either)
            # From this branch on the open modules support every GPU since Turing.
            if [ "$1" -ge 560 ]; then modules=open; else modules=proprietary; fi
            ;;
        *) modules=$DRIVER_MODULES ;;
    esac
}

debian_driver() {
    add_components
    update
    # Newest first.
    version=$(apt-cache madison nvidia-driver | awk -v wish="$DRIVER" -v most="$DRIVER_MOST" \
        '{ v = $3; sub(/^[0-9]+:/, "", v); if (v + 0 >= most + 1) next; if (wish == "distro" || index(v "-", wish "-") == 1 || index(v, wish ".") == 1) { print $3; exit } }')
    [ -n "$version" ] || fail "this release has no nvidia-driver $DRIVER that serves the GPUs of this host; it has: $(apt-cache madison nvidia-driver)"
    branch=${version#*:}
    choose_modules "${branch%%.*}"
    if [ "$modules" = open ]; then kernel_driver=nvidia-open-kernel-dkms; else kernel_driver=nvidia-kernel-dkms; fi
    get install --no-install-recommends "nvidia-driver=$version" "$kernel_driver" nvidia-smi libcuda1 nvidia-persistenced
}

ubuntu_driver() {
    update
    branches=$(apt-cache --names-only search '^nvidia-driver-[0-9]+-server(-open)?$' | sed -E 's/^nvidia-driver-([0-9]+)-.*/\1/' | sort -un)
    if [ "$DRIVER" = distro ]; then
        branch=$(echo "$branches" | awk -v most="$DRIVER_MOST" '$1 <= most' | tail -n 1)
    else
        branch=$(echo "$branches" | grep -x "${DRIVER%%.*}" | tail -n 1)
    fi
    [ -n "$branch" ] || fail "this release has no nvidia-driver-…-server of $DRIVER that serves the GPUs of this host; it has: $branches"
    choose_modules "$branch"
    suffix=
    if [ "$modules" = open ]; then suffix=-open; fi
    get install --no-install-recommends "nvidia-driver-$branch-server$suffix" "nvidia-utils-$branch-server"
}

install_driver() {
    begin kernel
    update
    kernels=$(kernel_packages)
    [ -n "$kernels" ] || fail "this system follows its kernel by no package: give an image that does"
    # Together and of one version: a module is built for the kernel that boots, and needs its headers.
    get install --no-install-recommends $kernels $(echo "$kernels" | sed 's/^linux-image-/linux-headers-/')
    begin driver
    case $ID in
        debian) debian_driver ;;
        ubuntu) ubuntu_driver ;;
        *) fail "there is no driver to be had for $ID: use an image of Debian or Ubuntu, or --driver none" ;;
    esac
    begin driver-check
    kernel=$(newest_kernel)
    driver=$(driver_of "$kernel")
    [ -n "$driver" ] || fail "no module was built for the kernel $kernel"
    case "$DRIVER $driver." in
        "distro "*) ;;
        "$DRIVER $DRIVER."*) ;;
        *) fail "the driver $driver was installed, and $DRIVER was asked for" ;;
    esac
    command -v nvidia-smi
    systemctl enable nvidia-persistenced.service
    echo "fact driver $driver" >&3
    echo "fact modules $modules" >&3
}

install_toolkit() {
    begin container-toolkit
    update
    get install --no-install-recommends curl gpg ca-certificates
    place=https://nvidia.github.io/libnvidia-container
    keys=$(mktemp -d)
    curl -q --fail --silent --show-error --proto =https --location --max-time 120 --retry 3 --output "$keys/key" "$place/gpgkey"
    found=$(gpg --batch --homedir "$keys" --show-keys --with-colons "$keys/key" | awk -F: '$1 == "pub" { n = 1 } $1 == "fpr" && n { print $10; n = 0 }')
    # The key that signs the toolkit's repository, NVIDIA CORPORATION (Open Source Projects).
    [ "$found" = C95B321B61E88C1809C4F759DDCAE044F796ECB0 ] || fail "$place has another key than NVIDIA's: $found"
    gpg --batch --homedir "$keys" --dearmor --output /usr/share/keyrings/nvidia-container-toolkit.gpg "$keys/key"
    rm -rf "$keys"
    echo "deb [signed-by=/usr/share/keyrings/nvidia-container-toolkit.gpg] $place/stable/deb/amd64 /" \
        >/etc/apt/sources.list.d/nvidia-container-toolkit.list
    get update
    get install --no-install-recommends nvidia-container-toolkit
}

install_jupyter() {
    begin jupyter
    update
    get install --no-install-recommends python3-venv
    python3 -m venv /opt/jupyter
    # As PyPI has it now, checked by nobody: the help and the manual say so.
    /opt/jupyter/bin/pip install --disable-pip-version-check --no-cache-dir --no-input jupyterlab 3>&-
    # Renters publish port 8888, so it listens everywhere; the token is made by each instance for itself.
    cat >/etc/systemd/system/qudata-jupyter.service <<'UNIT'
[Unit]
Description=JupyterLab on port 8888, token in /etc/qudata/jupyter_token
After=network.target

[Service]
Environment=HOME=/root JUPYTER_TOKEN_FILE=/etc/qudata/jupyter_token
ExecStartPre=/bin/sh -c 'umask 077; mkdir -p /etc/qudata; [ -s /etc/qudata/jupyter_token ] || od -An -N24 -tx1 /dev/urandom | tr -d " \\n" >/etc/qudata/jupyter_token'
ExecStart=/opt/jupyter/bin/jupyter lab --ip=0.0.0.0 --port=8888 --no-browser --allow-root --ServerApp.root_dir=/root
Restart=on-failure

[Install]
WantedBy=multi-user.target
UNIT
    systemctl enable qudata-jupyter.service
}

# Driver and kernel belong together: neither may change under a renter's job.
hold() {
    begin hold
    installed 'linux-image*' 'linux-headers*' 'linux-modules*' 'linux-virtual*' 'linux-generic*' '*nvidia*' 'libcuda*' 2>/dev/null |
        awk '{ print $1 }' >/run/qudata-held
    [ -s /run/qudata-held ] || fail "no kernel package is installed"
    xargs apt-mark hold </run/qudata-held
    cat >/etc/apt/apt.conf.d/52qudata-hold <<'CONF'
Unattended-Upgrade::Package-Blacklist { "linux-"; "nvidia"; "libnvidia"; "libcuda"; "xserver-xorg-video-nvidia"; };
CONF
    mkdir -p /etc/needrestart/conf.d
    echo '$nrconf{restart} = "l";' >/etc/needrestart/conf.d/50-qudata.conf
}

# Whatever else happened in this machine, nothing is half installed, and the kernel that boots has its driver.
check_whole() {
    broken=$(dpkg --audit) || fail "packages are not whole: $broken"
    [ -z "$broken" ] || fail "packages are not whole: $broken"
    if [ "$DRIVER" != none ]; then
        kernel=$(newest_kernel)
        [ "$(driver_of "$kernel")" = "$driver" ] || fail "the kernel $kernel has no module of the driver $driver"
    fi
}

# What would make two instances the same machine, or tell of the builder.
clean() {
    begin clean
    check_whole
    get clean
    rm -rf /var/lib/apt/lists/*
    for unit in rsyslog.service syslog.socket; do
        if systemctl is-active --quiet "$unit"; then systemctl stop rsyslog.service syslog.socket; fi
    done
    journalctl --relinquish-var
    # Stopping it writes the file; what is removed afterwards is not written again at power-off.
    systemctl stop systemd-random-seed.service
    cloud-init clean --logs --seed
    rm -f /etc/netplan/50-cloud-init.yaml /etc/network/interfaces.d/50-cloud-init* \
        /etc/systemd/network/10-cloud-init-* /etc/ssh/sshd_config.d/50-cloud-init.conf /etc/sudoers.d/90-cloud-init-users
    rm -rf /var/lib/dhcp/* /var/lib/NetworkManager/* /var/lib/systemd/timers/* /root/.ssh /root/.cache /root/.gnupg
    rm -f /etc/ssh/ssh_host_* /var/lib/dbus/machine-id /var/lib/systemd/random-seed /var/lib/systemd/credential.secret
    rm -f /root/.*_history /home/*/.*_history /root/.wget-hsts /root/.lesshst
    rm -rf /var/log/journal/* /tmp/* /var/tmp/* /var/cache/apt/*.bin /var/crash/*
    find /var/log -type f -delete
    echo localhost >/etc/hostname
    : >/etc/machine-id
    fstrim /
}

report() {
    begin report
    echo "fact system $PRETTY_NAME" >&3
    echo "fact kernel $(newest_kernel)" >&3
    installed | awk '{ print "package", $1, $3 }' >&3
}

install_packages
if [ "$DRIVER" != none ]; then install_driver; fi
if [ "$TOOLKIT" = yes ]; then install_toolkit; fi
if [ "$JUPYTER" = yes ]; then install_jupyter; fi
hold
clean
report
sync
finished=yes
echo "done $NONCE" >&3
