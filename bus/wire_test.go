package bus

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

// frame returns a frame as RabbitMQ sends it.
func frame(kind byte, channel uint16, payload ...[]byte) []byte {
	all := bytes.Join(payload, nil)
	f := binary.BigEndian.AppendUint16([]byte{kind}, channel)
	f = binary.BigEndian.AppendUint32(f, uint32(len(all)))
	return append(append(f, all...), frameEnd)
}

func short(s string) []byte { return append([]byte{byte(len(s))}, s...) }

func long(s string) []byte {
	return append(binary.BigEndian.AppendUint32(nil, uint32(len(s))), s...)
}

// deliver returns the method of a delivery.
func deliver(tag uint64, redelivered byte, key string) []byte {
	b := append([]byte{0, 60, 0, 60}, short("ctag-1")...)
	b = append(binary.BigEndian.AppendUint64(b, tag), redelivered)
	return append(append(b, short("nova")...), short(key)...)
}

// header returns a content header with every property there is.
func header(size int, table ...[]byte) []byte {
	b := binary.BigEndian.AppendUint64([]byte{0, 60, 0, 0}, uint64(size))
	b = append(b, 0xFF, 0xF8)
	b = append(append(b, short("application/json")...), short("utf-8")...)
	b = append(b, long(string(bytes.Join(table, nil)))...)
	b = append(b, 2, 7) // delivery mode, priority
	for _, s := range []string{"correlation", "reply", "60000", "message-1"} {
		b = append(b, short(s)...)
	}
	b = binary.BigEndian.AppendUint64(b, 1_800_000_000)
	for _, s := range []string{"type", "guest", "app"} {
		b = append(b, short(s)...)
	}
	return b
}

// entry is one of a table.
func entry(key string, kind byte, value ...byte) []byte {
	return append(append(short(key), kind), value...)
}

// table has a value of each kind.
var table = [][]byte{
	entry(headerKeyID, 'S', long("node-1")...), entry("t", 't', 1), entry("b", 'b', 1), entry("B", 'B', 1),
	entry("s", 's', 1, 2), entry("u", 'u', 1, 2), entry("I", 'I', 1, 2, 3, 4), entry("i", 'i', 1, 2, 3, 4), entry("f", 'f', 1, 2, 3, 4),
	entry("l", 'l', 1, 2, 3, 4, 5, 6, 7, 8), entry("d", 'd', 1, 2, 3, 4, 5, 6, 7, 8), entry("T", 'T', 1, 2, 3, 4, 5, 6, 7, 8),
	entry("D", 'D', 1, 2, 3, 4, 5), entry("x", 'x', long("bytes")...), entry("F", 'F', long("\x01kV")...), entry("A", 'A', long("V")...),
	entry("V", 'V'), entry(headerHMAC, 'S', long("hmac")...),
}

// pass sends what a broker says to a wire in pieces, and returns the deliveries and
// what is left for the library.
func pass(t *testing.T, text []byte, piece int, gather time.Duration) (ds []*incoming, rest []byte, err error) {
	t.Helper()
	near, far := net.Pipe()
	w := newWire(near)
	in := w.divert()
	w.gather.Store(int64(gather))
	go func() {
		for from := 0; from < len(text); from += piece {
			if _, err := far.Write(text[from:min(from+piece, len(text))]); err != nil {
				return // the reader says why
			}
		}
		_ = far.Close()
	}()
	rest, err = io.ReadAll(io.MultiReader(io.LimitReader(w, 3), w))
	_ = near.Close()
	return in.take(nil), rest, err
}

