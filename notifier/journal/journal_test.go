package journal_test

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/kvmeter/kvmeter/notifier/journal"
)

func open(t testing.TB, dir string) (*journal.Journal, [][]byte, int64) {
	t.Helper()
	j, records, torn, err := journal.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	return j, records, torn
}

func closeIt(t testing.TB, j *journal.Journal) {
	t.Helper()
	if err := j.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestWhatWasAppendedIsThereAgain(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "made")
	r := rand.New(rand.NewPCG(1, 1))
	var want [][]byte
	for life := range 20 {
		j, got, torn := open(t, dir)
		if diff := cmp.Diff(want, got); diff != "" || torn != 0 {
			t.Fatalf("life %d, %d bytes torn (-want +got):\n%s", life, torn, diff)
		}
		for i := range r.IntN(5) {
			record := bytes.Repeat([]byte{byte(i)}, 1+r.IntN(3000))
			if err := j.Append(t.Context(), record); err != nil {
				t.Fatal(err)
			}
			want = append(want, record)
		}
		if r.IntN(4) == 0 {
			want = [][]byte{[]byte("all"), {0}, fmt.Appendf(nil, "of life %d", life)}
			if err := j.Replace(t.Context(), want); err != nil {
				t.Fatal(err)
			}
			if err := j.Append(t.Context(), []byte("more")); err != nil {
				t.Fatal(err)
			}
			want = append(want, []byte("more"))
		}
		closeIt(t, j)
	}
}

// TestATornEndIsCutOff ends the file after each of its bytes, as a power failure
// may, and puts other bytes there.
func TestATornEndIsCutOff(t *testing.T) {
	dir := t.TempDir()
	j, _, _ := open(t, dir)
	var ends []int64
	file := filepath.Join(dir, "journal")
	for i := range 4 {
		if err := j.Append(t.Context(), bytes.Repeat([]byte{byte('a' + i)}, 1+i*5)); err != nil {
			t.Fatal(err)
		}
		info, err := os.Stat(file)
		if err != nil {
			t.Fatal(err)
		}
		ends = append(ends, info.Size())
	}
	closeIt(t, j)
	whole, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for _, junk := range []string{"", "\x00", "\x00\x00\x00\x00\xe1\xe2\xe3\xe4", "\xe1\xe2\xe3\xe4\x00\x00\x00\x00junk"} {
		for size := range len(whole) + 1 {
			if err := os.WriteFile(file, append(bytes.Clone(whole[:size]), junk...), 0o600); err != nil {
				t.Fatal(err)
			}
			want, counts := 0, int64(0)
			for want < len(ends) && ends[want] <= int64(size) {
				counts = ends[want]
				want++
			}
			j, got, torn := open(t, dir)
			if len(got) != want || torn != int64(size+len(junk))-counts {
				t.Fatalf("%d bytes and %q: %d records and %d bytes torn, want %d and %d", size, junk, len(got), torn, want, int64(size+len(junk))-counts)
			}
			if err := j.Append(t.Context(), []byte("next")); err != nil {
				t.Fatal(err)
			}
			closeIt(t, j)
			j, got, torn = open(t, dir)
			if len(got) != want+1 || string(got[want]) != "next" || torn != 0 {
				t.Fatalf("%d bytes and %q: %d records after another one", size, junk, len(got))
			}
			closeIt(t, j)
		}
	}
}

func TestAJournalIsOneProcessesOnly(t *testing.T) {
	dir := t.TempDir()
	j, _, _ := open(t, dir)
	if _, _, _, err := journal.Open(dir); !errors.Is(err, journal.ErrInUse) {
		t.Errorf("opened twice: %v", err)
	}
	closeIt(t, j)
	j, _, _ = open(t, dir)
	closeIt(t, j)
}

func TestANextFileOfADeadNotifierIsRemoved(t *testing.T) {
	dir := t.TempDir()
	j, _, _ := open(t, dir)
	if err := j.Append(t.Context(), []byte("a")); err != nil {
		t.Fatal(err)
	}
	closeIt(t, j)
	next := filepath.Join(dir, "journal.new")
	if err := os.WriteFile(next, []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	j, got, _ := open(t, dir)
	defer closeIt(t, j)
	if _, err := os.Stat(next); err == nil || len(got) != 1 {
		t.Errorf("%d records, and %s is there: %v", len(got), next, err)
	}
}

// FuzzOpen: whatever is in the file, it is opened, and what is added is there.
func FuzzOpen(f *testing.F) {
	f.Add([]byte{})
	f.Add([]byte{1, 0, 0, 0, 0, 0, 0, 0, 'a'})
	f.Fuzz(func(t *testing.T, data []byte) {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "journal"), data, 0o600); err != nil {
			t.Fatal(err)
		}
		j, before, _ := open(t, dir)
		if err := j.Append(t.Context(), []byte("next")); err != nil {
			t.Fatal(err)
		}
		closeIt(t, j)
		j, after, torn := open(t, dir)
		closeIt(t, j)
		if len(after) != len(before)+1 || torn != 0 {
			t.Errorf("%d records, %d with one more, and %d bytes torn", len(before), len(after), torn)
		}
	})
}
