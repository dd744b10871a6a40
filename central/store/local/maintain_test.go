package local

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/cockroachdb/pebble/v2"

	"github.com/kvmeter/kvmeter/central/store"
	"github.com/kvmeter/kvmeter/sample"
)

// fill stores samples of some hours: rolled up, flushed, and in memory.
func fill(t testing.TB, s *Store) {
	t.Helper()
	ctx := context.Background()
	for seq := uint64(1); seq <= 60; seq++ {
		b := crashBatch(seq)
		b.Base = start + int64(seq)*400e6
		appendTick(t, s, b)
		switch seq {
		case 20, 40:
			if err := s.Roll(ctx); err != nil {
				t.Fatal(err)
			}
		case 10, 30, 50:
			if err := s.Flush(ctx); err != nil {
				t.Fatal(err)
			}
		}
	}
	if _, err := s.AppendEvents(ctx, []sample.Event{{ID: "e-1", Type: "x", Generated: start}}); err != nil {
		t.Fatal(err)
	}
}

func verify(t testing.TB, s *Store) (problems []string) {
	t.Helper()
	checked, err := s.Verify(context.Background(), func(p string) { problems = append(problems, p) })
	if err != nil {
		t.Fatal(err)
	}
	if checked.Problems != int64(len(problems)) {
		t.Errorf("got %+v, %d problems", checked, len(problems))
	}
	return problems[:min(5, len(problems))]
}

func TestBackupOfARunningStoreIsRestored(t *testing.T) {
	ctx := context.Background()
	dir := t.TempDir()
	s := open(t, filepath.Join(dir, "store"), Options{Retention: -1, EventRetention: -1})
	fill(t, s)
	want := list(t, s, store.Filter{})
	backup, restored := filepath.Join(dir, "backup"), filepath.Join(dir, "restored")
	if err := s.Backup(ctx, backup); err != nil {
		t.Fatal(err)
	}
	if err := s.Backup(ctx, backup); err == nil || !strings.Contains(err.Error(), "is not empty") {
		t.Errorf("backup over a backup: got %v", err)
	}
	appendTick(t, s, crashBatch(61)) // is not in it
	closeStore(t, s)
	if err := Restore(ctx, dir, restored); err == nil || !strings.Contains(err.Error(), "is no backup") {
		t.Errorf("restore of something else: got %v", err)
	}
	for range 2 { // a backup stays good
		if err := Restore(ctx, backup, restored); err != nil {
			t.Fatal(err)
		}
		s = open(t, restored, Options{Retention: -1, EventRetention: -1})
		if got := list(t, s, store.Filter{}); len(got) != len(want) || !slices.EqualFunc(got, want, func(a, b store.Sample) bool { return a.ID == b.ID && a.Volume == b.Volume }) {
			t.Errorf("got %d samples, want %d", len(got), len(want))
		}
		if _, err := s.Event(ctx, "e-1"); err != nil {
			t.Error(err)
		}
		if ps := verify(t, s); len(ps) > 0 {
			t.Errorf("got %q", ps)
		}
		if checked, err := s.Verify(ctx, nil); err != nil || checked.Records == 0 || checked.Samples == 0 {
			t.Errorf("got %+v, %v", checked, err)
		}
		appendTick(t, s, crashBatch(62))
		closeStore(t, s)
		if err := Restore(ctx, backup, restored); err == nil || !strings.Contains(err.Error(), "is not empty") {
			t.Errorf("restore over a store: got %v", err)
		}
		restored += "-again"
	}
}

