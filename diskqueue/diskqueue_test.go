package diskqueue_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/kvmeter/kvmeter/diskqueue"
	"github.com/kvmeter/kvmeter/diskqueue/crashfs"
)

func open(t testing.TB, o diskqueue.Options) *diskqueue.Queue {
	t.Helper()
	q, err := diskqueue.Open(o)
	if err != nil {
		t.Fatal(err)
	}
	return q
}

func closeQueue(t testing.TB, q *diskqueue.Queue) {
	t.Helper()
	if err := q.Close(); err != nil {
		t.Error(err)
	}
}

// put puts records whose bodies are the given texts, at one time a record.
func put(t testing.TB, q *diskqueue.Queue, at int64, bodies ...string) (refs []diskqueue.Ref) {
	t.Helper()
	for i, b := range bodies {
		r, err := q.Put(false, diskqueue.Record{Kind: 1, Time: at + int64(i), N: len(b), Body: []byte(b)})
		if err != nil {
			t.Fatal(err)
		}
		refs = append(refs, r...)
	}
	return refs
}

func take(t testing.TB, q *diskqueue.Queue, order diskqueue.Order, n int) (bodies []string, refs []diskqueue.Ref) {
	t.Helper()
	all, err := q.Take(nil, order, n, 1<<40)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range all {
		bodies, refs = append(bodies, string(e.Body)), append(refs, e.Ref)
	}
	return bodies, refs
}

func want(t testing.TB, got []string, want ...string) {
	t.Helper()
	if !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestRecordsComeInTheOrderThatIsAskedFor(t *testing.T) {
	q := open(t, diskqueue.Options{Dir: t.TempDir(), SegmentBytes: 60}) // two a file
	put(t, q, 1, "a", "b", "c", "d", "e")
	got, first := take(t, q, diskqueue.OldestFirst, 2)
	want(t, got, "a", "b")
	got, last := take(t, q, diskqueue.NewestFirst, 2)
	want(t, got, "e", "d")
	got, _ = take(t, q, diskqueue.NewestFirst, 9)
	want(t, got, "c")
	q.Return(append(first, last...)...)
	got, _ = take(t, q, diskqueue.NewestFirst, 9)
	want(t, got, "e", "d", "b", "a")
	closeQueue(t, q)
}

func TestTakingEndsAtTheRecordThatReachesTheBytes(t *testing.T) {
	q := open(t, diskqueue.Options{Dir: t.TempDir()})
	put(t, q, 1, "a", "b", "c")
	size := q.Stats().Bytes / 3
	got, err := q.Take(nil, diskqueue.OldestFirst, 9, size+1)
	if err != nil || len(got) != 2 {
		t.Errorf("got %d records, %v, want 2", len(got), err)
	}
	closeQueue(t, q)
}

func TestWhatIsDoneStaysDoneAndLeavesTheDisk(t *testing.T) {
	dir := t.TempDir()
	q := open(t, diskqueue.Options{Dir: dir, SegmentBytes: 60})
	refs := put(t, q, 1, "a", "b", "c", "d")
	if err := q.Done(refs[3], refs[0], refs[3]); err != nil {
		t.Fatal(err)
	}
	if st := q.Stats(); st.Records != 2 || st.Newest != 4 || st.Oldest != 1 {
		t.Errorf("got %+v", st)
	}
	closeQueue(t, q)
	q = open(t, diskqueue.Options{Dir: dir})
	got, refs := take(t, q, diskqueue.OldestFirst, 9)
	want(t, got, "b", "c")
	if err := q.Done(refs...); err != nil {
		t.Fatal(err)
	}
	if st := q.Stats(); st.Bytes != 0 || st.Records != 0 || st.Newest != 4 {
		t.Errorf("an empty queue has %+v", st)
	}
	closeQueue(t, q)
	if left, _ := filepath.Glob(filepath.Join(dir, "*0*")); len(left) > 0 {
		t.Errorf("an empty queue leaves %v", left)
	}
}

func TestOneProcessUsesAFolder(t *testing.T) {
	dir := t.TempDir()
	q := open(t, diskqueue.Options{Dir: dir})
	if _, err := diskqueue.Open(diskqueue.Options{Dir: dir}); !errors.Is(err, diskqueue.ErrLocked) {
		t.Errorf("a second one gets %v, want ErrLocked", err)
	}
	closeQueue(t, q)
}

func TestTheOldestIsDroppedAlsoWhileItIsTaken(t *testing.T) {
	q := open(t, diskqueue.Options{Dir: t.TempDir()})
	put(t, q, 1, "aa", "b")
	_, refs := take(t, q, diskqueue.OldestFirst, 1)
	if n, ok := q.DropOldest(); n != 2 || !ok {
		t.Errorf("got %d, %v, want 2 of the first", n, ok)
	}
	if err := q.Done(refs...); err != nil {
		t.Error(err)
	}
	got, _ := take(t, q, diskqueue.OldestFirst, 9)
	want(t, got, "b")
	closeQueue(t, q)
}

func TestTheOldestFileGoesAsAWhole(t *testing.T) {
	q := open(t, diskqueue.Options{Dir: t.TempDir()})
	refs := put(t, q, 1, "a", "b", "c")
	if err := q.Done(refs[1]); err != nil {
		t.Fatal(err)
	}
	var got []string
	refs, damage, err := q.TakeOldestSegment(func(r *diskqueue.Record) { got = append(got, string(r.Body)) })
	if err != nil || damage.Records != 0 || damage.From != 1 || damage.To != 3 {
		t.Errorf("damage %+v, %v", damage, err)
	}
	want(t, got, "a", "c")
	put(t, q, 4, "d")
	if err := q.Done(refs...); err != nil {
		t.Error(err)
	}
	got, _ = take(t, q, diskqueue.OldestFirst, 9)
	want(t, got, "d")
	closeQueue(t, q)
}

// file returns the only segment file of a folder.
func file(t *testing.T, dir string) string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "*.spool"))
	if err != nil || len(files) != 1 {
		t.Fatalf("files %v, %v", files, err)
	}
	return files[0]
}

