package api

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/kvmeter/kvmeter/central/store"
)

// Bounds of a complex query. More is refused, not cut.
const (
	maxTerms  = 1000    // expressions of a filter
	maxListed = 10_000  // values of one list
	maxSorted = 100_000 // samples that are sorted otherwise than by time
)

// queryField is a field of a complex query: one of the store's, or one that
// samples had in the original and no longer have.
type queryField struct {
	store.Field
	key string // of metadata
}

// queryFields are the names of fields, long and short.
var queryFields = map[string]store.Field{
	"source": store.FieldSource, "counter_name": store.FieldMeter, "counter_type": store.FieldKind,
	"counter_unit": store.FieldUnit, "counter_volume": store.FieldVolume, "user_id": store.FieldUser,
	"project_id": store.FieldProject, "resource_id": store.FieldResource, "timestamp": store.FieldTime,
	"recorded_at": store.FieldRecorded, "message_id": store.FieldID,
	"resource_metadata": "", "message_signature": "",
	"user": store.FieldUser, "project": store.FieldProject, "resource": store.FieldResource,
	"meter": store.FieldMeter, "type": store.FieldKind, "unit": store.FieldUnit, "volume": store.FieldVolume,
}

// comparisons are the operators that compare a field with one value.
var comparisons = map[string]store.Op{
	"=": store.Eq, "!=": store.Ne, "<": store.Lt, "<=": store.Le, "=<": store.Le, ">": store.Gt, ">=": store.Ge, "=>": store.Ge,
	"=~": store.Match,
}

// nothing selects no sample.
func nothing() store.Filter { return store.Filter{Or: []store.Filter{}} }

// invalidFilter complains of a filter expression.
func invalidFilter(format string, args ...any) error {
	return badRequest("Filter expression not valid: %s", clip(fmt.Sprintf(format, args...)))
}

// noSchema complains of an expression that is of no known form.
func noSchema(expression any) error {
	return invalidFilter("%s is not valid under any of the given schemas", clip(pythonText(expression)))
}

// querySamples answers a complex query.
func (s *server) querySamples(r *request, out *output) error {
	p := newParams()
	if err := p.readQuery(r.URL.RawQuery, []string{"metadata", "extra"}); err != nil {
		return err
	}
	m, err := readMetadata(p)
	if err != nil {
		return err
	}
	extra, err := p.flag("extra")
	if err != nil {
		return err
	}
	body, err := readComplex(r)
	if err != nil {
		return err
	}
	filter, err := parseFilter(body.filter, r.caller)
	if err != nil {
		return err
	}
	order, err := parseOrder(body.orderby)
	if err != nil {
		return err
	}
	limit, err := s.limit(body.params)
	if err != nil {
		return err
	}
	list := listOf(out, limit)
	entry := func(smp *store.Sample) (bool, error) {
		return list.add(func(b []byte) []byte { return appendSample(b, smp, &newNames, m, extra) })
	}
	if order.newestFirst() {
		err = s.eachSample(r.Context(), filter, entry)
	} else {
		err = s.sorted(r.Context(), filter, order, limit, entry)
	}
	if err != nil {
		return err
	}
	list.end()
	return nil
}

// complexBody is the body of a complex query.
type complexBody struct {
	filter, orderby *string // JSON; nil: not sent
	params          *params // limit
}

func readComplex(r *request) (*complexBody, error) {
	data, err := readBody(r.Request, maxBody)
	if err != nil {
		return nil, err
	}
	b := &complexBody{params: newParams()}
	if len(data) == 0 {
		return b, nil
	}
	var object map[string]any
	if err := decodeJSON(data, &object); err != nil {
		return nil, badRequest("Request is not in valid JSON format")
	}
	for _, name := range sortedKeys(object) {
		v := object[name]
		switch name {
		case "filter", "orderby":
			text, ok := v.(string)
			switch {
			case !ok && v != nil:
				return nil, invalidInput(name, pythonText(v), "Wrong type. Expected '<class 'str'>', got '"+pythonType(v)+"'")
			case ok && name == "filter":
				b.filter = &text
			case ok:
				b.orderby = &text
			}
		case "limit":
			text, set, err := bodyText(name, v)
			if err != nil {
				return nil, err
			}
			if set {
				b.params.plain[name] = []string{text}
			}
		default:
			return nil, badRequest("Unknown attribute for argument body: %s", clip(name))
		}
	}
	return b, nil
}

