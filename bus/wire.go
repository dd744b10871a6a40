package bus

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"sync/atomic"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

// wire is a connection to RabbitMQ, beneath the library. It is read rarely and
// much at once, since a broker that hands out small messages one by one wakes its
// consumer for each of them, which costs more CPU time than reading them. And where
// [wire.divert] asks for it, it takes the deliveries out of what is read: the library
// would pass each of them through three goroutines, with some 50 allocations. All
// other frames are the library's.
type wire struct {
	net.Conn
	gather atomic.Int64 // ns that a read waits for more; 0: not at all
	limit  atomic.Int64 // ns that the broker may be silent; 0: for ever
	inbox  atomic.Pointer[inbox]

	buf   []byte
	n     int         // how much of buf is not looked at yet
	last  int         // how much the last read from the connection gave
	other []byte      // frames for the library
	ready []byte      // of other, what the library has not read yet
	plain bool        // what comes are not frames
	open  *incoming   // the delivery whose content is not whole yet
	on    uint16      // the channel that it comes over
	whole []*incoming // deliveries of what was read last
	known names
}

const (
	// readBuffer is how much is read from a connection at once, in bytes: the library
	// asks for 4 KiB, which is one or two messages a system call.
	readBuffer = 64 << 10
	// maxFrame is how large a frame may be, in bytes: RabbitMQ's own limit is 128 KiB
	// unless it is told otherwise.
	maxFrame = 16 << 20
)

// AMQP 0-9-1 §4.2.3: a frame is a type, a channel, the size of its payload, that,
// and an octet that ends it.
const (
	frameMethod    = 1
	frameHeader    = 2
	frameBody      = 3
	frameHeartbeat = 8
	frameEnd       = 0xCE
	frameOverhead  = 8 // 7 octets before the payload and one after it
)

const basicDeliver = 60<<16 | 60 // class and method

var errFrame = errors.New("RabbitMQ sends what is not AMQP 0-9-1")

func newWire(c net.Conn) *wire {
	return &wire{Conn: c, buf: make([]byte, readBuffer), known: names{}}
}

// divert makes the deliveries that come from now on go to an inbox.
func (c *wire) divert() *inbox {
	in := newInbox()
	c.inbox.Store(in)
	return in
}

// SetReadDeadline implements [net.Conn]. The library sets it anew for each of its
// frames; that is done for each read here, whoever the frames in it are for.
func (c *wire) SetReadDeadline(t time.Time) error {
	c.limit.Store(int64(time.Until(t)))
	return nil
}

// SetDeadline implements [net.Conn]. It is for the handshake, and for the end.
func (c *wire) SetDeadline(t time.Time) error {
	c.limit.Store(0)
	return c.Conn.SetDeadline(t)
}

// Close implements [net.Conn].
func (c *wire) Close() error {
	if in := c.inbox.Load(); in != nil {
		in.close()
	}
	return c.Conn.Close()
}

// Read implements [net.Conn].
func (c *wire) Read(p []byte) (int, error) {
	for len(c.ready) == 0 {
		if err := c.fill(); err != nil {
			return 0, err
		}
	}
	n := copy(p, c.ready)
	c.ready = c.ready[n:]
	return n, nil
}

// fill reads from the connection. After a read that gave much the next one is not
// delayed: there is more already.
func (c *wire) fill() error {
	in := c.inbox.Load()
	if in != nil {
		in.await()
	}
	if gather := time.Duration(c.gather.Load()); gather > 0 && c.last < readBuffer/2 {
		time.Sleep(gather)
	}
	if limit := time.Duration(c.limit.Load()); limit > 0 {
		if err := c.Conn.SetReadDeadline(time.Now().Add(limit)); err != nil {
			return err
		}
	}
	n, err := c.Conn.Read(c.buf[c.n:])
	c.n, c.last = c.n+n, n
	if n == 0 {
		return err
	}
	c.other = c.other[:0]
	err = c.frames()
	c.ready = c.other
	if len(c.whole) > 0 {
		c.inbox.Load().add(c.whole)
		clear(c.whole)
		c.whole = c.whole[:0]
	}
	return err
}

// frames takes the frames that are whole from buf.
func (c *wire) frames() error {
	rest := c.buf[:c.n]
	for len(rest) > 0 {
		switch rest[0] {
		case frameMethod, frameHeader, frameBody, frameHeartbeat:
		default: // a broker that speaks another version says so
			c.plain = true
		}
		if c.plain {
			c.other, rest = append(c.other, rest...), nil
			break
		}
		if len(rest) < frameOverhead {
			break
		}
		size := frameOverhead + int(binary.BigEndian.Uint32(rest[3:]))
		if size > maxFrame {
			return fmt.Errorf("%w: a frame of %d bytes", errFrame, size)
		}
		if size > len(rest) {
			if size > len(c.buf) {
				c.buf = append(make([]byte, 0, size+readBuffer), rest...)[:size+readBuffer]
				c.n = len(rest)
				return nil
			}
			break
		}
		frame := rest[:size]
		rest = rest[size:]
		if frame[size-1] != frameEnd {
			return fmt.Errorf("%w: a frame without an end", errFrame)
		}
		switch mine, err := c.take(frame[0], binary.BigEndian.Uint16(frame[1:]), frame[7:size-1]); {
		case err != nil:
			return err
		case !mine:
			c.other = append(c.other, frame...)
		}
	}
	c.n = copy(c.buf, rest)
	return nil
}

