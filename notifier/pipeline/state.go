package pipeline

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"time"

	"github.com/kvmeter/kvmeter/notifier/pipeline/python"
	"github.com/kvmeter/kvmeter/sample"
)

// errState is wrapped by every error about a record of what stages remember.
var errState = errors.New("damaged record")

// remembering is a stage that remembers something. What it remembers is written
// as operations, each whole in itself, and is the same again when all of them
// are read in order.
type remembering interface {
	stage
	// track makes the stage remember what changed, for changes.
	track()
	// changes writes the operations since it was last called.
	changes(w *writer)
	// all calls op with each of the operations that lead to what there is.
	all(op func(write func(w *writer)))
	// load does an operation.
	load(r *reader)
}

// The operations.
const (
	opSet    = 1 // a key, and what is known of it
	opClear  = 2 // nothing is left
	opRotate = 3 // what is known so far may be forgotten next
	opDelete = 4 // a key
	opTotals = 5 // what is not known of a key alone
)

// writer writes what stages remember. Texts and numbers are as compact as is
// simple; the record they are part of is compressed.
type writer struct{ buf []byte }

func (w *writer) byte(b byte)     { w.buf = append(w.buf, b) }
func (w *writer) uint(v uint64)   { w.buf = binary.AppendUvarint(w.buf, v) }
func (w *writer) int(v int64)     { w.buf = binary.AppendVarint(w.buf, v) }
func (w *writer) fixed(v uint64)  { w.buf = binary.BigEndian.AppendUint64(w.buf, v) }
func (w *writer) float(v float64) { w.fixed(math.Float64bits(v)) }

func (w *writer) string(s string) {
	w.uint(uint64(len(s)))
	w.buf = append(w.buf, s...)
}

func (w *writer) bytes(b []byte) {
	w.uint(uint64(len(b)))
	w.buf = append(w.buf, b...)
}

func (w *writer) bool(b bool) {
	if b {
		w.byte(1)
	} else {
		w.byte(0)
	}
}

// time writes a time to the microsecond; the zero time is 0.
func (w *writer) time(t time.Time) {
	if t.IsZero() {
		w.int(0)
	} else {
		w.int(t.UnixMicro())
	}
}

func (w *writer) volume(v sample.Volume) {
	w.byte(byte(v.Tag))
	w.uint(v.Bits)
}

func (w *writer) number(n python.Number) { w.bytes(n.Append(nil)) }

func (w *writer) id(id sample.ID) {
	w.string(id.Text)
	if id.Text == "" {
		w.buf = append(w.buf, id.UUID[:]...)
	}
}

func (w *writer) item(it *Item) {
	w.string(it.pipeline)
	w.bool(it.derived)
	w.id(it.ID)
	w.string(it.Name)
	w.string(string(it.Kind))
	w.string(it.Unit)
	w.volume(it.Volume)
	w.string(it.Resource)
	w.string(it.Source)
	w.string(it.Project)
	w.string(it.User)
	w.int(it.Time)
	w.string(string(it.Origin))
	w.fixed(uint64(it.Incarnation))
	w.bytes(it.Metadata)
	f := it.Foreign
	w.bool(f != nil)
	if f != nil {
		w.string(f.UserName)
		w.string(f.ProjectName)
		w.string(f.Timestamp)
		w.bool(f.HasMonotonic)
		w.float(f.Monotonic)
	}
}

// reader reads what writer wrote, and keeps the first error. After one it returns
// zeros.
type reader struct {
	buf []byte
	err error
}

func (r *reader) fail(what string) {
	if r.err == nil {
		r.err = fmt.Errorf("%w: %s", errState, what)
	}
}

func (r *reader) more() bool { return r.err == nil && len(r.buf) > 0 }

func (r *reader) take(n int) []byte {
	if r.err != nil || n > len(r.buf) {
		r.fail("it ends too early")
		return nil
	}
	b := r.buf[:n]
	r.buf = r.buf[n:]
	return b
}

func (r *reader) byte() byte {
	if b := r.take(1); b != nil {
		return b[0]
	}
	return 0
}

func (r *reader) uint() uint64 {
	v, n := binary.Uvarint(r.buf)
	if n <= 0 {
		r.fail("no number")
		return 0
	}
	r.take(n)
	return v
}

func (r *reader) int() int64 {
	v, n := binary.Varint(r.buf)
	if n <= 0 {
		r.fail("no number")
		return 0
	}
	r.take(n)
	return v
}

func (r *reader) fixed() uint64 {
	if b := r.take(8); b != nil {
		return binary.BigEndian.Uint64(b)
	}
	return 0
}

func (r *reader) float() float64 { return math.Float64frombits(r.fixed()) }

// view returns bytes that are part of the record.
func (r *reader) view() []byte {
	n := r.uint()
	if n > uint64(len(r.buf)) {
		r.fail("it ends too early")
		return nil
	}
	return r.take(int(n))
}

