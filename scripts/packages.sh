#!/usr/bin/env bash
# packages.sh WHAT-FOR PACKAGE...: installs the Debian packages that are missing.
# Their services are neither started nor enabled: a policy-rc.d forbids it for
# the duration, and what systemd was told to start at boot is taken back.
set -eu
what=$1
shift
missing=()
for p in "$@"; do
  dpkg-query -W -f '${Status}' "$p" 2>/dev/null | grep -q '^install ok installed$' || missing+=("$p")
done
[ ${#missing[@]} -eq 0 ] && exit 0
if ! command -v apt-get >/dev/null; then
  echo "Please install what $what need: ${missing[*]} (no apt-get here to do it)." >&2
  exit 1
fi
sudo=
if [ "$(id -u)" != 0 ]; then
  command -v sudo >/dev/null || { echo "Please install as root what $what need: apt-get install ${missing[*]}" >&2; exit 1; }
  sudo=sudo
fi
echo "Installing what $what need, without starting any service: ${missing[*]}"

policy=/usr/sbin/policy-rc.d
saved=$(mktemp -d)
units() { find /etc/systemd/system -type l 2>/dev/null | sort; }
restore() {
  if [ -e "$saved/policy-rc.d" ]; then $sudo cp -p "$saved/policy-rc.d" $policy; else $sudo rm -f $policy; fi
  units | comm -13 "$saved/units" - | while read -r link; do $sudo rm -f "$link"; done
  rm -rf "$saved"
}
units >"$saved/units"
[ -e $policy ] && cp -p $policy "$saved/policy-rc.d"
trap restore EXIT
trap 'exit 130' INT TERM HUP
printf '#!/bin/sh\nexit 101\n' | $sudo tee $policy >/dev/null
$sudo chmod 755 $policy
log=$saved/apt.log
# A repository that cannot be reached may not be needed, and another apt-get may
# hold the lock for a while.
if ! { $sudo apt-get update -qq || true
  $sudo env DEBIAN_FRONTEND=noninteractive NEEDRESTART_SUSPEND=1 apt-get install -qq -y --no-install-recommends \
    -o DPkg::Lock::Timeout=120 "${missing[@]}"; } >"$log" 2>&1; then
  tail -20 "$log" >&2
  echo "apt-get could not install ${missing[*]}; once they are installed by other means, this goes on." >&2
  exit 1
fi
