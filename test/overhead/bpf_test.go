//go:build lab

package overhead

import (
	"cmp"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/kvmeter/kvmeter/bpf"
	"github.com/kvmeter/kvmeter/collectors/procfs"
	"github.com/kvmeter/kvmeter/collectors/rtnl"
	"github.com/kvmeter/kvmeter/test/lab"
)

const (
	herd      = 500 // VM-like processes, of 10 threads each
	herdPolls = 15
)

// BenchmarkCostWalk polls 500 VM-like processes of 10 threads and 500 tap-like
// interfaces, as the profile lean does: the walk, the link statistics, and their
// decoding. It reports the CPU time a second, medians over the polls.
func BenchmarkCostWalk(b *testing.B) {
	for _, load := range []struct {
		name string
		busy int
	}{{"idle", 0}, {"50-busy", 50}, {"all-busy", herd}} {
		b.Run(load.name, func(b *testing.B) {
			links := linksOf(b, herd)
			var procs []bpf.Proc
			for _, pid := range lab.StartHerd(b, lab.HerdSpec{
				Count: herd, Threads: lab.QEMUThreads, Busy: load.busy, Work: 20 * time.Microsecond, Rest: time.Second,
			}) {
				start, err := procfs.StartTicks(pid)
				check(b, err)
				procs = append(procs, bpf.Proc{PID: pid, StartTicks: start})
			}
			for _, hz := range []int{1, 10} {
				b.Run(fmt.Sprintf("%dHz", hz), func(b *testing.B) { walkAt(b, procs, links, hz) })
			}
		})
	}
}

func walkAt(b *testing.B, procs []bpf.Proc, links *rtnl.Conn, hz int) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	walk, err := bpf.LoadWalk()
	check(b, err)
	defer walk.Close()
	out := make([]bpf.Usage, len(procs))
	var table []rtnl.Link
	var walked, dumped []time.Duration
	poll := func() {
		start := threadTime(b)
		check(b, walk.Read(b.Context(), procs, out))
		between := threadTime(b)
		table, err = links.Read(b.Context(), table[:0])
		check(b, err)
		walked, dumped = append(walked, between-start), append(dumped, threadTime(b)-between)
	}
	poll()
	for i := range out {
		if out[i].Err != nil || out[i].Threads != 10 {
			b.Fatalf("process %d: %+v", i, out[i])
		}
	}
	if len(table) < herd {
		b.Fatalf("%d interfaces", len(table))
	}
	walked, dumped = nil, nil
	for b.Loop() {
		tick := time.NewTicker(time.Second / time.Duration(hz))
		for range herdPolls {
			<-tick.C
			poll()
		}
		tick.Stop()
	}
	b.ReportMetric(0, "ns/op")
	w, d := median(walked), median(dumped)
	b.ReportMetric(float64(w.Nanoseconds())/1e3, "walk-µs/poll")
	b.ReportMetric(float64(d.Nanoseconds())/1e3, "links-µs/poll")
	b.ReportMetric(float64((w+d).Nanoseconds()*int64(hz))/1e6, "cpu-ms/s")
}

// linksOf returns a connection to a network namespace with so many taps. The
// calling goroutine's thread ends with it.
func linksOf(b *testing.B, taps int) *rtnl.Conn {
	b.Helper()
	runtime.LockOSThread()
	check(b, unix.Unshare(unix.CLONE_NEWNET))
	var batch strings.Builder
	for i := range taps {
		fmt.Fprintf(&batch, "tuntap add dev tap%d mode tap\n", i)
	}
	ip := exec.Command("ip", "-batch", "-")
	ip.Stdin = strings.NewReader(batch.String())
	if out, err := ip.CombinedOutput(); err != nil {
		b.Fatalf("%v\n%s", err, out)
	}
	links, err := rtnl.Open()
	check(b, err)
	b.Cleanup(func() { links.Close() })
	return links
}

func check(b *testing.B, err error) {
	b.Helper()
	if err != nil {
		b.Fatal(err)
	}
}

// threadTime is the CPU time of the calling thread.
func threadTime(b *testing.B) time.Duration {
	var ts unix.Timespec
	check(b, unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &ts))
	return time.Duration(ts.Nano())
}

func median[T cmp.Ordered](d []T) T {
	slices.Sort(d)
	return d[len(d)/2]
}

