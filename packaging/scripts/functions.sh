#!/bin/sh
set -e

# dpkg calls postinst configure [OLD], prerm and postrm remove|upgrade|purge...; rpm
# calls each with how many of the package are installed afterwards.

# make_key FILE makes a secret that only root and the group kvmeter read, once.
make_key() {
  [ ! -e "$1" ] || return 0
  secret=$(od -An -N32 -tx1 /dev/urandom)
  (umask 077 && echo "$secret" | tr -d ' \n' >"$1.new")
  chgrp kvmeter "$1.new"
  chmod 640 "$1.new"
  mv "$1.new" "$1"
}

# with_systemd CMD... runs it where systemd does; that it fails is told, and no reason
# to leave the package half installed.
with_systemd() {
  [ ! -d /run/systemd/system ] || "$@" || :
}

# stop_units UNIT... before the package is removed. rpm disables them as well; dpkg
# leaves that to the purge, so that one installed again is as it was.
stop_units() {
  [ "$action" = remove ] || systemctl disable "$@" || :
  with_systemd systemctl stop "$@"
}

# purge_unit NAME removes what a service leaves, and its user.
purge_unit() {
  rm -f "/etc/systemd/system/multi-user.target.wants/$1.service"
  rm -rf "/etc/systemd/system/$1.service.d"
  ! getent passwd "$1" >/dev/null || userdel "$1"
}

# purge_shared removes what both packages have, unless the other's user is still there.
purge_shared() {
  ! getent passwd "$1" >/dev/null || return 0
  rm -rf /etc/kvmeter /var/lib/kvmeter /run/kvmeter
  ! getent group kvmeter >/dev/null || groupdel kvmeter
}

action=$1
old=$2
