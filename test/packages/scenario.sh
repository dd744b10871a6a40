#!/bin/bash
# What a host's operator does with the packages, in the folder of this script: 1/*.deb,
# and 2/*.deb, which are newer, by install.md. It runs in a root of Debian, and where systemd has
# booted it tries the services as well. It prints "@@ ok" at the end.
set -eu
cd "$(dirname "$0")"
export DEBIAN_FRONTEND=noninteractive
booted() { [ -d /run/systemd/system ]; }
say() { echo "@@ $*"; }
fail() {
  say "FAIL: $*"
  ! booted || journalctl --no-pager -n 60 -u 'kvmeter*'
  exit 1
}
install() { apt-get install -qq -y --no-install-recommends -o Dpkg::Use-Pty=0 "$@"; }
# What a package could leave, but for the backups of passwd and group.
files() {
  find /etc /usr /opt /srv -xdev | grep -v '^/etc/[a-z]*-$' | sort
  ls -d /var/lib/*kvmeter* /var/log/*kvmeter* /var/cache/*kvmeter* /run/*kvmeter* /sys/fs/bpf/kvmeter 2>/dev/null || :
  getent passwd
  getent group
}
# retry CMD... until it succeeds, for five minutes.
retry() {
  local end=$(($(date +%s) + 300))
  until "$@"; do
    [ "$(date +%s)" -lt "$end" ] || fail "in time it never was so: $*"
    sleep 1
  done
}
sampled() { kvmeter sample-list -m cpu -l 1 -f value 2>/dev/null | grep -q .; }
spooled() { [ "$(find /var/lib/kvmeter/agent/spool -type f -size +0 | wc -l)" -gt 0 ]; }
active() { systemctl is-active --quiet "$1"; }
# dropped UNIT checks that a service has no capability, but CAP_NET_ADMIN on kernels
# without TCX, and tells what it takes.
dropped() {
  local pid has may=0000000000000000
  pid=$(systemctl show -P MainPID "$1")
  has=$(awk '/^CapPrm/{print $2}' "/proc/$pid/status")
  [ "$(printf '6.6\n%s\n' "$(uname -r)" | sort -V | head -1)" = 6.6 ] || may=0000000000001000
  [ "$has" = 0000000000000000 ] || [ "$has" = $may ] || fail "$1 keeps the capabilities $has"
  say "$1: $(awk '/^VmRSS/{print $2 / 1024}' "/proc/$pid/status") MiB; $(systemd-analyze security --no-pager "$1" | tail -1)"
}

files >before
! grep -i kvmeter before || fail "something of kvmeter is there before the packages are"

if booted; then
  qemu-system-x86_64 -name guest=instance-00000001 -uuid 492fec16-0000-4000-8000-000000000001 -m 16 -display none -S -daemonize
  start=$(cut -d. -f1 /proc/uptime)
  # The first commands of the page, as they are there.
  awk '/^```/{n++; next} n == 1' install.md >commands
  [ "$(wc -l <commands)" = 2 ] || fail "there are not two commands: $(cat commands)"
  (cd 1 && bash -eu ../commands)
  retry sampled
  say "from the package to the first sample: $(($(cut -d. -f1 /proc/uptime) - start)) s"
  dropped kvmeter-up
else
  install ./1/kvmeter_*.deb
fi

install ./1/kvmeter-agent_*.deb
[ "$(stat -c '%a %U %G' /etc/kvmeter/agent.key)" = "640 root kvmeter" ] || fail "$(ls -l /etc/kvmeter/agent.key)"
[ "$(wc -c </etc/kvmeter/agent.key)" = 64 ] || fail "a key of $(wc -c </etc/kvmeter/agent.key) bytes"
cmp -s /etc/kvmeter/agent.key /etc/kvmeter/keys.d/notifier-1.key && fail "agent and notifier have one key"
kvmeter-agent --config /etc/kvmeter/agent.yaml --check-config >/dev/null
for part in notifier central; do
  env -u HOME setpriv --reuid kvmeter-$part --regid kvmeter --clear-groups kvmeter $part --config /etc/kvmeter/$part.yaml --check-config >/dev/null
done
kvmeter up --config /etc/kvmeter/up.yaml --check-config >/dev/null
systemctl is-enabled --quiet kvmeter-agent
for page in kvmeter kvmeter-up kvmeter-agent kvmeter-agent-doctor; do
  gzip -t /usr/share/man/man1/$page.1.gz
done
bash -n /usr/share/bash-completion/completions/kvmeter
if booted; then
  retry active kvmeter-agent
  ! active kvmeter-up || fail "kvmeter-up runs beside the agent"
  retry spooled
  dropped kvmeter-agent
  pid=$(systemctl show -P MainPID kvmeter-agent)
  [ "$(stat -c %G /run/kvmeter/agent.sock)" = kvmeter ] || fail "$(ls -l /run/kvmeter/agent.sock)"
fi

say "upgrade"
echo '# of this host' | tee -a /etc/kvmeter/agent.yaml /etc/kvmeter/central.yaml >/dev/null
echo kept >/etc/kvmeter/keys.d/other.key
key=$(cat /etc/kvmeter/agent.key)
install ./2/*.deb
[ "$(cat /etc/kvmeter/agent.key)" = "$key" ] || fail "the upgrade made another key"
[ "$(cat /etc/kvmeter/agent.yaml /etc/kvmeter/central.yaml | grep -c '^# of this host')" = 2 ] || fail "the upgrade changed the configuration"
if booted; then
  retry active kvmeter-agent
  [ "$(systemctl show -P MainPID kvmeter-agent)" != "$pid" ] || fail "the upgrade did not restart the agent"
  spooled || fail "the upgrade lost the spool"
  systemctl start kvmeter-up
  ! active kvmeter-agent || fail "the agent runs beside kvmeter-up"
  retry sampled
fi

say "remove, and install again"
apt-get remove -qq -y kvmeter kvmeter-agent
[ "$(cat /etc/kvmeter/agent.key)" = "$key" ] || fail "the removal took the key"
grep -q '^# of this host' /etc/kvmeter/agent.yaml || fail "the removal took the configuration"
! booted || [ -d /var/lib/kvmeter/up/store ] || fail "the removal took the store"
install ./2/*.deb
if booted; then
  retry active kvmeter-agent
fi

say "purge"
apt-get purge -qq -y kvmeter kvmeter-agent
files >after
diff before after || fail "the purge left something"
say ok
