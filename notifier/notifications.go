package notifier

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/bus"
	"github.com/kvmeter/kvmeter/notifier/conversion"
	"github.com/kvmeter/kvmeter/notifier/meters"
	"github.com/kvmeter/kvmeter/sample"
)

// priorities are those of which samples or events are made, and others those
// that Ceilometer's queues have besides, which are emptied where they are taken
// over.
var (
	priorities = []string{"info", "sample", "error"}
	others     = []string{"audit", "critical", "debug", "warn"}
)

// gather is how long notifications wait for others. Services send them one by one,
// and publishers sync, and the broker is told, once for all that are there; each
// time that the process wakes up costs as much CPU time as some notifications.
const gather = 100 * time.Millisecond

// loadDefinitions compiles the definitions, if notifications are taken.
func (n *Notifier) loadDefinitions(setup *setup) error {
	c := &setup.cfg.Notifications
	if !c.Enabled {
		return nil
	}
	if len(n.deps.Subscribers) == 0 {
		return errors.New("notifications: they come over RabbitMQ; `kvmeter notifier` takes them")
	}
	if len(c.Exchanges) == 0 || len(c.Topics) == 0 || len(c.MeterDefinitions) == 0 {
		return errors.New("notifications: notification_control_exchanges, topics and meter_definitions must not be empty")
	}
	settings := conversion.DefaultSettings()
	settings.NoEvents = setup.events == nil
	for _, s := range c.Settings {
		if err := settings.Set(s); err != nil {
			return fmt.Errorf("notifications.settings: %w", err)
		}
	}
	secret, err := setup.cfg.TelemetrySecret()
	if err != nil {
		return err
	}
	// A secret that everybody knows proves nothing.
	settings.Meters.Secret, settings.Meters.RefuseUnsigned = secret, (setup.cfg.TelemetrySecretFile != "" || setup.cfg.Secret != "") && !setup.cfg.AllowUnsigned
	if settings.NoEvents {
		setup.events = nil
	}
	d, findings, err := conversion.Load(settings, c.MeterDefinitions, c.EventDefinitions)
	if err != nil {
		return fmt.Errorf("notifications: %w", err)
	}
	for i := range findings {
		if findings[i].Error {
			n.log.Error("a meter definition can't be used and is left out", zap.String("why", findings[i].String()))
		}
	}
	setup.definitions = d
	setup.files = digests(append(slices.Clone(c.MeterDefinitions), c.EventDefinitions))
	return nil
}

// subscriptions returns what is taken of what services send.
func (c *Notifications) subscriptions() []bus.Subscription {
	var all []bus.Subscription
	if c.TakeOver {
		for _, topic := range c.Topics {
			for _, priority := range append(others[:len(others):len(others)], priorities...) {
				name := topic + "." + priority
				all = append(all, bus.Subscription{Queue: name, Theirs: true, Keys: []string{name}})
			}
		}
	} else {
		for _, priority := range priorities {
			s := bus.Subscription{Queue: "kvmeter.notifications." + priority}
			for _, topic := range c.Topics {
				s.Keys = append(s.Keys, topic+"."+priority)
			}
			all = append(all, s)
		}
	}
	for i := range all {
		all[i].Gather = gather
		all[i].Exchanges, all[i].Durable, all[i].AutoDelete = c.Exchanges, c.DurableQueues, c.AutoDelete
	}
	return all
}

// listen consumes notifications until ctx ends.
func (n *Notifier) listen(ctx context.Context, from bus.Subscriber, s bus.Subscription) error {
	w := &worker{n: n}
	w.open = w.notification
	return from.Subscribe(ctx, s, max(1, n.cfg.Notifications.Prefetch), w.handle)
}

// notification converts a delivery. One that gives nothing but errors, or is no
// notification, is rejected.
func (w *worker) notification(d *bus.Delivery) {
	switch strings.ToLower(d.ContentEncoding) {
	case "", "utf-8", "utf8", "us-ascii", "ascii", "binary":
	default:
		w.refuse(d, fmt.Errorf("content encoding %q: send UTF-8", d.ContentEncoding), "encoding")
		return
	}
	r, err := w.converter.Convert(d.Body)
	if err != nil {
		w.refuse(d, err, "malformed")
		return
	}
	w.n.m.unsigned.Add(float64(r.Unsigned))
	b, noNumber := r.Batch(w.n.cfg.Name)
	if len(r.Errors) > 0 {
		if b == nil && r.Event == nil {
			err, reason := errors.Join(r.Errors...), "conversion"
			if errors.Is(err, meters.ErrSignature) {
				reason = "bad_signature"
			}
			w.refuse(d, err, reason)
			return
		}
		w.n.m.conversionErrors.Add(float64(len(r.Errors)))
		w.n.refusals.Warn("a part of a notification can't be converted", zap.Error(errors.Join(r.Errors...)))
	}
	w.n.m.notifications.Inc()
	w.n.m.noNumber.Add(float64(noNumber))
	if d.Redelivered {
		w.n.m.redelivered.Inc()
	}
	job := w.newWork(sample.BatchID{})
	if b != nil {
		job.id = b.ID
		w.n.m.samples.Add(float64(b.Len()))
		// What comes out is never what was received, so the notifier signs it.
		w.split(job, d, b, &sample.Batch{ID: b.ID, Node: b.Node})
	}
	if r.Event != nil {
		w.n.m.events.Inc()
		w.setup.events.route(&w.events, r.Event, job)
	}
	d.State = job
}
