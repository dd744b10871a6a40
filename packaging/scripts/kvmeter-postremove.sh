# After kvmeter is removed. Settings and samples stay until it is purged.
case "$action" in
  remove | purge | 0) ;;
  *) exit 0 ;;
esac
with_systemd systemctl daemon-reload
[ "$action" = purge ] || exit 0
for unit in kvmeter-up kvmeter-notifier kvmeter-central; do
  purge_unit $unit
done
rm -rf /etc/kvmeter/keys.d/notifier-1.key /var/lib/kvmeter/up /var/lib/kvmeter/notifier /var/lib/kvmeter/store /run/kvmeter/up
purge_shared kvmeter-agent
