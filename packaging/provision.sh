#!/bin/bash
# provision.sh central|compute [NODE...]: makes a host of Debian one of a lab, from the
# packages in the folder KVMETER_PACKAGES. On central NODEs are the compute hosts whose
# samples it takes. All hosts are given the same KVMETER_SECRET, of which keys and the
# broker's password are made, and the address KVMETER_CENTRAL. It may be run again.
set -eu
role=$1
shift
export DEBIAN_FRONTEND=noninteractive
install_packages() {
  apt-get install -qq -y --no-install-recommends -o Dpkg::Use-Pty=0 "$@" >/dev/null
}
# of NAME is what the lab's secret gives for it.
of() { printf '%s %s' "$KVMETER_SECRET" "$1" | sha256sum | cut -c1-64; }
# key NAME FILE writes a node's key where the services read it.
key() { of "$1" | install -m 640 -g kvmeter /dev/stdin "$2"; }
package() { ls "$KVMETER_PACKAGES/$1"_*_"$(dpkg --print-architecture)".deb; }

apt-get update -qq
install -d /etc/kvmeter
echo "KVMETER_AMQP__URL=amqp://kvmeter:$(of broker)@$KVMETER_CENTRAL:5672/kvmeter" | install -m 600 /dev/stdin /etc/kvmeter/amqp.env

case $role in
  central)
    install_packages rabbitmq-server "$(package kvmeter)"
    rabbitmqctl -q list_vhosts | grep -qx kvmeter || rabbitmqctl -q add_vhost kvmeter
    rabbitmqctl -q list_users | grep -q '^kvmeter\b' || rabbitmqctl -q add_user kvmeter "$(of broker)"
    rabbitmqctl -q set_permissions -p kvmeter kvmeter '^kvmeter' '^kvmeter' '^kvmeter'
    for node in "$@"; do
      key "$node" "/etc/kvmeter/keys.d/$node.key"
    done
    systemctl enable --now kvmeter-central kvmeter-notifier
    ;;
  compute)
    install_packages libvirt-daemon-system qemu-system-x86 "$(package kvmeter)" "$(package kvmeter-agent)"
    key "$(uname -n)" /etc/kvmeter/agent.key
    systemctl restart kvmeter-agent
    # Guests that loop in their firmware, for want of a disk: load enough to be seen.
    for n in 1 2; do
      virsh -q dominfo "guest-$n" >/dev/null 2>&1 || virsh -q define /dev/stdin <<XML
<domain type="$([ -w /dev/kvm ] && echo kvm || echo qemu)">
  <name>guest-$n</name>
  <memory unit="MiB">64</memory>
  <os><type arch="x86_64">hvm</type></os>
</domain>
XML
      virsh -q domstate "guest-$n" | grep -q running || virsh -q start "guest-$n"
    done
    ;;
  *)
    echo "provision.sh: $role: it is central or compute" >&2
    exit 1
    ;;
esac
