package compute

import (
	"fmt"
	"slices"
	"strings"

	"github.com/kvmeter/kvmeter/cmd/internal/oslo"
)

// untaken are options of a compute host that no setting stands for: why, and with
// which values they ask for nothing else than what the agent does.
var untaken = []struct {
	options  []string // the name, and older ones
	harmless []string
	why      string
}{
	{
		[]string{"compute.instance_discovery_method"},
		[]string{"libvirt_metadata"},
		"domains are found by the kernel and libvirt; Nova's API is not asked, so samples lack what only it knows: task state, availability zone, reservation, kernel and ramdisk",
	},
	{
		[]string{"compute.fetch_extra_metadata"},
		[]string{"false", "0", "off", "no"},
		"Nova's API is not asked for the metadata of servers; the setting user_metadata takes them from the domains' XML",
	},
	{[]string{"compute.resource_update_interval"}, []string{"0"}, "Nova's API is not asked; libvirt tells of each change"},
	{[]string{"compute.resource_cache_expiry"}, []string{"3600"}, "Nova's API is not asked; libvirt tells of each change"},
	{[]string{"compute.workload_partitioning"}, []string{"false", "0", "off", "no"}, "each agent meters its own host"},
	{[]string{"polling.partitioning_group_prefix", "central.partitioning_group_prefix"}, nil, "each agent meters its own host"},
	{[]string{"coordination.backend_url"}, []string{""}, "each agent meters its own host"},
	{
		[]string{"polling.heartbeat_socket_dir"},
		[]string{""},
		"there is no heartbeat socket; systemd's watchdog watches the polls, and the page of the setting metrics tells of them",
	},
	{
		[]string{"polling.identity_name_discovery", "polling.tenant_name_discovery"},
		[]string{"false", "0", "off", "no"},
		"Keystone is not asked; samples have the ids of users and projects, and no names",
	},
	{
		[]string{"polling.pollsters_definitions_dirs", "DEFAULT.pollsters_definitions_dirs"},
		[]string{"/etc/ceilometer/pollsters.d"},
		"the agent runs no dynamic pollsters; leave them to a ceilometer-polling beside it",
	},
	{[]string{"polling.threads_to_process_pollsters"}, []string{"1"}, "meters of one interval are read together, and nothing waits for a domain that hangs"},
	{[]string{"DEFAULT.shuffle_time_before_polling_task"}, []string{"0"}, "the setting spread spreads what is sent over the interval"},
	{[]string{"DEFAULT.pollster_list"}, []string{""}, "name the meters in polling.yaml"},
	{[]string{"publisher_notifier.telemetry_driver"}, []string{"messagingv2"}, "messages have the form of messagingv2"},
	{[]string{"oslo_messaging_notifications.retry"}, []string{"-1"}, "samples wait until the broker has taken them"},
	{[]string{"ipmi.polling_retry"}, []string{"3"}, "a BMC that does not answer is asked again at the next poll, however often"},
	{[]string{"ipmi.node_manager_init_retry"}, []string{"3"}, "a BMC that does not answer is asked again at the next poll, however often"},
}

// notes says what the agent does otherwise than the files ask. Values stay out of it:
// some hold passwords.
func notes(conf *oslo.Config) (all []string) {
	for _, o := range untaken {
		v, ok := conf.Text(o.options...)
		if ok && !slices.Contains(o.harmless, strings.ToLower(strings.TrimSpace(v.Text))) {
			all = append(all, fmt.Sprintf("%s has no effect: %s", v.String(), o.why))
		}
	}
	return all
}
