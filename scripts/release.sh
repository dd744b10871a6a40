#!/usr/bin/env bash
# release.sh: makes dist/ whole: packages, what they are made of (SBOM), checksums.
# It fails where two builds give different bytes, where a module's licence is none
# that may be linked in, and where a vulnerability is known.
set -eu
cd "$(dirname "$0")/.."
GO=${GO:-go}
tool() { $GO tool -modfile=tools/release/go.mod "$@"; }
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT

rm -rf dist
packaging/build.sh dist
GOCACHE=$tmp/cache packaging/build.sh "$tmp/again"
diff -r dist "$tmp/again"
echo "Two builds gave the same bytes."

# The licences of modules that may be linked in; a BPF program's is its own.
licences='["Apache-2.0", "MIT", "BSD-2-Clause", "BSD-3-Clause", "BSD-Source-Code", "0BSD", "ISC", "MPL-2.0"]'
date=$(date -u -d "@$(git log -1 --format=%ct)" +%Y-%m-%dT%H:%M:%SZ)
for arch in amd64 arm64; do
  for program in kvmeter kvmeter-agent; do
    GOARCH=$arch CGO_ENABLED=0 $GO build -trimpath -ldflags='-s -w' -o "$tmp/$program" ./cmd/$program
    sbom=dist/$program.$arch.cdx.json
    tool cyclonedx-gomod bin -json -licenses -noserial -version "$($GO version -m "$tmp/$program" | awk '$1 == "mod" {print $3}')" \
      -output "$tmp/sbom" "$tmp/$program" 2>"$tmp/log" || { cat "$tmp/log" >&2; exit 1; }
    jq --arg date "$date" '.metadata.timestamp = $date' "$tmp/sbom" >"$sbom"
    bad=$(jq -r --argjson ok "$licences" '.components[]
      | [(.evidence.licenses // .licenses // [])[].license.id] as $ids
      | select($ids == [] or ($ids - $ok) != []) | "\(.name) \(.version): \($ids)"' "$sbom")
    [ -z "$bad" ] || { echo "$program: licences that nobody has allowed:"; echo "$bad"; exit 1; } >&2
  done
done
echo "The licences of all modules are among the allowed ones."

if tool govulncheck ./cmd/... >"$tmp/vulnerabilities" 2>&1; then
  echo "No known vulnerability."
elif grep -q 'fetching vulnerabilities' "$tmp/vulnerabilities"; then
  echo "NOT CHECKED for vulnerabilities: $(tail -1 "$tmp/vulnerabilities")" >&2
else
  cat "$tmp/vulnerabilities" >&2
  exit 1
fi

(cd dist && sha256sum -- * >"$tmp/SHA256SUMS" && mv "$tmp/SHA256SUMS" .)
ls -l dist
