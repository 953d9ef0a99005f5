# Tells the host over virtio-serial that sshd listens. Runs as qudata-ready.service, beside sshd's own start.
# systemd expands percent signs, doubled dollars and braced variables: none may stand here.
read -r boot </proc/sys/kernel/random/boot_id

# A socket in state 0A (LISTEN) on port 0016 (22).
listens() {
  for table in /proc/net/tcp /proc/net/tcp6; do
    [ -r "$table" ] || continue
    while read -r _ local _ state _; do
      case "$local $state" in *:0016\ 0A) return 0 ;; esac
    done <"$table"
  done
  return 1
}

# Waits without starting a process, where the shell can: the guest has one CPU for all of its boot, perhaps emulated.
tick=/run/qudata-ready/tick
[ -p "$tick" ] || mkfifo "$tick" 2>/dev/null
exec 4<>"$tick" || exit 1
pause() {
  if [ -n "$BASH_VERSION" ]; then read -r -t "$1" -u 4 _; else sleep "$1"; fi
}

# sshd's own start and the first login come before the rest of the boot.
for unit in ssh.service sshd.service; do
  systemctl --no-block --runtime set-property "$unit" CPUWeight=10000 2>/dev/null
done
# "Ready" also means durable: a reset right after it must not find the keys that cloud-init has just written still in
# the page cache, for cloud-init writes them once per instance and sshd would never start again.
sync -f / || sync

exec 3<>/dev/virtio-ports/ru.qudata.ready
tries=0
while :; do
  until listens; do
    tries=$((tries + 1))
    if [ "$tries" -lt 1200 ]; then pause 0.05; else pause 1; fi
  done
  # Blocks while nobody is connected on the host: nothing is lost while the agent is away.
  echo "ready $boot" >&3 || exit 1
  # Until the host asks again (a line) or goes away (end of file).
  read -r _ <&3 || pause 0.05
done