func TestRepairDropsWhatCannotBeReadAndWorksOutTheRest(t *testing.T) {
	ctx := context.Background()
	for name, tc := range map[string]struct {
		spoil   func(t *testing.T, db *pebble.DB)
		problem string // of Verify; empty: the store does not open
		dropped int    // samples
	}{
		"a rollup that is wrong": {func(t *testing.T, db *pebble.DB) {
			k, v := record(t, db, keyRollup)
			v[len(v)-1] ^= 1
			set(t, db, k, v)
		}, "rollup", 0},
		"a rollup that is missing": {func(t *testing.T, db *pebble.DB) {
			k, _ := record(t, db, keyRollup)
			if err := db.Delete(k, pebble.Sync); err != nil {
				t.Fatal(err)
			}
		}, "there are no rollups", 0},
		"a chunk that is cut off": {func(t *testing.T, db *pebble.DB) {
			k, v := record(t, db, keyChunk)
			set(t, db, k, v[:len(v)-2])
		}, "corrupt record", 8},
		"what is known of a resource": {func(t *testing.T, db *pebble.DB) {
			k, v := record(t, db, keyResource)
			set(t, db, k, v[:4])
		}, "", 0},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			o := Options{Retention: -1, EventRetention: -1}
			s := open(t, dir, o)
			fill(t, s)
			if err := s.Roll(ctx); err != nil {
				t.Fatal(err)
			}
			want := list(t, s, store.Filter{})
			if ps := verify(t, s); len(ps) > 0 {
				t.Fatalf("before: got %q", ps)
			}
			closeStore(t, s)
			db, err := pebble.Open(filepath.Join(dir, "samples"), &pebble.Options{FormatMajorVersion: pebble.FormatValueSeparation})
			if err != nil {
				t.Fatal(err)
			}
			tc.spoil(t, db)
			if err := db.Close(); err != nil {
				t.Fatal(err)
			}
			if s, err = Open(dir, o); err == nil {
				if ps := verify(t, s); len(ps) == 0 || !strings.Contains(strings.Join(ps, "\n"), tc.problem) || tc.problem == "" {
					t.Errorf("got %q, want %q", ps, tc.problem)
				}
				closeStore(t, s)
			} else if tc.problem != "" || !errors.Is(err, errCorrupt) {
				t.Errorf("got %v", err)
			}
			checked, err := Repair(ctx, dir, o, func(string) {})
			if err != nil {
				t.Fatal(err)
			}
			if (checked.Dropped > 0) != (tc.dropped > 0) {
				t.Errorf("got %+v", checked)
			}
			s = open(t, dir, o)
			defer closeStore(t, s)
			if ps := verify(t, s); len(ps) > 0 {
				t.Errorf("after: got %q", ps)
			}
			if got := len(list(t, s, store.Filter{})); got != len(want)-tc.dropped {
				t.Errorf("got %d samples of %d, want %d fewer", got, len(want), tc.dropped)
			}
			if ms, err := s.Meters(ctx, store.Filter{}); err != nil || len(ms) != perTick {
				t.Errorf("got %d meters, %v", len(ms), err)
			}
		})
	}
}

func TestADamagedFileCostsOnlyWhatItHolds(t *testing.T) {
	ctx := context.Background()
	o := Options{Retention: -1, EventRetention: -1}
	sound := filepath.Join(t.TempDir(), "sound")
	s := open(t, sound, o)
	f := newFleet(t, 1, 40)
	ingest(t, s, f, 100_000)
	settle(t, s)
	closeStore(t, s)
	opened := 0
	for part := range int64(3) {
		dir := filepath.Join(t.TempDir(), "damaged")
		if err := os.CopyFS(dir, os.DirFS(sound)); err != nil {
			t.Fatal(err)
		}
		damage(t, dir, 1+2*part, 8)
		s, err := Open(dir, o)
		if err != nil {
			if !pebble.IsCorruptionError(err) {
				t.Errorf("part %d: got %v", part, err)
			}
			continue
		}
		opened++
		if err := s.Samples(ctx, store.Filter{}, func(store.Sample) bool { return true }); err != nil && !pebble.IsCorruptionError(err) {
			t.Errorf("part %d: got %v", part, err)
		}
		appendTick(t, s, crashBatch(1))
		if ps := verify(t, s); len(ps) == 0 {
			t.Errorf("part %d: no problem was found", part)
		}
		closeStore(t, s)
		if _, err := Repair(ctx, dir, o, func(string) {}); !errors.Is(err, errDamaged) {
			t.Errorf("part %d: got %v", part, err)
		}
	}
	if opened == 0 {
		t.Error("no damaged store could be opened; the test is blind")
	}
}

// damage changes a byte in a part of the largest file of samples.
func damage(t *testing.T, dir string, part, of int64) {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "samples", "*.sst"))
	if err != nil {
		t.Fatal(err)
	}
	var largest []byte
	var name string
	for _, f := range files {
		data, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		if len(data) > len(largest) {
			largest, name = data, f
		}
	}
	largest[int64(len(largest))*part/of+100] ^= 0x55
	if err := os.WriteFile(name, largest, 0o600); err != nil {
		t.Fatal(err)
	}
}

// record returns the first record of a kind.
func record(t *testing.T, db *pebble.DB, kind byte) (k, v []byte) {
	t.Helper()
	it, err := db.NewIter(&pebble.IterOptions{LowerBound: []byte{kind}, UpperBound: []byte{kind + 1}})
	if err != nil {
		t.Fatal(err)
	}
	defer it.Close()
	if !it.First() {
		t.Fatalf("no record of kind %q", kind)
	}
	return slices.Clone(it.Key()), slices.Clone(it.Value())
}

func set(t *testing.T, db *pebble.DB, k, v []byte) {
	t.Helper()
	if err := db.Set(k, v, pebble.Sync); err != nil {
		t.Fatal(err)
	}
}
