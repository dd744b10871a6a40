package local

import (
	"context"
	"slices"
	"testing"
	"time"

	"github.com/kvmeter/kvmeter/central/store"
)

// chunksOf counts the chunks of an hour.
func chunksOf(t *testing.T, s *Store, h hour) (n int) {
	t.Helper()
	var r rows
	if err := s.scan(appendHour([]byte{keyRows}, h), appendHour([]byte{keyRows}, h+1), func(_, v []byte) error {
		err := r.decode(v)
		n += int(r.count)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	if err := s.scan(appendHour([]byte{keyChunk}, h), appendHour([]byte{keyChunk}, h+1), func(_, _ []byte) error {
		n++
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return n
}

func pendingHours(s *Store) (hours []hour) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	for h := range s.pending {
		hours = append(hours, h)
	}
	slices.Sort(hours)
	return hours
}

func TestHoursAreRolledUpOnceTheyAreOverAndQuiet(t *testing.T) {
	ctx := context.Background()
	now := time.UnixMicro(start).Add(50 * time.Minute)
	s := open(t, t.TempDir(), Options{Clock: func() time.Time { return now }, Retention: -1, FlushEvery: time.Hour})
	defer closeStore(t, s)
	first := hourOf(start)
	seq := uint64(0)
	flushed := func(at time.Duration) {
		t.Helper()
		seq++
		appendTick(t, s, tick("node", seq, start+at.Microseconds()))
		if err := s.Flush(ctx); err != nil {
			t.Fatal(err)
		}
	}
	roll := func() {
		t.Helper()
		if err := s.roll(false); err != nil {
			t.Fatal(err)
		}
	}
	flushed(10 * time.Minute)
	flushed(20 * time.Minute)
	roll()
	if got := pendingHours(s); !slices.Equal(got, []hour{first}) || chunksOf(t, s, first) != 2*perTick {
		t.Errorf("an hour that is not over: got %v, %d chunks", got, chunksOf(t, s, first))
	}
	now = now.Add(20 * time.Minute) // it is over, but was written to by the last flush
	roll()
	if got := pendingHours(s); !slices.Equal(got, []hour{first}) {
		t.Errorf("an hour that may be written to still: got %v", got)
	}
	flushed(65 * time.Minute)
	roll()
	if got := pendingHours(s); !slices.Equal(got, []hour{first + 1}) || chunksOf(t, s, first) != perTick {
		t.Errorf("an hour that is over: got %v, %d chunks, want %d", got, chunksOf(t, s, first), perTick)
	}
	flushed(30 * time.Minute) // late
	flushed(66 * time.Minute)
	if got := pendingHours(s); !slices.Equal(got, []hour{first, first + 1}) {
		t.Errorf("an hour with late samples: got %v", got)
	}
	roll()
	if got := pendingHours(s); !slices.Equal(got, []hour{first + 1}) || chunksOf(t, s, first) != perTick {
		t.Errorf("late samples are merged: got %v, %d chunks", got, chunksOf(t, s, first))
	}
	for range rollFlushes { // they never stop
		flushed(40 * time.Minute)
	}
	roll()
	if got := pendingHours(s); !slices.Equal(got, []hour{first + 1}) {
		t.Errorf("an hour with many late samples: got %v", got)
	}
	if got, want := len(list(t, s, store.Filter{})), int(seq)*perTick; got != want {
		t.Errorf("got %d samples, want %d", got, want)
	}
	if ps := verify(t, s); len(ps) > 0 {
		t.Errorf("got %q", ps)
	}
}
