package value

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"strconv"
	"strings"
	"unicode/utf16"
	"unicode/utf8"
	"unsafe"
)

// MaxDepth is how deep lists and objects may be nested: about as deep as
// Python's JSON reader follows them.
const MaxDepth = 990

// maxDigits is how long an integer may be: Python reads no longer ones.
const maxDigits = 4300

// keptValues bounds the memory that a parser keeps from one text to the next.
const keptValues = 1 << 14

// ErrSyntax is wrapped by the errors of [Parser.Parse].
var ErrSyntax = errors.New("malformed JSON")

// Parser reads JSON texts and reuses its memory from one to the next. It is
// not safe for concurrent use.
type Parser struct {
	// Strict refuses NaN and infinities, which only Python's JSON has.
	Strict bool
	// Inner is the key of a member of the outermost object. Where that is a text that
	// holds an object, it is read as that object, if its texts need no other escapes
	// than JSON's writers make.
	Inner string

	text  string
	pos   int
	inner bool    // pos is within the text that Inner means
	stack []Value // members and elements of what is not yet complete
	slab  []Value // those of what is
	buf   []byte  // of a text with escapes
	seen  map[string]int
}

// Reset frees the memory of what was parsed: it must no longer be used.
func (p *Parser) Reset() {
	if cap(p.slab) > keptValues || cap(p.stack) > keptValues || len(p.buf) > 64*keptValues {
		*p = Parser{Strict: p.Strict, Inner: p.Inner}
	}
	p.slab = p.slab[:0]
}

// Parse reads a JSON text, which must be UTF-8. What it returns is good until the
// next Reset; its texts are for ever.
func (p *Parser) Parse(text string) (Value, error) {
	if !utf8.ValidString(text) {
		return Value{}, fmt.Errorf("%w: it is not UTF-8; send UTF-8", ErrSyntax)
	}
	return p.ParseValid(text)
}

// ParseValid is Parse of a text that is UTF-8 for certain, as those that were
// parsed are.
func (p *Parser) ParseValid(text string) (Value, error) {
	p.start(text)
	v, err := p.next()
	if err == nil && p.pos != len(p.text) {
		err = p.errorf("text after the end")
	}
	return v, err
}

// ParseNext reads the first JSON value of a text and returns what follows it;
// ok is false where nothing but blanks is left.
func (p *Parser) ParseNext(text string) (v Value, rest string, ok bool, err error) {
	p.start(text)
	p.blanks()
	if p.pos == len(text) {
		return Value{}, "", false, nil
	}
	v, err = p.next()
	if err == nil && !utf8.ValidString(text[:p.pos]) {
		err = fmt.Errorf("%w: it is not UTF-8", ErrSyntax)
	}
	return v, text[p.pos:], true, err
}

func (p *Parser) start(text string) {
	p.text, p.pos, p.stack = text, 0, append(p.stack[:0], Value{})
}

func (p *Parser) next() (Value, error) {
	p.blanks()
	err := p.value(0)
	p.blanks()
	return p.stack[0], err
}

func (p *Parser) errorf(format string, args ...any) error {
	return fmt.Errorf("%w: byte %d: %s", ErrSyntax, p.pos, fmt.Sprintf(format, args...))
}

func (p *Parser) blanks() {
	if p.pos < len(p.text) && p.text[p.pos] <= ' ' {
		p.skip()
	}
}

func (p *Parser) skip() {
	for p.pos < len(p.text) {
		switch p.text[p.pos] {
		case ' ':
		case '\n', '\t', '\r':
			if p.inner {
				return // a control character within a text
			}
		default:
			return
		}
		p.pos++
	}
}

// value reads a value into the top of the stack, whose key it leaves alone.
func (p *Parser) value(depth int) error {
	if p.pos == len(p.text) {
		return p.errorf("it ends within a value")
	}
	v := &p.stack[len(p.stack)-1]
	switch c := p.text[p.pos]; c {
	case '"', '\\':
		if !p.quote() {
			break
		}
		var err error
		v.Kind = Text
		v.Text, err = p.string()
		return err
	case '{', '[':
		if depth >= MaxDepth {
			return p.errorf("more than %d levels deep", MaxDepth)
		}
		p.pos++
		return p.items(c == '{', depth+1)
	case 't':
		v.Kind, v.True = Bool, true
		return p.word("true")
	case 'f':
		v.Kind = Bool
		return p.word("false")
	case 'n':
		return p.word("null")
	case 'N', 'I':
		if p.Strict {
			break
		}
		v.Kind, v.Text = Float, "NaN"
		if c == 'I' {
			v.Text = "Infinity"
		}
		return p.word(v.Text)
	}
	return p.number(v)
}