func TestDamageCostsTheRecordItIsIn(t *testing.T) {
	const record = 25 + 3 // in the file
	begin := func(i int) int { return 16 + i*record }
	for name, tc := range map[string]struct {
		damage func([]byte) []byte
		unread bool // not seen before the file was read again
		left   []string
		want   []diskqueue.Damage
	}{
		"a body": {
			damage: func(b []byte) []byte { b[begin(1)+26]++; return b },
			left:   []string{"aaa", "ccc"}, want: []diskqueue.Damage{{Records: 1, From: 1, To: 3}},
		},
		"a length": {
			damage: func(b []byte) []byte { b[begin(1)+9]++; return b },
			left:   []string{"aaa", "ccc"}, want: []diskqueue.Damage{{Records: 1, From: 1, To: 3}},
		},
		"the first and the last": {
			damage: func(b []byte) []byte { b[begin(0)]++; b[begin(2)+5]++; return b },
			left:   []string{"bbb"}, want: []diskqueue.Damage{{Records: -1, To: 2}, {Records: -1, From: 2, To: 2}},
		},
		"the header": {
			damage: func(b []byte) []byte { b[0]++; return b },
			want:   []diskqueue.Damage{{Records: -1}},
		},
		"a torn end is none": {
			damage: func(b []byte) []byte { return b[:begin(2)+13] },
			left:   []string{"aaa", "bbb"},
		},
		"while it is open": {
			damage: func(b []byte) []byte { b[begin(2)+26]++; return b }, unread: true,
			left: []string{"aaa", "bbb"}, want: []diskqueue.Damage{{Records: 1, N: 3, From: 1, To: 3}},
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			var got []diskqueue.Damage
			o := diskqueue.Options{Dir: dir, Damaged: func(d diskqueue.Damage) {
				d.File = ""
				got = append(got, d)
			}}
			q := open(t, o)
			put(t, q, 1, "aaa", "bbb", "ccc")
			if !tc.unread {
				closeQueue(t, q)
			}
			data, err := os.ReadFile(file(t, dir))
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(file(t, dir), tc.damage(data), 0o600); err != nil {
				t.Fatal(err)
			}
			if !tc.unread {
				q = open(t, o)
			}
			left, _ := take(t, q, diskqueue.OldestFirst, 9)
			want(t, left, tc.left...)
			if diff := cmp.Diff(tc.want, got); diff != "" {
				t.Errorf("damage (-want +got):\n%s", diff)
			}
			closeQueue(t, q)
		})
	}
}

