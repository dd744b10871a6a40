//go:build lab

package disk

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/kvmeter/kvmeter/bpf"
	"github.com/kvmeter/kvmeter/collectors"
	"github.com/kvmeter/kvmeter/sample"
)

// exact says that the kernel loses no events of hooks: those of Debian in a
// guest of package vm, which sets the variable.
var exact = os.Getenv("KVMETER_VM") != ""

// program is a file that nobody does direct I/O on.
var program, _ = os.Executable()

// loaded is the hook of all tests: to load it takes seconds in an emulated
// guest.
var loaded = sync.OnceValues(func() (*Hook, error) { return Open(zap.NewNop()) })

// open returns the hook, attached and following nothing. What it counts of
// troubles goes on from test to test.
func open(t testing.TB) *Hook {
	t.Helper()
	h, err := loaded()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(h.Follow(nil), h.Detach()); err != nil {
			t.Error(err)
		}
	})
	if err := h.Attach(); err != nil {
		t.Fatal(err)
	}
	t.Logf("counted at %q", h.Sources())
	return h
}

// self is a target that is this process.
func self(id uint32, disks ...collectors.TargetDisk) collectors.Target {
	return collectors.Target{ID: id, Proc: bpf.Proc{PID: os.Getpid()}, Disks: disks}
}

func vd(id uint32, paths ...string) collectors.TargetDisk {
	return collectors.TargetDisk{ID: id, Device: "vd" + string('a'+rune(id%26)), Sources: paths, Direct: true}
}

// counted is what the hook tells of a disk.
type counted struct {
	Reads, ReadBytes, Writes, WriteBytes, Flushes uint64
}

func read(t testing.TB, h *Hook) map[uint32]counted {
	t.Helper()
	all := map[uint32]counted{}
	buckets := map[uint32][2]uint64{}
	latency := map[uint32][3]uint64{}
	if err := h.Read(t.Context(), func(id uint32, series int, n uint64) {
		c, b, l := all[id], buckets[id], latency[id]
		switch series {
		case iReadRequests:
			c.Reads = n
		case iReadBytes:
			c.ReadBytes = n
		case iReadLatency:
			l[0] = n
		case iWriteRequests:
			c.Writes = n
		case iWriteBytes:
			c.WriteBytes = n
		case iWriteLatency:
			l[1] = n
		case iFlushRequests:
			c.Flushes = n
		case iFlushLatency:
			l[2] = n
		case iDirect:
		default:
			b[(series-iReadBuckets)/bpf.LatencyBuckets] += n
		}
		all[id], buckets[id], latency[id] = c, b, l
	}); err != nil {
		t.Fatal(err)
	}
	for id, c := range all {
		if b := buckets[id]; b != [2]uint64{c.Reads, c.Writes} {
			t.Errorf("disk %d: its histograms have %d, want %d and %d", id, b, c.Reads, c.Writes)
		}
		for i, n := range []uint64{c.Reads, c.Writes, c.Flushes} {
			if l := latency[id][i]; (l == 0) != (n == 0) || l > n*10e9 {
				t.Errorf("disk %d: %d requests took %d ns", id, n, l)
			}
		}
	}
	return all
}