// decodeText decodes the JSON of a filter or of an order; its errors are worded
// as Python's.
func decodeText(text string) (any, error) {
	dec := json.NewDecoder(strings.NewReader(text))
	dec.UseNumber()
	var v any
	what, at := "Expecting value", int64(0)
	err := dec.Decode(&v)
	if err == nil {
		rest := text[dec.InputOffset():]
		at = int64(len(text) - len(strings.TrimLeft(rest, " \t\r\n")))
		if at == int64(len(text)) {
			return v, nil
		}
		what = "Extra data"
	} else if syntax := (*json.SyntaxError)(nil); errors.As(err, &syntax) {
		at = max(0, syntax.Offset-1)
	} else if errors.Is(err, io.ErrUnexpectedEOF) {
		at = int64(len(text))
	}
	before := text[:min(at, int64(len(text)))]
	line, column := 1+strings.Count(before, "\n"), len(before)-strings.LastIndexByte(before, '\n')
	return nil, fmt.Errorf("%s: line %d column %d (char %d)", what, line, column, at)
}

// parseFilter reads a filter and limits it to what the caller sees. One that
// asks for another project is refused.
func parseFilter(text *string, c *caller) (store.Filter, error) {
	project, limited, err := c.scope()
	if err != nil {
		return store.Filter{}, err
	}
	filter := store.Filter{}
	p := filterParser{}
	if text != nil {
		v, err := decodeText(*text)
		if err != nil {
			return filter, invalidFilter("%v", err)
		}
		if filter, err = p.expression(v, 0); err != nil {
			return filter, err
		}
		if _, err := store.Compile(filter); err != nil { // a pattern, for one
			return filter, invalidFilter("%v", err)
		}
	}
	if !limited {
		return filter, nil
	}
	for _, asked := range p.projects {
		if asked != project {
			return filter, notAuthorized(asked)
		}
	}
	return store.And(store.Where(store.FieldProject, store.Eq, project), filter), nil
}

type filterParser struct {
	terms    int
	projects []string // that the caller wants equal to the project
}

// expression reads an object with one key: what is done with its value.
func (p *filterParser) expression(v any, depth int) (store.Filter, error) {
	object, ok := v.(map[string]any)
	if !ok || len(object) != 1 {
		return store.Filter{}, noSchema(v)
	}
	if p.terms++; p.terms > maxTerms {
		return store.Filter{}, invalidFilter("it has more than %d terms", maxTerms)
	}
	if depth >= maxNesting {
		return store.Filter{}, invalidFilter("it nests more than %d levels", maxNesting)
	}
	op, operand := only(object)
	switch op = strings.ToLower(op); op {
	case "and", "or":
		return p.list(op, operand, object, depth)
	case "not":
		f, err := p.expression(operand, depth+1)
		return store.Filter{Not: &f}, err
	}
	compare, known := comparisons[op]
	if !known && op != "in" {
		return store.Filter{}, noSchema(v)
	}
	leaf, ok := operand.(map[string]any)
	if !ok || len(leaf) != 1 {
		return store.Filter{}, noSchema(v)
	}
	name, value := only(leaf)
	f, ok := fieldOf(name)
	if !ok {
		return store.Filter{}, noSchema(v)
	}
	if op == "in" {
		return p.in(f, name, value, object)
	}
	switch value.(type) {
	case string, bool, json.Number:
	default:
		return store.Filter{}, noSchema(v)
	}
	if f.Field == store.FieldProject && compare == store.Eq {
		p.projects = append(p.projects, pythonText(value))
	}
	return f.where(compare, name, value)
}

// only returns the one member of an object.
func only(object map[string]any) (string, any) {
	for k, v := range object {
		return k, v
	}
	return "", nil
}