func TestDeliveriesAreTakenOutOfWhatTheBrokerSends(t *testing.T) {
	const key = "notifications.info"
	large := strings.Repeat("0123456789abcdef", 20_000) // five times what is read at once
	other := [][]byte{
		frame(frameMethod, 0, []byte{0, 10, 0, 10, 0, 9}), frame(frameHeartbeat, 0), frame(frameMethod, 1, []byte{0, 60, 0, 21}),
		frame(frameMethod, 2, []byte{0, 60, 0, 71}), frame(frameHeader, 2, header(3)), frame(frameBody, 2, []byte("get")),
	}
	text := bytes.Join([][]byte{
		other[0],
		frame(frameMethod, 1, deliver(1, 0, key)), frame(frameHeader, 1, header(5, table...)), frame(frameBody, 1, []byte("hello")),
		frame(frameMethod, 1, deliver(2, 1, key)), other[1], frame(frameHeader, 1, header(0)), // an empty body has no frame
		other[2],
		frame(frameMethod, 1, deliver(3, 0, key)), frame(frameHeader, 1, header(len(large))),
		frame(frameBody, 1, []byte(large[:130_000])), other[3], other[4], other[5], frame(frameBody, 1, []byte(large[130_000:])),
	}, nil)
	for _, piece := range []int{97, 5000, 1 << 20} {
		for _, gather := range []time.Duration{0, time.Microsecond} {
			ds, rest, err := pass(t, text, piece, gather)
			if err != nil {
				t.Fatalf("in pieces of %d: %v", piece, err)
			}
			if want := bytes.Join(other, nil); !bytes.Equal(rest, want) {
				t.Errorf("in pieces of %d: got %q for the library, want %q", piece, rest, want)
			}
			if len(ds) != 3 {
				t.Fatalf("in pieces of %d: got %d deliveries, want 3", piece, len(ds))
			}
			for i, want := range []Delivery{
				{Message: Message{KeyID: "node-1", HMAC: "hmac", Body: []byte("hello")}}, {Redelivered: true}, {Message: Message{Body: []byte(large)}},
			} {
				d := ds[i]
				if d.tag != uint64(i+1) || d.from != d || d.Redelivered != want.Redelivered || d.KeyID != want.KeyID || d.HMAC != want.HMAC || !bytes.Equal(d.Body, want.Body) ||
					d.RoutingKey != key || d.ID != "message-1" || d.ContentType != "application/json" || d.ContentEncoding != "utf-8" || d.Time.Unix() != 1_800_000_000 {
					t.Errorf("in pieces of %d: delivery %d is %+v", piece, i+1, d)
				}
			}
		}
	}
}

