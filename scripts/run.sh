#!/usr/bin/env bash
# run.sh: what `make run` does once everything is built: guests to look at if the
# host has none, `kvmeter up`, and `kvmeter top` in front. Ctrl-C or q ends all
# that it started. VMS=5 boots five guests, DEMO=0 none; API=127.0.0.1:8778 is
# for hosts where port 8777 is taken.
set -eu
if [ "$(id -u)" != 0 ]; then
  command -v sudo >/dev/null || { echo "Reading other processes' accounting needs root: please run \`make run\` as root." >&2; exit 1; }
  echo "Reading other processes' accounting needs root, so sudo may ask for your password."
  exec sudo env VMS="${VMS:-2}" DEMO="${DEMO:-1}" API="${API:-}" SNAPSHOTS="${SNAPSHOTS:-10}" PACKAGES="${PACKAGES:-}" bash "$0"
fi
case ${VMS:=2} in '' | *[!0-9]*) echo "VMS=$VMS: it is a number of guests" >&2; exit 1 ;; esac
bin=$PWD/bin
listen=${API:-127.0.0.1:8777}
api=http://$listen
unset "${!KVMETER_@}" # the user's own are about something else
dir=$(mktemp -d /tmp/kvmeter-run-XXXXXX)
chmod 755 "$dir"
up= lab= boot= top=

# finish ends all that runs, and is not interrupted: a second Ctrl-C must leave
# nothing behind.
finish() {
  trap '' INT TERM HUP
  trap - EXIT
  set +e
  [ -n "$top" ] && kill "$top" 2>/dev/null
  if [ -n "$boot" ] && ! kill "$boot" 2>/dev/null && ! wait "$boot"; then
    tail -3 "$dir/lab.log" >&2
  fi
  if [ -n "$up" ] && ! kill "$up" 2>/dev/null && ! wait "$up"; then
    tail -3 "$dir/up.log" >&2
    grep -q 'the API cannot listen' "$dir/up.log" && echo "Another port: make run API=127.0.0.1:8778" >&2
  fi
  wait
  if [ -n "$lab" ]; then
    echo "Ending the demo guests."
    "$bin/lab" --dir "$lab" down >"$dir/lab.log" 2>&1 || cat "$dir/lab.log" >&2
  fi
  rm -rf "$dir"
}
trap finish EXIT
trap 'exit 130' INT TERM HUP

# domains tells whether the host has any, by what the agent finds.
domains() {
  [ -n "$(KVMETER_LIBVIRT=off KVMETER_IPMI__DEVICE='' "$bin/kvmeter-agent" --dry-run -f json --without-bpf --config /dev/null 2>/dev/null | head -c 1)" ]
}

flags=(--config /dev/null --state "$dir/state" --run "$dir/run")
if [ "${DEMO:-1}" != 0 ] && ! domains; then
  # shellcheck disable=SC2086 # a list of words
  scripts/packages.sh "the demo guests" ${PACKAGES:-}
  echo "This host has no domain: booting $VMS demo guests under a libvirtd of their own (DEMO=0 leaves that out)."
  lab=$dir/lab
  mkdir "$lab"
  "$bin/lab" --dir "$lab" up --vms 0 >"$dir/lab.log" 2>&1 || { cat "$dir/lab.log" >&2; exit 1; }
  flags+=(--libvirt "$lab/run/libvirt-sock-ro")
  # These are there to be looked at, so their QEMUs may be asked often.
  export KVMETER_AGENT__QEMU_INTERVAL=2s
fi

KVMETER_API__LISTEN=$listen "$bin/kvmeter" up "${flags[@]}" >"$dir/up.log" 2>&1 &
up=$!
for ((tries = 0; ; tries++)); do
  kill -0 "$up" 2>/dev/null || exit 1 # finish shows why
  [ -S "$dir/run/agent.sock" ] && "$bin/kvmeter" meter-list -l 1 --endpoint $api >/dev/null 2>&1 && break
  [ $tries -lt 200 ] || { echo "kvmeter up does not answer:" >&2; tail "$dir/up.log" >&2; exit 1; }
  sleep 0.1
done
if [ -n "$lab" ]; then
  "$bin/lab" --dir "$lab" up --vms "$VMS" --load "mix 30 100 200 0" >"$dir/lab.log" 2>&1 &
  boot=$!
fi

cat <<TXT

kvmeter's API answers at $api. In another terminal, try:
${API:+  export KVMETER_ENDPOINT=$api
}  bin/kvmeter meter-list
  bin/kvmeter sample-list -m cpu -l 10
  bin/kvmeter statistics -m cpu -p 10

TXT
if [ -t 1 ]; then
  sleep 2
  "$bin/kvmeter" top --socket "$dir/run/agent.sock"
else
  "$bin/kvmeter" top --socket "$dir/run/agent.sock" -n "${SNAPSHOTS:-10}" &
  top=$!
  wait "$top"
  top=
fi
