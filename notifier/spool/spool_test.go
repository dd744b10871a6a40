package spool

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/notifier/publisher"
	"github.com/kvmeter/kvmeter/sample"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// receiver is a publisher that can be switched off, and that remembers.
type receiver struct {
	mu      sync.Mutex
	err     error // what it answers
	hang    bool
	got     []string
	arrived chan struct{}
}

func newReceiver(err error) *receiver { return &receiver{err: err, arrived: make(chan struct{}, 1000)} }

func (r *receiver) answer(ctx context.Context, what ...string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.hang {
		r.mu.Unlock()
		<-ctx.Done()
		r.mu.Lock()
		return ctx.Err()
	}
	if r.err == nil {
		r.got = append(r.got, what...)
		for range what {
			r.arrived <- struct{}{}
		}
	}
	return r.err
}

func (r *receiver) Publish(ctx context.Context, parts []publisher.Part) error {
	var all []string
	for i := range parts {
		for s := range parts[i].Batch.Samples() {
			all = append(all, s.Name)
		}
	}
	return r.answer(ctx, all...)
}

func (r *receiver) PublishEvents(ctx context.Context, events []sample.Event) error {
	var all []string
	for i := range events {
		all = append(all, events[i].ID)
	}
	return r.answer(ctx, all...)
}

func (r *receiver) Close() error { return nil }

func (r *receiver) set(err error, hang bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.err, r.hang = err, hang
}

// wait returns what has arrived once it is n.
func (r *receiver) wait(t *testing.T, n int) []string {
	t.Helper()
	for range n {
		select {
		case <-r.arrived:
		case <-time.After(10 * time.Second):
			t.Fatalf("got %v, want %d", r.got, n)
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.got)
}

// counts is what a spool has counted.
type counts struct {
	mu      sync.Mutex
	spooled int
	lost    map[string]int
}

func (c *counts) Spooled(n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.spooled += n
}

func (c *counts) Lost(reason string, n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.lost[reason] += n
}

func (c *counts) Waiting(int64, int64) {}

func (c *counts) String() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return fmt.Sprint(c.spooled, c.lost)
}

func open(t *testing.T, dir string, to publisher.Publisher, change func(*Options)) (*Spool, *counts) {
	t.Helper()
	c := &counts{lost: map[string]int{}}
	o := Options{Dir: dir, MaxBytes: 1 << 30, Log: zap.NewNop(), Counters: c, Patience: 20 * time.Millisecond, Retry: time.Millisecond}
	if change != nil {
		change(&o)
	}
	s, err := New(to, o)
	if err != nil {
		t.Fatal(err)
	}
	return s, c
}

// batch has a sample of each name.
func batch(names ...string) []publisher.Part {
	b := sample.NewBuilder()
	b.Row(sample.Row{Resource: "r"})
	for _, name := range names {
		b.Add(sample.MeterRef{Name: name}, sample.Walk, sample.Uint(1))
	}
	out := b.Build()
	out.ID = sample.NewBatchID(time.Now())
	return []publisher.Part{{From: out, Batch: out}}
}

func put(t *testing.T, s *Spool, names ...string) {
	t.Helper()
	for _, name := range names {
		if err := s.Publish(t.Context(), batch(name)); err != nil {
			t.Fatal(err)
		}
	}
}

func TestWhatIsNotTakenWaitsAndArrivesInOrder(t *testing.T) {
	r := newReceiver(nil)
	dir := t.TempDir()
	s, c := open(t, dir, r, nil)
	put(t, s, "a")
	r.set(errors.New("down"), false)
	put(t, s, "b", "c")
	if err := s.PublishEvents(t.Context(), []sample.Event{{ID: "e", Type: "x"}}); err != nil {
		t.Fatal(err)
	}
	r.set(nil, false)
	put(t, s, "d")
	if diff := cmp.Diff([]string{"a", "b", "c", "e", "d"}, r.wait(t, 5)); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if got := c.String(); got != "4 map[]" && got != "3 map[]" { // d may be sent directly
		t.Errorf("counted %s", got)
	}
	if left, _ := filepath.Glob(filepath.Join(dir, "*.spool")); len(left) > 0 {
		t.Errorf("an empty spool leaves %v", left)
	}
}

func TestAHangingPublisherHoldsUpNobody(t *testing.T) {
	r := newReceiver(nil)
	r.set(nil, true)
	s, c := open(t, t.TempDir(), r, nil)
	begin := time.Now()
	for range 100 {
		put(t, s, "x")
	}
	if d := time.Since(begin); d > 5*time.Second {
		t.Errorf("100 batches took %v", d)
	}
	if got := c.String(); got != "100 map[]" {
		t.Errorf("counted %s", got)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

func TestWhatWaitsSurvivesARestartAndATornEnd(t *testing.T) {
	dir := t.TempDir()
	r := newReceiver(errors.New("down"))
	s, _ := open(t, dir, r, nil)
	put(t, s, "a", "b")
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob(filepath.Join(dir, "*.spool"))
	if err != nil || len(files) != 1 {
		t.Fatalf("files %v, %v", files, err)
	}
	data, err := os.ReadFile(files[0])
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(files[0], append(data, data[:len(data)/2-3]...), 0o600); err != nil {
		t.Fatal(err)
	}
	s, _ = open(t, dir, r, nil)
	put(t, s, "c")
	r.set(nil, false)
	if diff := cmp.Diff([]string{"a", "b", "c"}, r.wait(t, 3)); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

func TestTheOldestIsLostWhereThereIsNoRoom(t *testing.T) {
	for name, change := range map[string]func(*Options){
		"bytes":        func(o *Options) { o.MaxBytes = 2*114 + 50 }, // a record has 114
		"policy=queue": func(o *Options) { o.Policy.MaxQueue = 2 },
	} {
		t.Run(name, func(t *testing.T) {
			r := newReceiver(nil)
			r.set(nil, true)
			s, c := open(t, t.TempDir(), r, change)
			put(t, s, "a", "b", "c", "d")
			if got := c.String(); got != "4 map[full:2]" {
				t.Errorf("counted %s; %d bytes", got, s.disk.Stats().Bytes)
			}
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			r.set(nil, false)
			s, _ = open(t, s.o.Dir, r, change)
			if diff := cmp.Diff([]string{"c", "d"}, r.wait(t, 2)); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
			if err := s.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestWhatCannotBeSentIsCounted(t *testing.T) {
	status := &publisher.StatusError{Status: 400, Text: "no"}
	for name, tc := range map[string]struct {
		err    error
		change func(*Options)
		want   string
	}{
		"policy=drop":           {errors.New("down"), func(o *Options) { o.Policy.Drop = true }, "0 map[policy:1]"},
		"best effort":           {&publisher.Lost{N: 1, Err: errors.New("too long")}, nil, "0 map[sent:1]"},
		"refused as a whole":    {publisher.Refuse(publisher.All, status), nil, "0 map[refused:1]"},
		"refused, one of parts": {publisher.Refuse(0, status), nil, "1 map[refused:1]"},
	} {
		t.Run(name, func(t *testing.T) {
			r := newReceiver(tc.err)
			s, c := open(t, t.TempDir(), r, tc.change)
			put(t, s, "a")
			for range 1000 {
				if c.String() == tc.want {
					break
				}
				time.Sleep(time.Millisecond)
			}
			if got := c.String(); got != tc.want {
				t.Errorf("counted %s, want %s", got, tc.want)
			}
			if err := s.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}