func TestADiskThatFailsCostsNothingThatWasPut(t *testing.T) {
	full := errors.New("no space left on device")
	for _, op := range []crashfs.Op{crashfs.Create, crashfs.Write, crashfs.Sync, crashfs.SyncDir} {
		t.Run(string(op), func(t *testing.T) {
			fs := crashfs.New()
			q := open(t, diskqueue.Options{Dir: "/q", FS: fs, SegmentBytes: 60})
			put(t, q, 1, "a", "b") // fill a file: the next one needs another
			fs.Fail(func(o crashfs.Op, _ string) error {
				if o == op {
					return full
				}
				return nil
			})
			if _, err := q.Put(false, diskqueue.Record{Kind: 1, Body: []byte("lost")}); !errors.Is(err, full) {
				t.Errorf("got %v, want the disk's error", err)
			}
			fs.Fail(nil)
			put(t, q, 3, "c")
			got, _ := take(t, q, diskqueue.OldestFirst, 9)
			want(t, got, "a", "b", "c")
			closeQueue(t, q)
		})
	}
}

// TestAPowerLossLosesNothingThatWasPut cuts the power at random moments of
// random work, and looks for what was put and not done.
func TestAPowerLossLosesNothingThatWasPut(t *testing.T) {
	for seed := range uint64(200) {
		r := rand.New(rand.NewPCG(seed, 0))
		fs := crashfs.New()
		put, done := map[string]bool{}, map[string]bool{}
		next := 0
		for range 4 {
			q := open(t, diskqueue.Options{Dir: "/q", FS: fs, SegmentBytes: int64(100 + r.IntN(2000))})
			seen := map[string]bool{}
			all, err := q.Take(nil, diskqueue.OldestFirst, 1<<20, 1<<40)
			if err != nil {
				t.Fatal(err)
			}
			refs := map[string]diskqueue.Ref{}
			for _, e := range all {
				seen[string(e.Body)] = true
				refs[string(e.Body)] = e.Ref
			}
			for b := range put {
				if !done[b] && !seen[b] {
					t.Fatalf("seed %d: %s was put and is lost", seed, b)
				}
			}
			// The power goes before one of the next operations.
			left := r.IntN(60)
			after := fs
			fs.Fail(func(crashfs.Op, string) error {
				if left--; left == 0 {
					after = fs.Crash(r.IntN(101), r)
				}
				if left <= 0 {
					return errors.New("the power is off")
				}
				return nil
			})
			for left > 0 {
				if r.IntN(3) > 0 || len(refs) == 0 {
					b := fmt.Sprint("record ", next)
					next++
					if ref, err := q.Put(true, diskqueue.Record{Kind: 1, Body: []byte(b)}); err == nil {
						put[b], refs[b] = true, ref[0]
					}
					continue
				}
				names := slices.Sorted(func(yield func(string) bool) {
					for b := range refs {
						if !yield(b) {
							return
						}
					}
				})
				b := names[r.IntN(len(names))]
				done[b] = true // from now on it may come or not
				_ = q.Done(refs[b])
				delete(refs, b)
			}
			if after == fs {
				after = fs.Crash(100, r)
			}
			fs = after
		}
	}
}

func TestManyFilesGoThroughTheQueue(t *testing.T) {
	dir := t.TempDir()
	q := open(t, diskqueue.Options{Dir: dir})
	body := make([]byte, 3<<20)
	for i := range 8 {
		body[0] = byte(i)
		if _, err := q.Put(false, diskqueue.Record{Kind: 1, Time: int64(i), N: 1, Body: body}); err != nil {
			t.Fatal(err)
		}
	}
	closeQueue(t, q)
	q = open(t, diskqueue.Options{Dir: dir})
	for i := range 8 {
		all, err := q.Take(nil, diskqueue.OldestFirst, 1, 1)
		if err != nil || len(all) != 1 || all[0].Body[0] != byte(i) || q.Stats().Records != 8-i {
			t.Fatalf("record %d: %d records, %v", i, len(all), err)
		}
		if err := q.Done(all[0].Ref); err != nil {
			t.Fatal(err)
		}
	}
	closeQueue(t, q)
}
