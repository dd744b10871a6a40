#!/usr/bin/env bash
# bench-table.sh: prints what `go test -bench` writes as a table, a row for each
# benchmark. Its exit code is 1 if one failed.
set -eu
awk '
/^Benchmark/ {
  name = $1
  sub(/^Benchmark(Cost)?/, "", name); sub(/-[0-9]+$/, "", name)
  row = ""
  for (i = 3; i < NF; i += 2) {
    if ($(i + 1) == "ns/op" && NF > 4) continue # of a benchmark that reports more
    row = row (row == "" ? "" : ", ") $i " " $(i + 1)
  }
  rows[++n] = "| " name " | " row " |"
  next
}
/FAIL|panic:/ { bad = 1 }
/^(---|    |panic|FAIL)/ { print > "/dev/stderr" }
END {
  print "| what | measured |"
  print "|---|---|"
  for (i = 1; i <= n; i++) print rows[i]
  exit bad || !n
}'
