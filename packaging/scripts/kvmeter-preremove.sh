# Before kvmeter is removed; an upgrade restarts what runs afterwards.
case "$action" in
  remove | 0) stop_units kvmeter-up.service kvmeter-notifier.service kvmeter-central.service ;;
esac
