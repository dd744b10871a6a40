// Package client asks the Telemetry API v2 of kvmeter (or of the original
// service) for meters, samples, resources, statistics, events and gaps, and sends
// samples to it. Numbers keep
// the digits of the answer; times are the API's texts, UTC without a zone.
package client

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
)

// Client asks the API at Endpoint. It is safe for concurrent use.
type Client struct {
	Endpoint string       // such as http://127.0.0.1:8777; /v2 is added
	Token    string       // sent as X-Auth-Token where it is set
	HTTP     *http.Client // nil: http.DefaultClient
}

// Error is what the API answers where it does not answer the question.
type Error struct {
	Status int    // of HTTP
	Text   string // the API's faultstring
}

// Error returns the text with the status, as the original client prints it.
func (e *Error) Error() string { return fmt.Sprintf("%s (HTTP %d)", e.Text, e.Status) }

// Term is a comparison of a simple query; all terms of a query must hold.
// An empty Op is eq; Type is string, integer, float, boolean, datetime or empty.
type Term struct{ Field, Op, Value, Type string }

// Meter is a meter of a resource.
type Meter struct {
	Name     string  `json:"name"`
	Type     string  `json:"type"`
	Unit     string  `json:"unit"`
	Resource *string `json:"resource_id"`
	Project  *string `json:"project_id"`
	User     *string `json:"user_id"`
	Source   *string `json:"source"`
	ID       string  `json:"meter_id"`
}

// Sample is one reading of a meter. Origin and Incarnation are only there
// where they were asked for.
type Sample struct {
	ID          string            `json:"id"`
	Meter       string            `json:"meter"`
	Type        string            `json:"type"`
	Unit        string            `json:"unit"`
	Volume      json.Number       `json:"volume"`
	User        *string           `json:"user_id"`
	Project     *string           `json:"project_id"`
	Resource    *string           `json:"resource_id"`
	Source      *string           `json:"source"`
	Time        string            `json:"timestamp"`
	Recorded    string            `json:"recorded_at"`
	Metadata    map[string]string `json:"metadata"`
	Origin      *string           `json:"origin"`
	Incarnation *string           `json:"incarnation"`
}

// oldSample is a sample as /v2/meters/{name} lists it.
type oldSample struct {
	ID       string            `json:"message_id"`
	Meter    string            `json:"counter_name"`
	Type     string            `json:"counter_type"`
	Unit     string            `json:"counter_unit"`
	Volume   json.Number       `json:"counter_volume"`
	Metadata map[string]string `json:"resource_metadata"`
}

// Resource is what samples were taken of. First and Last are the times of its
// oldest and newest sample that match the query.
type Resource struct {
	ID       string            `json:"resource_id"`
	Project  *string           `json:"project_id"`
	User     *string           `json:"user_id"`
	Source   *string           `json:"source"`
	First    string            `json:"first_sample_timestamp"`
	Last     string            `json:"last_sample_timestamp"`
	Metadata map[string]string `json:"metadata"`
	Links    []Link            `json:"links"`
}

// Link is an address that the API names.
type Link struct {
	Href string `json:"href"`
	Rel  string `json:"rel"`
}

// Statistics are the aggregates of one period and group. Where aggregates were
// selected, Aggregate has them and the others are empty.
type Statistics struct {
	Group         map[string]*string     `json:"groupby"`
	Unit          string                 `json:"unit"`
	Min           json.Number            `json:"min"`
	Max           json.Number            `json:"max"`
	Avg           json.Number            `json:"avg"`
	Sum           json.Number            `json:"sum"`
	Count         json.Number            `json:"count"`
	Aggregate     map[string]json.Number `json:"aggregate"`
	Duration      *json.Number           `json:"duration"` // seconds
	DurationStart *string                `json:"duration_start"`
	DurationEnd   *string                `json:"duration_end"`
	Period        json.Number            `json:"period"` // seconds
	PeriodStart   string                 `json:"period_start"`
	PeriodEnd     string                 `json:"period_end"`
}

// Gap is a stretch of time for which numbers are missing, and why. A Meter or
// Resource of "*" is all of them.
type Gap struct {
	Meter    string `json:"meter"`
	Resource string `json:"resource_id"`
	Node     string `json:"node"`
	From     string `json:"from"`
	To       string `json:"to"`
	Reason   string `json:"reason"`
}

