package api

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"net/url"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

func badRequest(format string, args ...any) error {
	return &fault{status: http.StatusBadRequest, text: fmt.Sprintf(format, args...)}
}

func invalidInput(field, value, why string) error {
	return badRequest("Invalid input for field/attribute %s. Value: '%s'. %s", field, clip(value), why)
}

func unknownArgument(name, why string) error {
	if why != "" {
		why = ": " + why
	}
	return badRequest("Unknown argument: \"%s\"%s", clip(name), why)
}

// params are the arguments of a request: those of the query string, then
// those of a JSON body.
type params struct {
	plain   map[string][]string
	objects map[string][]object // "q" and "aggregate"
}

// object is an element of a list of objects. An attribute that was not sent is
// not in it.
type object map[string]string

// attributes of the parameters that are lists of objects.
var attributes = map[string][]string{
	"q":         {"field", "op", "value", "type"},
	"aggregate": {"func", "param"},
}

// maxBody bounds the body of a request that asks, in bytes.
const maxBody = 1 << 20

// maxEcho bounds how much of what a client sent an error repeats, in bytes.
const maxEcho = 4096

func newParams() *params {
	return &params{plain: map[string][]string{}, objects: map[string][]object{}}
}

// readParams reads the arguments of r and refuses those that are not known.
func readParams(r *http.Request, known ...string) (*params, error) {
	p := newParams()
	if err := p.readQuery(r.URL.RawQuery, known); err != nil {
		return nil, err
	}
	body, err := readBody(r, maxBody)
	if err != nil || len(body) == 0 {
		return p, err
	}
	return p, p.readBody(body, known)
}

// readBody returns the JSON that a request has in its body, without blanks
// around it, or nothing. It may have at most so many bytes.
func readBody(r *http.Request, most int64) ([]byte, error) {
	if r.Body == nil || r.Body == http.NoBody {
		return nil, nil
	}
	body, err := io.ReadAll(http.MaxBytesReader(nil, r.Body, most))
	if large := (*http.MaxBytesError)(nil); errors.As(err, &large) {
		return nil, tooLarge(fmt.Sprintf("The request body is larger than %d bytes.", most))
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return nil, &fault{status: http.StatusRequestTimeout, text: "The request body did not come in time."}
	}
	if err != nil {
		return nil, badRequest("The request body could not be read.")
	}
	if body = bytes.TrimSpace(body); len(body) == 0 {
		return nil, nil
	}
	kind := r.Header.Get("Content-Type")
	if media, _, err := mime.ParseMediaType(kind); err != nil || media != "application/json" {
		return nil, &fault{status: http.StatusUnsupportedMediaType, text: "Unknown mimetype: " + kind}
	}
	return body, nil
}

func tooLarge(text string) error {
	return &fault{status: http.StatusRequestEntityTooLarge, text: text}
}

// clip cuts text that an error repeats.
func clip(text string) string {
	if len(text) <= maxEcho {
		return text
	}
	return strings.ToValidUTF8(text[:maxEcho], "") + "…"
}

var indexed = regexp.MustCompile(`^(q|aggregate)(?:\[([0-9]{1,6})\])?\.(.*)$`)

func (p *params) readQuery(raw string, known []string) error {
	columns := map[string]map[string][]string{} // q.field=a&q.field=b
	cells := map[string]map[int]object{}        // q[0].field=a&q[1].field=b
	for pair := range strings.SplitSeq(raw, "&") {
		if pair == "" {
			continue
		}
		escapedKey, escapedValue, _ := strings.Cut(pair, "=")
		key, err1 := url.QueryUnescape(escapedKey)
		value, err2 := url.QueryUnescape(escapedValue)
		if err := errors.Join(err1, err2); err != nil {
			return badRequest("The query string is not escaped as it must be: %v", err)
		}
		m := indexed.FindStringSubmatch(key)
		if m == nil {
			if attributes[key] != nil || !slices.Contains(known, key) {
				return unknownArgument(key, "")
			}
			p.plain[key] = append(p.plain[key], value)
			continue
		}
		arg, attr := m[1], m[3]
		if !slices.Contains(known, arg) {
			return unknownArgument(key, "")
		}
		if !slices.Contains(attributes[arg], attr) {
			return badRequest("Unknown attribute for argument %s: %s", arg, attr)
		}
		if m[2] == "" {
			if columns[arg] == nil {
				columns[arg] = map[string][]string{}
			}
			columns[arg][attr] = append(columns[arg][attr], value)
			continue
		}
		i, err := strconv.Atoi(m[2])
		if err != nil {
			return unknownArgument(key, "")
		}
		if cells[arg] == nil {
			cells[arg] = map[int]object{}
		}
		if cells[arg][i] == nil {
			cells[arg][i] = object{}
		}
		cells[arg][i][attr] = value
	}
	for arg, byAttr := range columns {
		p.objects[arg] = zip(byAttr)
	}
	for arg, byIndex := range cells {
		order := make([]int, 0, len(byIndex))
		for i := range byIndex {
			order = append(order, i)
		}
		slices.Sort(order)
		for _, i := range order {
			p.objects[arg] = append(p.objects[arg], byIndex[i])
		}
	}
	return nil
}

