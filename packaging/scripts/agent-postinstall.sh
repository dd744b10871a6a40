# After kvmeter-agent is unpacked: its user, this host's key, the service.
unit=kvmeter-agent.service
case "$action" in
  configure) first=$([ -n "$old" ] || echo yes) ;;
  [0-9]*) first=$([ "$action" -gt 1 ] || echo yes) ;;
  *) exit 0 ;;
esac
systemd-sysusers kvmeter-agent.conf
chgrp kvmeter /etc/kvmeter/keys.d
make_key /etc/kvmeter/agent.key
# A control plane on this host knows the agent by this.
[ -e "/etc/kvmeter/keys.d/$(uname -n).key" ] || ln -s ../agent.key "/etc/kvmeter/keys.d/$(uname -n).key"

# Enabled once; whoever disables it finds it so after an upgrade.
[ -z "$first" ] || systemctl enable $unit
with_systemd systemctl daemon-reload
with_systemd udevadm control --reload
with_systemd udevadm trigger --subsystem-match=ipmi
if command -v deb-systemd-invoke >/dev/null; then # obeys policy-rc.d
  with_systemd deb-systemd-invoke restart $unit
elif systemctl is-enabled --quiet $unit; then
  with_systemd systemctl restart $unit
fi
