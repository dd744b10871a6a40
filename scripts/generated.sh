#!/usr/bin/env bash
# generated.sh: fails when `make generate` would change a generated file.
set -eu
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
cp -a gen "$out/gen"
mkdir -p docs && cp -a docs "$out/docs"
go generate ./...
status=0
diff -r "$out/gen" gen >&2 || status=1
diff -r "$out/docs" docs >&2 || status=1
[ $status -eq 0 ] || echo "Generated files were stale; they are fresh now. Commit them." >&2
exit $status
