// Package definition holds what meter and event definitions share: reading
// their files, their fields with paths and plugins, and the index of event
// types.
package definition

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"

	"github.com/kvmeter/kvmeter/notifier/value"
)

// Finding is something to say about a file.
type Finding struct {
	File  string // empty: Text says it
	Line  int    // 0: it is about the whole file
	Text  string // what is wrong, and what to write instead
	Error bool   // what it is about cannot be used; else it is only surprising
}

func (f *Finding) String() string {
	if f.File == "" {
		return f.Text
	}
	if f.Line == 0 {
		return f.File + ": " + f.Text
	}
	return fmt.Sprintf("%s:%d: %s", f.File, f.Line, f.Text)
}

// Reader walks the YAML of one file and collects the findings.
type Reader struct {
	File     string
	Findings []Finding
	pairs    int
}

// Fail says that what n holds cannot be used.
func (r *Reader) Fail(n *yaml.Node, format string, args ...any) { r.find(n, true, format, args...) }

// Warn says that what n holds may surprise.
func (r *Reader) Warn(n *yaml.Node, format string, args ...any) { r.find(n, false, format, args...) }

func (r *Reader) find(n *yaml.Node, isError bool, format string, args ...any) {
	r.Findings = append(r.Findings, Finding{r.File, n.Line, fmt.Sprintf(format, args...), isError})
}

// FailedSince reports whether one of the findings, but for the first so many, is an
// error.
func (r *Reader) FailedSince(before int) bool {
	return slices.ContainsFunc(r.Findings[before:], func(f Finding) bool { return f.Error })
}

// Errors returns the findings that are errors, joined, or nil.
func Errors(findings []Finding) error {
	var errs []error
	for i := range findings {
		if findings[i].Error {
			errs = append(errs, errors.New(findings[i].String()))
		}
	}
	return errors.Join(errs...)
}

// Document returns the only document of a file. An error is about the YAML.
func (r *Reader) Document(data []byte) (*yaml.Node, error) {
	dec := yaml.NewDecoder(bytes.NewReader(data))
	var doc, more yaml.Node
	switch err := dec.Decode(&doc); {
	case errors.Is(err, io.EOF):
		return nil, fmt.Errorf("%s: it is empty", r.File)
	case err != nil && strings.Contains(err.Error(), "UTF-8"):
		return nil, fmt.Errorf("%s:%d: it is not UTF-8 from here on; save the file in UTF-8", r.File, 1+bytes.Count(valid(data), []byte("\n")))
	case err != nil:
		return nil, r.syntax(err)
	}
	if err := dec.Decode(&more); err == nil {
		return nil, fmt.Errorf("%s:%d: a second document; write one", r.File, more.Line)
	} else if !errors.Is(err, io.EOF) {
		return nil, r.syntax(err)
	}
	return Resolve(doc.Content[0]), nil
}

// valid returns the beginning of data that is UTF-8.
func valid(data []byte) []byte {
	for at := 0; at < len(data); {
		r, size := utf8.DecodeRune(data[at:])
		if r == utf8.RuneError && size == 1 {
			return data[:at]
		}
		at += size
	}
	return data
}

// syntax turns "yaml: line 3: …" into "meters.yaml:3: …".
func (r *Reader) syntax(err error) error {
	text := strings.TrimPrefix(err.Error(), "yaml: ")
	switch {
	case strings.Contains(text, "alphabetic or numeric character"):
		text += ` (a text that begins with *, & or ! needs quotes: "*")`
	case strings.Contains(text, "cannot start any token"):
		text += " (a text that begins with %, @ or ` needs quotes)"
	case strings.Contains(text, "tab"):
		text += " (indent with blanks)"
	}
	if at, ok := strings.CutPrefix(text, "line "); ok {
		return fmt.Errorf("%s:%s", r.File, at)
	}
	return fmt.Errorf("%s: %s", r.File, text)
}

// Resolve follows an alias.
func Resolve(n *yaml.Node) *yaml.Node {
	for range 100 {
		if n.Kind != yaml.AliasNode {
			break
		}
		n = n.Alias
	}
	return n
}

// Pair is a key of a mapping with its value.
type Pair struct{ Key, Value *yaml.Node }