func (p *filterParser) list(op string, operand any, whole map[string]any, depth int) (store.Filter, error) {
	operands, ok := operand.([]any)
	if !ok {
		return store.Filter{}, noSchema(whole)
	}
	if len(operands) < 2 {
		return store.Filter{}, invalidFilter("%s is too short", clip(pythonText(operands)))
	}
	if p.terms+len(operands) > maxTerms {
		return store.Filter{}, invalidFilter("it has more than %d terms", maxTerms)
	}
	filters := make([]store.Filter, len(operands))
	for i, o := range operands {
		var err error
		if filters[i], err = p.expression(o, depth+1); err != nil {
			return store.Filter{}, err
		}
	}
	if op == "or" {
		return store.Filter{Or: filters}, nil
	}
	return store.Filter{And: filters}, nil
}

func (p *filterParser) in(f queryField, name string, operand any, whole map[string]any) (store.Filter, error) {
	values, ok := operand.([]any)
	if !ok {
		return store.Filter{}, noSchema(whole)
	}
	if len(values) == 0 {
		return store.Filter{}, invalidFilter("[] is too short")
	}
	if len(values) > maxListed {
		return store.Filter{}, invalidFilter("a list has more than %d values", maxListed)
	}
	converted := make([]any, len(values))
	for i, v := range values {
		switch v.(type) {
		case string, json.Number:
		default:
			return store.Filter{}, noSchema(whole)
		}
		var err error
		if converted[i], err = f.value(name, v); err != nil {
			return store.Filter{}, err
		}
	}
	if f.Field == "" {
		return nothing(), nil
	}
	return store.Filter{Cond: &store.Cond{Field: f.Field, Key: f.key, Op: store.In, Value: converted}}, nil
}

// maxKey bounds the path of a metadata field, in bytes.
const maxKey = 1024

// fieldOf returns the field of a name.
func fieldOf(name string) (queryField, bool) {
	if key, ok := strings.CutPrefix(name, "metadata."); ok {
		return queryField{store.FieldMetadata, key}, key != "" && len(key) <= maxKey && !strings.ContainsAny(key, " \t\r\n\v\f")
	}
	f, ok := queryFields[name]
	return queryField{Field: f}, ok
}

// where returns the filter of one comparison.
func (f queryField) where(op store.Op, name string, value any) (store.Filter, error) {
	if op == store.Match {
		if f.Field == "" {
			return nothing(), nil
		}
		return store.Filter{Cond: &store.Cond{Field: f.Field, Key: f.key, Op: op, Value: pythonText(value)}}, nil
	}
	converted, err := f.value(name, value)
	if err != nil {
		return store.Filter{}, err
	}
	if f.Field == "" { // every sample has another value, and there is no order
		if op == store.Ne {
			return store.Filter{}, nil
		}
		return nothing(), nil
	}
	return store.Filter{Cond: &store.Cond{Field: f.Field, Key: f.key, Op: op, Value: converted}}, nil
}

// value returns a value as the field is compared with.
func (f queryField) value(name string, value any) (any, error) {
	switch f.Field {
	case store.FieldMetadata:
		if n, ok := value.(json.Number); ok {
			if _, err := n.Float64(); err != nil {
				return nil, invalidFilter("%s is out of range", n)
			}
		}
		return value, nil
	case store.FieldTime, store.FieldRecorded:
		text := pythonText(value)
		at, err := parseTime(text)
		if err != nil {
			return nil, badRequest("Failed to parse the timestamp value %s", clip(text))
		}
		return at, nil
	case store.FieldVolume:
		var v posted
		text, isText := value.(string)
		n, isNumber := value.(json.Number)
		if isNumber {
			text = n.String()
		}
		if !isText && !isNumber || v.parseVolume(strings.TrimSpace(text), text) != nil {
			return nil, invalidFilter("%s is not a number, as %s is", clip(pythonText(value)), name)
		}
		return v.volume, nil
	}
	return pythonText(value), nil
}

// order is how samples are sorted.
type order []orderKey

type orderKey struct {
	field store.Field // empty: nothing to sort by
	name  string
	desc  bool
}

// newestFirst reports whether that is the order in which the store has samples.
func (o order) newestFirst() bool {
	return len(o) == 0 || len(o) == 1 && o[0] == orderKey{store.FieldTime, "timestamp", true}
}

