package state

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
	"unsafe"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
	"golang.org/x/sys/unix"

	"github.com/kvmeter/kvmeter/sample"
)

const boot = "1f0ee3c6-a6a1-4c5f-9e3e-1d2c3b4a5968"

// childEnv makes the test binary count in the file of that path instead.
const childEnv = "KVMETER_STATE_CHILD"

func TestMain(m *testing.M) {
	if path := os.Getenv(childEnv); path != "" {
		beChild(path)
	}
	os.Exit(m.Run())
}

func open(t testing.TB, path, boot string) *File {
	t.Helper()
	f, said := openSaid(t, path, boot)
	if f.Err() != nil || strings.Contains(said, "anew") {
		t.Fatalf("%v, %s", f.Err(), said)
	}
	return f
}

// openSaid returns also what the log was told.
func openSaid(t testing.TB, path, boot string) (*File, string) {
	t.Helper()
	core, logs := observer.New(zap.WarnLevel)
	f, err := Open(zap.New(core), path, boot)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	said := ""
	for _, e := range logs.All() {
		said += e.Message + fmt.Sprint(e.ContextMap())
	}
	if logs.Len() > 1 {
		t.Errorf("said %d things: %s", logs.Len(), said)
	}
	return f, said
}

func closeFile(t testing.TB, f *File) {
	t.Helper()
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}

func set(b *Block, words ...uint64) {
	copy(b.Words, words)
	b.Commit()
}

func want(t *testing.T, b *Block, words ...uint64) {
	t.Helper()
	if !slices.Equal(b.Words, words) {
		t.Errorf("got %v, want %v", b.Words, words)
	}
}

func TestWhatWasCommittedIsThereAgain(t *testing.T) {
	path := filepath.Join(t.TempDir(), "run", "counters")
	f := open(t, path, boot)
	set(f.Block(1, 1, 3), 5, 6, 1<<64-1)
	b := f.Block(1, 2, 2)
	set(b, 7, 8)
	b.Words[0] = 9 // not committed
	set(f.Block(2, 1, 1), 10)
	set(f.Block(3, 1, 1), 11)
	f.Block(4, 1, 1).Drop()
	f.Forget(2)
	if b != f.Block(1, 2, 2) {
		t.Error("a block that is asked for again is another")
	}
	closeFile(t, f)
	b.Words[0] = 12
	b.Commit() // keeps nothing and harms nothing

	f = open(t, path, boot)
	want(t, f.Block(1, 1, 3), 5, 6, 1<<64-1)
	want(t, f.Block(1, 2, 2), 7, 8)
	want(t, f.Block(2, 1, 1), 0)
	want(t, f.Block(4, 1, 1), 0)
	f.Keep(func(o sample.Incarnation) bool { return o == 1 })
	closeFile(t, f)

	f = open(t, path, boot)
	want(t, f.Block(3, 1, 1), 0)
	want(t, f.Block(1, 2, 4), 7, 8, 0, 0) // a newer version has more
	set(f.Block(1, 2, 4), 7, 8, 9, 10)
	closeFile(t, f)

	f = open(t, path, boot)
	want(t, f.Block(1, 2, 4), 7, 8, 9, 10)
	want(t, f.Block(1, 2, 1), 7)
	closeFile(t, f)
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
}

func TestView(t *testing.T) {
	type counters struct {
		a    uint64
		last [2]uint64
	}
	b := Memory().Block(1, 1, 3)
	v := View[counters](b)
	v.a, v.last[1] = 1, 3
	want(t, b, 1, 0, 3)
	defer func() {
		if recover() == nil {
			t.Error("a view of another size is taken")
		}
	}()
	View[[4]uint64](b)
}

func TestTheFileGrowsAndItsRoomIsUsedAgain(t *testing.T) {
	path := filepath.Join(t.TempDir(), "counters")
	f := open(t, path, boot)
	fill := func(owner sample.Incarnation) {
		for k := range Key(3000) {
			n := 1 + int(k)%40
			b := f.Block(owner, k, n)
			for i := range b.Words {
				b.Words[i] = uint64(owner)*1e6 + uint64(k)*100 + uint64(i)
			}
			b.Commit()
		}
	}
	check := func(owner sample.Incarnation) {
		t.Helper()
		for k := range Key(3000) {
			b := f.Block(owner, k, 1+int(k)%40)
			for i, w := range b.Words {
				if want := uint64(owner)*1e6 + uint64(k)*100 + uint64(i); w != want {
					t.Fatalf("owner %d, key %d: word %d is %d, want %d", owner, k, i, w, want)
				}
			}
		}
	}
	fill(1)
	fill(2)
	_, size := f.Size()
	for owner := sample.Incarnation(3); owner < 20; owner++ {
		f.Forget(owner - 2)
		fill(owner)
		check(owner)
		check(owner - 1)
	}
	f.Block(30, 1, MaxWords)
	if blocks, now := f.Size(); blocks != 6001 || now > size+segmentBytes {
		t.Errorf("%d blocks in %d bytes, after %d bytes", blocks, now, size)
	}
	closeFile(t, f)
	f = open(t, path, boot)
	check(19)
	check(18)
}

