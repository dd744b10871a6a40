package control

import (
	"errors"
	"fmt"
	"net/url"
	"path/filepath"
	"slices"
	"strings"

	"github.com/kvmeter/kvmeter/cmd/internal/config"
	"github.com/kvmeter/kvmeter/cmd/internal/oslo"
)

// inheritance is what a ceilometer.conf says of a notification agent and of a
// collector.
type inheritance struct {
	conf *oslo.Config
	main string // the last of its files
	all  []config.Inherited
}

// Inherit implements [config.Heir]: what ceilometer.conf says of the notification
// agent and of the collector.
func (n *Notifier) Inherit(set config.Origins) ([]config.Inherited, error) {
	if len(n.CeilometerConf) == 0 {
		return nil, nil
	}
	conf, err := oslo.Read(n.CeilometerConf...)
	if err != nil {
		return nil, fmt.Errorf("ceilometer_conf: %w", err)
	}
	conf.Default("DEFAULT.host", n.Name)
	conf.Default("DEFAULT.state_path", "/var/lib/ceilometer")
	i := &inheritance{conf: conf, main: n.CeilometerConf[len(n.CeilometerConf)-1]}
	i.all = append(i.all, config.Inherited{Key: "notifications.enabled", Value: true, From: i.main})
	if v, ok := conf.Text("DEFAULT.host"); ok {
		i.take("name", v.Text, v)
	}
	if v, ok := conf.Text("publisher.telemetry_secret", "DEFAULT.metering_secret", "publisher_rpc.metering_secret", "publisher.metering_secret"); ok {
		if set["telemetry_secret_file"] == "" {
			n.Secret = v.Text
		}
		i.take("telemetry_secret_file", nil, v)
	}
	i.settings()
	err = errors.Join(i.bus(set), i.files(), i.dispatchers())
	return i.all, err
}

func (i *inheritance) take(key string, value any, from oslo.Value) {
	i.all = append(i.all, config.Inherited{Key: key, Value: value, From: from.String()})
}

// bus takes where notifications come from.
func (i *inheritance) bus(set config.Origins) error {
	transport, ok, err := i.conf.Transport()
	if err != nil {
		return err
	}
	if ok {
		i.take("amqp.url", transport.URLs[0], transport.From)
		if len(transport.URLs) > 1 && set["amqp.url"] == "" {
			i.take("amqp.urls", transport.URLs, transport.From)
		}
		for key, v := range map[string]oslo.Value{"amqp.tls_ca": transport.CA, "amqp.tls_cert": transport.Cert, "amqp.tls_key": transport.Key} {
			if v.Text != "" {
				i.take(key, v.Text, v)
			}
		}
	}
	if urls := i.conf.Multi("notification.messaging_urls"); len(urls) > 0 {
		i.take("notifications.messaging_urls", texts(urls), urls[0])
	}
	if exchanges, from := i.exchanges(); exchanges != nil {
		i.take("notifications.notification_control_exchanges", exchanges, from)
	}
	if topics, v, ok := i.conf.List("oslo_messaging_notifications.topics", "rpc_notifier2.topics", "DEFAULT.notification_topics"); ok {
		i.take("notifications.topics", topics, v)
	}
	quorum, quorumAt, _, err := i.conf.Bool("oslo_messaging_rabbit.rabbit_quorum_queue")
	if err != nil {
		return err
	}
	durable, v, ok, err := i.conf.Bool("oslo_messaging_rabbit.amqp_durable_queues", "oslo_messaging_rabbit.rabbit_durable_queues")
	switch {
	case err != nil:
		return err
	case quorum:
		i.take("notifications.amqp_durable_queues", true, quorumAt)
	case ok:
		i.take("notifications.amqp_durable_queues", durable, v)
	}
	deleted, v, ok, err := i.conf.Bool("oslo_messaging_rabbit.amqp_auto_delete")
	if err == nil && ok {
		i.take("notifications.amqp_auto_delete", deleted, v)
	}
	return err
}

// exchanges returns those that are listened to: one list since Pike, one option a
// service before.
func (i *inheritance) exchanges() (all []string, from oslo.Value) {
	if listed := i.conf.Multi("notification.notification_control_exchanges"); len(listed) > 0 {
		return texts(listed), listed[0]
	}
	for _, service := range []struct{ option, exchange string }{
		{"nova", "nova"},
		{"glance", "glance"},
		{"neutron", "neutron"},
		{"cinder", "cinder"},
		{"heat", "heat"},
		{"keystone", "keystone"},
		{"trove", "trove"},
		{"zaqar", "zaqar"},
		{"swift", "swift"},
		{"sahara", "sahara"},
		{"magnetodb", "magnetodb"},
		{"magnum", "magnum"},
		{"dns", "central"},
		{"ceilometer", "ceilometer"},
		{"ironic", "ironic"},
		{"aodh", "aodh"},
	} {
		exchange := service.exchange
		if v, ok := i.conf.Text("DEFAULT." + service.option + "_control_exchange"); ok {
			from, exchange = v, v.Text
		}
		all = append(all, exchange)
	}
	if from.Option == "" { // none is named, so kvmeter's own list holds
		return nil, from
	}
	return all, from
}