// BenchmarkCostAccuracy holds the walk's process CPU time against the kernel's
// own clocks.
//
// paused: processes with threads that work, and that come and go, are polled ten
// times a second for a minute, each value held as the agent does where it is
// lower than the one before, and stopped at both ends: how far what they were
// told to have used is off their CPU clock.
//
// running: a thread of this process works all the time; after each read its
// exact CPU clock is read, which another process's thread does not have. The
// value should lie between that and the time that has passed since the read
// began before it. Reads that take more than 10 µs are dropped.
func BenchmarkCostAccuracy(b *testing.B) {
	walk, err := bpf.LoadWalk()
	check(b, err)
	defer walk.Close()
	b.Run("paused", func(b *testing.B) {
		pids := lab.StartHerd(b, lab.HerdSpec{
			Count: 4, Busy: 4, Work: 2 * time.Millisecond, Rest: 3 * time.Millisecond,
			Threads: []string{"CPU 0/KVM", "CPU 1/KVM", "~worker", "IO iothread1"},
		})
		procs, out := make([]bpf.Proc, len(pids)), make([]bpf.Usage, len(pids))
		signal := func(s syscall.Signal) {
			for _, pid := range pids {
				check(b, syscall.Kill(pid, s))
			}
			time.Sleep(100 * time.Millisecond)
		}
		told, clock := make([]uint64, len(pids)), make([]uint64, len(pids))
		poll := func() {
			check(b, walk.Read(b.Context(), procs, out))
			for i := range out {
				told[i] = max(told[i], out[i].Process)
			}
		}
		off := func() (most uint64) {
			for i, pid := range pids {
				clock[i], err = bpf.ProcessCPUClock(pid)
				check(b, err)
				most = max(most, told[i]-min(told[i], clock[i]), clock[i]-min(told[i], clock[i]))
			}
			return most
		}
		for i, pid := range pids {
			start, err := procfs.StartTicks(pid)
			check(b, err)
			procs[i] = bpf.Proc{PID: pid, StartTicks: start}
		}
		most := uint64(0)
		for b.Loop() {
			for range 600 {
				poll()
				time.Sleep(100 * time.Millisecond)
			}
			signal(syscall.SIGSTOP)
			poll()
			most = max(most, off())
			signal(syscall.SIGCONT)
		}
		b.ReportMetric(0, "ns/op")
		b.ReportMetric(float64(most), "ns-off")
	})
	b.Run("running", func(b *testing.B) {
		var stop atomic.Bool
		defer stop.Store(true)
		tid := make(chan int)
		go func() {
			runtime.LockOSThread()
			name := []byte("CPU 0/KVM\x00")
			_ = unix.Prctl(unix.PR_SET_NAME, uintptr(unsafe.Pointer(&name[0])), 0, 0, 0)
			tid <- unix.Gettid()
			for !stop.Load() {
			}
		}()
		clock := ^int32(<-tid)<<3 | 4 | 2 // CPUCLOCK_SCHED of that thread
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		procs, out := []bpf.Proc{{PID: os.Getpid()}}, make([]bpf.Usage, 1)
		var outside []time.Duration
		dropped := 0
		for b.Loop() {
			for range 5000 {
				time.Sleep(time.Millisecond)
				begin := time.Now()
				check(b, walk.Read(b.Context(), procs, out))
				var ts unix.Timespec
				check(b, unix.ClockGettime(clock, &ts))
				took := time.Since(begin)
				if took > 10*time.Microsecond {
					dropped++
					continue
				}
				late := time.Duration(uint64(ts.Nano()) - out[0].Run[bpf.VCPU] - out[0].Slice[bpf.VCPU])
				outside = append(outside, max(0, -late, late-took))
			}
		}
		if len(outside) < 100 {
			b.Fatalf("only %d reads took less than 10 µs", len(outside))
		}
		slices.Sort(outside)
		b.ReportMetric(0, "ns/op")
		b.ReportMetric(float64(outside[len(outside)*99/100].Nanoseconds()), "ns-outside-p99")
		b.ReportMetric(float64(outside[len(outside)-1].Nanoseconds()), "ns-outside-max")
		b.ReportMetric(float64(dropped), "reads-dropped")
	})
}
