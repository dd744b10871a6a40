package main

import (
	"encoding/csv"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"
)

// record is one figure: what of whom, at which interval, and in which turn and
// cycle. docs/comparison/PART.csv has them, a line each.
type record struct {
	who      string
	interval time.Duration
	turn     int
	cycle    int // from 1; 0: of the whole turn
	what     string
	value    float64
}

var header = []string{"who", "interval_s", "turn", "cycle", "what", "value"}

// series picks the values of one figure.
func series(records []record, who string, interval time.Duration, what string) (values []float64) {
	for _, r := range records {
		if r.who == who && r.interval == interval && r.what == what {
			values = append(values, r.value)
		}
	}
	return values
}

// save replaces a part's records.
func save(dir, part string, records []record) error {
	f, err := os.Create(filepath.Join(dir, part+".csv"))
	if err != nil {
		return err
	}
	w := csv.NewWriter(f)
	lines := [][]string{header}
	for _, r := range records {
		lines = append(lines, []string{
			r.who, strconv.FormatFloat(r.interval.Seconds(), 'g', -1, 64), strconv.Itoa(r.turn), strconv.Itoa(r.cycle), r.what, strconv.FormatFloat(r.value, 'g', 6, 64),
		})
	}
	return errors.Join(w.WriteAll(lines), f.Close())
}

// loadRecords returns a part's records, none where it was not run.
func loadRecords(dir, part string) ([]record, error) {
	f, err := os.Open(filepath.Join(dir, part+".csv"))
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	lines, err := csv.NewReader(f).ReadAll()
	if err != nil {
		return nil, err
	}
	var records []record
	for _, l := range lines[1:] {
		interval, err1 := strconv.ParseFloat(l[1], 64)
		turn, err2 := strconv.Atoi(l[2])
		cycle, err3 := strconv.Atoi(l[3])
		value, err4 := strconv.ParseFloat(l[5], 64)
		if err := errors.Join(err1, err2, err3, err4); err != nil {
			return nil, fmt.Errorf("%s: %q: %w", f.Name(), l, err)
		}
		records = append(records, record{l[0], time.Duration(interval * float64(time.Second)), turn, cycle, l[4], value})
	}
	return records, nil
}

// facts are what a report needs to know of a run beside its figures.
type facts struct {
	Date     string
	Machine  string
	Versions []string
	Load     [2]float64 // least and most 1-minute load average in the run
	Lasted   string
	Command  string
	KVM      int // guests
	Linux    int
	Configs  []config
}

type config struct{ Name, About, Text string }

func saveFacts(dir, part string, f facts) error {
	b, err := json.MarshalIndent(f, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, part+".json"), append(b, '\n'), 0o644)
}

// loadFacts returns nil where the part was not run.
func loadFacts(dir, part string) (*facts, error) {
	b, err := os.ReadFile(filepath.Join(dir, part+".json"))
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	f := new(facts)
	return f, json.Unmarshal(b, f)
}
