package bpf

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"os"
	"testing"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"

	"github.com/kvmeter/kvmeter/gen"
)

func TestClassOf(t *testing.T) {
	for comm, want := range map[string]Class{
		"CPU 0/KVM":       VCPU,
		"CPU 255/KVM":     VCPU,
		"CPU 1/TCG":       VCPU,
		"ALL CPUs/TCG":    VCPU,
		"qemu-system-x86": Emulator,
		"call_rcu":        Emulator,
		"IO mon_iothread": Emulator,
		"kvm-nx-lpage-re": Emulator,
		"SPICE Worker":    Emulator,
		"":                Emulator,
		"CPU":             Emulator,
		"IO iothread1":    IOThread,
		"IO monitor":      IOThread,
		"worker":          Worker,
		"workers":         Emulator,
		"iou-wrk-4711":    Worker,
		"iou-sqp-4711":    Worker,
		"vhost-4711":      VHost,
	} {
		if got := ClassOf(comm); got != want {
			t.Errorf("%q: got %s, want %s", comm, got, want)
		}
	}
}

// TestGoAndCAgree reads the types of the compiled programs: what Go assumes of
// them must hold.
func TestGoAndCAgree(t *testing.T) {
	walk, err := gen.LoadWalk()
	if err != nil {
		t.Fatal(err)
	}
	iter, err := gen.LoadIter()
	if err != nil {
		t.Fatal(err)
	}
	for name, m := range map[string]*ebpf.MapSpec{
		"walk usages":   walk.Maps[gen.WalkMapUsages],
		"walk requests": walk.Maps[gen.WalkMapRequests],
		"iter usages":   iter.Maps[gen.IterMapUsages],
		"iter slots":    iter.Maps[gen.IterMapSlots],
	} {
		if m.MaxEntries != maxProcesses {
			t.Errorf("%s holds %d, want %d", name, m.MaxEntries, maxProcesses)
		}
	}
	for name, sizes := range map[string][2]int{
		"walk's usage":   {int(walk.Maps[gen.WalkMapUsages].ValueSize), int(unsafe.Sizeof(gen.WalkUsage{}))},
		"iter's usage":   {int(iter.Maps[gen.IterMapUsages].ValueSize), int(unsafe.Sizeof(gen.WalkUsage{}))},
		"walk's request": {int(walk.Maps[gen.WalkMapRequests].ValueSize), int(unsafe.Sizeof(gen.WalkRequest{}))},
	} {
		if sizes[0] != sizes[1] {
			t.Errorf("%s is %d bytes in C, %d in Go", name, sizes[0], sizes[1])
		}
	}
	var run *btf.Struct
	if err := walk.Types.TypeByName("run", &run); err != nil {
		t.Fatal(err)
	}
	if want := uint32(unsafe.Sizeof(walkContext{})); run.Size != want || run.Members[0].Name != "count" {
		t.Errorf("struct run is %+v, want %d bytes that start with count", run, want)
	}
}

