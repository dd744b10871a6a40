package sample

import (
	"bytes"
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/zstd"
	"github.com/vmihailenco/msgpack/v5"
	"github.com/vmihailenco/msgpack/v5/msgpcode"
)

// The content type and encoding of an encoded batch.
const (
	ContentType     = "application/vnd.kvmeter.batch.v1+msgpack"
	ContentEncoding = "zstd"
)

// version is the first element of a batch. A decoder reads one version back
// and one ahead: elements that follow the known ones are ignored.
const version = 1

// MaxDecoded bounds what a batch may decompress to, in bytes.
const MaxDecoded = 16 << 20

// ErrMalformed is wrapped by every error of [Decoder.Decode].
var ErrMalformed = errors.New("malformed batch")

// Encoder turns batches into zstd-compressed msgpack. It is not safe for
// concurrent use.
type Encoder struct {
	buf  bytes.Buffer
	text []byte // scratch of events
	enc  *msgpack.Encoder
	zstd *zstd.Encoder
}

// NewEncoder returns an encoder.
func NewEncoder() (*Encoder, error) {
	z, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(1<<20), zstd.WithLowerEncoderMem(true))
	if err != nil {
		return nil, fmt.Errorf("zstd: %w", err)
	}
	e := &Encoder{zstd: z}
	e.enc = msgpack.NewEncoder(&e.buf)
	return e, nil
}

// Encode appends the encoded batch to dst. It returns an error for a batch
// that does not pass [Batch.Check].
func (e *Encoder) Encode(dst []byte, b *Batch) ([]byte, error) {
	if err := b.Check(); err != nil {
		return dst, fmt.Errorf("encode batch: %w", err)
	}
	e.buf.Reset()
	if err := e.batch(b); err != nil {
		return dst, fmt.Errorf("encode batch: %w", err)
	}
	if e.buf.Len() > MaxDecoded {
		return dst, fmt.Errorf("encode batch: %d bytes, at most %d are read; split it", e.buf.Len(), MaxDecoded)
	}
	return e.zstd.EncodeAll(e.buf.Bytes(), dst), nil
}

func (e *Encoder) batch(b *Batch) error {
	w := &arrayWriter{enc: e.enc}
	told := b.Of != "" || b.Since != 0
	if told {
		w.array(13)
	} else {
		w.array(11)
	}
	w.uint(version)
	w.bytes(b.ID[:])
	w.string(b.Node)
	w.uint(b.Epoch)
	w.uint(b.Seq)
	w.int(b.Base)
	w.array(len(b.Meters))
	for _, m := range b.Meters {
		w.array(3)
		w.string(m.Name)
		w.string(string(m.Kind))
		w.string(m.Unit)
	}
	w.array(len(b.Rows))
	for i := range b.Rows {
		r := &b.Rows[i]
		if r.Foreign == nil {
			w.array(7)
		} else {
			w.array(8)
		}
		w.string(r.Resource)
		w.int(r.Offset)
		w.uint(uint64(r.Incarnation))
		w.string(r.Source)
		w.string(r.Project)
		w.string(r.User)
		w.bytes(r.Metadata)
		if r.Foreign != nil {
			w.foreign(r.Foreign)
		}
	}
	w.array(len(b.Columns))
	for i := range b.Columns {
		c := &b.Columns[i]
		w.array(5)
		w.uint(uint64(c.Meter))
		w.string(string(c.Origin))
		w.uint(uint64(c.Tag))
		w.bytes(c.Bitmap)
		w.array(len(c.Values))
		for _, v := range c.Values {
			w.volume(Volume{v, c.Tag})
		}
	}
	if b.IDs == nil {
		w.nil()
	} else {
		w.array(len(b.IDs))
		for _, id := range b.IDs {
			w.string(id)
		}
	}
	w.array(len(b.Gaps))
	for _, g := range b.Gaps {
		w.array(6)
		w.string(g.Meter)
		w.string(g.Resource)
		w.int(g.From)
		w.int(g.To)
		w.string(g.Reason)
		w.string(g.Node)
	}
	if told {
		w.string(b.Of)
		w.int(b.Since)
	}
	return w.err
}

// arrayWriter writes msgpack and keeps the first error.
type arrayWriter struct {
	enc *msgpack.Encoder
	err error
}

func (w *arrayWriter) do(err error) {
	if w.err == nil {
		w.err = err
	}
}

