// Package udp sends each sample as a datagram of msgpack, as Ceilometer's udp
// publisher does, signed.
//
//	udp://host[:4952]
//
// It is best effort: nothing says whether a datagram arrived, and what the
// network refuses is counted as lost.
package udp

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"sync"

	"github.com/kvmeter/kvmeter/notifier/publisher"
	"github.com/kvmeter/kvmeter/sample/ceilometer"
)

type udp struct {
	address string

	mu   sync.Mutex
	conn net.Conn // nil until the host's name was resolved
	bus  *ceilometer.Writer
	buf  []byte
}

// New returns the publisher of a URL.
func New(u *url.URL, d publisher.Deps) (publisher.Publisher, error) {
	address, err := publisher.HostPort(u, "4952")
	if err != nil {
		return nil, err
	}
	return &udp{address: address, bus: ceilometer.NewWriter(d.TelemetrySecret, "")}, publisher.NewOptions(u).Done(d.Log)
}

// Publish sends the samples of all parts.
func (p *udp) Publish(ctx context.Context, parts []publisher.Part) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.conn == nil {
		conn, err := new(net.Dialer).DialContext(ctx, "udp", p.address)
		if err != nil {
			return err
		}
		p.conn = conn
	}
	var lost publisher.Lost
	for i := range parts {
		for s := range parts[i].Batch.Samples() {
			p.buf = p.bus.SampleMsgpack(p.buf[:0], &s)
			if _, err := p.conn.Write(p.buf); err != nil {
				lost.Add(fmt.Errorf("datagram of %d bytes: %w", len(p.buf), err))
			}
		}
	}
	if errors.Is(lost.Err, net.ErrClosed) {
		p.conn = nil
	}
	return lost.Result()
}

// Close closes the socket.
func (p *udp) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.conn == nil {
		return nil
	}
	return p.conn.Close()
}