// What merges may make of a file.
const (
	maxPairs  = 100_000
	maxMerges = 20
)

// Pairs returns what a mapping holds, each key once: first what it merges in,
// then its own, as PyYAML reads it. A key that is there twice keeps its first
// place and its last value.
func (r *Reader) Pairs(n *yaml.Node) []Pair {
	var pairs []Pair
	places := map[string]int{}
	r.merge(n, 0, func(key, v *yaml.Node) {
		if at, ok := places[key.Value]; ok {
			pairs[at] = Pair{key, v}
			return
		}
		places[key.Value] = len(pairs)
		pairs = append(pairs, Pair{key, v})
	})
	return pairs
}

func (r *Reader) merge(n *yaml.Node, depth int, add func(key, v *yaml.Node)) {
	n = Resolve(n)
	if n.Kind != yaml.MappingNode {
		r.Fail(n, "a merge (<<) takes a mapping, or a list of mappings")
		return
	}
	if depth > maxMerges || r.pairs > maxPairs {
		r.Fail(n, "more merges (<<) than can be followed; write the keys out")
		return
	}
	own := map[string]int{}
	for i := 0; i < len(n.Content); i += 2 {
		if n.Content[i].Tag != "!!merge" {
			continue
		}
		from := Resolve(n.Content[i+1])
		if from.Kind != yaml.SequenceNode {
			r.merge(from, depth+1, add)
			continue
		}
		for j := len(from.Content) - 1; j >= 0; j-- { // the first wins
			r.merge(from.Content[j], depth+1, add)
		}
	}
	for i := 0; i < len(n.Content); i += 2 {
		key := n.Content[i]
		if key.Tag == "!!merge" {
			continue
		}
		if first, twice := own[key.Value]; twice {
			r.Warn(key, "%q is there twice, first on line %d; the last one counts", key.Value, first)
		}
		own[key.Value] = key.Line
		r.pairs++
		add(key, Resolve(n.Content[i+1]))
	}
}

// Scalar returns the value that a scalar stands for.
func Scalar(n *yaml.Node) value.Value {
	switch n.Tag {
	case "!!null":
		return value.Value{}
	case "!!bool":
		var b bool
		if n.Decode(&b) == nil {
			return value.Value{Kind: value.Bool, True: b}
		}
	case "!!int":
		v := value.Of(strings.TrimPrefix(n.Value, "+"))
		if i, err := v.Integer(); err == nil {
			return i
		}
		var i int64
		if n.Decode(&i) == nil { // hexadecimal, octal
			return value.OfInt(i)
		}
	case "!!float":
		var f float64
		if n.Decode(&f) == nil {
			return value.OfFloat(f)
		}
	}
	return value.Of(n.Value)
}

// Texts returns the texts of a scalar or of a list of scalars.
func (r *Reader) Texts(n *yaml.Node, what string) []string {
	n = Resolve(n)
	switch n.Kind {
	case yaml.ScalarNode:
		if n.Tag == "!!null" || n.Value == "" {
			r.Fail(n, "%s is empty", what)
			return nil
		}
		return r.texts([]*yaml.Node{n}, what)
	case yaml.SequenceNode:
		if len(n.Content) == 0 {
			r.Fail(n, "%s is an empty list", what)
		}
		return r.texts(n.Content, what)
	}
	r.Fail(n, "%s is neither a text nor a list of texts", what)
	return nil
}

func (r *Reader) texts(items []*yaml.Node, what string) (texts []string) {
	for _, item := range items {
		item = Resolve(item)
		switch {
		case item.Kind != yaml.ScalarNode || item.Tag == "!!null":
			r.Fail(item, "an element of %s is no text", what)
			return nil
		case item.Tag != "!!str":
			r.Fail(item, "%s: %s is no text; quote it: \"%s\"", what, item.Value, item.Value)
			return nil
		}
		texts = append(texts, item.Value)
	}
	return texts
}

// integer returns the integer that a scalar stands for.
func integer(n *yaml.Node) (int, bool) {
	v := Scalar(Resolve(n))
	if n.Kind != yaml.ScalarNode || v.Kind != value.Int {
		return 0, false
	}
	i, err := strconv.Atoi(v.Text)
	return i, err == nil
}