// parseOrder reads a list of objects of one field each.
func parseOrder(text *string) (order, error) {
	if text == nil {
		return nil, nil
	}
	invalid := func(format string, args ...any) error {
		return badRequest("Order-by expression not valid: %s", fmt.Sprintf(format, args...))
	}
	v, err := decodeText(*text)
	if err != nil {
		return nil, invalid("%v", err)
	}
	list, ok := v.([]any)
	if !ok {
		return nil, invalid("%s is not of type 'array'", clip(pythonText(v)))
	}
	if len(list) > maxTerms {
		return nil, invalid("it has more than %d fields", maxTerms)
	}
	var o order
	seen := map[string]bool{}
	for _, v := range list {
		object, ok := v.(map[string]any)
		switch {
		case !ok:
			return nil, invalid("%s is not of type 'object'", clip(pythonText(v)))
		case len(object) == 0:
			return nil, invalid("{} does not have enough properties")
		case len(object) > 1:
			return nil, invalid("%s has too many properties", clip(pythonText(v)))
		}
		name, direction := only(object)
		field, ok := queryFields[name]
		if !ok {
			return nil, invalid("%s does not match any of the regexes: '%s'", pythonRepr(clip(name)), fieldPattern)
		}
		text, ok := direction.(string)
		if !ok {
			return nil, invalid("%s is not of type 'string'", clip(pythonText(direction)))
		}
		desc := strings.EqualFold(text, "desc")
		if !desc && !strings.EqualFold(text, "asc") {
			return nil, invalid("%s does not match '(?i)^asc$|^desc$'", pythonRepr(clip(text)))
		}
		if !seen[name] { // a second time it decides nothing
			seen[name] = true
			o = append(o, orderKey{field, name, desc})
		}
	}
	return o, nil
}

// fieldPattern is how the original lists the fields.
var fieldPattern = func() string {
	var names []string
	for name := range queryFields {
		names = append(names, "^"+name+"$")
	}
	slices.Sort(names)
	return strings.Join(names, "|")
}()

// compare orders two samples.
func (o order) compare(a, b *store.Sample) int {
	for _, k := range o {
		n := k.compare(a, b)
		if n != 0 {
			if k.desc {
				return -n
			}
			return n
		}
	}
	return 0
}

func (k *orderKey) compare(a, b *store.Sample) int {
	switch {
	case k.field == store.FieldTime:
		return cmp.Compare(a.Time, b.Time)
	case k.field == store.FieldRecorded:
		return cmp.Compare(a.Recorded, b.Recorded)
	case k.field == store.FieldVolume:
		return store.Compare(a.Volume, b.Volume)
	case k.name == "resource_metadata":
		return bytes.Compare(a.Metadata, b.Metadata)
	case k.field == "":
		return 0
	}
	x, _ := a.Text(k.field)
	y, _ := b.Text(k.field)
	return strings.Compare(x, y)
}

// sorted calls each with the first of the samples that match, sorted, until it
// returns false; samples that the order has equal come newest first.
func (s *server) sorted(ctx context.Context, f store.Filter, o order, limit int, each func(*store.Sample) (bool, error)) error {
	keep := min(limit, maxSorted)
	var best []store.Sample
	matched := 0
	trim := func(n int) {
		slices.SortStableFunc(best, func(a, b store.Sample) int { return o.compare(&a, &b) })
		clear(best[min(n, len(best)):])
		best = best[:min(n, len(best))]
	}
	err := s.store.Samples(ctx, f, func(smp store.Sample) bool {
		if matched++; matched > maxSorted && limit > maxSorted {
			return false
		}
		if best = append(best, smp); len(best) >= 2*keep+1000 {
			trim(keep)
		}
		return true
	})
	if err != nil {
		return err
	}
	if matched > maxSorted && limit > maxSorted {
		return badRequest("More than %d samples match, too many to sort: narrow the filter, or set a limit of at most %d.", maxSorted, maxSorted)
	}
	trim(keep)
	for i := range best {
		if more, err := each(&best[i]); err != nil || !more {
			return err
		}
	}
	return nil
}