// UsageQuery asks how much was used from Start to End (times, UTC; empty: this
// month, until now), told apart by the values of metadata.
type UsageQuery struct {
	Query      []Term
	Start, End string
	SplitBy    []string
}

// Usage is how much a project used of a meter and resource.
type Usage struct {
	Project  *string            `json:"project_id"`
	Resource string             `json:"resource_id"`
	Meter    string             `json:"meter"`
	Type     string             `json:"type"`
	Unit     string             `json:"unit"`
	Source   *string            `json:"source"`
	Split    map[string]*string `json:"split"`
	Quantity json.Number        `json:"quantity"` // exact
	Of       string             `json:"quantity_unit"`
	Samples  json.Number        `json:"samples"`
	First    string             `json:"first"`
	Last     string             `json:"last"`
	Covered  json.Number        `json:"covered"` // seconds
	Origins  []string           `json:"origins"`
	Gaps     []Gap              `json:"gaps"`
}

// Aggregate is a function that statistics are asked for: max, min, sum, avg,
// count, stddev, or cardinality with a field as its Param.
type Aggregate struct{ Func, Param string }

// StatisticsQuery asks for aggregates of one meter.
type StatisticsQuery struct {
	Meter      string
	Query      []Term
	Period     int64 // seconds; 0: one for all
	GroupBy    []string
	Aggregates []Aggregate
}

// Meters lists meters, at most limit of them; 0 leaves the limit to the API.
// unique lists each meter once, whatever its resources.
func (c *Client) Meters(ctx context.Context, query []Term, limit int, unique bool) ([]Meter, error) {
	args := arguments(query, limit)
	if unique {
		args.Set("unique", "True")
	}
	return get[[]Meter](ctx, c, "/v2/meters", args)
}

// Samples lists samples of all meters, newest first. extra asks for origin and
// incarnation, which only kvmeter knows.
func (c *Client) Samples(ctx context.Context, query []Term, limit int, extra bool) ([]Sample, error) {
	return get[[]Sample](ctx, c, "/v2/samples", sampleArguments(query, limit, extra))
}

// MeterSamples lists samples of one meter, newest first.
func (c *Client) MeterSamples(ctx context.Context, meter string, query []Term, limit int, extra bool) ([]Sample, error) {
	entries, err := get[[]json.RawMessage](ctx, c, "/v2/meters/"+escapeID(meter), sampleArguments(query, limit, extra))
	if err != nil {
		return nil, err
	}
	return fromOld(entries)
}

// fromOld reads samples in the form of /v2/meters/{name}.
func fromOld(entries []json.RawMessage) ([]Sample, error) {
	samples := make([]Sample, len(entries))
	for i, entry := range entries {
		var old oldSample
		for _, part := range []any{&samples[i], &old} {
			if err := json.Unmarshal(entry, part); err != nil {
				return nil, fmt.Errorf("read the API's answer: %w", err)
			}
		}
		s := &samples[i]
		s.ID, s.Meter, s.Type, s.Unit, s.Volume, s.Metadata = old.ID, old.Meter, old.Type, old.Unit, old.Volume, old.Metadata
	}
	return samples, nil
}

// Sample returns the sample with the given id.
func (c *Client) Sample(ctx context.Context, id string, extra bool) (Sample, error) {
	return get[Sample](ctx, c, "/v2/samples/"+escapeID(id), sampleArguments(nil, 0, extra))
}

// Resources lists resources without the links to their meters.
func (c *Client) Resources(ctx context.Context, query []Term, limit int) ([]Resource, error) {
	args := arguments(query, limit)
	args.Set("meter_links", "0")
	return get[[]Resource](ctx, c, "/v2/resources", args)
}

// Resource returns the resource with the given id.
func (c *Client) Resource(ctx context.Context, id string) (Resource, error) {
	return get[Resource](ctx, c, "/v2/resources/"+escapeID(id), nil)
}

// Statistics returns aggregates of a meter's samples.
func (c *Client) Statistics(ctx context.Context, q StatisticsQuery) ([]Statistics, error) {
	args := arguments(q.Query, 0)
	if q.Period != 0 {
		args.Set("period", strconv.FormatInt(q.Period, 10))
	}
	for _, g := range q.GroupBy {
		args.Add("groupby", g)
	}
	for _, a := range q.Aggregates {
		args.Add("aggregate.func", a.Func)
		args.Add("aggregate.param", a.Param)
	}
	return get[[]Statistics](ctx, c, "/v2/meters/"+escapeID(q.Meter)+"/statistics", args)
}