// take reports whether a frame is of a delivery, and takes it.
func (c *wire) take(kind byte, channel uint16, payload []byte) (mine bool, err error) {
	if kind == frameMethod && len(payload) >= 4 && binary.BigEndian.Uint32(payload) == basicDeliver && c.inbox.Load() != nil {
		c.open, c.on = &incoming{}, channel
		return true, c.open.deliver(payload[4:], c.known)
	}
	d := c.open
	if d == nil || channel != c.on {
		return false, nil
	}
	switch kind {
	case frameHeader:
		err = d.header(payload, c.known)
	case frameBody:
		err = d.body(payload)
	default: // AMQP 0-9-1 §4.2.6: another method ends the content
		c.open = nil
		return false, nil
	}
	if err == nil && d.headed && uint64(len(d.Body)) == d.size {
		c.open = nil
		c.whole = append(c.whole, d)
	}
	return true, err
}

// incoming is a delivery with what it takes to settle it.
type incoming struct {
	Delivery
	tag        uint64
	properties []byte // as they came
	size       uint64 // of the body
	headed     bool   // the header is there
}

// deliver reads the arguments of basic.deliver.
func (d *incoming) deliver(args []byte, known names) error {
	r := reader{b: args}
	r.bytes(int(r.uint(1))) // the consumer's tag: there is one consumer
	d.tag = r.uint(8)
	d.Redelivered = r.uint(1)&1 == 1
	r.bytes(int(r.uint(1))) // exchange
	d.RoutingKey = known.get(r.bytes(int(r.uint(1))))
	d.from = d
	return r.err()
}

// ahead is how much memory is taken for a body before it has come, in bytes.
const ahead = 1 << 20

// header reads a content header.
func (d *incoming) header(payload []byte, known names) error {
	r := reader{b: payload}
	r.uint(4) // class and weight
	d.size, d.headed = r.uint(8), true
	var p amqp.Publishing
	if !readProperties(&p, r.b, known) {
		return fmt.Errorf("%w: a content header", errFrame)
	}
	d.ID, d.ContentType, d.ContentEncoding, d.Time = p.MessageId, p.ContentType, p.ContentEncoding, p.Timestamp
	d.KeyID, _ = p.Headers[headerKeyID].(string)
	d.HMAC, _ = p.Headers[headerHMAC].(string)
	space := min(d.size, ahead)
	memory := make([]byte, int(space)+len(r.b)) // one piece for both
	d.properties = append(memory[space:space], r.b...)
	d.Body = memory[:0:space]
	return nil
}

// body adds a piece of the body.
func (d *incoming) body(payload []byte) error {
	if !d.headed || uint64(len(payload)) > d.size-uint64(len(d.Body)) {
		return fmt.Errorf("%w: a body without a header, or longer than that says", errFrame)
	}
	d.Body = append(d.Body, payload...)
	return nil
}

// readProperties reads the properties of a content header, of whose headers it
// keeps those that are texts. It reports whether they are well formed. AMQP 0-9-1
// §4.2.6.1.
func readProperties(p *amqp.Publishing, b []byte, known names) bool {
	r := reader{b: b}
	flags := r.uint(2)
	has := func(bit int) bool { return flags>>bit&1 == 1 }
	text := func(bit int) []byte {
		if !has(bit) {
			return nil
		}
		return r.bytes(int(r.uint(1)))
	}
	p.ContentType, p.ContentEncoding = known.get(text(15)), known.get(text(14))
	if has(13) {
		p.Headers = r.texts()
	}
	if has(12) {
		p.DeliveryMode = uint8(r.uint(1))
	}
	if has(11) {
		p.Priority = uint8(r.uint(1))
	}
	p.CorrelationId, p.ReplyTo = string(text(10)), string(text(9))
	text(8) // expiration
	p.MessageId = string(text(7))
	if has(6) {
		p.Timestamp = time.Unix(int64(r.uint(8)), 0)
	}
	p.Type = string(text(5))
	text(4) // user id
	p.AppId = string(text(3))
	return !r.short
}

// names are texts that come again and again, so that they take memory once.
type names map[string]string

// maxNames bounds them: routing keys may be of any number.
const maxNames = 1000

func (n names) get(b []byte) string {
	s, ok := n[string(b)]
	if !ok {
		s = string(b)
		if len(n) < maxNames {
			n[s] = s
		}
	}
	return s
}

// reader reads AMQP's encodings of values, AMQP 0-9-1 §4.2.5.
type reader struct {
	b     []byte
	short bool // there was less than was asked for
}

func (r *reader) err() error {
	if r.short {
		return fmt.Errorf("%w: a frame that is too short", errFrame)
	}
	return nil
}

func (r *reader) bytes(n int) []byte {
	if n < 0 || n > len(r.b) {
		r.b, r.short = nil, true
		return nil
	}
	b := r.b[:n]
	r.b = r.b[n:]
	return b
}

// uint reads an unsigned integer of n octets.
func (r *reader) uint(n int) (v uint64) {
	for _, b := range r.bytes(n) {
		v = v<<8 | uint64(b)
	}
	return v
}

// texts reads a table and returns those of its values that are texts; nil: there
// are none.
func (r *reader) texts() (texts amqp.Table) {
	in := reader{b: r.bytes(int(r.uint(4)))}
	for len(in.b) > 0 {
		key := in.bytes(int(in.uint(1)))
		size := 0
		switch kind := in.uint(1); kind {
		case 't', 'b', 'B':
			size = 1
		case 's', 'u':
			size = 2
		case 'I', 'i', 'f':
			size = 4
		case 'l', 'L', 'd', 'T':
			size = 8
		case 'D':
			size = 5
		case 'S', 'x', 'A', 'F':
			v := in.bytes(int(in.uint(4)))
			if kind == 'S' && !in.short {
				if texts == nil {
					texts = amqp.Table{}
				}
				texts[string(key)] = string(v)
			}
		case 'V':
		default:
			in.short = true
		}
		in.bytes(size)
		if in.short {
			r.short = true
			return nil
		}
	}
	return texts
}
