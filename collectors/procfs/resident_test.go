package procfs

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/kvmeter/kvmeter/bpf"
)

// write puts a file into a /proc of a test.
func write(t testing.TB, root, name, text string) {
	t.Helper()
	path := filepath.Join(root, name)
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o644)); err != nil {
		t.Fatal(err)
	}
}

func TestResidentIsWhatTheKernelTells(t *testing.T) {
	start, err := StartTicks(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	r, err := OpenResident("/proc", bpf.Proc{PID: os.Getpid(), StartTicks: start})
	if err != nil {
		t.Fatal(err)
	}
	bytes, err := r.Read()
	if err = errors.Join(err, r.Close()); err != nil || bytes < 1<<20 || bytes%uint64(os.Getpagesize()) != 0 {
		t.Errorf("this process has %d bytes, %v", bytes, err)
	}
	if _, err := OpenResident("/proc", bpf.Proc{PID: os.Getpid(), StartTicks: start + 1}); !errors.Is(err, bpf.ErrReused) {
		t.Errorf("another process of the PID: %v, want %v", err, bpf.ErrReused)
	}
	if _, err := OpenResident("/proc", bpf.Proc{PID: 1 << 30}); !errors.Is(err, bpf.ErrGone) {
		t.Errorf("no such process: %v, want %v", err, bpf.ErrGone)
	}
}

func TestResidentOfAProcessThatEnds(t *testing.T) {
	child := exec.Command("sleep", "60")
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	r, err := OpenResident("/proc", bpf.Proc{PID: child.Process.Pid})
	if err == nil {
		_, err = r.Read()
	}
	if err != nil {
		t.Error(err)
	}
	if err := child.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = child.Wait() // it says that it was killed
	if r == nil {
		return
	}
	if _, err := r.Read(); !errors.Is(err, bpf.ErrGone) {
		t.Errorf("got %v, want %v", err, bpf.ErrGone)
	}
	if err := r.Close(); err != nil {
		t.Error(err)
	}
}

func TestParseResident(t *testing.T) {
	const head = "77 (a) b) c) S 1 1 1 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 3 0 "
	for name, tc := range map[string]struct {
		text         string
		start, pages uint64
		bad          bool
	}{
		"a name with parentheses": {head + "4242 1000 55 18446744073709551615\n", 4242, 55, false},
		"a text that is cut off":  {head + "4242 1000", 0, 0, true},
		"no number of pages":      {head + "4242 1000 x 1\n", 0, 0, true},
		"no text":                 {"", 0, 0, true},
	} {
		start, pages, err := parseResident([]byte(tc.text))
		if (err != nil) != tc.bad || !tc.bad && (start != tc.start || pages != tc.pages) {
			t.Errorf("%s: got %d, %d, %v", name, start, pages, err)
		}
	}
}

func TestSchedReadsTheLineThatLibvirtReads(t *testing.T) {
	const older = "qemu (7, #threads: 3)\n-----\nse.exec_start    :   1.5\nse.statistics.wait_max : 1.000001\nse.statistics.wait_sum                       :       1234.005678\nse.nr_migrations : 7\n"
	for name, tc := range map[string]struct {
		text string
		want uint64
		bad  bool
	}{
		"before Linux 5.16":     {older, 1234005678, false},
		"as it was called once": {"se.wait_sum : 0.000001\n", 1, false},
		"Linux 5.16 and newer":  {"wait_sum : 1234.005678\n", 0, true},
		"no number":             {"se.statistics.wait_sum : soon\n", 0, true},
		"another precision":     {"se.statistics.wait_sum : 1.5\n", 0, true},
		"too large a number":    {"se.statistics.wait_sum : 18446744073709551615.000000\n", 0, true},
	} {
		got, err := parseSched([]byte(tc.text))
		if got != tc.want || (err != nil) != tc.bad {
			t.Errorf("%s: got %d, %v", name, got, err)
		}
	}
	root := t.TempDir()
	if NewSched(root) != nil {
		t.Error("a kernel without the line can be read")
	}
	write(t, root, "self/sched", older)
	write(t, root, "7/task/8/sched", older)
	s := NewSched(root)
	if s == nil {
		t.Fatal("a kernel with the line cannot be read")
	}
	if ns, err := s.Wait(7, 8); ns != 1234005678 || err != nil {
		t.Errorf("got %d, %v", ns, err)
	}
	if _, err := s.Wait(7, 9); !errors.Is(err, bpf.ErrGone) {
		t.Errorf("no such thread: %v, want %v", err, bpf.ErrGone)
	}
}

func FuzzProcTexts(f *testing.F) {
	f.Add([]byte("77 (a) S 1 1 1 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 3 0 4242 1000 55 1\n"))
	f.Add([]byte("se.statistics.wait_sum : 1234.005678\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		if start, _, err := ParseStat(text); err == nil {
			if other, _, err := parseResident(text); err == nil && other != start {
				t.Errorf("start %d and %d", start, other)
			}
		}
		_, _ = parseSched(text)
	})
}

func BenchmarkResident(b *testing.B) {
	r, err := OpenResident("/proc", bpf.Proc{PID: os.Getpid()})
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := r.Read(); err != nil {
			b.Fatal(err)
		}
	}
	if err := r.Close(); err != nil {
		b.Fatal(err)
	}
}
