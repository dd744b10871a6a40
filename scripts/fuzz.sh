#!/usr/bin/env bash
# fuzz.sh GO TIME: runs every fuzz test for TIME, of which little goes into making
# inputs smaller that reach something new.
set -eu
go=$1 time=$2
for f in $(grep -rlE --include='*_test.go' '^func Fuzz' .); do
  head -3 "$f" | grep -q 'go:build lab' && continue
  for name in $(grep -oE '^func Fuzz\w+' "$f" | cut -c6-); do
    echo "== $(dirname "$f") $name"
    "$go" test -run '^$' -fuzz "^$name\$" -fuzztime "$time" -fuzzminimizetime 5x "$(dirname "$f")"
  done
done