func TestAFileThatCannotBeUsedStartsEmpty(t *testing.T) {
	made := filepath.Join(t.TempDir(), "made")
	f := open(t, made, boot)
	set(f.Block(1, 1, 2), 3, 4)
	set(f.Block(1, 2, 2), 5, 6)
	closeFile(t, f)
	good, err := os.ReadFile(made)
	if err != nil {
		t.Fatal(err)
	}
	word := func(i int, v uint64) func([]byte) []byte {
		return func(b []byte) []byte {
			binary.NativeEndian.PutUint64(b[i*8:], v)
			return b
		}
	}
	two := func(f, g func([]byte) []byte) func([]byte) []byte {
		return func(b []byte) []byte { return f(g(b)) }
	}
	const first = headerBytes / 8
	for name, tc := range map[string]struct {
		change func([]byte) []byte
		boot   string
		say    string
	}{
		"of before the last start":   {func(b []byte) []byte { return b }, "another", "before the host was started"},
		"of another version":         {word(atVersion, version+1), boot, "version"},
		"not ours":                   {func([]byte) []byte { return []byte(strings.Repeat("x", 1<<20)) }, boot, "not an agent's"},
		"one byte":                   {func([]byte) []byte { return []byte{1} }, boot, "too short"},
		"cut off":                    {func(b []byte) []byte { return b[:len(b)-1] }, boot, "too short"},
		"cut off after the header":   {func(b []byte) []byte { return b[:headerBytes] }, boot, "too short"},
		"a header that was begun":    {word(atSum, 0), boot, "header is damaged"},
		"another boot id":            {word(atBoot, 1), boot, "header is damaged"},
		"many segments":              {word(atSegments, 1<<60), boot, "too short"},
		"negative segments":          {word(atSegments, 1<<63), boot, "too short"},
		"a word changed":             {word(first+atRecordWords, 77), boot, "record is damaged"},
		"another owner":              {word(first+atOwner, 77), boot, "record is damaged"},
		"a sum changed":              {word(first+atRecordSum, 77), boot, "record is damaged"},
		"an odd size":                {word(first+atBytes, 65), boot, "record is damaged"},
		"a huge size":                {word(first+atBytes, 1<<62), boot, "record is damaged"},
		"a huge count":               {word(first+atCount, 1<<62), boot, "record is damaged"},
		"a journal of nothing":       {two(word(atJournal+atValid, 1), word(atJournal+atOffset, 0)), boot, "journal is damaged"},
		"a journal of a free place":  {two(word(atJournal+atValid, 1), word(atJournal+atOffset, headerBytes+(128<<10))), boot, "journal is damaged"},
		"a journal of other words":   {two(word(atJournal+atValid, 1), word(atJournal+atJournalWords, 99)), boot, "journal is damaged"},
		"a journal that can't be":    {word(atJournal+atValid, 2), boot, "journal is damaged"},
		"zeros where a header is":    {func(b []byte) []byte { clear(b[:headerBytes]); return b }, boot, "not an agent's"},
		"a segment more than needed": {func(b []byte) []byte { return append(b, make([]byte, segmentBytes)...) }, boot, ""},
		"untouched":                  {func(b []byte) []byte { return b }, boot, ""},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "counters")
			if err := os.WriteFile(path, tc.change(slices.Clone(good)), 0o600); err != nil {
				t.Fatal(err)
			}
			f, said := openSaid(t, path, tc.boot)
			if (said != "") != (tc.say != "") || !strings.Contains(said, tc.say) || f.Err() != nil {
				t.Fatalf("said %q, %v; want %q", said, f.Err(), tc.say)
			}
			if tc.say == "" {
				want(t, f.Block(1, 1, 2), 3, 4)
				want(t, f.Block(1, 2, 2), 5, 6)
				return
			}
			want(t, f.Block(1, 1, 2), 0, 0)
			set(f.Block(1, 1, 2), 8, 9)
			closeFile(t, f)
			want(t, open(t, path, tc.boot).Block(1, 1, 2), 8, 9)
		})
	}
}