func (w *arrayWriter) array(n int)     { w.do(w.enc.EncodeArrayLen(n)) }
func (w *arrayWriter) uint(v uint64)   { w.do(w.enc.EncodeUint(v)) }
func (w *arrayWriter) int(v int64)     { w.do(w.enc.EncodeInt(v)) }
func (w *arrayWriter) string(s string) { w.do(w.enc.EncodeString(s)) }
func (w *arrayWriter) nil()            { w.do(w.enc.EncodeNil()) }

func (w *arrayWriter) foreign(f *Foreign) {
	w.array(4)
	w.string(f.UserName)
	w.string(f.ProjectName)
	w.string(f.Timestamp)
	if f.HasMonotonic {
		w.do(w.enc.EncodeFloat64(f.Monotonic))
	} else {
		w.nil()
	}
}

func (w *arrayWriter) bytes(b []byte) {
	if b == nil {
		b = []byte{} // the library writes nil for a nil slice
	}
	w.do(w.enc.EncodeBytes(b))
}

func (w *arrayWriter) volume(v Volume) {
	switch v.Tag {
	case I64:
		w.int(int64(v.Bits))
	case F64:
		w.do(w.enc.EncodeFloat64(v.Float64()))
	default:
		w.uint(v.Bits)
	}
}

// Decoder reads what [Encoder] writes. It trusts nothing in its input. It is
// not safe for concurrent use.
type Decoder struct {
	zstd    *zstd.Decoder
	dec     *msgpack.Decoder
	buf     []byte
	in      bytes.Reader
	text    map[string]string // strings that recur from batch to batch
	scratch []byte
}

// NewDecoder returns a decoder.
func NewDecoder() (*Decoder, error) {
	z, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(MaxDecoded), zstd.WithDecodeAllCapLimit(false))
	if err != nil {
		return nil, fmt.Errorf("zstd: %w", err)
	}
	return &Decoder{zstd: z, dec: msgpack.NewDecoder(nil), text: map[string]string{}}, nil
}

// Decode returns the batch in body. Its error wraps [ErrMalformed] and says
// what is wrong. The batch shares no memory with body or the decoder.
func (d *Decoder) Decode(body []byte) (*Batch, error) {
	raw, err := d.zstd.DecodeAll(body, d.buf[:0])
	if err != nil {
		return nil, fmt.Errorf("%w: decompress: %w", ErrMalformed, err)
	}
	d.buf = raw
	d.in.Reset(raw)
	d.dec.Reset(&d.in)
	b := &Batch{}
	r := &arrayReader{dec: d.dec, in: &d.in, text: d.text, scratch: d.scratch}
	r.batch(b)
	d.scratch = r.scratch
	if r.err == nil && d.in.Len() > 0 {
		r.err = fmt.Errorf("%d bytes after the batch", d.in.Len())
	}
	if r.err == nil {
		r.err = b.Check()
	}
	if r.err != nil {
		if errors.Is(r.err, io.EOF) {
			r.err = io.ErrUnexpectedEOF
		}
		return nil, fmt.Errorf("%w: %w", ErrMalformed, r.err)
	}
	return b, nil
}

// arrayReader reads msgpack and keeps the first error. After an error it
// returns zeros.
type arrayReader struct {
	dec  *msgpack.Decoder
	in   *bytes.Reader
	text map[string]string // strings that recur
	err  error

	scratch []byte
	samples int // values so far
}

func (r *arrayReader) fail(format string, args ...any) {
	if r.err == nil {
		r.err = fmt.Errorf(format, args...)
	}
}