func (r *reader) string() string { return string(r.view()) }

// bytes returns a copy, nil where it is empty.
func (r *reader) bytes() []byte {
	if b := r.view(); len(b) > 0 {
		return append([]byte(nil), b...)
	}
	return nil
}

func (r *reader) bool() bool { return r.byte() != 0 }

func (r *reader) time() time.Time {
	if v := r.int(); v != 0 {
		return time.UnixMicro(v)
	}
	return time.Time{}
}

func (r *reader) volume() sample.Volume {
	v := sample.Volume{Tag: sample.Tag(r.byte()), Bits: r.uint()}
	if err := v.Check(); err != nil && r.err == nil {
		r.err = fmt.Errorf("%w: %w", errState, err)
	}
	return v
}

func (r *reader) number() python.Number {
	n, err := python.ReadNumber(r.view())
	if err != nil && r.err == nil {
		r.err = fmt.Errorf("%w: %w", errState, err)
	}
	return n
}

func (r *reader) id() sample.ID {
	id := sample.ID{Text: r.string()}
	if id.Text == "" {
		copy(id.UUID[:], r.take(len(id.UUID)))
	}
	return id
}

func (r *reader) item() Item {
	it := Item{row: -1, pipeline: r.string(), derived: r.bool()}
	it.ID = r.id()
	it.Name, it.Kind, it.Unit, it.Volume = r.string(), sample.Kind(r.string()), r.string(), r.volume()
	it.Resource, it.Source, it.Project, it.User = r.string(), r.string(), r.string(), r.string()
	it.Time, it.Origin, it.Incarnation = r.int(), sample.Origin(r.string()), sample.Incarnation(r.fixed())
	it.Metadata = r.bytes()
	if r.bool() {
		it.Foreign = &sample.Foreign{UserName: r.string(), ProjectName: r.string(), Timestamp: r.string()}
		it.Foreign.HasMonotonic, it.Foreign.Monotonic = r.bool(), r.float()
	}
	return it
}

// memory remembers a value by key for at least the limit/2 keys that were set
// last, and at most limit, and none for longer than twice the age.
type memory[K comparable, V any] struct {
	limit      int
	age        time.Duration // 0: any
	young, old map[K]V
	now, since time.Time // of the batch at hand; when young was begun

	tracked bool
	changed []change[K] // if tracked
}

// change is a key that was set, or that young became old.
type change[K comparable] struct {
	key     K
	rotated bool
}

func newMemory[K comparable, V any](b Bound) *memory[K, V] {
	return &memory[K, V]{limit: max(2, b.Series), age: b.Age, young: map[K]V{}}
}

// begin says what time it is.
func (m *memory[K, V]) begin(now time.Time) {
	m.now = now
	if m.since.IsZero() {
		m.since = now
	}
	if m.age > 0 && now.Sub(m.since) >= m.age && (len(m.young) > 0 || len(m.old) > 0) {
		m.rotate()
	}
}

func (m *memory[K, V]) rotate() {
	m.old, m.young, m.since = m.young, make(map[K]V), m.now
	if m.tracked {
		m.changed = append(m.changed, change[K]{rotated: true})
	}
}

func (m *memory[K, V]) get(k K) (V, bool) {
	v, ok := m.young[k]
	if !ok {
		v, ok = m.old[k]
	}
	return v, ok
}

func (m *memory[K, V]) set(k K, v V) {
	if len(m.young) >= m.limit/2 {
		if _, ok := m.young[k]; !ok {
			m.rotate()
		}
	}
	m.young[k] = v
	if m.tracked {
		m.changed = append(m.changed, change[K]{key: k})
	}
}

// write writes the changes, and forgets them.
func (m *memory[K, V]) write(w *writer, set func(*writer, K, V)) {
	for _, c := range m.changed {
		if c.rotated {
			w.byte(opRotate)
			w.time(m.since)
		} else if v, ok := m.get(c.key); ok {
			w.byte(opSet)
			set(w, c.key, v)
		}
	}
	clear(m.changed)
	m.changed = m.changed[:0]
}

// all calls op with what leads to what there is.
func (m *memory[K, V]) all(op func(func(*writer)), set func(*writer, K, V)) {
	generation := func(of map[K]V) {
		for k, v := range of {
			op(func(w *writer) {
				w.byte(opSet)
				set(w, k, v)
			})
		}
	}
	generation(m.old)
	op(func(w *writer) {
		w.byte(opRotate)
		w.time(m.since)
	})
	generation(m.young)
}

// load does an operation; get reads what set has written.
func (m *memory[K, V]) load(r *reader, get func(*reader) (K, V)) {
	switch r.byte() {
	case opSet:
		if k, v := get(r); r.err == nil {
			m.set(k, v)
		}
	case opRotate:
		m.now = r.time()
		m.rotate()
	default:
		r.fail("unknown operation")
	}
}