// Gaps lists what is known to be missing, newest first. Empty times are no
// bounds.
func (c *Client) Gaps(ctx context.Context, start, end string, limit int) ([]Gap, error) {
	args := arguments(nil, limit)
	if start != "" {
		args.Set("start", start)
	}
	if end != "" {
		args.Set("end", end)
	}
	return get[[]Gap](ctx, c, "/v2/gaps", args)
}

// NewSample is a sample to create. Values of Metadata are texts; a dot in a
// name nests.
type NewSample struct {
	Meter    string            `json:"counter_name"`
	Type     string            `json:"counter_type"`
	Unit     string            `json:"counter_unit"`
	Volume   json.Number       `json:"counter_volume"`
	Resource string            `json:"resource_id"`
	Project  string            `json:"project_id,omitempty"`
	User     string            `json:"user_id,omitempty"`
	Time     string            `json:"timestamp,omitempty"`
	Metadata map[string]string `json:"resource_metadata,omitempty"`
}

// CreateSamples sends samples, all of the meter, and returns them as they were
// taken. samples is a []NewSample, or JSON that the caller has. With direct they
// are stored when it returns, else they pass the pipelines.
func (c *Client) CreateSamples(ctx context.Context, meter string, samples any, direct bool) ([]Sample, error) {
	args := url.Values{}
	if direct {
		args.Set("direct", "true")
	}
	entries, err := do[[]json.RawMessage](ctx, c, http.MethodPost, "/v2/meters/"+escapeID(meter), args, samples)
	if err != nil {
		return nil, err
	}
	return fromOld(entries)
}

// QuerySamples lists samples that a complex query selects. filter and orderBy
// are JSON; empty ones are left out.
func (c *Client) QuerySamples(ctx context.Context, filter, orderBy string, limit int) ([]Sample, error) {
	query := map[string]any{}
	if filter != "" {
		query["filter"] = filter
	}
	if orderBy != "" {
		query["orderby"] = orderBy
	}
	if limit != 0 {
		query["limit"] = limit
	}
	return do[[]Sample](ctx, c, http.MethodPost, "/v2/query/samples", nil, query)
}

// Trait is a value of an event. Its Type is string, integer, float or datetime.
type Trait struct {
	Name  string `json:"name"`
	Type  string `json:"type"`
	Value string `json:"value"`
}

// Event is what a service said that happened.
type Event struct {
	ID        string          `json:"message_id"`
	Type      string          `json:"event_type"`
	Generated string          `json:"generated"`
	Traits    []Trait         `json:"traits"`
	Raw       json.RawMessage `json:"raw"`
}

// Events lists events, oldest first: those of the caller's project or, if the
// caller may see them, of all projects, which only kvmeter can.
func (c *Client) Events(ctx context.Context, query []Term, limit int, allProjects bool) ([]Event, error) {
	return get[[]Event](ctx, c, "/v2/events", eventArguments(query, limit, allProjects))
}

// Event returns the event with the given id, of the caller's project or of any.
func (c *Client) Event(ctx context.Context, id string, allProjects bool) (Event, error) {
	return get[Event](ctx, c, "/v2/events/"+escapeID(id), eventArguments(nil, 0, allProjects))
}

// EventTypes lists the types of all events.
func (c *Client) EventTypes(ctx context.Context) ([]string, error) {
	return get[[]string](ctx, c, "/v2/event_types", nil)
}

// TraitDescriptions lists the names and types of the traits that events of a type
// have.
func (c *Client) TraitDescriptions(ctx context.Context, eventType string) ([]Trait, error) {
	return get[[]Trait](ctx, c, "/v2/event_types/"+escapeID(eventType)+"/traits", nil)
}

// Traits lists the values of a trait that events of a type have.
func (c *Client) Traits(ctx context.Context, eventType, name string) ([]Trait, error) {
	return get[[]Trait](ctx, c, "/v2/event_types/"+escapeID(eventType)+"/traits/"+escapeID(name), nil)
}

// Capabilities says what the API and its stores can do, by part.
func (c *Client) Capabilities(ctx context.Context) (map[string]map[string]bool, error) {
	return get[map[string]map[string]bool](ctx, c, "/v2/capabilities", nil)
}

// Usage lists what was used, sorted by resource and meter.
func (c *Client) Usage(ctx context.Context, q UsageQuery) ([]Usage, error) {
	return get[[]Usage](ctx, c, "/v2/usage", q.arguments())
}