func (r *arrayReader) batch(b *Batch) {
	extra := r.array("batch", 11)
	if v := r.uint("version"); r.err == nil && (v == 0 || v > version+1) {
		r.fail("version %d; this program reads up to %d", v, version+1)
	}
	id := r.bytes("batch id")
	if r.err == nil && len(id) != len(b.ID) {
		r.fail("batch id of %d bytes", len(id))
	}
	copy(b.ID[:], id)
	b.Node = r.string("node")
	b.Epoch = r.uint("epoch")
	b.Seq = r.uint("seq")
	b.Base = r.int("base time")
	b.Meters = make([]MeterRef, r.list("meters"))
	for i := range b.Meters {
		more := r.array("meter", 3)
		b.Meters[i] = MeterRef{r.string("meter name"), Kind(r.string("meter type")), r.string("meter unit")}
		r.skip(more)
	}
	b.Rows = make([]Row, r.list("rows"))
	for i := range b.Rows {
		more := r.array("row", 7)
		b.Rows[i] = Row{
			Resource: r.string("resource"), Offset: r.int("time"), Incarnation: Incarnation(r.uint("incarnation")),
			Source: r.string("source"), Project: r.string("project"), User: r.string("user"), Metadata: r.bytes("metadata"),
		}
		if more > 0 {
			b.Rows[i].Foreign = r.foreign()
		}
		r.skip(more - 1)
	}
	b.Columns = make([]Column, r.list("columns"))
	for i := range b.Columns {
		r.column(&b.Columns[i])
	}
	if r.null("ids") {
		b.IDs = nil
	} else {
		b.IDs = make([]string, r.list("ids"))
		for i := range b.IDs {
			b.IDs[i] = r.string("id")
		}
	}
	b.Gaps = make([]Gap, r.list("gaps"))
	for i := range b.Gaps {
		more := r.array("gap", 5)
		b.Gaps[i] = Gap{
			Meter: r.string("gap meter"), Resource: r.string("gap resource"),
			From: r.int("gap start"), To: r.int("gap end"), Reason: r.string("gap reason"),
		}
		if more > 0 {
			b.Gaps[i].Node = r.string("gap node")
		}
		r.skip(more - 1)
	}
	if extra > 1 {
		b.Of, b.Since = r.string("host"), r.int("begin of metering")
		extra -= 2
	}
	r.skip(extra)
}

// foreign returns what only foreign samples have, nil where there is none.
func (r *arrayReader) foreign() *Foreign {
	if r.null("foreign fields") {
		return nil
	}
	more := r.array("foreign fields", 4)
	f := &Foreign{UserName: r.string("user name"), ProjectName: r.string("project name"), Timestamp: r.string("timestamp")}
	if !r.null("monotonic time") {
		v := Volume{r.float("monotonic time"), F64}
		if err := v.Check(); err != nil {
			r.fail("monotonic time: %w", err)
		}
		f.Monotonic, f.HasMonotonic = v.Float64(), true
	}
	r.skip(more)
	return f
}

func (r *arrayReader) column(c *Column) {
	more := r.array("column", 5)
	c.Meter = int(min(r.uint("meter index"), MaxDecoded))
	c.Origin = Origin(r.string("origin"))
	tag := r.uint("number kind")
	if r.err == nil && tag > uint64(F64) {
		r.fail("number kind %d", tag)
	}
	c.Tag = Tag(tag)
	c.Bitmap = r.bytes("bitmap")
	n := r.list("values")
	if r.samples += n; r.samples > MaxSamples {
		r.fail("more than %d samples", MaxSamples)
		return
	}
	c.Values = make([]uint64, n)
	for i := range c.Values {
		switch c.Tag {
		case I64:
			c.Values[i] = uint64(r.int("value"))
		case F64:
			c.Values[i] = r.float("value")
		default:
			c.Values[i] = r.uint("value")
		}
	}
	r.skip(more)
}

// code returns the next element's first byte without taking it.
func (r *arrayReader) code(what string) byte {
	if r.err != nil {
		return msgpcode.Nil
	}
	c, err := r.dec.PeekCode()
	if err != nil {
		r.fail("%s: %w", what, err)
	}
	return c
}

// list returns the length of an array. It is bounded before anything is
// allocated: no list of a batch is longer than its samples may be many, and
// each element takes a byte at least.
func (r *arrayReader) list(what string) int {
	c := r.code(what)
	if r.err != nil {
		return 0
	}
	if !msgpcode.IsFixedArray(c) && c != msgpcode.Array16 && c != msgpcode.Array32 {
		r.fail("%s: code %#x is no array", what, c)
		return 0
	}
	n, err := r.dec.DecodeArrayLen()
	if err != nil {
		r.fail("%s: %w", what, err)
		return 0
	}
	if n < 0 || n > min(MaxSamples, r.in.Len()) {
		r.fail("%s: array of %d elements, %d bytes are left and at most %d elements fit", what, n, r.in.Len(), MaxSamples)
		return 0
	}
	return n
}

// array reads the length of an array of at least want elements and returns
// how many more it has.
func (r *arrayReader) array(what string, want int) int {
	n := r.list(what)
	if r.err == nil && n < want {
		r.fail("%s: %d elements, %d are needed", what, n, want)
	}
	return n - want
}

