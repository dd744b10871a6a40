package bpf

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"os"
	"reflect"
	"strings"
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
	life, err := gen.LoadLife()
	if err != nil {
		t.Fatal(err)
	}
	if got := int(life.Maps[gen.LifeMapLives].ValueSize); got != int(unsafe.Sizeof(gen.LifeLife{})) {
		t.Errorf("struct life is %d bytes in C, %d in Go", got, unsafe.Sizeof(gen.LifeLife{}))
	}
	for name, m := range map[string]*ebpf.MapSpec{
		"walk usages":    walk.Maps[gen.WalkMapUsages],
		"walk requests":  walk.Maps[gen.WalkMapRequests],
		"walk processes": walk.Maps[gen.WalkMapProcesses],
		"iter usages":    iter.Maps[gen.IterMapUsages],
		"iter slots":     iter.Maps[gen.IterMapSlots],
	} {
		if m.MaxEntries != maxProcesses {
			t.Errorf("%s holds %d, want %d", name, m.MaxEntries, maxProcesses)
		}
	}
	for name, m := range map[string]*ebpf.MapSpec{
		"walk vcpus": walk.Maps[gen.WalkMapVcpus],
		"iter vcpus": iter.Maps[gen.IterMapVcpus],
	} {
		if size := uint32(unsafe.Sizeof(gen.WalkVcpu{})); m.MaxEntries != maxVCPUs || m.ValueSize != size {
			t.Errorf("%s holds %d of %d bytes, want %d of %d", name, m.MaxEntries, m.ValueSize, maxVCPUs, size)
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
	kvm, err := gen.LoadKVM()
	if err != nil {
		t.Fatal(err)
	}
	if m := kvm.Maps[gen.KVMMapKvmUsages]; m.MaxEntries != maxProcesses || int(m.ValueSize) != int(unsafe.Sizeof(gen.KVMKvmUsage{})) {
		t.Errorf("kvm's usages are %d of %d bytes", m.MaxEntries, m.ValueSize)
	}
	var stat *btf.Struct
	if err := kvm.Types.TypeByName("kvm_stat", &stat); err != nil || stat.Size != maxKVMStat {
		t.Errorf("struct kvm_stat: %v, %v", stat, err)
	}
}

// TestKVMLayout takes the types as KVM has them on some architectures.
func TestKVMLayout(t *testing.T) {
	u64 := &btf.Int{Name: "u64", Size: 8}
	word := func(name string, at uint32) btf.Member {
		return btf.Member{Name: name, Type: u64, Offset: btf.Bits(at * 8)}
	}
	generic := &btf.Struct{Name: "kvm_vcpu_stat_generic", Size: 32, Members: []btf.Member{
		word("halt_successful_poll", 0), word("halt_poll_success_ns", 8), word("halt_poll_fail_ns", 16),
		{Name: "halt_wait_hist", Type: &btf.Array{Type: u64, Nelems: 1}, Offset: 24 * 8},
	}}
	vcpu := func(stat btf.Type) *btf.Struct {
		return &btf.Struct{Name: "kvm_vcpu", Size: 1 << 12, Members: []btf.Member{
			{Name: "kvm", Type: &btf.Pointer{Target: u64}}, {Name: "stat", Type: stat, Offset: 640 * 8},
		}}
	}
	stat := &btf.Struct{Name: "kvm_vcpu_stat", Size: 72, Members: []btf.Member{
		{Name: "generic", Type: generic},
		word("pf_taken", 32), word("exits", 40), word("io_exits", 48),
		{Name: "old_exits", Type: &btf.Int{Size: 4}, Offset: 56 * 8},
		word("halt_exits", 64),
	}}
	layout, fields, err := kvmLayout(vcpu(&btf.Typedef{Name: "stat_t", Type: stat}))
	if err != nil {
		t.Fatal(err)
	}
	want := gen.KVMKvmLayout{Stat: 640, Size: 72, Fields: 5}
	copy(want.At[:], []uint32{8, 16, 40, 48, 64})
	if names := "halt_poll_success_ns halt_poll_fail_ns exits io_exits halt_exits"; layout != want || strings.Join(fields, " ") != names {
		t.Errorf("got %v, %+v, want %s, %+v", fields, layout, names, want)
	}
	for name, bad := range map[string]*btf.Struct{
		"no statistics":    {Name: "kvm_vcpu", Members: []btf.Member{word("cpu", 0)}},
		"of another type":  vcpu(u64),
		"too large":        vcpu(&btf.Struct{Size: maxKVMStat + 1, Members: stat.Members}),
		"without counters": vcpu(&btf.Struct{Size: 8, Members: []btf.Member{word("pf_taken", 0)}}),
	} {
		if _, _, err := kvmLayout(bad); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	for field, kind := range map[string]string{
		"io_exits": "io", "irq_window_exits": "irq_window", "wfe_exit_stat": "wfe", "mmio_exit_user": "mmio_user",
		"exit_validity": "validity", "exits": "", "halt_poll_fail_ns": "",
	} {
		if got := KVMExitKind(field); got != kind {
			t.Errorf("%s: got %q, want %q", field, got, kind)
		}
	}
}

func TestARecordIsReadFieldByField(t *testing.T) {
	// Every field of the record has a value of its own.
	raw := make([]byte, unsafe.Sizeof(gen.WalkUsage{}))
	for i := range len(raw) / 8 {
		binary.NativeEndian.PutUint64(raw[8*i:], uint64(i+1)<<32|uint64(i+1))
	}
	rec := *(*gen.WalkUsage)(unsafe.Pointer(&raw[0]))
	rec.Status, rec.Fields, rec.VcpuNumber = statusOK, fieldIO|fieldWait, rec.Vcpus-2
	v := func(i int) uint64 { return uint64(i)<<32 | uint64(i) }
	want := Usage{
		Exited: v(21), ReadBytes: v(22), WriteBytes: v(23), CancelledWriteBytes: v(24),
		Threads: 25, VCPUs: 25, HasSplit: true, HasIO: true, HasWait: true,
	}
	want.Process = want.Exited
	for c := range Classes {
		i := int(c) + 1
		want.Run[c], want.Slice[c], want.Wait[c], want.Switches[c] = v(i), v(i+5), v(i+10), v(i+15)
		want.Process += want.Run[c] + want.Slice[c]
	}
	var stats Stats
	var got Usage
	stats.usage(&rec, &got)
	if got != want {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
	if stats.LostVCPUs != 2 || stats.Retries != uint64(rec.Retries) {
		t.Errorf("%+v", stats)
	}
	for name, index := range map[string]int{"12/KVM\x00\x00": 12, "s/TCG\x00\x00\x00": -1, "12345/KV": 12345} {
		rec := gen.WalkVcpu{Tid: 7, RunNs: 1, SliceNs: 2, WaitNs: 3, Switches: 4}
		rec.Number = binary.NativeEndian.Uint64([]byte(name))
		if got, want := vcpu(&rec), (VCPUUsage{Index: index, TID: 7, Run: 1, Slice: 2, Wait: 3, Switches: 4}); got != want {
			t.Errorf("%q: got %+v, want %+v", name, got, want)
		}
	}
}

func TestStatusBecomesAnError(t *testing.T) {
	var stats Stats
	for status, want := range map[uint32]error{
		statusGone: ErrGone, statusOK: nil, statusReused: ErrReused, statusTorn: ErrTorn,
		statusTooManyThreads: ErrTooManyThreads, statusKernelThread: ErrKernelThread, 99: ErrGone,
	} {
		var u Usage
		stats.usage(&gen.WalkUsage{Status: status, ExitedNs: 5}, &u)
		if u.Err != want || want != nil && u != (Usage{Err: want}) {
			t.Errorf("status %d: got %+v, want %v", status, u, want)
		}
	}
	if stats.Failed != 6 {
		t.Errorf("got %d failed, want 6", stats.Failed)
	}
}

func TestVCPUOf(t *testing.T) {
	for comm, want := range map[string]int{
		"CPU 0/KVM": 0, "CPU 3/TCG": 3, "CPU 255/KVM": 255, "CPU 12345/KVM": 12345, "CPU 123456/KVM": -1,
		"CPU /KVM": -1, "CPU 1": -1, "CPU x/KVM": -1, "CPU -1/KVM": -1, "CPU 1x/KVM": -1, "ALL CPUs/TCG": -1, "CPU": -1, "": -1,
	} {
		if got := VCPUOf(comm); got != want {
			t.Errorf("%q: got %d, want %d", comm, got, want)
		}
	}
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
	var stats Stats
	rec := gen.WalkUsage{Status: statusOK, ExitedNs: 100}
	var u Usage
	b.ReportAllocs()
	for b.Loop() {
		rec.RunNs[VCPU]++
		stats.usage(&rec, &u)
	}
}

func TestEventsOfLifeAreReadFieldByField(t *testing.T) {
	exec := gen.LifeExecEvent{Kind: kindExec, Pid: 7, StartTicks: 8, AtNs: 9, Bytes: 3, All: 5}
	copy(exec.Args[:], "a\x00b")
	life := gen.LifeLife{
		StartTicks: 8,
		Freed:      gen.LifeShares{RunNs: [5]uint64{1, 2, 0, 4, 5}, WaitNs: [5]uint64{6, 7, 8, 0, 10}, Switches: [5]uint64{0, 12, 13, 14, 15}},
		Exited:     gen.LifeShares{RunNs: [5]uint64{0, 1, 3, 4, 4}, WaitNs: [5]uint64{5, 6, 7, 9, 9}, Switches: [5]uint64{11, 11, 12, 13, 14}},
		EndedNs:    16, ProcessNs: 15, ReadBytes: 18, WriteBytes: 19, CancelledWriteBytes: 20, Threads: 21, Fields: fieldIO | fieldWait,
	}
	lived := Lived{
		Proc: Proc{PID: 7, StartTicks: 8}, Ended: 16, Process: 15,
		Run: [Classes]uint64{1, 2, 3, 4, 5}, Wait: [Classes]uint64{6, 7, 8, 9, 10}, Switches: [Classes]uint64{11, 12, 13, 14, 15},
		ReadBytes: 18, WriteBytes: 19, CancelledWriteBytes: 20, Threads: 21, HasIO: true, HasWait: true,
	}
	for name, tc := range map[string]struct {
		raw  any
		want LifeEvent
	}{
		"an exec":                   {&exec, LifeEvent{Proc: lived.Proc, Args: []byte("a\x00b"), Cut: true, At: 9}},
		"an end":                    {&gen.LifeEndEvent{Kind: kindEnd, Pid: 7, Life: life}, LifeEvent{Proc: lived.Proc, Lived: &lived}},
		"an end that is in the way": {&gen.LifeEndEvent{Kind: kindReplaced, Pid: 7, Life: life}, LifeEvent{Proc: lived.Proc, Lived: &lived, Replaced: true}},
	} {
		t.Run(name, func(t *testing.T) {
			raw, err := binary.Append(nil, binary.NativeEndian, tc.raw)
			if err != nil {
				t.Fatal(err)
			}
			got, ok := decodeLife(raw)
			if !ok || !reflect.DeepEqual(got, tc.want) {
				t.Errorf("got  %+v, %v\nwant %+v", got, ok, tc.want)
			}
			for n := range raw {
				if _, ok := decodeLife(raw[:n]); ok {
					t.Errorf("%d of %d bytes were taken", n, len(raw))
				}
			}
		})
	}
	if !lived.Whole() {
		t.Error("it is whole")
	}
	lived.Process++
	if lived.Whole() {
		t.Error("1 ns is missing")
	}
}

func FuzzLifeEvent(f *testing.F) {
	for kind := range uint32(4) {
		raw, err := binary.Append(nil, binary.NativeEndian, &gen.LifeEndEvent{Kind: kind, Pid: 7})
		if err != nil {
			f.Fatal(err)
		}
		f.Add(raw)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		e, ok := decodeLife(b)
		if e.Replaced && e.Lived == nil || !ok && e.Lived != nil || len(e.Args) > len(b) {
			t.Errorf("got %+v, %v of %d bytes", e, ok, len(b))
		}
	})
}
