// Package conversion makes samples and events of notifications, by the meter
// and event definitions that are configured.
package conversion

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strconv"
	"strings"

	"github.com/kvmeter/kvmeter/notifier/definition"
	"github.com/kvmeter/kvmeter/notifier/events"
	"github.com/kvmeter/kvmeter/notifier/meters"
)

// Settings say which definitions are used, and how.
type Settings struct {
	Meters meters.Options
	Events events.Options
	// NoMeters and NoEvents switch one half off.
	NoMeters, NoEvents bool
}

// DefaultSettings returns what holds where nothing is said.
func DefaultSettings() Settings { return Settings{Meters: meters.DefaultOptions()} }

// Set applies a setting of the form group.option=value, with the names of
// ceilometer.conf.
func (s *Settings) Set(text string) error {
	name, v, ok := strings.Cut(text, "=")
	name, v = strings.TrimSpace(name), strings.TrimSpace(v)
	option := options[strings.TrimPrefix(name, "DEFAULT.")]
	if !ok || option == nil {
		names := make([]string, 0, len(options))
		for n := range options {
			names = append(names, n)
		}
		sort.Strings(names)
		return fmt.Errorf("setting %q is none of the form group.option=value for %s", text, strings.Join(names, ", "))
	}
	if err := option(s, v); err != nil {
		return fmt.Errorf("setting %s: %w", name, err)
	}
	return nil
}

// options are those of ceilometer.conf that change what is converted; the two of
// the group meter that Ceilometer does not know say so in docs/ceilometer.md.
var options = map[string]func(*Settings, string) error{
	"sample_source":               func(s *Settings, v string) error { s.Meters.Source = v; return nil },
	"reserved_metadata_namespace": func(s *Settings, v string) error { s.Meters.ReservedNamespaces = words(v); return nil },
	"reserved_metadata_keys":      func(s *Settings, v string) error { s.Meters.ReservedKeys = words(v); return nil },
	"reserved_metadata_length": func(s *Settings, v string) (err error) {
		if s.Meters.ReservedLength, err = strconv.Atoi(v); err != nil || s.Meters.ReservedLength < 0 {
			return fmt.Errorf("%q is no whole number of at least 0", v)
		}
		return nil
	},
	"meter.context_fallback": func(s *Settings, v string) error {
		if v != "intended" && v != "strict" {
			return fmt.Errorf("%q is neither intended nor strict", v)
		}
		s.Meters.StrictContext = v == "strict"
		return nil
	},
	"meter.legacy_units":                 func(s *Settings, v string) error { return truth(&s.Meters.LegacyUnits, v) },
	"event.drop_unmatched_notifications": func(s *Settings, v string) error { return truth(&s.Events.DropUnmatched, v) },
	"event.store_raw": func(s *Settings, v string) error {
		s.Events.StoreRaw = append(s.Events.StoreRaw, words(strings.ToLower(v))...)
		return nil
	},
	"notification.disable_non_metric_meters": func(s *Settings, v string) error { return opposite(&s.Meters.Existence, v) },
	"notification.store_events":              func(s *Settings, v string) error { return opposite(&s.NoEvents, v) },
	"notification.pipelines": func(s *Settings, v string) error {
		ws := words(v)
		for _, w := range ws {
			if w != "meter" && w != "event" {
				return fmt.Errorf("%q is neither meter nor event", w)
			}
		}
		s.NoMeters, s.NoEvents = !slices.Contains(ws, "meter"), !slices.Contains(ws, "event")
		return nil
	},
}

func words(v string) []string {
	var ws []string
	for w := range strings.SplitSeq(v, ",") {
		if w = strings.TrimSpace(w); w != "" {
			ws = append(ws, w)
		}
	}
	return ws
}

// truth reads a truth value as oslo.config does.
func truth(dst *bool, v string) error {
	switch strings.ToLower(v) {
	case "true", "1", "on", "yes":
		*dst = true
	case "false", "0", "off", "no":
		*dst = false
	default:
		return fmt.Errorf("%q is neither true nor false", v)
	}
	return nil
}

func opposite(dst *bool, v string) error {
	err := truth(dst, v)
	*dst = !*dst
	return err
}

// Definitions are what notifications are converted by. They are safe for
// concurrent use.
type Definitions struct {
	meters *meters.Set
	events *events.Set // nil: no events are made
	make   bool        // samples
}

// Shipped stands for the definitions that kvmeter brings, among files of meters.
const Shipped = "shipped"

// Load compiles the definitions of files: meterFiles may be folders, of which
// all *.yaml are read, or [Shipped]. Without a file of events they are what
// kvmeter brings. Meter definitions with errors are left out, event definitions
// with errors are an error, as in Ceilometer; the findings say what there is
// to say about each.
func Load(s Settings, meterFiles []string, eventFile string) (*Definitions, []definition.Finding, error) {
	d := &Definitions{make: !s.NoMeters}
	files, err := readMeters(meterFiles, s)
	if err != nil {
		return nil, nil, err
	}
	if d.meters, err = meters.Load(files, s.Meters); err != nil {
		return nil, nil, err
	}
	findings := d.meters.Findings()
	if s.NoEvents {
		return d, findings, nil
	}
	name, data := events.ShippedName, events.Shipped()
	if eventFile != "" {
		name = eventFile
		if data, err = os.ReadFile(eventFile); err != nil {
			return nil, findings, fmt.Errorf("read event definitions: %w", err)
		}
	}
	d.events, err = events.Load(name, data, s.Events)
	return d, append(findings, d.events.Findings()...), err
}

// readMeters reads files and folders of meter definitions.
func readMeters(paths []string, s Settings) ([]meters.File, error) {
	var files []meters.File
	for _, path := range paths {
		if path == Shipped {
			files = append(files, meters.Shipped(s.Meters)...)
			continue
		}
		names := []string{path}
		if info, err := os.Stat(path); err == nil && info.IsDir() {
			if names, err = filepath.Glob(filepath.Join(path, "*.yaml")); err != nil {
				return nil, fmt.Errorf("read meter definitions: %w", err)
			}
			sort.Strings(names)
			if len(names) == 0 {
				return nil, fmt.Errorf("read meter definitions: no *.yaml in %s", path)
			}
		}
		for _, name := range names {
			data, err := os.ReadFile(name)
			if err != nil {
				return nil, fmt.Errorf("read meter definitions: %w", err)
			}
			files = append(files, meters.File{Name: name, Data: data})
		}
	}
	return files, nil
}