// zip makes objects of the values of their attributes, by position.
func zip(byAttr map[string][]string) []object {
	n := 0
	for _, values := range byAttr {
		n = max(n, len(values))
	}
	objects := make([]object, n)
	for i := range objects {
		objects[i] = object{}
		for attr, values := range byAttr {
			if i < len(values) {
				objects[i][attr] = values[i]
			}
		}
	}
	return objects
}

func (p *params) readBody(body []byte, known []string) error {
	var args map[string]any
	if err := decodeJSON(body, &args); err != nil {
		return badRequest("Request is not in valid JSON format")
	}
	for key, value := range args {
		if !slices.Contains(known, key) {
			return unknownArgument(key, "")
		}
		list, isList := value.([]any)
		if !isList {
			list = []any{value}
		}
		for _, v := range list {
			if attributes[key] == nil {
				text, set, err := bodyText(key, v)
				if err != nil {
					return err
				}
				if set {
					p.plain[key] = append(p.plain[key], text)
				}
				continue
			}
			fields, ok := v.(map[string]any)
			if !isList || !ok {
				return invalidInput(key, pythonText(value), "It must be a list of objects.")
			}
			o := object{}
			for attr, v := range fields {
				if !slices.Contains(attributes[key], attr) {
					return badRequest("Unknown attribute for argument %s: %s", key, attr)
				}
				text, set, err := bodyText(attr, v)
				if err != nil {
					return err
				}
				if set {
					o[attr] = text
				}
			}
			p.objects[key] = append(p.objects[key], o)
		}
	}
	return nil
}

// bodyText returns a scalar of a JSON body as the query string would have it.
// null is not set.
func bodyText(name string, v any) (text string, set bool, err error) {
	switch v.(type) {
	case nil:
		return "", false, nil
	case map[string]any, []any:
		return "", false, invalidInput(name, pythonText(v), "It must be text or a number.")
	}
	return pythonText(v), true, nil
}

// decodeJSON reads one JSON value that fills data, numbers as they are
// written.
func decodeJSON(data []byte, into any) error {
	d := json.NewDecoder(bytes.NewReader(data))
	d.UseNumber()
	if err := d.Decode(into); err != nil {
		return err
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return errors.New("more than one JSON value")
	}
	return nil
}

// one returns a parameter that may be given once.
func (p *params) one(name string) (value string, given bool, err error) {
	values := p.plain[name]
	switch len(values) {
	case 0:
		return "", false, nil
	case 1:
		return values[0], true, nil
	}
	list := make([]any, len(values))
	for i, v := range values {
		list[i] = v
	}
	return "", false, invalidInput(name, pythonText(list), "It must be given once.")
}

// integer returns an integer parameter.
func (p *params) integer(name string, otherwise int64) (int64, error) {
	value, given, err := p.one(name)
	if err != nil || !given {
		return otherwise, err
	}
	return parseInt(name, value)
}

func parseInt(name, value string) (int64, error) {
	n, err := strconv.ParseInt(strings.TrimSpace(value), 10, 64)
	if errors.Is(err, strconv.ErrRange) {
		return 0, invalidInput(name, value, "unable to convert to int. Error: the number is too large")
	}
	if err != nil {
		return 0, invalidInput(name, value, "unable to convert to int. Error: invalid literal for int() with base 10: "+pythonRepr(value))
	}
	return n, nil
}

// flag returns a parameter that is true or, whatever else it says, false.
func (p *params) flag(name string) (bool, error) {
	value, _, err := p.one(name)
	return slices.Contains([]string{"1", "t", "true", "on", "y", "yes"}, strings.ToLower(strings.TrimSpace(value))), err
}

// limit returns how many entries the answer may have.
func (s *server) limit(p *params) (int, error) {
	n, err := p.integer("limit", int64(s.opts.DefaultLimit))
	if err != nil {
		return 0, err
	}
	if n <= 0 {
		return 0, badRequest("Limit must be positive")
	}
	if s.opts.MaxLimit > 0 {
		n = min(n, int64(s.opts.MaxLimit))
	}
	return int(n), nil
}
