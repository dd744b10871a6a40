#!/usr/bin/env bash
# go-version.sh GO: says how to get a Go that is new enough, unless GO is one.
set -eu
have=$("$1" env GOVERSION 2>/dev/null || echo none)
minor=$(sed -nE 's/^go1\.([0-9]+).*/\1/p' <<<"$have")
[ "${minor:-0}" -ge 26 ] && exit 0
cat >&2 <<TXT
kvmeter needs Go 1.26 or newer; found: $have.
Get it from https://go.dev/dl/ (unpack to /usr/local and put /usr/local/go/bin into PATH), or where
an older Go is installed: go install golang.org/dl/go1.26.0@latest && go1.26.0 download && make GO=go1.26.0
TXT
exit 1
