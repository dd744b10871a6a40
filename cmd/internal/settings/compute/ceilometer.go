package compute

import (
	"fmt"
	"net/url"
	"path/filepath"
	"slices"

	"github.com/kvmeter/kvmeter/cmd/internal/config"
	"github.com/kvmeter/kvmeter/cmd/internal/oslo"
)

// Inherit implements [config.Heir]: what ceilometer.conf says of a compute host.
func (a *Agent) Inherit(set config.Origins) ([]config.Inherited, error) {
	var all []config.Inherited
	if a.Wire == Ceilometer {
		all = append(all, config.Inherited{Key: "cpu_definition", Value: Ceilometer, From: "wire: ceilometer"})
	}
	if len(a.CeilometerConf) == 0 {
		return all, nil
	}
	conf, err := oslo.Read(a.CeilometerConf...)
	if err != nil {
		return nil, fmt.Errorf("ceilometer_conf: %w", err)
	}
	conf.Default("DEFAULT.host", a.Node)
	conf.Default("DEFAULT.state_path", "/var/lib/ceilometer")
	take := func(key string, value any, from oslo.Value) {
		all = append(all, config.Inherited{Key: key, Value: value, From: from.String()})
	}
	texts := func(key string, options ...string) {
		if v, ok := conf.Text(options...); ok {
			take(key, v.Text, v)
		}
	}
	texts("node", "DEFAULT.host")
	texts("source", "DEFAULT.sample_source")
	for _, key := range []string{"reserved_metadata_namespace", "reserved_metadata_keys"} {
		if list, v, ok := conf.List("DEFAULT." + key); ok {
			take(key, list, v)
		}
	}
	if n, v, ok, err := conf.Int("DEFAULT.reserved_metadata_length"); err != nil {
		return nil, err
	} else if ok {
		take("reserved_metadata_length", n, v)
	}
	if on, v, ok, err := conf.Bool("compute.report_stopped_instance_metrics"); err != nil {
		return nil, err
	} else if ok {
		take("stopped_domains", on, v)
	}
	if err := a.inheritNamespaces(conf, take); err != nil {
		return nil, err
	}
	transport, ok, err := conf.Transport()
	if err != nil {
		return nil, err
	}
	if v, old := conf.Text("oslo_messaging_rabbit.rabbit_hosts", "oslo_messaging_rabbit.rabbit_host", "DEFAULT.rabbit_hosts", "DEFAULT.rabbit_host"); old && !ok {
		a.note("%s has no effect: write transport_url = rabbit://USER:PASSWORD@%s/", v.String(), v.Text)
	}
	if ok {
		take("amqp.url", transport.URLs[0], transport.From)
		if len(transport.URLs) > 1 && set["amqp.url"] == "" {
			take("amqp.urls", transport.URLs, transport.From)
		}
		for key, v := range map[string]oslo.Value{"amqp.tls_ca": transport.CA, "amqp.tls_cert": transport.Cert, "amqp.tls_key": transport.Key} {
			if v.Text != "" {
				take(key, v.Text, v)
			}
		}
	}
	if err := a.inheritWire(conf, set, take); err != nil {
		return nil, err
	}
	if err := inheritExporter(conf, take); err != nil {
		return nil, err
	}
	if sockets, from, err := libvirtSockets(conf); err != nil {
		return nil, err
	} else if sockets != nil {
		take("libvirt", sockets, from)
	}
	switch path, from, err := pollingFile(conf, a.CeilometerConf[len(a.CeilometerConf)-1]); {
	case err != nil:
		return nil, err
	case path != "":
		all = append(all, config.Inherited{Key: "polling", Value: path, From: from})
	case set["polling"] == "" && set["interval"] == "":
		a.note("there is no polling.yaml beside %s, so every meter is polled every %s; Ceilometer polls twelve of them every 300s then: set polling or interval", a.CeilometerConf[len(a.CeilometerConf)-1], a.Interval)
	}
	a.Notes = append(a.Notes, notes(conf)...)
	return all, nil
}

// note notes what the agent does otherwise than the files ask.
func (a *Agent) note(format string, args ...any) {
	a.Notes = append(a.Notes, fmt.Sprintf(format, args...))
}

// inheritNamespaces takes what is polled at all.
func (a *Agent) inheritNamespaces(conf *oslo.Config, take func(string, any, oslo.Value)) error {
	if v, ok := conf.Text("DEFAULT.hypervisor_inspector"); ok && v.Text != "libvirt" {
		return fmt.Errorf("%s: %q is not supported: libvirt is", v.String(), v.Text)
	}
	namespaces, v, ok := conf.List("DEFAULT.polling_namespaces")
	if !ok {
		return nil
	}
	for _, name := range namespaces {
		if name != "compute" && name != "ipmi" {
			a.note("%s: this agent does not poll the namespace %s; leave it to a ceilometer-polling beside it", v.String(), name)
		}
	}
	if !slices.Contains(namespaces, "ipmi") {
		take("ipmi.device", "", v)
	}
	if !slices.Contains(namespaces, "compute") {
		a.note("%s: domains are metered although compute is not listed; leave their meters out of polling.yaml", v.String())
	}
	return nil
}

