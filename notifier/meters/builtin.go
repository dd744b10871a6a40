package meters

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/kvmeter/kvmeter/notifier/notification"
	"github.com/kvmeter/kvmeter/notifier/value"
)

// Polling is the event type of samples that Ceilometer's polling agents send.
const Polling = "telemetry.polling"

// metering is the event type of what Ceilometer's publisher notifier:// sends; with
// per_meter_topic the meter's name follows.
const metering = "metering"

// builtin adds the samples that no definition describes.
func (c *Converter) builtin() {
	var err error
	switch event := c.n.EventType; {
	case strings.HasPrefix(event, "http.request"), strings.HasPrefix(event, "http.response"):
		err = c.http(event)
	case strings.HasPrefix(event, "hardware.ipmi."):
		err = c.sensors()
	case event == Polling:
		err = c.polled(c.n.Payload().Field("samples"))
	case event == metering || strings.HasPrefix(event, metering+"."):
		if samples := c.n.Payload(); samples.Kind == value.List {
			err = c.polled(samples)
		}
	}
	if err != nil && !errors.Is(err, errSaid) {
		c.out.Errors = append(c.out.Errors, fmt.Errorf("%s: %w", c.n.EventType, err))
	}
}

var (
	gauge = value.Of("gauge")
	delta = value.Of("delta")
	one   = value.OfInt(1)
)

// http makes the sample of a request to or a response of an API, which the
// services' middleware reports.
func (c *Converter) http(event string) error {
	request := c.n.Payload().Field("request")
	if request == nil || request.Kind != value.Object {
		return errors.New("payload.request is missing, or no object")
	}
	when, err := c.time(nil)
	if err != nil {
		return err
	}
	meta, err := c.payload()
	if err != nil {
		return err
	}
	unit := value.Of(strings.Split(event, ".")[1])
	c.out.Samples = append(c.out.Samples, Sample{
		Name: c.n.Message.Field("event_type"), Kind: &delta, Unit: &unit, Volume: &one,
		Row: &Row{
			User: request.Field("HTTP_X_USER_ID"), Project: request.Field("HTTP_X_PROJECT_ID"),
			Resource: request.Field("HTTP_X_SERVICE_NAME"), Time: when, Source: c.set.opt.Source, Metadata: meta,
		},
	})
	return nil
}

// sensors makes the samples of the sensors that Ironic read. One that is
// invalid costs itself only.
func (c *Converter) sensors() error {
	payload := c.n.Payload()
	node, inner := payload.Field("node_uuid"), payload.Field("payload")
	if inner == nil || inner.Kind != value.Object {
		return errors.New("payload.payload is missing, or no object")
	}
	for _, kind := range []string{"Temperature", "Voltage", "Current", "Fan"} {
		group := inner.Field(kind)
		if group == nil || group.Kind != value.Object {
			continue
		}
		for i := range group.Items {
			sensor := &group.Items[i]
			if err := c.sensor(kind, payload, node, sensor); err != nil {
				c.out.Warnings = append(c.out.Warnings, fmt.Sprintf("sensor %q: %v", sensor.Key, err))
			}
		}
	}
	return nil
}

func (c *Converter) sensor(kind string, payload, node, sensor *value.Value) error {
	text := func(key string) (string, error) {
		if v := sensor.Field(key); v != nil && v.Kind == value.Text {
			return v.Text, nil
		}
		return "", fmt.Errorf("%s is missing, or no text", key)
	}
	id, err := text("Sensor ID")
	if err != nil {
		return err
	}
	reading, err := text("Sensor Reading")
	if err != nil || reading == "Disabled" {
		return err
	}
	if node == nil {
		return errors.New("payload.node_uuid is missing")
	}
	number, rest, ok := strings.Cut(reading, " ")
	word := value.Of(number)
	f, err := word.Float64()
	if !ok || err != nil {
		return fmt.Errorf("reading %q is no number with a unit", reading)
	}
	unit := rest[strings.LastIndexByte(rest, ' ')+1:]
	switch unit {
	case "Watts":
		unit = "W"
	case "Volts":
		unit = "V"
	}
	stamp, event := payload.Field("timestamp"), payload.Field("event_type")
	if stamp == nil || event == nil {
		return errors.New("payload.timestamp or payload.event_type is missing")
	}
	when, err := c.time(stamp)
	if err != nil {
		return err
	}
	member := *node
	member.Key = "node"
	name, unitValue, volume := value.Of("hardware.ipmi."+strings.ToLower(kind)), value.Of(unit), value.OfFloat(f)
	resource := value.Of(node.Str() + "-" + strings.ReplaceAll(strings.ToLower(id), " ", "_"))
	c.out.Samples = append(c.out.Samples, Sample{
		Name: &name, Kind: &gauge, Unit: &unitValue, Volume: &volume,
		Row: &Row{
			User: payload.Field("user_id"), Project: payload.Field("project_id"), Resource: &resource,
			Time: when, Source: c.set.opt.Source,
			Metadata: withOrigin(sensor, event, c.n.Message.Field("publisher_id"), member),
		},
	})
	return nil
}