// skip passes over n elements, with all that is in them. It does not recurse as
// the library does: a batch may nest as deep as it has bytes.
func (r *arrayReader) skip(n int) {
	for ; n > 0 && r.err == nil; n-- {
		c := r.code("skip")
		var inner int
		var err error
		switch {
		case r.err != nil:
			return
		case msgpcode.IsFixedArray(c), c == msgpcode.Array16, c == msgpcode.Array32:
			inner, err = r.dec.DecodeArrayLen()
		case msgpcode.IsFixedMap(c), c == msgpcode.Map16, c == msgpcode.Map32:
			inner, err = r.dec.DecodeMapLen()
			inner *= 2
		default:
			err = r.dec.Skip()
		}
		if err != nil {
			r.fail("skip: %w", err)
		}
		n += inner
	}
}

// null takes the next element if it is nil, and reports whether it was.
func (r *arrayReader) null(what string) bool {
	if c := r.code(what); r.err != nil || c != msgpcode.Nil {
		return false
	}
	if err := r.dec.DecodeNil(); err != nil {
		r.fail("%s: %w", what, err)
	}
	return true
}

func (r *arrayReader) uint(what string) uint64 {
	c := r.code(what)
	if r.err != nil {
		return 0
	}
	if c > msgpcode.PosFixedNumHigh && (c < msgpcode.Uint8 || c > msgpcode.Uint64) {
		r.fail("%s: code %#x is no unsigned integer", what, c)
		return 0
	}
	v, err := r.dec.DecodeUint64()
	if err != nil {
		r.fail("%s: %w", what, err)
	}
	return v
}

func (r *arrayReader) int(what string) int64 {
	c := r.code(what)
	if r.err != nil {
		return 0
	}
	switch {
	case c <= msgpcode.PosFixedNumHigh, c >= msgpcode.NegFixedNumLow, c >= msgpcode.Int8 && c <= msgpcode.Int64:
		v, err := r.dec.DecodeInt64()
		if err != nil {
			r.fail("%s: %w", what, err)
		}
		return v
	case c >= msgpcode.Uint8 && c <= msgpcode.Uint64:
		v, err := r.dec.DecodeUint64()
		if err != nil {
			r.fail("%s: %w", what, err)
		} else if v > 1<<63-1 {
			r.fail("%s: %d does not fit a signed integer", what, v)
		}
		return int64(v)
	}
	r.fail("%s: code %#x is no integer", what, c)
	return 0
}

func (r *arrayReader) float(what string) uint64 {
	c := r.code(what)
	if r.err != nil {
		return 0
	}
	if c != msgpcode.Double {
		r.fail("%s: code %#x is no float64", what, c)
		return 0
	}
	v, err := r.dec.DecodeFloat64()
	if err != nil {
		r.fail("%s: %w", what, err)
	}
	return Float(v).Bits
}

// bytes returns a copy of the next element, nil where it is empty.
func (r *arrayReader) bytes(what string) []byte {
	c := r.code(what)
	if r.err == nil && !msgpcode.IsBin(c) {
		r.fail("%s: code %#x is no byte string", what, c)
	}
	return r.take(what, nil)
}

// take appends the next element's bytes to dst, which is returned as it is
// where the element is empty.
func (r *arrayReader) take(what string, dst []byte) []byte {
	if r.err != nil {
		return dst
	}
	n, err := r.dec.DecodeBytesLen()
	if err == nil && n > r.in.Len() {
		err = fmt.Errorf("%d bytes, %d are left", n, r.in.Len())
	}
	if err == nil && n > 0 {
		dst = append(dst, make([]byte, n)...)
		err = r.dec.ReadFull(dst[len(dst)-n:])
	}
	if err != nil {
		r.fail("%s: %w", what, err)
	}
	return dst
}

// What a decoder keeps of the strings it has seen.
const (
	maxText    = 1 << 16 // strings
	maxTextLen = 256     // bytes of one
)

// string returns the next element, and the same string where it recurs.
func (r *arrayReader) string(what string) string {
	c := r.code(what)
	if r.err == nil && !msgpcode.IsString(c) {
		r.fail("%s: code %#x is no string", what, c)
	}
	r.scratch = r.take(what, r.scratch[:0])
	if r.err != nil {
		return ""
	}
	if kept, ok := r.text[string(r.scratch)]; ok {
		return kept
	}
	if len(r.text) >= maxText {
		clear(r.text)
	}
	s := string(r.scratch)
	if len(s) <= maxTextLen {
		r.text[s] = s
	}
	return s
}
