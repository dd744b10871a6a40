// Package publisher holds what the notifier's publishers share. Each scheme of
// a publisher URL is a package of its own; the table all lists them.
package publisher

import (
	"context"
	"fmt"
	"net/url"
	"strings"

	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/bus"
	"github.com/kvmeter/kvmeter/sample"
)

// Part is what a pipeline passes of one batch. Publishers only read it.
type Part struct {
	Message *bus.Message  // as received
	From    *sample.Batch // what Message carries
	// Batch is what is passed: From itself where that is all of it, else a
	// derived batch, which has explicit ids, an id of its own and the notifier as
	// its node.
	Batch *sample.Batch
}

// Whole reports whether the part is all that was received.
func (p *Part) Whole() bool { return p.Batch == p.From }

// Publisher takes samples further. It is safe for concurrent use.
type Publisher interface {
	// Publish returns nil when it has taken all parts, in the sense of
	// docs/architecture.md: they are synced, or confirmed by the next queue,
	// unless the publisher says that it is best effort. After an error all of
	// them are published again later, except that a [Refusal] names one that is
	// given up. Publish returns when ctx ends.
	Publish(ctx context.Context, parts []Part) error
	Close() error
}

// EventPublisher is a publisher that takes events, too.
type EventPublisher interface {
	// PublishEvents is to events what Publish is to samples. A [Refusal] names
	// one by its index.
	PublishEvents(ctx context.Context, events []sample.Event) error
}

// Refusal is the error for a part that can never be published; of the others
// nothing is known.
type Refusal struct {
	Part int // index in the parts that were given, or All
	Err  error
}

func (r *Refusal) Error() string { return fmt.Sprintf("refused for good: %v", r.Err) }

// Unwrap returns the reason.
func (r *Refusal) Unwrap() error { return r.Err }

// Deps is what publishers may need.
type Deps struct {
	Log        *zap.Logger
	Bus        bus.Publisher
	Name       string   // of the notifier: node and key id of what it makes
	Keys       bus.Keys // where that key is missing, what it makes is not signed
	Partitions int      // of the bus
	AMQP       bus.Config
	// TelemetrySecret signs what goes out in Ceilometer's own forms; empty: they
	// are not signed.
	TelemetrySecret string
}

// Scheme makes the publishers of one URL scheme.
type Scheme struct {
	Name string
	// New opens a publisher. It refuses options that it does not know.
	New func(u *url.URL, d Deps) (Publisher, error)
	// Alias is set where the scheme is another name of others: it returns the URL
	// that is meant, and New is not used.
	Alias func(u *url.URL) (*url.URL, error)
	// Events is true where what New returns is an [EventPublisher].
	Events bool
	// Durable is true where what was published cannot get lost and needs no spool:
	// it is the bus.
	Durable bool
	// Check says what is wrong with a URL without opening a connection or a file to
	// write, and warns in the log of what has no effect. Nil where New does no more
	// than that.
	Check func(u *url.URL, d Deps) error
	// Signs is true where derived batches are sent on and so need the
	// notifier's key.
	Signs bool
}

// Check returns the scheme of a URL, that which is meant where it has another
// name, and says what is wrong with the URL.
func Check(schemes []Scheme, u *url.URL, d Deps) (*Scheme, error) {
	s, u, err := find(schemes, u)
	if err != nil {
		return nil, err
	}
	if s.Check != nil {
		return s, s.Check(u, d)
	}
	p, err := s.New(u, d)
	if err != nil {
		return s, err
	}
	return s, p.Close()
}

func find(schemes []Scheme, u *url.URL) (*Scheme, *url.URL, error) {
	var names []string
	for i := range schemes {
		s := &schemes[i]
		switch {
		case s.Name == u.Scheme && s.Alias != nil:
			to, err := s.Alias(u)
			if err != nil {
				return nil, nil, err
			}
			return find(schemes, to)
		case s.Name == u.Scheme:
			return s, u, nil
		}
		names = append(names, s.Name+"://")
	}
	return nil, nil, fmt.Errorf("there is none of this scheme; there are %s", strings.Join(names, ", "))
}

// Open opens the publisher of a URL by its scheme, and returns that scheme.
func Open(schemes []Scheme, u *url.URL, d Deps) (Publisher, *Scheme, error) {
	s, u, err := find(schemes, u)
	if err != nil {
		return nil, nil, err
	}
	p, err := s.New(u, d)
	return p, s, err
}