// CopyUsage writes what was used to w as the API sends it: json, csv or parquet.
func (c *Client) CopyUsage(ctx context.Context, w io.Writer, q UsageQuery, format string) error {
	args := q.arguments()
	args.Set("format", format)
	resp, err := c.ask(ctx, http.MethodGet, "/v2/usage", args, nil)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	_, err = io.Copy(w, resp.Body)
	return err
}

func (q *UsageQuery) arguments() url.Values {
	args := arguments(q.Query, 0)
	for name, value := range map[string]string{"start": q.Start, "end": q.End} {
		if value != "" {
			args.Set(name, value)
		}
	}
	args["split"] = q.SplitBy
	return args
}

// arguments sends four lists of equal length, so that positions hold.
func arguments(query []Term, limit int) url.Values {
	args := url.Values{}
	for _, t := range query {
		op := t.Op
		if op == "" {
			op = "eq"
		}
		args.Add("q.field", t.Field)
		args.Add("q.op", op)
		args.Add("q.type", t.Type)
		args.Add("q.value", t.Value)
	}
	if limit != 0 {
		args.Set("limit", strconv.Itoa(limit))
	}
	return args
}

func sampleArguments(query []Term, limit int, extra bool) url.Values {
	args := arguments(query, limit)
	if extra {
		args.Set("extra", "true")
	}
	return args
}

func eventArguments(query []Term, limit int, allProjects bool) url.Values {
	args := arguments(query, limit)
	if allProjects {
		args.Set("all_projects", "true")
	}
	return args
}

// escapeID escapes an id for a path. A slash is escaped twice: the original
// service's HTTP layer takes the first escape away.
func escapeID(id string) string {
	return strings.ReplaceAll(url.PathEscape(id), "%2F", "%252F")
}

// maxError bounds how much of an error's body is read.
const maxError = 1 << 16

func get[T any](ctx context.Context, c *Client, path string, args url.Values) (T, error) {
	return do[T](ctx, c, http.MethodGet, path, args, nil)
}

// do asks and reads the answer. A body that is not nil is sent as JSON.
func do[T any](ctx context.Context, c *Client, method, path string, args url.Values, body any) (answer T, err error) {
	resp, err := c.ask(ctx, method, path, args, body)
	if err != nil {
		return answer, err
	}
	defer func() { _ = resp.Body.Close() }()
	if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil {
		return answer, fmt.Errorf("read the API's answer: %w", err)
	}
	return answer, nil
}

// ask returns the response of a request that succeeded.
func (c *Client) ask(ctx context.Context, method, path string, args url.Values, body any) (*http.Response, error) {
	address := strings.TrimSuffix(strings.TrimSuffix(c.Endpoint, "/"), "/v2") + path
	if len(args) > 0 {
		address += "?" + args.Encode()
	}
	var content io.Reader
	if body != nil {
		b, err := json.Marshal(body)
		if err != nil {
			return nil, err
		}
		content = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, address, content)
	if err != nil {
		return nil, fmt.Errorf("address of the API: %w", err)
	}
	req.Header.Set("Accept", "application/json")
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	if c.Token != "" {
		req.Header.Set("X-Auth-Token", c.Token)
	}
	client := c.HTTP
	if client == nil {
		client = http.DefaultClient
	}
	resp, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode/100 == 2 {
		return resp, nil
	}
	defer func() { _ = resp.Body.Close() }()
	text, _ := io.ReadAll(io.LimitReader(resp.Body, maxError)) // what came of it is still the best text
	return nil, &Error{Status: resp.StatusCode, Text: faultText(text, resp.Status)}
}

// faultText finds the text in an error's body: an object's faultstring, or
// where the original answers with a text instead, its first line.
func faultText(body []byte, status string) string {
	var doc struct {
		Message json.RawMessage `json:"error_message"`
	}
	if err := json.Unmarshal(body, &doc); err != nil {
		return status
	}
	var fault struct {
		Text string `json:"faultstring"`
	}
	if err := json.Unmarshal(doc.Message, &fault); err == nil && fault.Text != "" {
		return fault.Text
	}
	var text string
	if err := json.Unmarshal(doc.Message, &text); err == nil {
		if line, _, _ := bytes.Cut([]byte(strings.TrimSpace(text)), []byte("\n")); len(line) > 0 {
			return string(line)
		}
	}
	return status
}
