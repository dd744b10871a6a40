package api

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/sample"
)

// maxSamplesBody bounds the body of a request that sends samples or events, in
// bytes.
const maxSamplesBody = 8 << 20

// posted is a sample that a client sends.
type posted struct {
	source, meter, kind, unit, user, project, resource, id string
	volume                                                 sample.Volume
	at                                                     time.Time // zero: the request's
	zoned                                                  bool      // at names a time zone
	metadata                                               map[string]any
}

// sampleAttribute is an attribute of a sample that is sent.
type sampleAttribute struct {
	name      string
	mandatory bool
	set       func(*posted, string, any) error
}

// sampleAttributes are those that there are, in the order in which they are checked.
var sampleAttributes = []sampleAttribute{
	{"source", false, textOf(func(p *posted) *string { return &p.source })},
	{"counter_name", true, textOf(func(p *posted) *string { return &p.meter })},
	{"counter_type", true, textOf(func(p *posted) *string { return &p.kind })},
	{"counter_unit", true, textOf(func(p *posted) *string { return &p.unit })},
	{"counter_volume", true, (*posted).setVolume},
	{"user_id", false, textOf(func(p *posted) *string { return &p.user })},
	{"project_id", false, textOf(func(p *posted) *string { return &p.project })},
	{"resource_id", true, textOf(func(p *posted) *string { return &p.resource })},
	{"timestamp", false, (*posted).setTime},
	{"recorded_at", false, func(*posted, string, any) error { return nil }},
	{"resource_metadata", false, (*posted).setMetadata},
	{"message_id", false, textOf(func(p *posted) *string { return &p.id })},
}

// badValue is what is wrong with a value that cannot be converted: the original
// complains of the whole argument then.
type badValue string

func (b badValue) Error() string { return string(b) }

func textOf(field func(*posted) *string) func(*posted, string, any) error {
	return func(p *posted, name string, v any) error {
		text, ok := v.(string)
		if !ok {
			return invalidInput(name, pythonText(v), "Wrong type. Expected '<class 'str'>', got '"+pythonType(v)+"'")
		}
		*field(p) = text
		return nil
	}
}

func (p *posted) setVolume(_ string, v any) error {
	switch v := v.(type) {
	case bool:
		p.volume = sample.Uint(0)
		if v {
			p.volume = sample.Uint(1)
		}
		return nil
	case json.Number:
		return p.parseVolume(v.String(), v.String())
	case string:
		return p.parseVolume(strings.TrimSpace(v), v)
	}
	return badValue("float() argument must be a string or a number, not '" + strings.TrimSuffix(strings.TrimPrefix(pythonType(v), "<class '"), "'>") + "'")
}

func (p *posted) parseVolume(text, sent string) error {
	if u, err := strconv.ParseUint(text, 10, 64); err == nil {
		p.volume = sample.Uint(u)
		return nil
	}
	if i, err := strconv.ParseInt(text, 10, 64); err == nil {
		p.volume = sample.Int(i)
		return nil
	}
	f, err := strconv.ParseFloat(text, 64)
	if math.IsInf(f, 0) || math.IsNaN(f) {
		return badValue("the volume " + pythonRepr(sent) + " is not a finite number")
	}
	if err != nil || strings.ContainsAny(text, "xXpP_") {
		return badValue("could not convert string to float: " + pythonRepr(sent))
	}
	p.volume = sample.Float(f)
	return nil
}

func (p *posted) setTime(_ string, v any) error {
	text, ok := v.(string)
	if ok {
		var err error
		p.at, p.zoned, err = readTime(text)
		ok = err == nil
	}
	if !ok {
		return badValue(pythonText(v) + " is not a legal datetime value")
	}
	return nil
}

// setMetadata takes an object of texts.
func (p *posted) setMetadata(name string, v any) error {
	object, ok := v.(map[string]any)
	if !ok {
		return badValue("Value not a valid dict: " + pythonText(v))
	}
	for _, k := range sortedKeys(object) {
		v := object[k]
		if _, text := v.(string); !text && v != nil {
			return invalidInput(name, pythonText(object), "Wrong type. Expected '<class 'str'>', got '"+pythonType(v)+"'")
		}
		if strings.Count(k, ".") >= maxNesting {
			return invalidInput(name, pythonText(object), fmt.Sprintf("A key has more than %d dots.", maxNesting))
		}
	}
	p.metadata = object
	return nil
}

// pythonType returns the type of a decoded JSON value as Python prints it.
func pythonType(v any) string {
	switch v := v.(type) {
	case nil:
		return "<class 'NoneType'>"
	case bool:
		return "<class 'bool'>"
	case json.Number:
		if strings.ContainsAny(v.String(), ".eE") {
			return "<class 'float'>"
		}
		return "<class 'int'>"
	case string:
		return "<class 'str'>"
	case []any:
		return "<class 'list'>"
	}
	return "<class 'dict'>"
}