func (p *Parser) word(word string) error {
	end := p.pos + len(word)
	if end > len(p.text) || p.text[p.pos:end] != word {
		return p.errorf("no JSON value")
	}
	p.pos = end
	return nil
}

func (p *Parser) number(v *Value) error {
	start := p.pos
	if p.text[p.pos] == '-' {
		p.pos++
		if p.pos < len(p.text) && p.text[p.pos] == 'I' && !p.Strict {
			v.Kind, v.Text = Float, "-Infinity"
			return p.word("Infinity")
		}
	}
	whole := p.digits()
	if whole == 0 || whole > 1 && p.text[p.pos-whole] == '0' {
		p.pos = start
		return p.errorf("no JSON value")
	}
	kind := Int
	if p.pos < len(p.text) && p.text[p.pos] == '.' {
		kind = Float
		p.pos++
		if p.digits() == 0 {
			return p.errorf("no digit after the point")
		}
	}
	if p.pos < len(p.text) && (p.text[p.pos] == 'e' || p.text[p.pos] == 'E') {
		kind = Float
		p.pos++
		if p.pos < len(p.text) && (p.text[p.pos] == '+' || p.text[p.pos] == '-') {
			p.pos++
		}
		if p.digits() == 0 {
			return p.errorf("no digit in the exponent")
		}
	}
	text := p.text[start:p.pos]
	if kind == Int && whole > maxDigits {
		return p.errorf("an integer of %d digits, at most %d are read", whole, maxDigits)
	}
	if kind == Float {
		if f, err := strconv.ParseFloat(text, 64); err != nil { // out of range
			v.Kind, v.Text = Float, ofFloat(f).Text
			return nil
		}
	}
	if text == "-0" {
		text = "0"
	}
	v.Kind, v.Text = kind, text
	return nil
}

func (p *Parser) digits() int {
	start := p.pos
	for p.pos < len(p.text) && p.text[p.pos]-'0' <= 9 {
		p.pos++
	}
	return p.pos - start
}

// items reads what is in a list or object, after its bracket, into the top of the
// stack.
func (p *Parser) items(object bool, depth int) error {
	kind, end := List, byte(']')
	if object {
		kind, end = Object, '}'
	}
	mark := len(p.stack)
	p.stack[mark-1].Kind = kind
	p.blanks()
	if p.pos < len(p.text) && p.text[p.pos] == end {
		p.pos++
		return nil
	}
	for {
		p.stack = append(p.stack, Value{})
		whole := false
		if object {
			key, err := p.key()
			if err != nil {
				return err
			}
			p.stack[len(p.stack)-1].Key = key
			whole = depth == 1 && key == p.Inner && p.object()
		}
		if !whole {
			if err := p.value(depth); err != nil {
				return err
			}
		}
		p.blanks()
		if p.pos == len(p.text) {
			return p.errorf("it ends within %v", kind)
		}
		c := p.text[p.pos]
		if c != ',' && c != end {
			return p.errorf("neither a comma nor the end of %v", kind)
		}
		p.pos++
		if c == end {
			break
		}
		p.blanks()
	}
	if object {
		p.dedupe(mark)
	}
	n := len(p.stack) - mark
	if cap(p.slab)-len(p.slab) < n {
		p.slab = make([]Value, 0, max(256, 2*cap(p.slab), n)) // the old one is kept by what is in it
	}
	from := len(p.slab)
	p.slab = append(p.slab, p.stack[mark:]...)
	p.stack[mark-1].Items = p.slab[from:len(p.slab):len(p.slab)]
	p.stack = p.stack[:mark]
	return nil
}