// TestACommitIsWholeOrNot stops one after each of its steps.
func TestACommitIsWholeOrNot(t *testing.T) {
	const first = headerBytes / 8
	journal := func(b []uint64, offset uint64, words ...uint64) {
		j := b[atJournal:]
		copy(j[atJournalWords:], words)
		j[atOffset] = offset
		j[atJournalSum] = sum(seedOf(name{1, 1}, 2), words)
	}
	for name, tc := range map[string]struct {
		stop func(b []uint64)
		want []uint64
	}{
		"the journal is written, but not valid": {func(b []uint64) { journal(b, headerBytes, 7, 8) }, []uint64{3, 4}},
		"the journal is valid": {func(b []uint64) {
			journal(b, headerBytes, 7, 8)
			b[atJournal] = 1
		}, []uint64{7, 8}},
		"a word is written": {func(b []uint64) {
			journal(b, headerBytes, 7, 8)
			b[atJournal] = 1
			b[first+atRecordWords] = 7
		}, []uint64{7, 8}},
		"all is written": {func(b []uint64) {
			journal(b, headerBytes, 7, 8)
			b[atJournal] = 1
			b[first+atRecordWords], b[first+atRecordWords+1] = 7, 8
			b[first+atRecordSum] = b[atJournal+atJournalSum]
		}, []uint64{7, 8}},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "counters")
			f := open(t, path, boot)
			set(f.Block(1, 1, 2), 3, 4)
			closeFile(t, f)
			raw, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			tc.stop(unsafe.Slice((*uint64)(unsafe.Pointer(&raw[0])), len(raw)/8))
			if err := os.WriteFile(path, raw, 0o600); err != nil {
				t.Fatal(err)
			}
			want(t, open(t, path, boot).Block(1, 1, 2), tc.want...)
		})
	}
}

// beChild counts for ever: all words of a block are equal at each commit, and
// never shrink. Blocks come, grow and go.
func beChild(path string) {
	f, err := Open(zap.NewNop(), path, boot)
	if err != nil || f.Err() != nil {
		fmt.Println(err, f.Err())
		os.Exit(1)
	}
	for round := uint64(0); ; round++ {
		for owner := range sample.Incarnation(8) {
			n := 20 + int(round/50%3)
			b := f.Block(owner+1, KeyOf("count"), n)
			for i := range b.Words {
				b.Words[i] = b.Words[0] + uint64(min(i, 1))
			}
			b.Words[0]++
			b.Commit()
			f.Block(100+sample.Incarnation(round%20)*8+owner, 1, 1+int(round%30)).Commit()
		}
		f.Forget(100 + sample.Incarnation(round*7%160))
		if round == 0 {
			fmt.Println("ready")
		}
	}
}

func TestAKillAtAnyMomentLosesNothing(t *testing.T) {
	path := filepath.Join(t.TempDir(), "counters")
	kills := 200
	if testing.Short() {
		kills = 30
	}
	last := make([]uint64, 9)
	for kill := range kills {
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = append(os.Environ(), childEnv+"="+path, "GOMAXPROCS=1")
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		ready := make([]byte, 6)
		if _, err := io.ReadFull(out, ready); err != nil || string(ready) != "ready\n" {
			t.Fatalf("%q, %v", ready, err)
		}
		time.Sleep(rand.N(3 * time.Millisecond))
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		cmd.Wait()
		f := open(t, path, boot)
		for owner := 1; owner <= 8; owner++ {
			b := f.blocks[name{sample.Incarnation(owner), KeyOf("count")}]
			if b == nil {
				t.Fatalf("kill %d: block %d is not there", kill, owner)
			}
			for i, w := range b.Words[1:] {
				fresh := i >= 19 && w == 0 // the block had just grown
				if w != b.Words[0] && !fresh {
					t.Fatalf("kill %d: torn: %v", kill, b.Words)
				}
			}
			if b.Words[0] < last[owner] {
				t.Fatalf("kill %d: went back from %d to %d", kill, last[owner], b.Words[0])
			}
			last[owner] = b.Words[0]
		}
		closeFile(t, f)
	}
	t.Logf("%d kills, counted to %v", kills, last[1:])
}

func TestTwoOnOneFileAreRefused(t *testing.T) {
	path := filepath.Join(t.TempDir(), "counters")
	f := open(t, path, boot)
	set(f.Block(1, 1, 1), 5)
	if _, err := Open(zap.NewNop(), path, boot); !errors.Is(err, ErrInUse) {
		t.Errorf("got %v, want %v", err, ErrInUse)
	}
	go func() {
		time.Sleep(50 * time.Millisecond)
		f.Close()
	}()
	g := open(t, path, boot) // waits for one that is ending
	want(t, g.Block(1, 1, 1), 5)
}

