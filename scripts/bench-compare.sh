#!/usr/bin/env bash
# bench-compare.sh GO REF: runs the benchmarks of REF and of the working tree
# ten times in turn and compares them by benchstat.
set -eu
go=$1 ref=$2
old=$(mktemp -d)
trap 'git worktree remove --force "$old/tree"; rm -rf "$old"' EXIT
git worktree add -q --detach "$old/tree" "$ref"
for _ in $(seq 10); do
  (cd "$old/tree" && "$go" test -run '^$' -bench . -benchmem -benchtime 200ms ./sample ./bus ./notifier/... ./agent) >>"$old/old.txt" || true
  "$go" test -run '^$' -bench . -benchmem -benchtime 200ms ./sample ./bus ./notifier/... ./agent >>"$old/new.txt"
done
"$go" tool -modfile=tools/go.mod benchstat "$old/old.txt" "$old/new.txt"
