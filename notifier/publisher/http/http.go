// Package http posts samples and events as JSON, as Ceilometer's http publisher
// does.
//
//	http[s]://[user:password@]host[:port]/path?timeout=5&max_retries=2&batch=true&verify_ssl=true&clientcert=F&clientkey=F&raw_only=false
//
// Other options stay in the query. What the server refuses with a status of 5xx,
// or for reasons that may pass, is sent again; what it finds wrong is given up.
package http

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"net/url"
	"slices"

	"github.com/kvmeter/kvmeter/notifier/publisher"
	"github.com/kvmeter/kvmeter/notifier/wire"
	"github.com/kvmeter/kvmeter/sample"
)

type poster struct {
	web     *publisher.Web
	batch   bool
	rawOnly bool
}

var header = http.Header{"Content-Type": {"application/json"}}

// empty are the payloads that raw_only leaves out.
var empty = []string{"", "null", "{}", "[]", `""`, "0", "false"}

// New returns the publisher of a URL.
func New(u *url.URL, d publisher.Deps) (publisher.Publisher, error) {
	o := publisher.NewOptions(u)
	p := &poster{batch: o.Bool("batch", true), rawOnly: o.Bool("raw_only", false)}
	var err error
	p.web, err = publisher.NewWeb(u, u.Scheme, o)
	if err != nil {
		return nil, err
	}
	return p, o.Done(d.Log)
}

// Publish posts the samples of all parts as one list, or each by itself.
func (p *poster) Publish(ctx context.Context, parts []publisher.Part) error {
	for i := range parts {
		w := wire.NewWriter(wire.JSON)
		var items [][]byte
		for s := range parts[i].Batch.Samples() {
			items = append(items, w.Sample(nil, &s))
		}
		if err := p.post(ctx, items); err != nil {
			return publisher.Refuse(i, err)
		}
	}
	return nil
}

// PublishEvents posts events, or only what the services sent for those that
// have it.
func (p *poster) PublishEvents(ctx context.Context, events []sample.Event) error {
	var items [][]byte
	for i := range events {
		if !p.rawOnly {
			items = append(items, events[i].AppendJSON(nil))
			continue
		}
		var raw struct{ Payload json.RawMessage }
		if json.Unmarshal(events[i].Raw, &raw) != nil {
			continue
		}
		if payload := wire.NewWriter(wire.JSON).Value(nil, raw.Payload); !slices.Contains(empty, string(payload)) {
			items = append(items, payload)
		}
	}
	return publisher.Refuse(publisher.All, p.post(ctx, items))
}

func (p *poster) post(ctx context.Context, items [][]byte) error {
	if len(items) == 0 {
		return nil
	}
	if p.batch {
		body := []byte{'['}
		for i, item := range items {
			if i > 0 {
				body = append(body, ", "...)
			}
			body = append(body, item...)
		}
		_, err := p.web.Post(ctx, "", header, append(body, ']'))
		return err
	}
	var errs error
	for _, item := range items {
		_, err := p.web.Post(ctx, "", header, item)
		var status *publisher.StatusError
		if errors.As(err, &status) && status.Permanent() {
			errs = err // the others may be better
			continue
		}
		if err != nil {
			return err
		}
	}
	return errs
}

// Close closes the connections.
func (p *poster) Close() error {
	p.web.Close()
	return nil
}
