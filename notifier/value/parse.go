package value

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"strconv"
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

	text  string
	pos   int
	stack []Value // members and elements of what is not yet complete
	slab  []Value // those of what is
	buf   []byte  // of a text with escapes
	seen  map[string]int
}

// Reset frees the memory of what was parsed: it must no longer be used.
func (p *Parser) Reset() {
	if cap(p.slab) > keptValues || cap(p.stack) > keptValues || len(p.buf) > 64*keptValues {
		*p = Parser{Strict: p.Strict}
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
	p.text, p.pos, p.stack = text, 0, p.stack[:0]
	v, err := p.next()
	if err == nil && p.pos != len(p.text) {
		err = p.errorf("text after the end")
	}
	return v, err
}

// ParseNext reads the first JSON value of a text and returns what follows it;
// ok is false where nothing but blanks is left.
func (p *Parser) ParseNext(text string) (v Value, rest string, ok bool, err error) {
	p.text, p.pos, p.stack = text, 0, p.stack[:0]
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

func (p *Parser) next() (Value, error) {
	p.blanks()
	v, err := p.value(0)
	p.blanks()
	return v, err
}

func (p *Parser) errorf(format string, args ...any) error {
	return fmt.Errorf("%w: byte %d: %s", ErrSyntax, p.pos, fmt.Sprintf(format, args...))
}

func (p *Parser) blanks() {
	for p.pos < len(p.text) {
		switch p.text[p.pos] {
		case ' ', '\n', '\t', '\r':
			p.pos++
		default:
			return
		}
	}
}

func (p *Parser) value(depth int) (Value, error) {
	if p.pos == len(p.text) {
		return Value{}, p.errorf("it ends within a value")
	}
	switch c := p.text[p.pos]; c {
	case '"':
		s, err := p.string()
		return Value{Kind: Text, Text: s}, err
	case '{', '[':
		if depth >= MaxDepth {
			return Value{}, p.errorf("more than %d levels deep", MaxDepth)
		}
		p.pos++
		return p.items(c == '{', depth+1)
	case 't':
		return Value{Kind: Bool, True: true}, p.word("true")
	case 'f':
		return Value{Kind: Bool}, p.word("false")
	case 'n':
		return Value{}, p.word("null")
	case 'N', 'I':
		if p.Strict {
			break
		}
		if c == 'I' {
			return Value{Kind: Float, Text: "Infinity"}, p.word("Infinity")
		}
		return Value{Kind: Float, Text: "NaN"}, p.word("NaN")
	}
	return p.number()
}

func (p *Parser) word(word string) error {
	end := p.pos + len(word)
	if end > len(p.text) || p.text[p.pos:end] != word {
		return p.errorf("no JSON value")
	}
	p.pos = end
	return nil
}

func (p *Parser) number() (Value, error) {
	start := p.pos
	if p.text[p.pos] == '-' {
		p.pos++
		if p.pos < len(p.text) && p.text[p.pos] == 'I' && !p.Strict {
			return Value{Kind: Float, Text: "-Infinity"}, p.word("Infinity")
		}
	}
	whole := p.digits()
	if whole == 0 || whole > 1 && p.text[p.pos-whole] == '0' {
		p.pos = start
		return Value{}, p.errorf("no JSON value")
	}
	kind := Int
	if p.pos < len(p.text) && p.text[p.pos] == '.' {
		kind = Float
		p.pos++
		if p.digits() == 0 {
			return Value{}, p.errorf("no digit after the point")
		}
	}
	if p.pos < len(p.text) && (p.text[p.pos] == 'e' || p.text[p.pos] == 'E') {
		kind = Float
		p.pos++
		if p.pos < len(p.text) && (p.text[p.pos] == '+' || p.text[p.pos] == '-') {
			p.pos++
		}
		if p.digits() == 0 {
			return Value{}, p.errorf("no digit in the exponent")
		}
	}
	text := p.text[start:p.pos]
	if kind == Int && whole > maxDigits {
		return Value{}, p.errorf("an integer of %d digits, at most %d are read", whole, maxDigits)
	}
	if kind == Float {
		if f, err := strconv.ParseFloat(text, 64); err != nil { // out of range
			return ofFloat(f), nil
		}
	}
	if text == "-0" {
		text = "0"
	}
	return Value{Kind: kind, Text: text}, nil
}

func (p *Parser) digits() int {
	start := p.pos
	for p.pos < len(p.text) && p.text[p.pos]-'0' <= 9 {
		p.pos++
	}
	return p.pos - start
}

// items reads what is in a list or object, after its bracket.
func (p *Parser) items(object bool, depth int) (Value, error) {
	v := Value{Kind: List}
	end := byte(']')
	if object {
		v.Kind, end = Object, '}'
	}
	mark := len(p.stack)
	p.blanks()
	if p.pos < len(p.text) && p.text[p.pos] == end {
		p.pos++
		return v, nil
	}
	for {
		var key string
		if object {
			var err error
			if key, err = p.key(); err != nil {
				return v, err
			}
		}
		item, err := p.value(depth)
		if err != nil {
			return v, err
		}
		item.Key = key
		p.stack = append(p.stack, item)
		p.blanks()
		if p.pos == len(p.text) {
			return v, p.errorf("it ends within %v", v.Kind)
		}
		c := p.text[p.pos]
		if c != ',' && c != end {
			return v, p.errorf("neither a comma nor the end of %v", v.Kind)
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
	v.Items = p.slab[from:len(p.slab):len(p.slab)]
	p.stack = p.stack[:mark]
	return v, nil
}

func (p *Parser) key() (string, error) {
	if p.pos == len(p.text) || p.text[p.pos] != '"' {
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

// string reads a text, from its first quote to after its last.
func (p *Parser) string() (string, error) {
	start := p.pos + 1
	text := p.text
	i := plainUntil(text, start)
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