// check compares what was counted with what was done. On a kernel that loses
// events of hooks some may lack, but no byte that the kernel's own accounting
// has not.
func check(t *testing.T, h *Hook, got, want counted) {
	t.Helper()
	if got == want {
		return
	}
	s := h.Stats()
	if exact {
		t.Errorf("got  %+v\nwant %+v (%+v)", got, want, s)
		return
	}
	t.Logf("of %+v the kernel kept silent about %+v (%+v)", want, counted{
		want.Reads - got.Reads, want.ReadBytes - got.ReadBytes, want.Writes - got.Writes, want.WriteBytes - got.WriteBytes, want.Flushes - got.Flushes,
	}, s)
	few := func(got, want uint64) bool { return got <= want && got >= want-want/10 }
	if !few(got.Reads, want.Reads) || !few(got.Writes, want.Writes) || got.ReadBytes != got.Reads*4096 || got.WriteBytes != got.Writes*65536 || got.Flushes > want.Flushes {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
}

var guests = counted{Reads: 1000, ReadBytes: 1000 * 4096, Writes: 512, WriteBytes: 512 * 65536, Flushes: 3}

func TestEachRequestIsCountedOnce(t *testing.T) {
	for name, engine := range engines {
		t.Run(name, func(t *testing.T) {
			h := open(t)
			path := filepath.Join(t.TempDir(), "disk.raw")
			f := makeImage(t, path, guestImage, true)
			if err := h.Follow([]collectors.Target{self(1, vd(2, path))}); err != nil {
				t.Fatal(err)
			}
			read0, written0 := accountedTo(t, os.Getpid())
			engine(t, f, asGuests(3))
			read1, written1 := accountedTo(t, os.Getpid())
			got := read(t, h)[2]
			check(t, h, got, guests)
			// So that the shortfall that the agent tells is what lacks.
			if read1-read0 != guests.ReadBytes || written1-written0 < guests.WriteBytes {
				t.Errorf("the kernel accounted %d bytes read and %d written, want %d and %d", read1-read0, written1-written0, guests.ReadBytes, guests.WriteBytes)
			}
		})
	}
}

func TestBufferedIOIsCountedWhereTheKernelTells(t *testing.T) {
	for name, engine := range engines {
		t.Run(name, func(t *testing.T) {
			h := open(t)
			path := filepath.Join(t.TempDir(), "disk.raw")
			f := makeImage(t, path, guestImage, false)
			d := vd(2, path)
			d.Direct = false
			if err := h.Follow([]collectors.Target{self(1, d)}); err != nil {
				t.Fatal(err)
			}
			engine(t, f, asGuests(3))
			want := guests
			if sources := strings.Join(h.Sources(), ","); name != "io_uring" && !strings.HasSuffix(sources, "ext4") && !strings.Contains(sources, "ext4,") {
				want = counted{Flushes: 3}
			}
			check(t, h, read(t, h)[2], want)
			var direct uint64
			if err := h.Read(t.Context(), func(_ uint32, series int, n uint64) {
				if series == iDirect {
					direct = n
				}
			}); err != nil || direct != 0 {
				t.Errorf("%d bytes are taken for direct I/O, %v", direct, err)
			}
		})
	}
}

func TestABlockDeviceIsCounted(t *testing.T) {
	backing := filepath.Join(t.TempDir(), "backing")
	makeImage(t, backing, guestImage, true)
	device := loop(t, backing)
	for name, engine := range engines {
		t.Run(name, func(t *testing.T) {
			h := open(t)
			if sources := strings.Join(h.Sources(), ","); name != "io_uring" && !strings.Contains(sources, "block") {
				t.Skip("the kernel refuses fentry programs")
			}
			f, err := os.OpenFile(device, os.O_RDWR|unix.O_DIRECT, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			// Another name of it, as in the /dev that libvirt makes for QEMU.
			var st unix.Stat_t
			other := filepath.Join(t.TempDir(), "node")
			if err := unix.Stat(device, &st); err != nil {
				t.Fatal(err)
			}
			if err := unix.Mknod(other, unix.S_IFBLK|0o600, int(st.Rdev)); err != nil {
				t.Fatal(err)
			}
			if err := h.Follow([]collectors.Target{self(1, vd(2, other))}); err != nil {
				t.Fatal(err)
			}
			engine(t, f, asGuests(3))
			check(t, h, read(t, h)[2], guests)
		})
	}
}

// loop makes a block device of a file.
func loop(t *testing.T, path string) string {
	t.Helper()
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		t.Skipf("the kernel has no loop devices: %v", err)
	}
	defer control.Close()
	n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
	if err != nil {
		t.Fatal(err)
	}
	device := "/dev/loop" + string('0'+rune(n))
	d, err := os.OpenFile(device, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.IoctlSetInt(int(d.Fd()), unix.LOOP_CLR_FD, 0); err != nil {
			t.Error(err)
		}
		d.Close()
	})
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.IoctlSetInt(int(d.Fd()), unix.LOOP_SET_FD, int(f.Fd())); err != nil {
		t.Fatal(err)
	}
	return device
}

// do makes n reads of 4 KiB of a file, and returns them.
func do(t *testing.T, f *os.File, n int) counted {
	t.Helper()
	var all []request
	for i := range n {
		all = append(all, request{offset: i << 12, size: 4096})
	}
	threads(t, f, all)
	return counted{Reads: uint64(n), ReadBytes: uint64(n) * 4096}
}

