package procfs

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"testing"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/kvmeter/kvmeter/bpf"
)

func fixture(t testing.TB, name string) []byte {
	t.Helper()
	text, err := os.ReadFile("testdata/" + name)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

func TestParseStat(t *testing.T) {
	for name, tc := range map[string]struct {
		text   string
		start  uint64
		kernel bool
		err    error
	}{
		"a process":                       {string(fixture(t, "stat.sleep")), 211136, false, nil},
		"a kernel thread":                 {string(fixture(t, "stat.kthreadd")), 21, true, nil},
		"a name with ) and a newline":     {string(fixture(t, "stat.odd-name")), 211150, false, nil},
		"an empty file":                   {"", 0, false, errShort},
		"a file that ends early":          {"1 (a) S 1 2 3", 0, false, errShort},
		"letters where the start belongs": {"2 (kthreadd) S 0 0 0 0 -1 2129984 0 0 0 0 0 0 0 0 20 0 1 0 many 0 0", 0, false, errNotNumber},
		"letters where a number belongs":  {"1 (a) S 1 2 3 4 5 x 7 8 9 10 11 12 13 14 15 16 17 18 19 20", 0, false, errNotNumber},
	} {
		t.Run(name, func(t *testing.T) {
			start, kernel, err := ParseStat([]byte(tc.text))
			if !errors.Is(err, tc.err) || err == nil && (start != tc.start || kernel != tc.kernel) {
				t.Errorf("got %d, %t, %v; want %d, %t, %v", start, kernel, err, tc.start, tc.kernel, tc.err)
			}
		})
	}
}

func TestParseSchedstat(t *testing.T) {
	for text, want := range map[string][3]uint64{
		string(fixture(t, "schedstat.sleep")): {1852626, 420680, 3},
		"0 0 0\n":                             {},
		"18446744073709551615 1 2":            {1<<64 - 1, 1, 2},
	} {
		run, wait, switches, err := parseSchedstat([]byte(text))
		if got := [3]uint64{run, wait, switches}; err != nil || got != want {
			t.Errorf("%q: got %v, %v; want %v", text, got, err, want)
		}
	}
	for text, want := range map[string]error{
		"": errShort, "1 2": errShort, "1 -2 3": errNotNumber, "18446744073709551616 1 2": errNotNumber, "1.5 2 3": errNotNumber,
	} {
		if _, _, _, err := parseSchedstat([]byte(text)); !errors.Is(err, want) {
			t.Errorf("%q: got %v, want %v", text, err, want)
		}
	}
}

func TestParseIO(t *testing.T) {
	read, write, cancelled, err := parseIO(fixture(t, "io.sleep"))
	if read != 45056 || write != 0 || cancelled != 0 || err != nil {
		t.Errorf("got %d, %d, %d, %v", read, write, cancelled, err)
	}
	for text, want := range map[string]error{
		"":                                errShort,
		"read_bytes: 1\nwrite_bytes: 2\n": errShort,
		"read_bytes: x\n":                 errNotNumber,
		"read_bytes\n":                    errShort,
	} {
		if _, _, _, err := parseIO([]byte(text)); !errors.Is(err, want) {
			t.Errorf("%q: got %v, want %v", text, err, want)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, name := range []string{"stat.sleep", "stat.kthreadd", "stat.odd-name", "schedstat.sleep", "io.sleep"} {
		f.Add(fixture(f, name))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		ParseStat(b)
		parseIO(b)
		run, wait, switches, err := parseSchedstat(b)
		if err != nil {
			return
		}
		text := fmt.Sprintf("%d %d %d\n", run, wait, switches)
		if r, w, s, err := parseSchedstat([]byte(text)); r != run || w != wait || s != switches || err != nil {
			t.Errorf("%q read as %q", b, text)
		}
	})
}

// proc is a tree like /proc with one process, 27996, and a clock for it.
type proc struct {
	*Reader
	dir   string
	files map[string]string
	total uint64
}

func newProc(t *testing.T, files map[string]string) *proc {
	p := &proc{Reader: New(zap.NewNop()), dir: t.TempDir(), files: files}
	p.root = p.dir
	p.clock = func(pid int) (uint64, error) {
		if pid != 27996 {
			return 0, fmt.Errorf("clock: %w", bpf.ErrGone)
		}
		return p.total, nil
	}
	p.write(t, files)
	return p
}

func (p *proc) write(t *testing.T, files map[string]string) {
	t.Helper()
	for name, text := range files {
		path := filepath.Join(p.dir, "27996", name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

func (p *proc) read(t *testing.T, ask bpf.Proc) bpf.Usage {
	t.Helper()
	out := make([]bpf.Usage, 1)
	if err := p.Read(t.Context(), []bpf.Proc{ask}, out); err != nil {
		t.Fatal(err)
	}
	return out[0]
}

func qemu(t *testing.T) map[string]string {
	return map[string]string{
		"stat":                string(fixture(t, "stat.sleep")),
		"io":                  "rchar: 1\nread_bytes: 4096\nwrite_bytes: 8192\ncancelled_write_bytes: 512\n",
		"task/10/comm":        "qemu-system-x86\n",
		"task/10/schedstat":   "100 1 2\n",
		"task/11/comm":        "CPU 0/KVM\n",
		"task/11/schedstat":   "1000 10 20\n",
		"task/12/comm":        "IO iothread1\n",
		"task/12/schedstat":   "10 100 200\n",
		"task/gone/unrelated": "a thread that has exited has no files",
	}
}

var sleep = bpf.Proc{PID: 27996, StartTicks: 211136}

func TestRead(t *testing.T) {
	complete := bpf.Usage{
		Run: [bpf.Classes]uint64{bpf.VCPU: 1000, bpf.Emulator: 100, bpf.IOThread: 10}, Exited: 90, Process: 1200,
		Wait:     [bpf.Classes]uint64{bpf.VCPU: 10, bpf.Emulator: 1, bpf.IOThread: 100},
		Switches: [bpf.Classes]uint64{bpf.VCPU: 20, bpf.Emulator: 2, bpf.IOThread: 200}, ReadBytes: 4096, WriteBytes: 8192, CancelledWriteBytes: 512,
		Threads: 3, VCPUs: 1, HasSplit: true, HasWait: true, HasIO: true,
	}
	without := func(names ...string) map[string]string {
		files := qemu(t)
		for _, name := range names {
			delete(files, name)
		}
		return files
	}
	noWait := qemu(t)
	maps.Copy(noWait, map[string]string{"task/10/schedstat": "0 0 0\n", "task/11/schedstat": "0 0 0\n", "task/12/schedstat": "0 0 0\n"})
	broken := qemu(t)
	broken["task/11/schedstat"] = "nonsense\n"
	kthread := qemu(t)
	kthread["stat"] = string(fixture(t, "stat.kthreadd"))

	for name, tc := range map[string]struct {
		files map[string]string
		ask   bpf.Proc
		want  func(u *bpf.Usage)
		err   error
	}{
		"what the threads lack of the clock is exited": {files: qemu(t), ask: sleep},
		"no start time takes any process":              {files: qemu(t), ask: bpf.Proc{PID: 27996}},
		"another start time is another process":        {files: qemu(t), ask: bpf.Proc{PID: 27996, StartTicks: 1}, err: bpf.ErrReused},
		"no clock is no process":                       {files: qemu(t), ask: bpf.Proc{PID: 1}, err: bpf.ErrGone},
		"a process that goes meanwhile is gone":        {files: without("stat"), ask: sleep, err: bpf.ErrGone},
		"a kernel thread is named":                     {files: kthread, ask: bpf.Proc{PID: 27996}, err: bpf.ErrKernelThread},
		"a broken file costs the process":              {files: broken, ask: sleep, err: errNotNumber},
		"no right to read io leaves the bytes out": {files: without("io"), ask: sleep, want: func(u *bpf.Usage) {
			u.HasIO, u.ReadBytes, u.WriteBytes, u.CancelledWriteBytes = false, 0, 0, 0
		}},
		"a thread that goes meanwhile is exited": {files: without("task/11/schedstat"), ask: sleep, want: func(u *bpf.Usage) {
			u.Run[bpf.VCPU], u.Exited, u.Wait[bpf.VCPU], u.Switches[bpf.VCPU], u.Threads, u.VCPUs = 0, 1090, 0, 0, 2, 0
		}},
		"without scheduler statistics only the total is known": {files: noWait, ask: sleep, want: func(u *bpf.Usage) {
			u.Run, u.Exited, u.Wait, u.Switches = [bpf.Classes]uint64{}, 1200, [bpf.Classes]uint64{}, [bpf.Classes]uint64{}
			u.HasSplit, u.HasWait = false, false
		}},
		"a hidden process has its total": {files: nil, ask: sleep, want: func(u *bpf.Usage) {
			*u = bpf.Usage{Process: 1200, Exited: 1200}
		}},
	} {
		t.Run(name, func(t *testing.T) {
			p := newProc(t, tc.files)
			p.total = 1200
			got := p.read(t, tc.ask)
			want := complete
			if tc.want != nil {
				tc.want(&want)
			}
			if tc.err != nil {
				want = bpf.Usage{Err: got.Err}
			}
			if !errors.Is(got.Err, tc.err) || got != want {
				t.Errorf("got  %+v\nwant %+v, %v", got, want, tc.err)
			}
			var vcpus []bpf.VCPUUsage
			if want.VCPUs > 0 {
				vcpus = []bpf.VCPUUsage{{Index: 0, TID: 11, Run: want.Run[bpf.VCPU], Wait: want.Wait[bpf.VCPU], Switches: want.Switches[bpf.VCPU]}}
			}
			if got := p.VCPUs(0); !slices.Equal(got, vcpus) {
				t.Errorf("vCPUs: got %+v, want %+v", got, vcpus)
			}
			failed := uint64(0)
			if tc.err != nil {
				failed = 1
			}
			if s := (bpf.Stats{Reads: 1, Processes: 1, Failed: failed}); p.Stats() != s {
				t.Errorf("got %+v, want %+v", p.Stats(), s)
			}
		})
	}
}

// TestExitedNeverGoesBack: while threads run, the clock that was read before
// them lags behind their sum by a different amount each time.
func TestExitedNeverGoesBack(t *testing.T) {
	p := newProc(t, qemu(t))
	var last bpf.Usage
	for i, step := range []struct{ total, vcpu, exited, process uint64 }{
		{1200, 1000, 90, 1200},
		{1300, 1195, 90, 1395}, // lags by 95: as if nothing had exited
		{1395, 1195, 90, 1395},
		{1500, 1295, 95, 1500}, // 5 more have exited
		{1500, 0, 1390, 1500},  // the vCPU's thread has
	} {
		p.total = step.total
		p.write(t, map[string]string{"task/11/schedstat": strconv.FormatUint(step.vcpu, 10) + " 10 20\n"})
		u := p.read(t, sleep)
		if u.Exited != step.exited || u.Process != step.process {
			t.Errorf("step %d: got exited %d, process %d; want %d, %d", i, u.Exited, u.Process, step.exited, step.process)
		}
		if u.Process < last.Process {
			t.Errorf("step %d: process went from %d to %d", i, last.Process, u.Process)
		}
		last = u
	}
}

func TestMissingRightsAreSaidOnce(t *testing.T) {
	core, logs := observer.New(zap.DebugLevel)
	p := newProc(t, qemu(t))
	p.log = zap.New(core)
	if err := os.Remove(filepath.Join(p.dir, "27996/io")); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(p.dir, "27996/io"), 0o755); err != nil { // reading it is an error
		t.Fatal(err)
	}
	for range 3 {
		if u := p.read(t, sleep); u.HasIO || u.Err != nil {
			t.Errorf("got %+v", u)
		}
	}
	if logs.Len() != 1 {
		t.Errorf("said %d times, want once", logs.Len())
	}
}

func TestReadGivesUp(t *testing.T) {
	p := newProc(t, nil)
	if err := p.Read(t.Context(), []bpf.Proc{sleep}, nil); err == nil {
		t.Error("read into too little room")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := p.Read(ctx, []bpf.Proc{sleep}, make([]bpf.Usage, 1)); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want %v", err, context.Canceled)
	}
}

func TestOwnProcess(t *testing.T) {
	start, err := StartTicks(os.Getpid())
	if err != nil || start == 0 {
		t.Fatalf("got %d, %v", start, err)
	}
	if _, err := StartTicks(1 << 30); !errors.Is(err, bpf.ErrGone) {
		t.Errorf("got %v, want %v", err, bpf.ErrGone)
	}
	r := New(zap.NewNop())
	out := make([]bpf.Usage, 1)
	if err := r.Read(t.Context(), []bpf.Proc{{PID: os.Getpid(), StartTicks: start}}, out); err != nil {
		t.Fatal(err)
	}
	if u := out[0]; u.Err != nil || u.Process == 0 || u.HasSplit && u.Threads == 0 {
		t.Errorf("got %+v", u)
	}
}

func BenchmarkOwnProcess(b *testing.B) {
	r := New(zap.NewNop())
	procs, out := []bpf.Proc{{PID: os.Getpid()}}, make([]bpf.Usage, 1)
	b.ReportAllocs()
	for b.Loop() {
		if err := r.Read(b.Context(), procs, out); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(out[0].Threads), "threads")
}
