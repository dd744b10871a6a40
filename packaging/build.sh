#!/usr/bin/env bash
# build.sh FOLDER [ARCH...]: builds the deb and rpm packages of both programs into
# FOLDER, for amd64 and arm64 unless told otherwise. The same commit gives the same
# bytes: dates are the commit's. VERSION, FORMATS and COMPRESSION (of the debs) may be
# set in the environment.
set -eu
cd "$(dirname "$0")/.."
out=$1
shift
[ $# -gt 0 ] || set -- amd64 arm64
GO=${GO:-go}
export CGO_ENABLED=0 SOURCE_DATE_EPOCH
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}
DATE=$(date -u -d "@$SOURCE_DATE_EPOCH" +%Y-%m-%dT%H:%M:%SZ)
# A tag vX.Y.Z is that version; any other commit is older than every version.
VERSION=${VERSION:-$(git describe --exact-match --match 'v[0-9]*' 2>/dev/null | cut -c2- || true)}
VERSION=${VERSION:-0~$(date -u -d "@$SOURCE_DATE_EPOCH" +%Y%m%d%H%M%S).$(git rev-parse --short=10 HEAD)}
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
mkdir -p "$out"

nfpm=$tmp/nfpm
$GO build -modfile=tools/release/go.mod -o "$nfpm" github.com/goreleaser/nfpm/v2/cmd/nfpm
for program in kvmeter kvmeter-agent; do
  $GO build -tags manual -o "$tmp/manual" ./cmd/$program
  "$tmp/manual" "$tmp/share-$program"
  gzip -9n "$tmp/share-$program"/man/man1/*
  for script in packaging/scripts/"${program#kvmeter-}"-*.sh; do
    cat packaging/scripts/functions.sh "$script" >"$tmp/$(basename "$script")"
  done
done
for arch in "$@"; do
  GOARCH=$arch $GO build -trimpath -ldflags='-s -w' -o "$tmp/$arch/" ./cmd/kvmeter ./cmd/kvmeter-agent
  find "$tmp" -exec touch -h -d "$DATE" {} +
  for program in kvmeter kvmeter-agent; do
    # nfpm itself expands variables in few fields, and paths are not among them.
    sed -e "s|@STAGE@|$tmp|; s|@DATE@|$DATE|; s|@ARCH@|$arch|; s|@VERSION@|$VERSION|; s|@COMPRESSION@|${COMPRESSION:-xz}|" \
      packaging/nfpm/$program.yaml >"$tmp/nfpm.yaml"
    for format in ${FORMATS:-deb rpm}; do
      "$nfpm" package --config "$tmp/nfpm.yaml" --packager "$format" --target "$out/" >/dev/null
    done
  done
done
