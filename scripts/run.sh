#!/usr/bin/env bash
# run.sh: what `make run` does once everything is built: guests to look at if the
# host has none, `kvmeter up`, and `kvmeter top` in front. Ctrl-C or q ends all
# that it started. VMS=5 boots five guests, DEMO=0 none.
set -eu
bin=$PWD/bin
sudo=
if [ "$(id -u)" != 0 ]; then
  sudo=sudo
  echo "Reading other processes' accounting needs root, so sudo will ask for your password."
  sudo -v
fi
dir=$(mktemp -d /tmp/kvmeter-run-XXXXXX)
chmod 755 "$dir"
up=
lab=
finish() {
  trap - EXIT INT TERM
  [ -n "$up" ] && $sudo kill -TERM "$up" 2>/dev/null && wait "$up" 2>/dev/null
  [ -n "$lab" ] && echo "Ending the demo guests." && $sudo "$bin/lab" --dir "$lab" down >/dev/null
  $sudo rm -rf "$dir"
}
trap finish EXIT
trap 'exit 130' INT TERM

flags=(--state "$dir/state" --run "$dir/run")
if [ "$DEMO" != 0 ] && ! pgrep -f '^[^ ]*qemu[^ ]* .*-uuid ' >/dev/null; then
  echo "This host has no domain: booting $VMS demo guests under a libvirtd of their own (DEMO=0 leaves that out)."
  lab=$dir/lab
  mkdir "$lab"
  $sudo "$bin/lab" --dir "$lab" up --vms 0 >"$dir/lab.log" 2>&1 || { cat "$dir/lab.log" >&2; exit 1; }
  flags+=(--libvirt "$lab/run/libvirt-sock-ro")
fi

# Demo guests are there to be looked at, so their QEMUs may be asked often.
$sudo env ${lab:+KVMETER_AGENT__QEMU_INTERVAL=2s} "$bin/kvmeter" up "${flags[@]}" >"$dir/up.log" 2>&1 &
up=$!
for _ in $(seq 100); do
  "$bin/kvmeter" meter-list -l 1 >/dev/null 2>&1 && break
  kill -0 "$up" 2>/dev/null || { cat "$dir/up.log" >&2; exit 1; }
  sleep 0.1
done
if [ -n "$lab" ]; then
  $sudo "$bin/lab" --dir "$lab" up --vms "$VMS" --load "mix 30 100 200 0" >"$dir/lab.log" 2>&1 &
fi

cat <<TXT

kvmeter's API answers at http://127.0.0.1:8777. In another terminal, try:
  bin/kvmeter meter-list
  bin/kvmeter sample-list -m cpu -l 10
  bin/kvmeter statistics -m cpu -p 10

TXT
if [ -t 1 ]; then
  sleep 2
  $sudo "$bin/kvmeter" top --socket "$dir/run/agent.sock"
else
  $sudo "$bin/kvmeter" top --socket "$dir/run/agent.sock" -n "${SNAPSHOTS:-10}"
fi
