// Package zaqar posts samples and events as messages to a queue of Zaqar,
// OpenStack's messaging service.
//
//	zaqar://?queue=Q&ttl=3600
//
// The identity service says where Zaqar is and who we are, by the variables
// OS_AUTH_URL, OS_USERNAME, OS_PASSWORD and so on of the environment.
package zaqar

import (
	"context"
	"crypto/rand"
	"errors"
	"net/http"
	"net/url"
	"strconv"
	"sync"

	"github.com/kvmeter/kvmeter/notifier/publisher"
	"github.com/kvmeter/kvmeter/notifier/wire"
	"github.com/kvmeter/kvmeter/sample"
)

// most is how many messages Zaqar takes at once.
const most = 20

type zaqar struct {
	keystone *publisher.Keystone
	path     string
	ttl      int
	client   string // id that Zaqar asks for

	mu  sync.Mutex
	web *publisher.Web // nil until the identity service said where Zaqar is
}

// Check says what is wrong with a URL, whatever the environment holds.
func Check(u *url.URL, d publisher.Deps) error {
	_, err := parse(u, d)
	return err
}

// New returns the publisher of a URL. It connects when it has something to send.
func New(u *url.URL, d publisher.Deps) (publisher.Publisher, error) {
	z, err := parse(u, d)
	if err != nil {
		return nil, err
	}
	z.keystone, err = publisher.NewKeystone("messaging")
	return z, err
}

// parse returns the publisher of a URL, without what only the environment says.
func parse(u *url.URL, d publisher.Deps) (*zaqar, error) {
	o := publisher.NewOptions(u)
	queue := o.Text("queue", "")
	var random [16]byte
	_, _ = rand.Read(random[:]) // never fails: crypto/rand ends the program instead
	z := &zaqar{
		path: "/v2/queues/" + url.PathEscape(queue) + "/messages", ttl: o.Int("ttl", 3600), client: sample.ID{UUID: random}.String(),
	}
	if err := o.Done(d.Log); err != nil {
		return nil, err
	}
	if queue == "" {
		return nil, errors.New("it needs the option queue")
	}
	return z, nil
}

// Publish posts the samples of all parts.
func (z *zaqar) Publish(ctx context.Context, parts []publisher.Part) error {
	for i := range parts {
		w := wire.NewWriter(wire.JSON)
		var bodies [][]byte
		for s := range parts[i].Batch.Samples() {
			bodies = append(bodies, w.Sample(nil, &s))
		}
		if err := z.post(ctx, bodies); err != nil {
			return publisher.Refuse(i, err)
		}
	}
	return nil
}

// PublishEvents posts events.
func (z *zaqar) PublishEvents(ctx context.Context, events []sample.Event) error {
	var bodies [][]byte
	for i := range events {
		bodies = append(bodies, events[i].AppendJSON(nil))
	}
	return publisher.Refuse(publisher.All, z.post(ctx, bodies))
}

func (z *zaqar) post(ctx context.Context, bodies [][]byte) error {
	z.mu.Lock()
	defer z.mu.Unlock()
	for len(bodies) > 0 {
		n := min(most, len(bodies))
		out := []byte(`{"messages": [`)
		for i, body := range bodies[:n] {
			if i > 0 {
				out = append(out, ", "...)
			}
			out = append(append(out, `{"body": `...), body...)
			out = append(strconv.AppendInt(append(out, `, "ttl": `...), int64(z.ttl), 10), '}')
		}
		if err := z.send(ctx, append(out, "]}"...)); err != nil {
			return err
		}
		bodies = bodies[n:]
	}
	return nil
}

func (z *zaqar) send(ctx context.Context, body []byte) error {
	token, endpoint, err := z.keystone.Get(ctx)
	if err != nil {
		return err
	}
	if z.web == nil {
		to, err := url.Parse(endpoint)
		if err != nil {
			return err
		}
		if z.web, err = publisher.NewWeb(to, to.Scheme, publisher.NewOptions(&url.URL{})); err != nil {
			return err
		}
	}
	header := http.Header{"Content-Type": {"application/json"}, "Client-Id": {z.client}, "X-Auth-Token": {token}}
	_, err = z.web.Post(ctx, z.path, header, body)
	var status *publisher.StatusError
	if errors.As(err, &status) && status.Status == http.StatusUnauthorized {
		z.keystone.Forget()
	}
	return err
}

// Close closes the connections.
func (z *zaqar) Close() error {
	z.mu.Lock()
	defer z.mu.Unlock()
	if z.web != nil {
		z.web.Close()
	}
	return nil
}