// object reads a text that holds an object, as that, into the top of the stack. It
// reports whether it could; what cannot be read so may be right all the same.
func (p *Parser) object() bool {
	start, mark := p.pos, len(p.stack)
	if p.inner || p.pos == len(p.text) || p.text[p.pos] != '"' {
		return false
	}
	p.pos++
	p.inner = true
	p.blanks()
	ok := p.pos < len(p.text) && p.text[p.pos] == '{' && p.value(0) == nil
	p.blanks()
	p.inner = false
	if ok && p.pos < len(p.text) && p.text[p.pos] == '"' {
		p.pos++
		return true
	}
	p.pos, p.stack = start, p.stack[:mark]
	p.stack[mark-1] = Value{Key: p.Inner}
	return false
}

func (p *Parser) key() (string, error) {
	if !p.quote() {
		return "", p.errorf("a key of an object must be a text")
	}
	key, err := p.string()
	if err != nil {
		return "", err
	}
	p.blanks()
	if p.pos == len(p.text) || p.text[p.pos] != ':' {
		return "", p.errorf("no colon after a key")
	}
	p.pos++
	p.blanks()
	return key, nil
}

// quote passes the quote with which a text begins; false: none begins here.
func (p *Parser) quote() bool {
	if p.pos < len(p.text) && p.text[p.pos] == '"' && !p.inner {
		p.pos++
		return true
	}
	if p.inner && strings.HasPrefix(p.text[p.pos:], `\"`) {
		p.pos += 2
		return true
	}
	return false
}

// dedupe leaves one of the members that have the same key: in the place of the
// first, with the value of the last. A filter of bits tells which members may
// have had one before.
func (p *Parser) dedupe(mark int) {
	var filter [16]uint64
	n := mark
	p.seen = nil
	for i := mark; i < len(p.stack); i++ {
		key := p.stack[i].Key
		h := uint(len(key)) * 31
		if len(key) > 0 {
			h += uint(key[0])*7 + uint(key[len(key)/2])*131 + uint(key[len(key)-1])*17
		}
		word, bit := &filter[h>>6%16], uint64(1)<<(h%64)
		at := -1
		if *word&bit != 0 {
			at = p.earlier(mark, n, key)
		}
		*word |= bit
		if at >= 0 {
			p.stack[at] = p.stack[i]
			continue
		}
		if p.seen != nil {
			p.seen[key] = n
		}
		if n != i {
			p.stack[n] = p.stack[i]
		}
		n++
	}
	p.stack = p.stack[:n]
}

// earlier returns where in the stack from mark to n a key is, or -1. Large
// objects get an index.
func (p *Parser) earlier(mark, n int, key string) int {
	if p.seen == nil && n-mark > 64 {
		p.seen = make(map[string]int, 2*(n-mark))
		for i := mark; i < n; i++ {
			p.seen[p.stack[i].Key] = i
		}
	}
	if p.seen != nil {
		if at, ok := p.seen[key]; ok {
			return at
		}
		return -1
	}
	for i := mark; i < n; i++ {
		if p.stack[i].Key == key {
			return i
		}
	}
	return -1
}

// string reads a text, from after its first quote to after its last.
func (p *Parser) string() (string, error) {
	start, text := p.pos, p.text
	i := plainUntil(text, start)
	if p.inner {
		return p.twice(start, i)
	}
	if i < len(text) {
		switch text[i] {
		case '"':
			p.pos = i + 1
			return text[start:i], nil
		case '\\':
			return p.escaped(start, i)
		}
		p.pos = i
		return "", p.errorf("a control character within a text")
	}
	p.pos = len(text)
	return "", p.errorf("it ends within a text")
}

// twice reads a text of what is in a text itself, so that its quotes are escaped and
// what it escapes is so twice. Its first special byte is at i. Other escapes than
// those that this makes necessary are not read.
func (p *Parser) twice(start, i int) (string, error) {
	text := p.text
	for plain := true; i+1 < len(text) && text[i] == '\\'; plain = false {
		switch text[i+1] {
		case '"':
			p.pos = i + 2
			if plain {
				return text[start:i], nil
			}
			return p.once(text[start:i])
		case '\\': // with what it escapes
			i += 2
			if i+1 < len(text) && text[i] == '\\' && (text[i+1] == '"' || text[i+1] == '\\') {
				i += 2
			}
			i = plainUntil(text, i)
		default:
			return "", errInner
		}
	}
	return "", errInner
}

