# After kvmeter-agent is removed. Settings and samples stay until it is purged.
case "$action" in
  remove | purge | 0) ;;
  *) exit 0 ;;
esac
with_systemd systemctl daemon-reload
rm -rf /sys/fs/bpf/kvmeter # hooks that outlive the agent on purpose
[ "$action" = purge ] || exit 0
purge_unit kvmeter-agent
[ ! -L "/etc/kvmeter/keys.d/$(uname -n).key" ] || rm "/etc/kvmeter/keys.d/$(uname -n).key"
rm -rf /etc/kvmeter/agent.key /var/lib/kvmeter/agent /run/kvmeter/agent.sock /run/kvmeter/counters
purge_shared kvmeter-central