// createSamples takes samples: into the store, or to the pipelines.
func (s *server) createSamples(r *request, out *output) error {
	p := newParams()
	if err := p.readQuery(r.URL.RawQuery, []string{"direct"}); err != nil {
		return err
	}
	direct, err := p.flag("direct")
	if err != nil {
		return err
	}
	samples, err := readSamples(r.Request)
	if err != nil {
		return err
	}
	now := s.opts.Clock()
	for i := range samples {
		if err := s.fill(&samples[i], r, now); err != nil {
			return err
		}
	}
	stored := make([]sample.Sample, len(samples))
	for i := range samples {
		stored[i] = samples[i].sample()
	}
	b := BatchOf(now, stored)
	if direct {
		err = Store(r.Context(), s.store, b)
	} else {
		err = s.publish(r, b)
	}
	if err != nil {
		return err
	}
	out.status = http.StatusCreated
	list := listOf(out, math.MaxInt)
	for i := range samples {
		if _, err := list.add(func(dst []byte) []byte { return samples[i].append(dst, b.IDs[i]) }); err != nil {
			return err
		}
	}
	list.end()
	return nil
}

// readSamples reads the body of a request: a list of samples.
func readSamples(r *http.Request) ([]posted, error) {
	body, err := readBody(r, maxSamplesBody)
	if err != nil {
		return nil, err
	}
	elements, err := splitList(body)
	if err != nil {
		return nil, err
	}
	if elements == nil {
		return nil, badSamples(body, "Value not a valid list: "+clip(pythonText(decoded(body))))
	}
	if len(elements) == 0 {
		return nil, badRequest("Samples should be included in request body")
	}
	samples := make([]posted, len(elements))
	for i, e := range elements {
		err := samples[i].read(e)
		if why := badValue(""); errors.As(err, &why) {
			err = badSamples(body, string(why))
		}
		if err != nil {
			return nil, err
		}
	}
	return samples, nil
}

// readElements reads a body that is a list, or one element of such a list.
func readElements(r *request) ([]json.RawMessage, error) {
	p := newParams()
	if err := p.readQuery(r.URL.RawQuery, nil); err != nil {
		return nil, err
	}
	body, err := readBody(r.Request, maxSamplesBody)
	if err != nil {
		return nil, err
	}
	elements, err := splitList(body)
	if elements == nil && err == nil {
		elements = []json.RawMessage{body}
	}
	return elements, err
}

// splitList returns the elements of a JSON list, which are none where there is
// no body, and nil of what is no list.
func splitList(body []byte) ([]json.RawMessage, error) {
	elements := []json.RawMessage{}
	if len(body) == 0 {
		return elements, nil
	}
	if !json.Valid(body) {
		return nil, badRequest("Request is not in valid JSON format")
	}
	if body[0] != '[' {
		return nil, nil
	}
	if err := json.Unmarshal(body, &elements); err != nil {
		return nil, badRequest("Request is not in valid JSON format")
	}
	if len(elements) > sample.MaxSamples {
		return nil, tooLarge(fmt.Sprintf("%d elements in a request, at most %d are taken.", len(elements), sample.MaxSamples))
	}
	return elements, nil
}

// decoded returns a JSON value that is known to be valid.
func decoded(data []byte) any {
	var v any
	if decodeJSON(data, &v) != nil {
		return nil
	}
	return v
}

// badSamples complains of the whole body.
func badSamples(body []byte, why string) error {
	if len(body) > 4*maxEcho { // not worth decoding to be cut off
		return invalidInput("samples", string(body[:maxEcho])+"…", why)
	}
	return invalidInput("samples", pythonText(decoded(body)), why)
}

// read fills the sample from a JSON object.
func (p *posted) read(data []byte) error {
	var object map[string]any
	if err := decodeJSON(data, &object); err != nil || object == nil {
		return badValue("Value not a valid sample: " + clip(pythonText(decoded(data))))
	}
	known := 0
	for _, a := range sampleAttributes {
		v, given := object[a.name]
		if given {
			known++
		}
		switch {
		case v == nil && a.mandatory:
			return invalidInput(a.name, "None", "Mandatory field missing.")
		case v == nil:
			continue
		}
		if err := a.set(p, a.name, v); err != nil {
			return err
		}
	}
	if known == len(object) {
		return nil
	}
	var unknown []string
	for _, k := range sortedKeys(object) {
		if !slices.ContainsFunc(sampleAttributes, func(a sampleAttribute) bool { return a.name == k }) {
			unknown = append(unknown, k)
		}
	}
	s := ""
	if len(unknown) > 1 {
		s = "s"
	}
	return badRequest("Unknown attribute%s for argument samples: %s", s, clip(strings.Join(unknown, ", ")))
}