func TestADiskIsFollowedThroughWhatBecomesOfIt(t *testing.T) {
	dir := t.TempDir()
	base, disk, snapshot, other := filepath.Join(dir, "base"), filepath.Join(dir, "disk"), filepath.Join(dir, "snapshot"), filepath.Join(dir, "other")
	fb, fd, fo := makeImage(t, base, guestImage, true), makeImage(t, disk, guestImage, true), makeImage(t, other, guestImage, true)
	h := open(t)
	before := h.Stats()
	follow := func(disks ...collectors.TargetDisk) {
		t.Helper()
		if err := h.Follow([]collectors.Target{self(1, disks...)}); err != nil {
			t.Fatal(err)
		}
	}
	expect := func(want map[uint32]counted) {
		t.Helper()
		got := read(t, h)
		if len(got) != len(want) {
			t.Errorf("got %+v, want %+v", got, want)
		}
		for id, w := range want {
			check(t, h, got[id], w)
		}
	}
	n := func(reads uint64) counted { return counted{Reads: reads, ReadBytes: reads * 4096} }

	follow(vd(2, disk, base))
	do(t, fd, 100)
	do(t, fb, 50)
	do(t, fo, 70) // nobody's
	expect(map[uint32]counted{2: n(150)})

	// A snapshot, before libvirt tells of it: nobody knows whose it is.
	fs := makeImage(t, snapshot, guestImage, true)
	do(t, fs, 10)
	expect(map[uint32]counted{2: n(150)})
	follow(vd(2, snapshot, disk, base))
	do(t, fs, 40)
	do(t, fd, 5)
	expect(map[uint32]counted{2: n(195)})

	// Hot-plug, of a file that was used before.
	follow(vd(2, snapshot, disk, base), vd(3, other))
	do(t, fo, 20)
	expect(map[uint32]counted{2: n(195), 3: n(20)})

	// The same path, another file: what a mirror leaves.
	if err := os.Rename(snapshot, snapshot+".old"); err != nil {
		t.Fatal(err)
	}
	fn := makeImage(t, snapshot, guestImage, true)
	do(t, fn, 1) // is what makes the hook look
	expect(map[uint32]counted{2: n(195), 3: n(20)})
	do(t, fn, 9)
	expect(map[uint32]counted{2: n(204), 3: n(20)})

	// Unplugged, and another plugged in its place: counts from zero.
	follow(vd(2, snapshot, disk, base))
	do(t, fo, 20)
	expect(map[uint32]counted{2: n(204)})
	follow(vd(2, snapshot, disk, base), vd(4, other))
	do(t, fo, 30)
	expect(map[uint32]counted{2: n(204), 4: n(30)})

	// The domain is gone, then back as another.
	if err := h.Follow(nil); err != nil {
		t.Fatal(err)
	}
	do(t, fd, 10)
	expect(map[uint32]counted{})
	if err := h.Follow([]collectors.Target{self(5, vd(6, disk))}); err != nil {
		t.Fatal(err)
	}
	do(t, fd, 11)
	expect(map[uint32]counted{6: n(11)})
	if s := h.Stats(); s.Orphans == before.Orphans || s.Dropped != before.Dropped {
		t.Errorf("%+v: what was read of files of no disk is not counted as such", s)
	}
}

func TestADeletedImageIsFoundByUse(t *testing.T) {
	for name, tc := range map[string]struct{ disks []collectors.TargetDisk }{
		"by the path that it was opened by": {[]collectors.TargetDisk{vd(2, "/nowhere/a"), vd(3, "PATH")}},
		"as the only one that is missing":   {[]collectors.TargetDisk{vd(3, "/nowhere/PATH")}},
	} {
		t.Run(name, func(t *testing.T) {
			h := open(t)
			path := filepath.Join(t.TempDir(), "disk")
			f := makeImage(t, path, guestImage, true)
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
			for _, d := range tc.disks {
				if d.Sources[0] == "PATH" {
					d.Sources[0] = path
				}
			}
			if err := h.Follow([]collectors.Target{self(1, tc.disks...)}); !errors.Is(err, unix.ENOENT) {
				t.Errorf("got %v, want the paths that lead nowhere", err)
			}
			do(t, f, 1)
			read(t, h)
			check(t, h, do(t, f, 99), read(t, h)[3])
		})
	}
}

