# After kvmeter is unpacked: its users, the notifier's key. Which of its services a
# host runs is its operator's choice; those that run are restarted.
case "$action" in
  configure | [0-9]*) ;;
  *) exit 0 ;;
esac
systemd-sysusers kvmeter.conf
chgrp kvmeter /etc/kvmeter/keys.d
make_key /etc/kvmeter/keys.d/notifier-1.key
with_systemd systemctl daemon-reload
# Central first, which reads what the others send.
with_systemd systemctl try-restart kvmeter-central.service kvmeter-notifier.service kvmeter-up.service
