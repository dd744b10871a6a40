//go:build lab

package bpf_test

import (
	"errors"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kvmeter/kvmeter/bpf"
	"github.com/kvmeter/kvmeter/test/boot"
	"github.com/kvmeter/kvmeter/test/vm/vmm"
)

// TestKVMsStatisticsAreRead compares them with what KVM itself tells of its
// vCPUs, of this process: one of a VM, then two of two.
func TestKVMsStatisticsAreRead(t *testing.T) {
	if _, err := os.Stat("/dev/kvm"); err != nil && os.Getenv(boot.GuestVariable) == "" {
		t.Skip("this machine has no KVM")
	}
	k, err := bpf.LoadKVM()
	if errors.Is(err, bpf.ErrNoTaskIterator) {
		t.Skipf("the kernel lacks bpf_task_from_pid: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	other := startChild(t, ".CPU 0/KVM")
	procs := []bpf.Proc{{PID: os.Getpid()}, other.proc, {PID: 1 << 30}}
	out := make([]bpf.KVMUsage, len(procs))
	read := func(vcpus uint32) {
		t.Helper()
		if err := k.Read(t.Context(), procs, []uint32{vcpus, 1, 0}, out); err != nil {
			t.Fatal(err)
		}
		if out[0].Err != nil || out[1].Err != nil || out[1].VCPUs != 0 || out[2].Err != bpf.ErrGone {
			t.Errorf("got %+v", out)
		}
	}
	compare := func(what string, vms ...*vmm.VM) {
		t.Helper()
		read(uint32(len(vms)))
		want := map[string]uint64{}
		for _, v := range vms {
			stats, err := v.Stats()
			if err != nil {
				t.Fatal(err)
			}
			for name, n := range stats {
				want[name] += n
			}
		}
		if out[0].VCPUs != uint32(len(vms)) {
			t.Errorf("%s: %d vCPUs, want %d", what, out[0].VCPUs, len(vms))
		}
		if len(k.Fields()) < 3 {
			t.Errorf("%s: KVM counts only %v", what, k.Fields())
		}
		for i, name := range k.Fields() {
			if got := out[0].Counts[i]; got != want[name] {
				t.Errorf("%s: %s is %d, KVM says %d", what, name, got, want[name])
			}
		}
	}
	err = vmm.OnThread(func(first *vmm.VM) error {
		if err := first.Run(2000); err != nil {
			return err
		}
		compare("one vCPU", first)
		for i, name := range k.Fields() {
			if n := out[0].Counts[i]; name == "exits" && n < 2000 && os.Getenv(boot.GuestVariable) != "" {
				t.Errorf("%d exits, want 2000 and more", n)
			}
		}
		t.Logf("%s: %v", strings.Join(k.Fields(), " "), out[0].Counts[:len(k.Fields())])
		scans := k.Stats().Retries
		compare("again", first)
		if now := k.Stats().Retries; now != scans+1 { // the one without vCPUs
			t.Errorf("looked for files of %d processes, want 1", now-scans)
		}
		second, err := vmm.New()
		if err != nil {
			return err
		}
		if err := second.Run(500); err != nil {
			return err
		}
		compare("two vCPUs", first, second)
		if err := second.Close(); err != nil {
			return err
		}
		compare("after one was closed", first)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if read(0); out[0].VCPUs != 0 {
		t.Errorf("after all were closed: %+v", out[0])
	}
}

// BenchmarkCostKVM is the CPU time of reading one process with one vCPU, of
// which the file is known, in a loop.
func BenchmarkCostKVM(b *testing.B) {
	k, err := bpf.LoadKVM()
	if err != nil {
		b.Fatal(err)
	}
	defer k.Close()
	err = vmm.OnThread(func(*vmm.VM) error {
		const reads = 1000
		procs, vcpus, out := []bpf.Proc{{PID: os.Getpid()}}, []uint32{1}, make([]bpf.KVMUsage, 1)
		read := func() error { return k.Read(b.Context(), procs, vcpus, out) }
		if err := read(); err != nil {
			return err
		}
		start := threadClock(b, unix.Gettid())
		for b.Loop() {
			for range reads {
				if err := read(); err != nil {
					return err
				}
			}
		}
		b.ReportMetric(0, "ns/op")
		b.ReportMetric(float64(threadClock(b, unix.Gettid())-start)/float64(b.N*reads), "cpu-ns/vcpu")
		return nil
	})
	if err != nil {
		b.Fatal(err)
	}
}
