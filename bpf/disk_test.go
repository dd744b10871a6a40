package bpf

import (
	"errors"
	"math/rand/v2"
	"testing"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/kvmeter/kvmeter/gen"
)

// TestDiskInGoAndCAgree reads the types of the compiled programs.
func TestDiskInGoAndCAgree(t *testing.T) {
	spec, err := gen.LoadDisk()
	if err != nil {
		t.Fatal(err)
	}
	files, devices, shared := spec.Maps[gen.DiskMapFiles], spec.Maps[gen.DiskMapDevices], spec.Maps[".bss"]
	for name, got := range map[string][2]int{
		"sets of files":        {int(files.MaxEntries), fileSets},
		"files in a set":       {len(gen.DiskFileSet{}.Keys), fileWays},
		"devices":              {int(devices.MaxEntries), MaxDevices},
		"buckets":              {len(gen.DiskDevice{}.Latency[0]), LatencyBuckets},
		"bits of processes":    {64 * int(spec.Maps[gen.DiskMapProcesses].MaxEntries), 2 * processBits},
		"bytes of a set":       {int(files.ValueSize), int(unsafe.Sizeof(gen.DiskFileSet{}))},
		"bytes of a device":    {int(devices.ValueSize), int(unsafe.Sizeof(gen.DiskDevice{}))},
		"bytes that is shared": {int(shared.ValueSize), int(unsafe.Sizeof(gen.DiskState{}))},
	} {
		if got[0] != got[1] {
			t.Errorf("%s: %d in C, %d in Go", name, got[0], got[1])
		}
	}
	for _, m := range []*ebpf.MapSpec{files, devices} {
		if m.Flags&unix.BPF_F_MMAPABLE == 0 {
			t.Errorf("%s can't be mapped", m.Name)
		}
	}
}

// inMemory is a Disk whose maps no program sees.
func inMemory() *Disk {
	return &Disk{
		processes: map[int]bool{},
		files:     &mapped[gen.DiskFileSet]{of: make([]gen.DiskFileSet, fileSets)},
		devices:   &mapped[gen.DiskDevice]{of: make([]gen.DiskDevice, MaxDevices)},
		shared:    &mapped[gen.DiskState]{of: make([]gen.DiskState, 1)},
	}
}

func TestFilesAreFoundWhereverTheyAre(t *testing.T) {
	d := inMemory()
	type owner struct {
		pid  int
		file File
	}
	want := map[owner]int{}
	check := func() {
		t.Helper()
		for o, device := range want {
			_, at := d.place(gen.DiskFileKey{Ino: o.file.Inode, Dev: o.file.Device, Tgid: uint32(o.pid)})
			if at == nil || int(*at)&0xffff != device {
				t.Fatalf("%+v is lost", o)
			}
		}
		if s := d.Stats(); s.Files != len(want) || s.MaxFiles != fileSets*fileWays {
			t.Fatalf("%+v, want %d files", s, len(want))
		}
	}
	// What the largest host has, plugged in and out all the time.
	for i := range 40000 {
		o := owner{1 + i%500, File{0xfe00001, uint64(rand.IntN(1 << 20))}}
		if err := d.FollowFile(o.pid, o.file, unix.EXT4_SUPER_MAGIC, i%MaxDevices); err != nil {
			t.Fatalf("with %d files: %v", len(want), err)
		}
		want[o] = i % MaxDevices
		if len(want) > 4000 {
			for o := range want {
				d.ForgetFile(o.pid, o.file)
				d.ForgetFile(o.pid, o.file)
				delete(want, o)
				break
			}
		}
	}
	check()
	// A second time in another place.
	for o := range want {
		if err := d.FollowFile(o.pid, o.file, 0, 7); err != nil {
			t.Fatal(err)
		}
		want[o] = 7
	}
	check()
}

func TestATableThatIsFullSaysSo(t *testing.T) {
	d := inMemory()
	f := File{1, 1}
	// One inode number on ever more file systems is always in the same sets.
	for f.Device = 1; f.Device <= fileProbes*fileWays; f.Device++ {
		if err := d.FollowFile(1, f, 0, 0); err != nil {
			t.Fatal(err)
		}
	}
	if err := d.FollowFile(1, f, 0, 0); !errors.Is(err, ErrNoRoom) {
		t.Errorf("got %v", err)
	}
	d.ForgetFile(1, File{3, 1})
	if err := d.FollowFile(1, f, 0, 0); err != nil {
		t.Errorf("where one was taken out: %v", err)
	}
}

func TestProcessesThatShareAWord(t *testing.T) {
	const bit, next = 1 << 7, 1 << 8
	for name, tc := range map[string]struct {
		processes map[int]bool
		want      [2]uint64
	}{
		"nobody":                      {nil, [2]uint64{}},
		"one":                         {map[int]bool{7: false}, [2]uint64{bit, 0}},
		"one by io_uring":             {map[int]bool{7: true}, [2]uint64{bit, bit}},
		"two that share a bit":        {map[int]bool{7: false, 7 + processBits: true}, [2]uint64{bit, bit}},
		"two that share a word":       {map[int]bool{7: false, 8: true}, [2]uint64{bit | next, next}},
		"another that shares nothing": {map[int]bool{7 + 64: true, 7 + processBits: false}, [2]uint64{bit, 0}},
	} {
		t.Run(name, func(t *testing.T) {
			d := inMemory()
			d.processes = tc.processes
			for half, want := range tc.want {
				for _, pid := range []int{7, 7 + processBits, 8 + 3*processBits} {
					i, word := d.processWord(half, pid)
					if i != uint32(half*processBits/64) || word != want {
						t.Errorf("half %d: word %d is %x, want %x", half, i, word, want)
					}
				}
			}
		})
	}
}

func TestFileOfABlockDeviceIsItsNumber(t *testing.T) {
	st := unix.Stat_t{Mode: unix.S_IFBLK | 0o600, Rdev: unix.Mkdev(253, 300), Dev: unix.Mkdev(0, 5), Ino: 77}
	if got, want := FileOf(&st), (File{BlockDevice, 253<<20 | 300}); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
	st.Mode = unix.S_IFREG
	st.Dev = unix.Mkdev(259, 1000000)
	if got, want := FileOf(&st), (File{259<<20 | 1000000, 77}); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
}