func TestAFileThatTwoDomainsShare(t *testing.T) {
	// A process that is none of the two's reads the base too: here, this one.
	h := open(t)
	path := filepath.Join(t.TempDir(), "base")
	f := makeImage(t, path, guestImage, true)
	if err := h.Follow([]collectors.Target{
		{ID: 1, Proc: bpf.Proc{PID: 1}, Disks: []collectors.TargetDisk{vd(2, program, path)}},
		self(3, vd(4, path)),
	}); err != nil {
		t.Fatal(err)
	}
	want := do(t, f, 100)
	got := read(t, h)
	check(t, h, got[4], want)
	if got[2] != (counted{}) {
		t.Errorf("domain 1 did nothing, and has %+v", got[2])
	}
	if err := h.Follow([]collectors.Target{{ID: 1, Proc: bpf.Proc{PID: 1}, Disks: []collectors.TargetDisk{vd(2, program, path)}}}); err != nil {
		t.Fatal(err)
	}
	do(t, f, 100)
	if got := read(t, h); got[2] != (counted{}) {
		t.Errorf("domain 1 did nothing, and has %+v", got[2])
	}
}

func TestAPathThatDoesNotAnswerCostsItselfOnly(t *testing.T) {
	h := open(t)
	path := filepath.Join(t.TempDir(), "disk")
	f := makeImage(t, path, guestImage, true)
	stuck := collectors.Target{ID: 3, Proc: bpf.Proc{PID: 1}, Disks: []collectors.TargetDisk{vd(4, program)}}
	if err := h.Follow([]collectors.Target{stuck}); err != nil {
		t.Fatal(err)
	}
	server := &search{done: make(chan struct{})}
	d := h.domains[3]
	d.search = server
	h.searches = append(h.searches, d)
	if err := h.Follow([]collectors.Target{stuck, self(1, vd(2, path))}); err == nil || !strings.Contains(err.Error(), "takes long") {
		t.Errorf("got %v", err)
	}
	check(t, h, do(t, f, 100), read(t, h)[2])
	start := time.Now()
	read(t, h)
	if took := time.Since(start); took > patience/2 {
		t.Errorf("the next reading waited for it again: %v", took)
	}
	close(server.done)
	read(t, h)
	if d.search != nil || len(h.searches) != 0 {
		t.Error("it is still looked for")
	}
	// A domain that ends while its paths do not answer.
	d.search = &search{done: make(chan struct{}), slow: true}
	h.searches = append(h.searches, d)
	server = d.search
	if err := h.Follow(nil); err != nil {
		t.Error(err)
	}
	close(server.done)
	read(t, h)
	if len(h.searches) != 0 {
		t.Error("it is still looked for")
	}
}

func TestMoreDisksThanFitCostNoOther(t *testing.T) {
	h := open(t)
	before := h.Stats()
	path := filepath.Join(t.TempDir(), "disk")
	f := makeImage(t, path, guestImage, true)
	disks := []collectors.TargetDisk{vd(1, path)}
	for i := range uint32(bpf.MaxDevices) {
		disks = append(disks, vd(2+i, program))
	}
	err := h.Follow([]collectors.Target{self(5000, disks...)})
	if err == nil || !strings.Contains(err.Error(), "room") {
		t.Errorf("got %v", err)
	}
	check(t, h, read(t, h)[1], counted{})
	check(t, h, do(t, f, 100), read(t, h)[1])
	if s := h.Stats(); s.Dropped != before.Dropped+1 || s.Entries != bpf.MaxDevices || s.MaxEntries != bpf.MaxDevices {
		t.Errorf("got %+v", s)
	}
	if err := h.Follow([]collectors.Target{self(5000, disks[:2]...)}); err != nil {
		t.Error(err)
	}
	if s := h.Stats(); s.Entries != 2 {
		t.Errorf("got %+v", s)
	}
}

