// Package tcp sends samples over a TCP connection, as Ceilometer's tcp
// publisher does: each is 8 bytes of length, little endian, and a map of msgpack,
// signed, with the sender's name in publisher_id. sg-core reads it.
//
//	tcp://host[:4952]
//
// Nothing says whether the receiver has taken what was sent: what is lost with a
// connection is known only where the connection says so. Then it is sent again.
package tcp

import (
	"context"
	"encoding/binary"
	"errors"
	"net"
	"net/url"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kvmeter/kvmeter/notifier/publisher"
	"github.com/kvmeter/kvmeter/sample/ceilometer"
)

// patience is how long the receiver may not read.
const patience = 10 * time.Second

type tcp struct {
	address string

	mu   sync.Mutex
	conn net.Conn // nil while there is none
	bus  *ceilometer.Writer
	buf  []byte
}

// New returns the publisher of a URL. It connects when it has something to send.
func New(u *url.URL, d publisher.Deps) (publisher.Publisher, error) {
	address, err := publisher.HostPort(u, "4952")
	if err != nil {
		return nil, err
	}
	return &tcp{address: address, bus: ceilometer.NewWriter(d.TelemetrySecret, d.Name)}, publisher.NewOptions(u).Done(d.Log)
}

// Publish sends the samples of all parts; over a connection that broke since
// the last time it does so again over a new one.
func (p *tcp) Publish(ctx context.Context, parts []publisher.Part) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.buf = p.buf[:0]
	for i := range parts {
		for s := range parts[i].Batch.Samples() {
			start := len(p.buf)
			p.buf = p.bus.SampleMsgpack(append(p.buf, 0, 0, 0, 0, 0, 0, 0, 0), &s)
			binary.LittleEndian.PutUint64(p.buf[start:], uint64(len(p.buf)-start-8))
		}
	}
	old := p.conn != nil && alive(p.conn)
	if old {
		if err := p.write(ctx); err == nil {
			return nil
		}
	}
	p.disconnect()
	conn, err := (&net.Dialer{Timeout: patience}).DialContext(ctx, "tcp", p.address)
	if err != nil {
		return err
	}
	p.conn = conn
	err = p.write(ctx)
	if err != nil {
		p.disconnect()
	}
	return err
}

// alive reports whether the receiver has not closed the connection; it never
// sends anything.
func alive(conn net.Conn) bool {
	raw, err := conn.(*net.TCPConn).SyscallConn()
	if err != nil {
		return false
	}
	open := false
	err = raw.Read(func(fd uintptr) bool {
		_, _, err := unix.Recvfrom(int(fd), make([]byte, 1), unix.MSG_PEEK|unix.MSG_DONTWAIT)
		open = errors.Is(err, unix.EAGAIN)
		return true
	})
	return open && err == nil
}

func (p *tcp) write(ctx context.Context) error {
	deadline := time.Now().Add(patience)
	if d, ok := ctx.Deadline(); ok && d.Before(deadline) {
		deadline = d
	}
	if err := p.conn.SetWriteDeadline(deadline); err != nil {
		return err
	}
	_, err := p.conn.Write(p.buf)
	return err
}

func (p *tcp) disconnect() {
	if p.conn != nil {
		_ = p.conn.Close()
		p.conn = nil
	}
}

// Close closes the connection.
func (p *tcp) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.disconnect()
	return nil
}