// errInner is the error of a text in a text that [Parser.object] does not read.
var errInner = fmt.Errorf("%w: within a text", ErrSyntax)

// outer undoes the outer escapes of a text in a text.
var outer = strings.NewReplacer(`\\`, `\`, `\"`, `"`)

// once returns what a text in a text says.
func (p *Parser) once(raw string) (string, error) {
	text, pos := p.text, p.pos
	p.text = outer.Replace(raw) + `"`
	s, err := p.escaped(0, 0)
	p.text, p.pos = text, pos
	return s, err
}

// plainUntil returns where, from i on, is the first byte that does not stand for
// itself in a text.
func plainUntil(text string, i int) int {
	for ; i+8 <= len(text); i += 8 {
		if m := specials(word(text, i)); m != 0 {
			return i + bits.TrailingZeros64(m)/8
		}
	}
	for i < len(text) && text[i] >= ' ' && text[i] != '"' && text[i] != '\\' {
		i++
	}
	return i
}

// word returns the eight bytes of a text from i on, the first one lowest.
func word(text string, i int) uint64 {
	return binary.LittleEndian.Uint64(unsafe.Slice(unsafe.StringData(text[i:i+8]), 8))
}

// specials returns a word whose lowest bit that is set is in the first byte that
// does not stand for itself in a text; 0: all eight do.
func specials(w uint64) uint64 {
	const ones, highs = 0x0101010101010101, 0x8080808080808080
	quote, backslash := w^ones*'"', w^ones*'\\'
	return ((w-ones*' ')&^w | (quote-ones)&^quote | (backslash-ones)&^backslash) & highs
}

// escaped reads a text from start on, whose first backslash is at i. What it
// means is never longer than what is written.
func (p *Parser) escaped(start, i int) (string, error) {
	text := p.text
	if len(p.buf) < len(text)-start {
		p.buf = make([]byte, len(text)-start)
	}
	buf := p.buf
	n := copy(buf, text[start:i])
	for i < len(text) {
		if i+8 <= len(text) { // eight bytes at a time: what is written too much is overwritten
			w := word(text, i)
			binary.LittleEndian.PutUint64(buf[n:], w)
			plain := 8
			if m := specials(w); m != 0 {
				plain = bits.TrailingZeros64(m) / 8
			}
			if n, i = n+plain, i+plain; plain == 8 {
				continue
			}
		}
		c := text[i]
		if c >= ' ' && c != '"' && c != '\\' { // near the end
			buf[n] = c
			n++
			i++
			continue
		}
		if c == '"' {
			p.pos = i + 1
			return string(buf[:n]), nil
		}
		if c != '\\' {
			p.pos = i
			return "", p.errorf("a control character within a text")
		}
		i++
		if i == len(text) {
			break
		}
		if c = unescaped[text[i]]; c != 0 {
			buf[n] = c
			n++
			i++
			continue
		}
		p.pos = i - 1
		if text[i] != 'u' {
			return "", p.errorf("unknown escape")
		}
		r, ok := hex4(text, i+1)
		if !ok {
			return "", p.errorf("no four hexadecimal digits after \\u")
		}
		i += 5
		if utf16.IsSurrogate(r) {
			if low, ok := hex4(text, i+2); ok && text[i] == '\\' && text[i+1] == 'u' {
				if both := utf16.DecodeRune(r, low); both != utf8.RuneError {
					r, i = both, i+6
				}
			}
		}
		n += utf8.EncodeRune(buf[n:], r) // half of a pair alone becomes U+FFFD
	}
	p.pos = len(text)
	return "", p.errorf("it ends within a text")
}

// unescaped is what stands after a backslash for which byte.
var unescaped = [256]byte{'"': '"', '\\': '\\', '/': '/', 'b': '\b', 'f': '\f', 'n': '\n', 'r': '\r', 't': '\t'}

func hex4(text string, i int) (r rune, ok bool) {
	if i+4 > len(text) {
		return 0, false
	}
	for _, c := range []byte(text[i : i+4]) {
		switch {
		case c-'0' <= 9:
			c -= '0'
		case c|0x20-'a' <= 5:
			c = c | 0x20 - 'a' + 10
		default:
			return 0, false
		}
		r = r<<4 | rune(c)
	}
	return r, true
}
