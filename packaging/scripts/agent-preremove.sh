# Before kvmeter-agent is removed; an upgrade restarts it afterwards.
case "$action" in
  remove | 0) stop_units kvmeter-agent.service ;;
esac
