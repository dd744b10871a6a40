package sample

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"
)

// ErrNoVolume is returned for a sample whose volume is no finite number.
var ErrNoVolume = errors.New("the volume is no number")

// Foreign holds what samples of Ceilometer have beside those of kvmeter.
type Foreign struct {
	UserName    string  // empty: unknown
	ProjectName string  // empty: unknown
	Monotonic   float64 // seconds of the sender's monotonic clock, if HasMonotonic
	// HasMonotonic says that the sender read its monotonic clock with the number.
	HasMonotonic bool
	// Timestamp is the time as it was written, where that is not how
	// [AppendTime] writes it.
	Timestamp string
}

// foreignJSON is a sample in either of Ceilometer's two vocabularies: that of
// the bus, and that of its objects, which files and HTTP carry.
type foreignJSON struct {
	CounterName      *string         `json:"counter_name"`
	Name             *string         `json:"name"`
	CounterType      *string         `json:"counter_type"`
	Type             *string         `json:"type"`
	CounterUnit      *string         `json:"counter_unit"`
	Unit             *string         `json:"unit"`
	CounterVolume    json.RawMessage `json:"counter_volume"`
	Volume           json.RawMessage `json:"volume"`
	MessageID        *string         `json:"message_id"`
	ID               *string         `json:"id"`
	Source           *string         `json:"source"`
	UserID           *string         `json:"user_id"`
	UserName         *string         `json:"user_name"`
	ProjectID        *string         `json:"project_id"`
	ProjectName      *string         `json:"project_name"`
	ResourceID       *string         `json:"resource_id"`
	Timestamp        *string         `json:"timestamp"`
	ResourceMetadata json.RawMessage `json:"resource_metadata"`
	MonotonicTime    *float64        `json:"monotonic_time"`
}

// ParseForeign reads a sample as Ceilometer sends it: a JSON object in the
// form of the bus (counter_name, message_id, …) or in that of its files (name,
// id, …). Its id is zero where it has none. A volume that is text is read as the
// number that it says; an integer of more than 64 bits becomes a float.
func ParseForeign(data []byte) (Sample, error) {
	var in foreignJSON
	err := json.Unmarshal(data, &in)
	if wrong := (*json.UnmarshalTypeError)(nil); errors.As(err, &wrong) {
		err = fmt.Errorf("a sample whose %s is of type %s", cmp.Or(wrong.Field, "JSON"), wrong.Value)
	}
	if err != nil {
		return Sample{}, err
	}
	s := Sample{
		Name: either(in.CounterName, in.Name), Kind: Kind(either(in.CounterType, in.Type)), Unit: either(in.CounterUnit, in.Unit),
		Resource: either(in.ResourceID, nil), Source: either(in.Source, nil), Project: either(in.ProjectID, nil), User: either(in.UserID, nil),
	}
	if s.Name == "" {
		return Sample{}, errors.New("a sample without a name (counter_name or name)")
	}
	if s.Source == "" {
		s.Source = "openstack"
	}
	if id := either(in.MessageID, in.ID); id != "" {
		s.ID = ParseID(id)
	}
	volume := in.CounterVolume
	if volume == nil {
		volume = in.Volume
	}
	if s.Volume, err = parseForeignVolume(volume); err != nil {
		return Sample{}, fmt.Errorf("sample %q of %q: %w", s.Name, s.Resource, err)
	}
	if meta := bytes.TrimSpace(in.ResourceMetadata); len(meta) > 0 && meta[0] == '{' {
		s.Metadata = meta
	} else if len(meta) > 0 && string(meta) != "null" {
		return Sample{}, fmt.Errorf("sample %q of %q: resource_metadata is no object", s.Name, s.Resource)
	}
	f := Foreign{UserName: either(in.UserName, nil), ProjectName: either(in.ProjectName, nil)}
	text := either(in.Timestamp, nil)
	at, ok := parseForeignTime(text)
	if !ok {
		return Sample{}, fmt.Errorf("sample %q of %q: timestamp %q is no time of the form 2006-01-02T15:04:05", s.Name, s.Resource, text)
	}
	s.Time = at.UnixMicro()
	if string(AppendTime(nil, s.Time)) != text {
		f.Timestamp = text
	}
	if in.MonotonicTime != nil {
		f.Monotonic, f.HasMonotonic = *in.MonotonicTime, true
	}
	if f != (Foreign{}) {
		s.Foreign = &f
	}
	return s, nil
}

func either(a, b *string) string {
	switch {
	case a != nil:
		return *a
	case b != nil:
		return *b
	}
	return ""
}

// parseForeignVolume reads a JSON number, or text that is one.
func parseForeignVolume(raw json.RawMessage) (Volume, error) {
	text := string(bytes.TrimSpace(raw))
	switch text {
	case "true":
		return Uint(1), nil
	case "false":
		return Uint(0), nil
	}
	if strings.HasPrefix(text, `"`) {
		var inner string
		if err := json.Unmarshal(raw, &inner); err != nil {
			return Volume{}, err
		}
		text = strings.TrimSpace(inner)
	}
	if u, err := strconv.ParseUint(text, 10, 64); err == nil {
		return Uint(u), nil
	}
	if i, err := strconv.ParseInt(text, 10, 64); err == nil {
		return Int(i), nil
	}
	f, err := strconv.ParseFloat(text, 64)
	if err != nil || math.IsNaN(f) || math.IsInf(f, 0) || strings.ContainsAny(text, "xXpP") {
		return Volume{}, fmt.Errorf("%w: %.40s", ErrNoVolume, raw)
	}
	return Float(f), nil
}

// foreignTimes are how Ceilometer writes times, old and new.
var foreignTimes = []string{
	"2006-01-02T15:04:05Z07:00", "2006-01-02T15:04:05", "2006-01-02 15:04:05Z07:00", "2006-01-02 15:04:05",
}

func parseForeignTime(s string) (time.Time, bool) {
	for _, layout := range foreignTimes {
		if at, err := time.Parse(layout, s); err == nil {
			return at, true
		}
	}
	return time.Time{}, false
}