func TestARecordIsReadFieldByField(t *testing.T) {
	// Every field of the record has a value of its own.
	raw := make([]byte, unsafe.Sizeof(gen.WalkUsage{}))
	for i := range len(raw) / 8 {
		binary.NativeEndian.PutUint64(raw[8*i:], uint64(i+1)<<32|uint64(i+1))
	}
	rec := *(*gen.WalkUsage)(unsafe.Pointer(&raw[0]))
	rec.Status, rec.Fields = statusOK, fieldIO|fieldWait
	v := func(i int) uint64 { return uint64(i)<<32 | uint64(i) }
	want := Usage{
		Exited: v(11), Wait: v(12), WaitAll: v(13), Switches: v(14),
		ReadBytes: v(15), WriteBytes: v(16), CancelledWriteBytes: v(17),
		Threads: 18, VCPUs: 18, HasSplit: true, HasIO: true, HasWait: true,
	}
	want.Process = want.Exited
	for c := range Classes {
		want.Run[c] = v(int(c)+1) + v(int(c)+6)
		want.Process += want.Run[c]
	}
	h := histories{of: map[Proc]*history{}}
	var got Usage
	h.usage(Proc{PID: 1}, &rec, &got)
	if got != want {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
}

func TestStatusBecomesAnError(t *testing.T) {
	h := histories{of: map[Proc]*history{}}
	for status, want := range map[uint32]error{
		statusGone: ErrGone, statusOK: nil, statusReused: ErrReused, statusTorn: ErrTorn,
		statusTooManyThreads: ErrTooManyThreads, statusKernelThread: ErrKernelThread, 99: ErrGone,
	} {
		var u Usage
		h.usage(Proc{PID: 1}, &gen.WalkUsage{Status: status, ExitedNs: 5}, &u)
		if u.Err != want || want != nil && u != (Usage{Err: want}) {
			t.Errorf("status %d: got %+v, want %v", status, u, want)
		}
	}
	if h.stats.Failed != 6 {
		t.Errorf("got %d failed, want 6", h.stats.Failed)
	}
}

func TestWhatWasToldIsHeld(t *testing.T) {
	type step struct {
		vcpu, slice, worker, workerSlice, exited uint64
		wantVCPU, wantWorker, wantProcess        uint64
	}
	for name, steps := range map[string][]step{
		"a slice in progress is added": {
			{vcpu: 100, slice: 7, wantVCPU: 107, wantProcess: 107},
		},
		"a slice that was told too long is held until the kernel has caught up": {
			{vcpu: 100, slice: 7, wantVCPU: 107, wantProcess: 107},
			{vcpu: 105, wantVCPU: 107, wantProcess: 107},
			{vcpu: 110, wantVCPU: 110, wantProcess: 110},
		},
		"a thread that exits takes its time from its class to exited": {
			{vcpu: 100, worker: 50, wantVCPU: 100, wantWorker: 50, wantProcess: 150},
			{vcpu: 120, worker: 0, exited: 60, wantVCPU: 120, wantWorker: 0, wantProcess: 180},
		},
		"the last tick of a thread that exits stays in the process": {
			{vcpu: 100, worker: 50, workerSlice: 30, wantVCPU: 100, wantWorker: 80, wantProcess: 180},
			{vcpu: 110, worker: 0, exited: 60, wantVCPU: 110, wantWorker: 10, wantProcess: 180},
			{vcpu: 140, worker: 0, exited: 60, wantVCPU: 140, wantWorker: 10, wantProcess: 210},
		},
		"a thread that is renamed takes its time along": {
			{worker: 50, wantWorker: 50, wantProcess: 50},
			{vcpu: 60, wantVCPU: 60, wantProcess: 60},
		},
	} {
		t.Run(name, func(t *testing.T) {
			h := histories{of: map[Proc]*history{}}
			for i, s := range steps {
				rec := gen.WalkUsage{Status: statusOK, ExitedNs: s.exited}
				rec.RunNs[VCPU], rec.SliceNs[VCPU] = s.vcpu, s.slice
				rec.RunNs[Worker], rec.SliceNs[Worker] = s.worker, s.workerSlice
				var u Usage
				h.usage(Proc{PID: 1}, &rec, &u)
				if u.Run[VCPU] != s.wantVCPU || u.Run[Worker] != s.wantWorker || u.Process != s.wantProcess {
					t.Errorf("step %d: got vcpu %d, worker %d, process %d; want %d, %d, %d", i,
						u.Run[VCPU], u.Run[Worker], u.Process, s.wantVCPU, s.wantWorker, s.wantProcess)
				}
			}
		})
	}
}

func TestAProcessIsForgotten(t *testing.T) {
	h := histories{of: map[Proc]*history{}}
	rec := gen.WalkUsage{Status: statusOK, ExitedNs: 100}
	var u Usage
	p := Proc{PID: 1, StartTicks: 7}
	h.usage(p, &rec, &u)
	h.usage(p, &gen.WalkUsage{Status: statusGone}, &u)
	if len(h.of) != 0 {
		t.Errorf("a process that is gone is still remembered")
	}
	for pid := range maxHistories + 1 {
		h.usage(Proc{PID: pid}, &rec, &u)
	}
	h.stats.Reads++
	h.usage(p, &rec, &u)
	h.prune()
	if len(h.of) != 1 || h.of[p] == nil {
		t.Errorf("%d processes are remembered, want the one that was asked for last", len(h.of))
	}
}

// FuzzHold feeds any sequence of records: the process never loses time, and
// the classes add up to it.
func FuzzHold(f *testing.F) {
	f.Add([]byte{100, 7, 0, 0, 0, 105, 0, 0, 0, 0})
	f.Add([]byte{100, 0, 50, 30, 0, 110, 0, 0, 0, 60, 140, 0, 0, 0, 60})
	f.Fuzz(func(t *testing.T, b []byte) {
		h := histories{of: map[Proc]*history{}}
		var last Usage
		for ; len(b) >= 5; b = b[5:] {
			rec := gen.WalkUsage{Status: statusOK, ExitedNs: uint64(b[4])}
			rec.RunNs[VCPU], rec.SliceNs[VCPU] = uint64(b[0]), uint64(b[1])
			rec.RunNs[Worker], rec.SliceNs[Worker] = uint64(b[2]), uint64(b[3])
			var u Usage
			h.usage(Proc{PID: 1}, &rec, &u)
			sum := u.Exited
			for _, ns := range u.Run {
				sum += ns
			}
			if u.Process < last.Process || u.Process != sum {
				t.Fatalf("after %+v came %+v, sum %d", last, u, sum)
			}
			last = u
		}
	})
}

func TestExplanation(t *testing.T) {
	verifier := errors.New("the verifier says no")
	for name, tc := range map[string]struct {
		err     error
		hasBTF  bool
		missing []string
		want    error
	}{
		"no BTF is said first":                     {unix.EPERM, false, []string{"CAP_BPF"}, ErrNoBTF},
		"a missing capability explains any error":  {unix.EINVAL, true, []string{"CAP_PERFMON"}, ErrNoCapability},
		"EPERM with the capabilities is a refusal": {fmt.Errorf("load: %w (MEMLOCK may be too low)", unix.EPERM), true, nil, ErrRefused},
		"a missing kfunc is the old kernel":        {fmt.Errorf("kfunc %q: %w", "bpf_iter_task_new", ebpf.ErrNotSupported), true, nil, ErrNoTaskIterator},
		"anything else stands for itself":          {verifier, true, nil, verifier},
	} {
		t.Run(name, func(t *testing.T) {
			if got := explanation(tc.err, tc.hasBTF, tc.missing); !errors.Is(got, tc.want) {
				t.Errorf("got %v, want %v", got, tc.want)
			}
		})
	}
}

func TestProcessCPUClock(t *testing.T) {
	first, err := ProcessCPUClock(os.Getpid())
	if err != nil || first == 0 {
		t.Fatalf("got %d, %v", first, err)
	}
	second, err := ProcessCPUClock(os.Getpid())
	if err != nil || second < first {
		t.Errorf("got %d after %d, %v", second, first, err)
	}
	for _, pid := range []int{-1, 0, 1 << 22, 1<<22 + 1, 1 << 29, math.MaxInt} {
		if _, err := ProcessCPUClock(pid); !errors.Is(err, ErrGone) {
			t.Errorf("PID %d: got %v, want %v", pid, err, ErrGone)
		}
	}
}

func BenchmarkUsage(b *testing.B) {
	h := histories{of: map[Proc]*history{}}
	rec := gen.WalkUsage{Status: statusOK, ExitedNs: 100}
	var u Usage
	b.ReportAllocs()
	for b.Loop() {
		rec.RunNs[VCPU]++
		h.usage(Proc{PID: 1, StartTicks: 7}, &rec, &u)
	}
}