// files takes pipelines and definitions.
func (i *inheritance) files() error {
	for _, f := range []struct{ key, file, option string }{
		{"pipeline", "pipeline.yaml", "DEFAULT.pipeline_cfg_file"},
		{"event_pipeline", "event_pipeline.yaml", "DEFAULT.event_pipeline_cfg_file"},
		{"notifications.event_definitions", "event_definitions.yaml", "event.definitions_cfg_file"},
	} {
		if v, ok := i.conf.Text(f.option); ok {
			if !filepath.IsAbs(v.Text) {
				v.Text = filepath.Join(filepath.Dir(v.File), v.Text)
			}
			i.take(f.key, v.Text, v)
		} else if path, err := oslo.Beside(i.main, f.file); err != nil {
			return err
		} else if path != "" {
			i.all = append(i.all, config.Inherited{Key: f.key, Value: path, From: "beside " + i.main})
		}
	}
	// Ceilometer's own definitions stand for kvmeter's, which are the same.
	switch dirs := i.conf.Multi("meter.meter_definitions_dirs"); {
	case len(dirs) > 0:
		var all []string
		for _, dir := range dirs {
			if packaged := strings.Contains(dir.Text, "/ceilometer/data/meters.d"); !packaged {
				all = append(all, dir.Text)
			}
		}
		i.take("notifications.meter_definitions", append(all, "shipped"), dirs[0])
	default:
		if v, ok := i.conf.Text("meter.meter_definitions_cfg_file"); ok {
			if !filepath.IsAbs(v.Text) {
				v.Text = filepath.Join(filepath.Dir(v.File), v.Text)
			}
			i.take("notifications.meter_definitions", []string{v.Text}, v)
		} else if path, err := oslo.Beside(i.main, "meters.d"); err != nil {
			return err
		} else if path != "" {
			i.all = append(i.all, config.Inherited{Key: "notifications.meter_definitions", Value: []string{path, "shipped"}, From: "beside " + i.main})
		}
	}
	return nil
}

// settings takes what changes what notifications give.
func (i *inheritance) settings() {
	var all []string
	var from oslo.Value
	add := func(name string, v oslo.Value) {
		from = v
		all = append(all, name+"="+v.Text)
	}
	for _, name := range []string{
		"DEFAULT.sample_source", "DEFAULT.reserved_metadata_length", "event.drop_unmatched_notifications", "notification.disable_non_metric_meters",
		"notification.store_events",
	} {
		if v, ok := i.conf.Text(name); ok {
			add(name, v)
		}
	}
	for _, name := range []string{"DEFAULT.reserved_metadata_namespace", "DEFAULT.reserved_metadata_keys", "event.store_raw", "notification.pipelines"} {
		if vs := i.conf.Multi(name); len(vs) > 0 {
			v := vs[len(vs)-1]
			v.Text = strings.Join(texts(vs), ",")
			add(name, v)
		}
	}
	if all != nil {
		i.take("notifications.settings", all, from)
	}
}

// dispatchers takes what the collector did with samples and events, as the
// publishers that stand for notifier:// and rpc://, by which they came to it.
func (i *inheritance) dispatchers() error {
	for _, of := range []struct{ key, option, older string }{
		{"dispatchers", "DEFAULT.meter_dispatchers", "DEFAULT.dispatcher"}, {"event_dispatchers", "DEFAULT.event_dispatchers", "DEFAULT.dispatcher"},
	} {
		names := i.conf.Multi(of.option)
		if len(names) == 0 {
			names = i.conf.Multi(of.older)
		}
		var urls []string
		for _, name := range names {
			u, err := i.dispatcher(name, of.key == "event_dispatchers")
			if err != nil {
				return err
			}
			if u != "" && !slices.Contains(urls, u) {
				urls = append(urls, u)
			}
		}
		if urls != nil {
			i.take(of.key, urls, names[0])
		}
	}
	return nil
}

// dispatcher returns the URL of the publisher that a dispatcher has become.
func (i *inheritance) dispatcher(name oslo.Value, events bool) (string, error) {
	query := url.Values{}
	option := func(group, from, to string) {
		if v, ok := i.conf.Text(group + "." + from); ok {
			query.Set(to, v.Text)
		}
	}
	text := func(option string) string {
		v, _ := i.conf.Text(option)
		return v.Text
	}
	switch name.Text {
	case "database":
		return "store://", nil
	case "gnocchi":
		option("dispatcher_gnocchi", "archive_policy", "archive_policy")
		option("dispatcher_gnocchi", "filter_service_activity", "enable_filter_project")
		option("dispatcher_gnocchi", "filter_project", "filter_project")
		option("dispatcher_gnocchi", "resources_definition_file", "resources_definition_file")
		return "gnocchi://?" + query.Encode(), nil
	case "file":
		path := text("dispatcher_file.file_path")
		if !filepath.IsAbs(path) {
			return "", fmt.Errorf("%s: dispatcher file needs an absolute path in [dispatcher_file] file_path", name.String())
		}
		if events { // it took none
			return "", nil
		}
		option("dispatcher_file", "max_bytes", "max_bytes")
		option("dispatcher_file", "backup_count", "backup_count")
		return (&url.URL{Scheme: "file", Path: path, RawQuery: query.Encode()}).String(), nil
	case "http":
		target := text("dispatcher_http.target")
		if events && text("dispatcher_http.event_target") != "" {
			target = text("dispatcher_http.event_target")
		}
		u, err := url.Parse(target)
		if err != nil || u.Host == "" {
			return "", fmt.Errorf("%s: dispatcher http needs a URL in [dispatcher_http] target", name.String())
		}
		query = u.Query()
		option("dispatcher_http", "timeout", "timeout")
		option("dispatcher_http", "verify_ssl", "verify_ssl")
		if query.Set("batch", "false"); text("dispatcher_http.batch_mode") != "" {
			option("dispatcher_http", "batch_mode", "batch")
		}
		u.RawQuery = query.Encode()
		return u.String(), nil
	}
	return "", fmt.Errorf("%s: there is no dispatcher %q; there are database, file, gnocchi and http", name.String(), name.Text)
}

func texts(vs []oslo.Value) []string {
	all := make([]string, len(vs))
	for i := range vs {
		all[i] = vs[i].Text
	}
	return all
}