// fill checks a sample and adds what the request says of it.
func (s *server) fill(p *posted, r *request, now time.Time) error {
	project, limited, err := r.caller.scope()
	if err != nil {
		return err
	}
	kinds := []sample.Kind{sample.Gauge, sample.Delta, sample.Cumulative}
	switch {
	case p.meter != r.names[0]:
		return invalidInput("counter_name", p.meter, "should be "+r.names[0])
	case p.id != "":
		return invalidInput("message_id", p.id, "The message_id must not be set")
	case !slices.Contains(kinds, sample.Kind(p.kind)):
		return invalidInput("counter_type", p.kind, "The counter type must be: gauge, delta, cumulative")
	}
	p.user = cmp.Or(p.user, r.caller.User)
	p.project = cmp.Or(p.project, r.caller.Project)
	p.source = cmp.Or(p.project, "None") + ":" + cmp.Or(p.source, s.opts.SampleSource)
	if p.at.IsZero() {
		p.at = now.UTC().Truncate(time.Microsecond)
	}
	if limited && p.project != project {
		return invalidInput("project_id", p.project, "can not post samples to other projects")
	}
	return nil
}

// sample returns what is stored. Its metadata is what the dotted names stand
// for.
func (p *posted) sample() sample.Sample {
	s := sample.Sample{
		Name: p.meter, Kind: sample.Kind(p.kind), Unit: p.unit, Volume: p.volume, Resource: p.resource,
		Source: p.source, Project: p.project, User: p.user, Time: p.at.UnixMicro(),
	}
	if len(p.metadata) > 0 {
		s.Metadata = marshal(nest(p.metadata))
	}
	return s
}

// nest turns {"a.b": "c"} into {"a": {"b": "c"}}.
func nest(flat map[string]any) map[string]any {
	nested := map[string]any{}
	for _, path := range sortedKeys(flat) {
		at, rest := nested, path
		for {
			top, below, ok := strings.Cut(rest, ".")
			if !ok {
				break
			}
			next, ok := at[top].(map[string]any)
			if !ok {
				next = map[string]any{}
				at[top] = next
			}
			at, rest = next, below
		}
		at[rest] = flat[path]
	}
	return nested
}

// marshal prints what was decoded from JSON.
func marshal(v any) []byte {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if e.Encode(v) != nil { // not for what was decoded
		return nil
	}
	return bytes.TrimSpace(b.Bytes())
}

// append prints the sample as the answer has it: as it was sent, completed.
func (p *posted) append(dst []byte, id string) []byte {
	dst = append(dst, '{')
	dst = appendString(field(dst, "source"), p.source)
	dst = appendString(field(dst, "counter_name"), p.meter)
	dst = appendString(field(dst, "counter_type"), p.kind)
	dst = appendString(field(dst, "counter_unit"), p.unit)
	dst = p.volume.AppendAPI(field(dst, "counter_volume"))
	dst = appendKnown(field(dst, "user_id"), p.user)
	dst = appendKnown(field(dst, "project_id"), p.project)
	dst = appendString(field(dst, "resource_id"), p.resource)
	layout := "2006-01-02T15:04:05"
	if p.at.Nanosecond() >= 1000 {
		layout += ".000000"
	}
	if p.zoned {
		layout += "-07:00"
	}
	dst = append(p.at.AppendFormat(append(field(dst, "timestamp"), '"'), layout), '"')
	dst = append(field(dst, "resource_metadata"), '{')
	for _, k := range sortedKeys(p.metadata) {
		if dst[len(dst)-1] != '{' {
			dst = append(dst, ", "...)
		}
		dst = append(appendString(dst, k), ": "...)
		if text, ok := p.metadata[k].(string); ok {
			dst = appendString(dst, text)
		} else {
			dst = append(dst, "null"...)
		}
	}
	dst = append(dst, '}')
	dst = appendString(field(dst, "message_id"), id)
	return append(dst, '}')
}

// publishWithin is how long a request waits for the pipelines to take samples.
const publishWithin = 30 * time.Second

// publish hands a batch to the pipelines.
func (s *server) publish(r *request, b *sample.Batch) error {
	if s.opts.Publish == nil {
		return &fault{status: http.StatusServiceUnavailable, text: "There is no pipeline behind this API; send the samples with direct=true."}
	}
	ctx, cancel := context.WithTimeout(r.Context(), publishWithin)
	defer cancel()
	err := s.opts.Publish(ctx, b)
	if err != nil && r.Context().Err() == nil {
		s.opts.Log.Error("samples sent to the API did not reach the bus", zap.Int("samples", b.Len()), zap.Error(err))
		return &fault{status: http.StatusServiceUnavailable, text: "The pipelines take no samples now; send them again later, or with direct=true."}
	}
	return err
}