func TestWithoutAFileCountersAreInMemory(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(dir, "link")
	if err := os.Symlink(file, link); err != nil {
		t.Fatal(err)
	}
	for name, path := range map[string]string{
		"a folder":            dir,
		"below a file":        filepath.Join(file, "counters"),
		"a symbolic link":     link,
		"a device":            "/dev/null",
		"no right to make it": "/proc/counters",
	} {
		t.Run(name, func(t *testing.T) {
			f, said := openSaid(t, path, boot)
			if f.Err() == nil || !strings.Contains(said, "not kept") {
				t.Fatalf("%v, %q", f.Err(), said)
			}
			set(f.Block(1, 1, 2), 1, 2)
			want(t, f.Block(1, 1, 3), 1, 2, 0)
			f.Block(2, 1, 1).Drop()
			f.Forget(1)
			want(t, f.Block(1, 1, 1), 0)
			if blocks, bytes := f.Size(); blocks != 1 || bytes != 0 {
				t.Errorf("%d blocks, %d bytes", blocks, bytes)
			}
		})
	}
}

func TestAFileThatCannotGrowKeepsWhatItHas(t *testing.T) {
	path := filepath.Join(t.TempDir(), "counters")
	f := open(t, path, boot)
	set(f.Block(1, 1, 1), 2)
	file := f.fd
	defer func() { f.fd = file }()
	var err error
	if f.fd, err = unix.Open(path, unix.O_RDONLY, 0); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(f.fd)
	for k := range Key(20) {
		b := f.Block(2, k, MaxWords)
		b.Words[0] = 3
		b.Commit()
	}
	if f.Err() == nil {
		t.Error("no error tells that the file could not grow")
	}
	for k := range Key(20) {
		if b := f.Block(2, k, MaxWords); b.Words[0] != 3 {
			t.Errorf("block %d has %d, want 3", k, b.Words[0])
		}
	}
	set(f.Block(1, 1, 1), 4)
	f.fd = file
	closeFile(t, f)
	f = open(t, path, boot)
	want(t, f.Block(1, 1, 1), 4)
	if blocks, _ := f.Size(); blocks < 10 || blocks > 20 {
		t.Errorf("%d blocks were kept, want those that fit into 256 KiB", blocks)
	}
}

func BenchmarkCommit(b *testing.B) {
	for _, n := range []int{8, 48} {
		b.Run(strconv.Itoa(n)+"words", func(b *testing.B) {
			f := open(b, filepath.Join(b.TempDir(), "counters"), boot)
			block := f.Block(1, 1, n)
			b.ReportAllocs()
			for b.Loop() {
				block.Words[n-1]++
				block.Commit()
			}
		})
	}
}

// FuzzLoad opens any file: nothing but what a sum guards is taken over.
func FuzzLoad(f *testing.F) {
	path := filepath.Join(f.TempDir(), "seed")
	file := open(f, path, boot)
	set(file.Block(1, 1, 2), 3, 4)
	set(file.Block(1, 2, 40), 5)
	closeFile(f, file)
	good, err := os.ReadFile(path)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(uint32(0), uint64(0), uint32(0), uint64(0))
	f.Add(uint32(atJournal+atValid), uint64(1), uint32(atJournal+atOffset), uint64(7))
	f.Add(uint32(headerBytes/8+atCount), uint64(1<<63), uint32(headerBytes/8+atBytes), uint64(64))
	f.Add(uint32(headerBytes/8+atOwner), uint64(0), uint32(headerBytes/8+8+atBytes), uint64(segmentBytes))
	f.Fuzz(func(t *testing.T, i uint32, v uint64, j uint32, w uint64) {
		raw := slices.Clone(good)
		words := unsafe.Slice((*uint64)(unsafe.Pointer(&raw[0])), len(raw)/8)
		words[int(i)%len(words)] = v
		words[int(j)%len(words)] = w
		path := filepath.Join(t.TempDir(), "counters")
		if err := os.WriteFile(path, raw, 0o600); err != nil {
			t.Fatal(err)
		}
		file, err := Open(zap.NewNop(), path, boot)
		if err != nil || file.Err() != nil {
			t.Fatal(err, file.Err())
		}
		defer file.Close()
		for _, b := range []struct {
			key  Key
			n    int
			want [2]uint64
		}{{1, 2, [2]uint64{3, 4}}, {2, 40, [2]uint64{5, 0}}} {
			block := file.Block(1, b.key, b.n)
			if got := [2]uint64(block.Words); got != b.want && got != [2]uint64{} {
				t.Errorf("block %d: got %v, want %v or zeros", b.key, got, b.want)
			}
			set(block, 8, 9)
		}
	})
}
