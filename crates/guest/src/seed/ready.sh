# Tells the host over virtio-serial that sshd listens. Runs as qudata-ready.service.
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

exec 3<>/dev/virtio-ports/ru.qudata.ready
tries=0
while :; do
  until listens; do
    tries=$((tries + 1))
    if [ "$tries" -lt 1200 ]; then sleep 0.05; else sleep 1; fi
  done
  # Blocks while nobody is connected on the host: nothing is lost while the agent is away.
  echo "ready $boot" >&3 || exit 1
  # Until the host asks again (a line) or goes away (end of file).
  read -r _ <&3 || sleep 0.05
done