// inheritWire takes what is about the bus: each setting that ceilometer.conf has
// by another name and shape.
func (a *Agent) inheritWire(conf *oslo.Config, set config.Origins, take func(string, any, oslo.Value)) error {
	if v, ok := conf.Text("DEFAULT.control_exchange"); ok {
		take("ceilometer.control_exchange", v.Text, v)
	}
	if topics, v, ok := conf.List("oslo_messaging_notifications.topics", "rpc_notifier2.topics", "DEFAULT.notification_topics"); ok {
		take("ceilometer.topics", topics, v)
	}
	n, v, ok, err := conf.Int("polling.batch_size")
	if err != nil {
		return err
	}
	if !ok { // before Newton: all samples of a poll together, or none
		var together bool
		if together, v, ok, err = conf.Bool("DEFAULT.batch_polled_samples"); err != nil {
			return err
		}
		ok = ok && !together
	}
	if ok {
		take("ceilometer.batch_size", n, v)
	}
	quorum, quorumAt, _, err := conf.Bool("oslo_messaging_rabbit.rabbit_quorum_queue")
	if err != nil {
		return err
	}
	durable, v, ok, err := conf.Bool("oslo_messaging_rabbit.amqp_durable_queues", "oslo_messaging_rabbit.rabbit_durable_queues")
	switch {
	case err != nil:
		return err
	case quorum:
		take("ceilometer.amqp_durable_queues", true, quorumAt)
	case ok:
		take("ceilometer.amqp_durable_queues", durable, v)
	}
	if deleted, v, ok, err := conf.Bool("oslo_messaging_rabbit.amqp_auto_delete"); err != nil {
		return err
	} else if ok {
		take("ceilometer.amqp_auto_delete", deleted, v)
	}
	arguments := map[string]any{}
	mirrored, from, _, err := conf.Bool("oslo_messaging_rabbit.rabbit_ha_queues")
	switch {
	case err != nil:
		return err
	case quorum:
		from, arguments["x-queue-type"] = quorumAt, "quorum"
		for option, argument := range map[string]string{
			"rabbit_quorum_delivery_limit": "x-delivery-limit", "rabbit_quorum_max_memory_length": "x-max-in-memory-length", "rabbit_quorum_max_memory_bytes": "x-max-in-memory-bytes",
		} {
			n, _, _, err := conf.Int("oslo_messaging_rabbit." + option)
			if err != nil {
				return err
			}
			if n > 0 {
				arguments[argument] = n
			}
		}
	case mirrored:
		arguments["x-ha-policy"] = "all"
	}
	if len(arguments) > 0 {
		take("ceilometer.queue_arguments", arguments, from)
	}
	if v, ok := conf.Text("publisher.telemetry_secret", "DEFAULT.metering_secret", "publisher_rpc.metering_secret", "publisher.metering_secret"); ok {
		if set["ceilometer.telemetry_secret_file"] == "" {
			a.Ceilometer.TelemetrySecret = v.Text
		}
		take("ceilometer.telemetry_secret_file", nil, v)
	}
	return nil
}

// inheritExporter takes what is about the exporter.
func inheritExporter(conf *oslo.Config, take func(string, any, oslo.Value)) error {
	sends, v, ok, err := conf.Bool("polling.enable_notifications")
	if err != nil {
		return err
	}
	if ok && !sends {
		take("wire", Off, v)
	}
	on, v, _, err := conf.Bool("polling.enable_prometheus_exporter")
	if err != nil || !on {
		return err
	}
	addresses := []string{"127.0.0.1:9101"}
	if list, at, ok := conf.List("polling.prometheus_listen_addresses"); ok {
		addresses, v = list, at
	}
	take("exporter.listen", addresses, v)
	secure, _, _, err := conf.Bool("polling.prometheus_tls_enable")
	if err != nil || !secure {
		return err
	}
	for key, option := range map[string]string{"exporter.tls_cert": "polling.prometheus_tls_certfile", "exporter.tls_key": "polling.prometheus_tls_keyfile"} {
		if v, ok := conf.Text(option); ok {
			take(key, v.Text, v)
		}
	}
	return nil
}

// libvirtSockets returns the socket that libvirt_uri names, or nil where the
// usual ones are meant.
func libvirtSockets(conf *oslo.Config) ([]string, oslo.Value, error) {
	if v, ok := conf.Text("DEFAULT.libvirt_uri"); ok && v.Text != "" {
		u, err := url.Parse(v.Text)
		switch {
		case err != nil || u.Scheme != "qemu" && u.Scheme != "qemu+unix" || u.Host != "" || u.Path != "/system":
			return nil, v, fmt.Errorf("%s: %q is not qemu:///system, nor qemu+unix:///system?socket=PATH: QEMU's processes must be on this host", v.String(), v.Text)
		case u.Query().Get("socket") != "":
			return []string{u.Query().Get("socket")}, v, nil
		}
		return nil, v, nil
	}
	v, ok := conf.Text("DEFAULT.libvirt_type")
	if ok && v.Text != "kvm" && v.Text != "qemu" {
		return nil, v, fmt.Errorf("%s: %q is not supported: kvm and qemu are", v.String(), v.Text)
	}
	return nil, v, nil
}

// pollingFile returns the polling file of a ceilometer.conf: the one that it
// names, or polling.yaml beside it, if that is there.
func pollingFile(conf *oslo.Config, main string) (path, from string, err error) {
	if v, ok := conf.Text("polling.cfg_file"); ok {
		if !filepath.IsAbs(v.Text) {
			v.Text = filepath.Join(filepath.Dir(v.File), v.Text)
		}
		return v.Text, v.String(), nil
	}
	path, err = oslo.Beside(main, "polling.yaml")
	return path, "beside " + main, err
}