func TestDetachedNothingIsCounted(t *testing.T) {
	h := open(t)
	path := filepath.Join(t.TempDir(), "disk")
	f := makeImage(t, path, guestImage, true)
	if err := h.Follow([]collectors.Target{self(1, vd(2, path))}); err != nil {
		t.Fatal(err)
	}
	want := do(t, f, 50)
	if err := h.Detach(); err != nil {
		t.Fatal(err)
	}
	do(t, f, 50)
	check(t, h, read(t, h)[2], want)
	if err := h.Attach(); err != nil {
		t.Fatal(err)
	}
	do(t, f, 50)
	check(t, h, read(t, h)[2], counted{Reads: 100, ReadBytes: 100 * 4096})
}

// unprivileged is the environment variable that makes the test below be the
// process of its other half.
const unprivileged = "KVMETER_DISK_UNPRIVILEGED"

func TestCapabilitiesAreNeededToOpenOnly(t *testing.T) {
	if os.Getenv(unprivileged) == "" {
		cmd := exec.Command("/proc/self/exe", "-test.run=^TestCapabilitiesAreNeededToOpenOnly$", "-test.v")
		cmd.Env = append(os.Environ(), unprivileged+"=1")
		cmd.Dir = "/"
		cmd.SysProcAttr = &syscall.SysProcAttr{
			Credential:  &syscall.Credential{Uid: 65534, Gid: 65534},
			AmbientCaps: []uintptr{unix.CAP_BPF, unix.CAP_PERFMON},
		}
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
		return
	}
	h, err := Open(zap.NewNop())
	if err != nil {
		t.Fatal(err)
	}
	runtime.LockOSThread() // the capabilities are this thread's
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var none [2]unix.CapUserData
	if err := unix.Capset(&header, &none[0]); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "disk")
	f := makeImage(t, path, guestImage, true)
	d := vd(2, path)
	d.Direct = false // for io_uring's programs to be attached
	if err := errors.Join(h.Attach(), h.Follow([]collectors.Target{self(1, d)})); err != nil {
		t.Fatal(err)
	}
	want := do(t, f, 100)
	check(t, h, read(t, h)[2], want)
	if err := errors.Join(h.Detach(), h.Attach(), h.Close()); err != nil {
		t.Error(err)
	}
}

func TestReadingAllocatesNothing(t *testing.T) {
	h := open(t)
	path := filepath.Join(t.TempDir(), "disk")
	f := makeImage(t, path, guestImage, true)
	if err := h.Follow([]collectors.Target{self(1, vd(2, path), vd(3, program))}); err != nil {
		t.Fatal(err)
	}
	do(t, f, 50)
	calls := 0
	emit := func(uint32, int, uint64) { calls++ }
	if n := testing.AllocsPerRun(100, func() {
		if err := h.Read(t.Context(), emit); err != nil {
			t.Fatal(err)
		}
	}); n != 0 || calls == 0 {
		t.Errorf("got %v allocations a read and %d numbers", n, calls)
	}
}

func TestAHookThatIsClosedIsGone(t *testing.T) {
	h, err := Open(zap.NewNop())
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "disk")
	f := makeImage(t, path, guestImage, true)
	if err := errors.Join(h.Attach(), h.Attach(), h.Follow([]collectors.Target{self(1, vd(2, path))})); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(h.Close(), h.Close()); err != nil {
		t.Error(err)
	}
	do(t, f, 1)
}

func TestSeriesAreTheCatalogues(t *testing.T) {
	h := open(t)
	tallies := 0
	names := map[string]bool{}
	for _, s := range h.Series() {
		if s.Tally {
			tallies++
		}
		if s.Meter == nil {
			continue
		}
		names[s.Name] = true
		if s.Meter.Parts == "" {
			if diff := cmp.Diff(s.Meter.MeterRef, s.MeterRef); diff != "" {
				t.Error(diff)
			}
		} else if !strings.HasPrefix(s.Name, s.Meter.Name+".") {
			t.Errorf("%s is no member of %s", s.Name, s.Meter.Name)
		}
	}
	if tallies != 1 || len(names) != seriesCount-1 || !names["disk.host.device.write.latency.bucket.36"] || !names[sample.DiskHostDeviceFlushLatency.Name] {
		t.Errorf("%d tallies, %d names: %v", tallies, len(names), names)
	}
}