// polled takes the samples of a polling agent, or of a publisher, as they are. One
// that lacks a key costs itself only.
func (c *Converter) polled(samples *value.Value) error {
	if samples == nil || samples.Kind != value.List {
		return errors.New("payload.samples is missing, or no list")
	}
	for i := range samples.Items {
		s, err := Polled(&samples.Items[i])
		if err == nil && c.verifier != nil && !c.verifier.good(&samples.Items[i]) {
			c.out.Unsigned++
			if c.set.opt.RefuseUnsigned {
				err = ErrSignature
			}
		}
		if err != nil {
			c.out.Errors = append(c.out.Errors, fmt.Errorf("%s: sample %d: %w", c.n.EventType, i, err))
			continue
		}
		c.out.Samples = append(c.out.Samples, s)
	}
	return nil
}

// Polled reads a sample as it is on Ceilometer's bus.
func Polled(v *value.Value) (Sample, error) {
	if v.Kind != value.Object {
		return Sample{}, fmt.Errorf("it is %v, not an object", v.Kind)
	}
	s := Sample{Row: &Row{UserName: v.Field("user_name"), ProjectName: v.Field("project_name"), Monotonic: v.Field("monotonic_time")}}
	var source, stamp, metadata *value.Value
	for _, f := range []struct {
		key string
		dst **value.Value
	}{
		{"counter_name", &s.Name},
		{"counter_type", &s.Kind},
		{"counter_unit", &s.Unit},
		{"counter_volume", &s.Volume},
		{"user_id", &s.User},
		{"project_id", &s.Project},
		{"resource_id", &s.Resource},
		{"source", &source},
		{"timestamp", &stamp},
		{"resource_metadata", &metadata},
		{"message_id", &s.ID},
	} {
		if *f.dst = v.Field(f.key); *f.dst == nil {
			return s, fmt.Errorf("%s is missing", f.key)
		}
	}
	if s.ID.Kind != value.Text || s.ID.Text == "" || s.Name.Kind != value.Text {
		return s, errors.New("message_id or counter_name is no text")
	}
	var err error
	if s.Time, err = parsed(stamp); err != nil {
		return s, err
	}
	s.Stamp, s.Source = stamp.Text, source.Str()
	if metadata.Kind == value.Object {
		s.Metadata = metadata.AppendJSON(make([]byte, 0, 1024))
	} else if metadata.Truthy() {
		return s, fmt.Errorf("resource_metadata is %v", metadata.Kind)
	}
	return s, nil
}

func parsed(stamp *value.Value) (time.Time, error) {
	if stamp.Kind != value.Text {
		return time.Time{}, fmt.Errorf("timestamp is %v", stamp.Kind)
	}
	t, err := value.ParseTime(stamp.Text)
	if err != nil {
		err = fmt.Errorf("timestamp: %w", err)
	}
	return t, err
}

// Why returns, for each definition that gives no sample of a notification, the
// reason.
func (c *Converter) Why(n *notification.Notification) []string {
	var why []string
	if n.Priority != "" && n.Priority != "info" && n.Priority != "sample" {
		return []string{fmt.Sprintf("priority %s: samples are made of info and sample", n.Priority)}
	}
	matched := map[*meter]bool{}
	for _, m := range c.cache.Get(n.EventType, c.matching) {
		matched[m] = true
	}
	for _, m := range c.set.meters {
		if !matched[m] {
			why = append(why, fmt.Sprintf("%s: %s: event type %s begins with no match of %s", m.where, m.text, n.EventType, strings.Join(m.events, " or ")))
		}
	}
	for i := range c.out.Samples {
		if err := c.out.Samples[i].Check(); err != nil {
			why = append(why, fmt.Sprintf("%s: %v", c.out.Samples[i].Name.Str(), err))
		}
	}
	return append(why, c.out.Warnings...)
}
