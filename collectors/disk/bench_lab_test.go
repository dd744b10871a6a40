//go:build lab

package disk

import (
	"errors"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/kvmeter/kvmeter/collectors"
)

// BenchmarkCostDisk measures what a direct read of 4 KiB costs by the kernel's own
// count of the programs' run time, less that of programs that do nothing at the
// same places: vm-ns/request if it is a domain's, other-ns/request if it is of
// another process, empty-ns/request what was taken off. Each of the three has the
// places for itself in turn. With threads the CPU has slept before a request
// completes, so that nothing of it is in its caches.
func BenchmarkCostDisk(b *testing.B) {
	stats, err := ebpf.EnableStats(uint32(unix.BPF_STATS_RUN_TIME))
	if err != nil {
		b.Fatal(err)
	}
	defer stats.Close()
	for name, engine := range engines {
		b.Run(name, func(b *testing.B) {
			h := open(b)
			programs := ownPrograms(b)
			maps.DeleteFunc(programs, func(name string, _ *ebpf.Program) bool { return places[name] == "" })
			empty := empties(b, programs)
			path := filepath.Join(b.TempDir(), "disk")
			f := makeImage(b, path, 64<<20, true)
			// The kernel's clock runs on while an interrupt or another task has
			// the CPU: the median of short stretches is what the programs take.
			const stretch, stretches = 500, 40
			all := make([]request, stretch)
			measure := func(programs map[string]*ebpf.Program) float64 {
				for i := range all {
					all[i] = request{offset: rand.IntN(64<<20>>12) << 12, size: 4096}
				}
				start := runTime(b, programs)
				engine(b, f, all)
				return (runTime(b, programs) - start) / stretch
			}
			var vm, other, none []float64
			for range stretches {
				if err := h.Detach(); err != nil {
					b.Fatal(err)
				}
				detach := attachAll(b, empty)
				none = append(none, measure(empty))
				detach()
				if err := h.Follow(nil); err != nil {
					b.Fatal(err)
				}
				if err := h.Attach(); err != nil {
					b.Fatal(err)
				}
				other = append(other, measure(programs))
				if err := h.Follow([]collectors.Target{self(1, vd(2, path))}); err != nil {
					b.Fatal(err)
				}
				vm = append(vm, measure(programs))
			}
			b.ReportMetric(median(vm)-median(none), "vm-ns/request")
			b.ReportMetric(median(other)-median(none), "other-ns/request")
			b.ReportMetric(median(none), "empty-ns/request")
			b.ReportMetric(0, "ns/op")
		})
	}
}

func median(v []float64) float64 {
	slices.Sort(v)
	return v[len(v)/2]
}

// runTime is how long programs have run in all, in ns.
func runTime(b *testing.B, programs map[string]*ebpf.Program) (ns float64) {
	for _, p := range programs {
		s, err := p.Stats()
		if err != nil {
			b.Fatal(err)
		}
		ns += float64(s.Runtime.Nanoseconds())
	}
	return ns
}

// ownPrograms returns the programs that this process has loaded: their
// descriptors are in its table.
func ownPrograms(b *testing.B) map[string]*ebpf.Program {
	b.Helper()
	fds, err := os.ReadDir("/proc/self/fdinfo")
	if err != nil {
		b.Fatal(err)
	}
	all := map[string]*ebpf.Program{}
	for _, fd := range fds {
		text, _ := os.ReadFile("/proc/self/fdinfo/" + fd.Name())
		_, after, ok := strings.Cut(string(text), "prog_id:\t")
		id, err := strconv.Atoi(strings.TrimSpace(strings.SplitN(after, "\n", 2)[0]))
		if !ok || err != nil {
			continue
		}
		p, err := ebpf.NewProgramFromID(ebpf.ProgramID(id))
		if errors.Is(err, os.ErrNotExist) {
			continue // one of the benchmark before, just unloaded
		}
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { _ = p.Close() })
		info, err := p.Info()
		if err != nil {
			b.Fatal(err)
		}
		if strings.Contains(string(text), "prog_type") {
			all[info.Name] = p
		}
	}
	return all
}

// places is where the programs are that see a direct read of a file.
var places = map[string]string{"iomap_begin": "iomap_dio_rw_begin", "iomap_end": "iomap_dio_complete"}

// empties returns programs that do nothing, for where the hook's are.
func empties(b *testing.B, programs map[string]*ebpf.Program) map[string]*ebpf.Program {
	if len(programs) != len(places) {
		b.Skip("the kernel lacks the tracepoints of direct I/O")
	}
	all := map[string]*ebpf.Program{}
	for name := range programs {
		p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
			Type: ebpf.Tracing, AttachType: ebpf.AttachTraceRawTp, AttachTo: places[name], License: "GPL",
			Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 0), asm.Return()},
		})
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { _ = p.Close() })
		all[strings.Clone(name)] = p
	}
	return all
}

func attachAll(b *testing.B, programs map[string]*ebpf.Program) (detach func()) {
	var links []link.Link
	for _, p := range programs {
		l, err := link.AttachTracing(link.TracingOptions{Program: p})
		if err != nil {
			b.Fatal(err)
		}
		links = append(links, l)
	}
	return func() {
		for _, l := range links {
			_ = l.Close()
		}
	}
}