func TestADeadLetterHasThePropertiesOfTheDelivery(t *testing.T) {
	ds, _, err := pass(t, bytes.Join([][]byte{
		frame(frameMethod, 1, deliver(1, 0, "key")), frame(frameHeader, 1, header(4, table...)), frame(frameBody, 1, []byte("body")),
	}, nil), 1000, 0)
	if err != nil || len(ds) != 1 {
		t.Fatal(ds, err)
	}
	got := deadLetter("queue", ds[0], errors.New("no good")).msg
	want := amqp.Publishing{
		Headers: amqp.Table{
			headerKeyID: "node-1", headerHMAC: "hmac",
			headerReason: "no good", headerQueue: "queue", headerKey: "key",
		},
		ContentType: "application/json", ContentEncoding: "utf-8", DeliveryMode: amqp.Persistent, Priority: 7, CorrelationId: "correlation",
		ReplyTo: "reply", MessageId: "message-1", Timestamp: time.Unix(1_800_000_000, 0), Type: "type", AppId: "app", Body: []byte("body"),
	}
	if fmt.Sprintf("%+v", got) != fmt.Sprintf("%+v", want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
}

func TestWhatIsNotAMQPEndsTheConnection(t *testing.T) {
	start := frame(frameMethod, 1, deliver(1, 0, "key"))
	for name, text := range map[string][]byte{
		"a frame that is too large":            {frameMethod, 0, 0, 0xFF, 0xFF, 0xFF, 0xFF, 0},
		"a frame without an end":               {frameMethod, 0, 0, 0, 0, 0, 0, 1},
		"a delivery that is cut short":         frame(frameMethod, 1, deliver(1, 0, "key")[:12]),
		"a header that is cut short":           append(bytes.Clone(start), frame(frameHeader, 1, header(4)[:20])...),
		"a table that is cut short":            append(bytes.Clone(start), frame(frameHeader, 1, header(4, entry("k", 'S', 0, 0, 0, 9)))...),
		"a value of a kind that is not known":  append(bytes.Clone(start), frame(frameHeader, 1, header(4, entry("k", '?', 1)))...),
		"a body without a header":              append(bytes.Clone(start), frame(frameBody, 1, []byte("x"))...),
		"a body that is longer than it should": append(append(bytes.Clone(start), frame(frameHeader, 1, header(1))...), frame(frameBody, 1, []byte("xy"))...),
	} {
		if ds, _, err := pass(t, text, 1000, 0); !errors.Is(err, errFrame) || len(ds) > 0 {
			t.Errorf("%s: got %d deliveries and %v", name, len(ds), err)
		}
	}
	// What speaks no AMQP 0-9-1 is for the library to complain of.
	for _, text := range []string{"AMQP\x00\x01\x00\x00", "HTTP/1.1 400 Bad Request\r\n\r\n"} {
		if _, rest, err := pass(t, []byte(text), 5, 0); err != nil || string(rest) != text {
			t.Errorf("%q: got %q and %v", text, rest, err)
		}
	}
}

func TestDeliveriesThatNobodyAskedForAreTheLibrarys(t *testing.T) {
	near, far := net.Pipe()
	text := append(frame(frameMethod, 1, deliver(1, 0, "key")), frame(frameHeader, 1, header(0))...)
	go func() {
		_, _ = far.Write(text)
		_ = far.Close()
	}()
	if got, err := io.ReadAll(newWire(near)); err != nil || !bytes.Equal(got, text) {
		t.Errorf("got %q and %v, want %q", got, err, text)
	}
}

func TestNoMoreIsReadThanMayWait(t *testing.T) {
	near, far := net.Pipe()
	w := newWire(near)
	in := w.divert()
	half := maxWaiting/2 + 1
	in.add([]*incoming{{Delivery: Delivery{Message: Message{Body: make([]byte, half)}}}, {Delivery: Delivery{Message: Message{Body: make([]byte, half)}}}})
	read := make(chan error, 1)
	go func() {
		_, err := w.Read(make([]byte, 10))
		read <- err
	}()
	// Once somebody takes what waits, reading goes on.
	written := make(chan struct{})
	go func() {
		_, _ = far.Write(frame(frameHeartbeat, 0))
		close(written)
	}()
	select {
	case <-written:
		t.Error("it was read, though more waits than may")
	case <-time.After(50 * time.Millisecond): // reads too late are not found, which fails nothing
	}
	if n := len(in.take(nil)); n != 2 {
		t.Errorf("%d deliveries, want 2", n)
	}
	<-written
	if err := <-read; err != nil {
		t.Error(err)
	}
	// And the end of the connection ends the waiting.
	in.add([]*incoming{{Delivery: Delivery{Message: Message{Body: make([]byte, 2*half)}}}})
	go func() {
		_, err := w.Read(make([]byte, 10))
		read <- err
	}()
	_ = w.Close()
	if err := <-read; err == nil {
		t.Error("a closed connection is read")
	}
	_ = far.Close()
}

func FuzzWire(f *testing.F) {
	f.Add(bytes.Join([][]byte{
		frame(frameMethod, 1, deliver(1, 0, "key")), frame(frameHeader, 1, header(5, table...)), frame(frameBody, 1, []byte("hello")),
	}, nil), 3)
	f.Fuzz(func(t *testing.T, text []byte, piece int) {
		whole, rest, err := pass(t, text, max(1, len(text)), 0)
		pieces, rest2, err2 := pass(t, text, max(1, piece), 0)
		if len(whole) != len(pieces) || err == nil && !bytes.Equal(rest, rest2) || (err == nil) != (err2 == nil) {
			t.Errorf("at once: %d deliveries, %q, %v; in pieces: %d, %q, %v", len(whole), rest, err, len(pieces), rest2, err2)
		}
	})
}
