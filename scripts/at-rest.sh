#!/usr/bin/env bash
# at-rest.sh GO MINUTES: what an agent's samples take in the store. Six guests run
# under load with an agent that reaches no broker, so that all is in its spool
# after MINUTES; BenchmarkAtRest makes a day of that and stores it.
set -eu
go=$1 minutes=$2
dir=$(mktemp -d /tmp/kvmeter-at-rest-XXXXXX)
chmod 755 "$dir"
mkdir "$dir/lab"
agent=
finish() {
  trap - EXIT
  [ -z "$agent" ] || kill "$agent" 2>/dev/null || true
  wait
  bin/lab --dir "$dir/lab" down >/dev/null 2>&1 || true
  rm -rf "$dir"
}
trap finish EXIT
trap 'exit 130' INT TERM HUP

bin/lab --dir "$dir/lab" up --vms 4 --kvm 2 >"$dir/log" 2>&1 || { cat "$dir/log" >&2; exit 1; }
guest() { bin/lab --dir "$dir/lab" exec "$@" >/dev/null; }
guest 1 -- bg mix 2 6 20 0
guest 2 -- bg mix 5 2 5 0
guest 3 -- bg mix 0 1 2 0
cat >"$dir/agent.yaml" <<TXT
node: compute-1
libvirt: $dir/lab/run/libvirt-sock-ro
socket: ""
counters: ""
pins: ""
ipmi: {device: ""}
spool: {path: $dir/spool}
amqp: {url: "amqp://127.0.0.1:1/"}
TXT
bin/kvmeter-agent --config "$dir/agent.yaml" --log-level error &
agent=$!
end=$((SECONDS + 60 * minutes))
while [ $SECONDS -lt $end ]; do # the fourth guest is busy now and then
  guest 4 -- bg mix $((RANDOM % 15)) $((RANDOM % 30)) $((RANDOM % 60)) 40
  sleep $((10 + RANDOM % 50))
  kill -0 "$agent"
done
kill "$agent"
wait "$agent" || true
agent=
KVMETER_BENCH_SPOOL=$dir/spool "$go" test -run '^$' -bench AtRest -benchtime 1x ./central/store/local
