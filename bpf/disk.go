package bpf

import (
	"errors"
	"fmt"
	"math/bits"
	"os"
	"runtime"
	"strings"
	"sync/atomic"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/kvmeter/kvmeter/gen"
)

// Bounds of [Disk], those of disk.bpf.c.
const (
	// MaxDevices is how many devices can be followed at a time.
	MaxDevices = 2048
	// LatencyBuckets is the number of a histogram's buckets.
	LatencyBuckets = 28
	// FirstLatencyPower is the power of two at which the second bucket ends
	// and the histogram begins: bucket i holds what took from 2^(9+i) ns, or for
	// the first from nothing, to less than 2^(10+i) ns; the last has no end.
	FirstLatencyPower = 9

	processBits  = 65536
	fileSets     = 4096
	fileWays     = 4
	fileProbes   = 8
	coveredShift = 16
	maxShardBits = 2
)

// BlockDevice is [File.Device] of a block device, which is known by its number.
const BlockDevice = ^uint32(0)

// What a file's requests are counted by, COVERED_* in disk.bpf.c.
const (
	coveredDirect = 1 << iota
	coveredBuffered
	coveredFlushes
)

// Errors of following a file.
var (
	// ErrNoRoom says that the table of followed files has no room for the file.
	ErrNoRoom = errors.New("there is no room to follow another file")
	// ErrNoHook says that the kernel takes none of a hook's programs.
	ErrNoHook = errors.New("the kernel has none of the points that the programs could hook into")
)

// File is an open file as the kernel knows it, whatever it is called.
type File struct {
	Device uint32 // of its file system, as the kernel packs it; or [BlockDevice]
	Inode  uint64 // or the block device's number
}

// FileOf returns the file that stat(2) tells of. On btrfs and overlayfs stat
// tells another device than the kernel uses.
func FileOf(st *unix.Stat_t) File {
	if st.Mode&unix.S_IFMT == unix.S_IFBLK {
		return File{BlockDevice, uint64(deviceNumber(st.Rdev))}
	}
	return File{deviceNumber(st.Dev), st.Ino}
}

// deviceNumber packs a device as the kernel does: dev_t in linux/kdev_t.h.
func deviceNumber(dev uint64) uint32 {
	return unix.Major(dev)<<20 | unix.Minor(dev)
}

// DiskCounts is what has been counted of a device since it was first followed.
// Failed requests are not in it.
type DiskCounts struct {
	Read, Write DirectionCounts
	Flushes     uint64
	FlushNs     uint64 // that they took
	Buffered    uint64 // of the bytes, those that went through the page cache
}

// DirectionCounts counts reads or writes.
type DirectionCounts struct {
	Requests uint64
	Bytes    uint64
	Ns       uint64                 // that they took, from submission to completion
	Latency  [LatencyBuckets]uint64 // how many took how long
}

// DiskStats counts what [Disk] has met.
type DiskStats struct {
	Misses   uint64 // runs that the kernel skipped because a program was running already
	Lost     uint64 // requests not counted because too many were in flight
	Endless  uint64 // requests of which no end was seen
	Files    int    // entries in the table of files
	MaxFiles int    // that it can hold
}

// Stranger is a file that a followed process used and that is not followed.
type Stranger struct {
	PID      int
	File     File
	Requests uint64 // since it was last told of
}

// Disk counts requests of followed processes on followed files as they happen,
// by programs at the points where the kernel takes and completes them. It is
// for one goroutine at a time. See docs/disk.md for what it can see.
type Disk struct {
	maps     *ebpf.Collection
	sets     []*ebpf.Collection
	names    []string // of the sets
	links    []link.Link
	attached bool
	stale    bool // requests may have ended while it was detached

	uring      *ebpf.Collection // attached while a process needs it; nil: not taken
	uringLinks []link.Link

	shared    *mapped[gen.DiskState]
	files     *mapped[gen.DiskFileSet]
	devices   *mapped[gen.DiskDevice]
	processes map[int]bool // those that are followed, true: also in io_uring's tracepoints
	shardBits int
	entries   int // in files

	iomap bool
	ext4  uint32
	xfs   uint32
	block uint32
}

// LoadDisk loads the programs that the kernel takes, attached to nothing. That
// takes CAP_BPF and CAP_PERFMON; what comes after needs neither (before Linux
// 5.19 attaching needs CAP_BPF where kernel.unprivileged_bpf_disabled is set).
func LoadDisk() (*Disk, error) {
	if err := checkPIDNamespace(); err != nil {
		return nil, fmt.Errorf("load disk: %w", err)
	}
	spec, err := gen.LoadDisk()
	if err != nil {
		return nil, fmt.Errorf("load disk: %w", err)
	}
	d := &Disk{processes: map[int]bool{}, shardBits: min(bits.Len(uint(runtime.NumCPU()-1)), maxShardBits)}
	if err := d.load(spec); err != nil {
		d.Close()
		return nil, fmt.Errorf("load disk: %w", err)
	}
	return d, nil
}

func (d *Disk) load(spec *ebpf.CollectionSpec) error {
	spec.Maps[gen.DiskMapDevices].MaxEntries = MaxDevices << d.shardBits
	if err := errors.Join(
		spec.Variables[gen.DiskVarShardBits].Set(uint32(d.shardBits)),
		spec.Variables[gen.DiskVarO_direct].Set(uint32(unix.O_DIRECT)),
	); err != nil {
		return err
	}
	empty := spec.Copy()
	clear(empty.Programs)
	var err error
	if d.maps, err = ebpf.NewCollection(empty); err != nil {
		return explain(err)
	}
	d.maps.Variables = nil // which the library keeps mapped
	d.shared, err = mapMemory[gen.DiskState](d.maps.Maps[".bss"])
	if err == nil {
		d.files, err = mapMemory[gen.DiskFileSet](d.maps.Maps[gen.DiskMapFiles])
	}
	if err == nil {
		d.devices, err = mapMemory[gen.DiskDevice](d.maps.Maps[gen.DiskMapDevices])
	}
	if err != nil {
		return err
	}
	return d.loadPrograms(spec)
}

// loadPrograms loads the sets of programs that the kernel takes. Each request
// is to be counted by one of them: the tracepoints of direct I/O where there
// are, else the functions of the file systems; for block devices, their
// functions; by io_uring's tracepoints what is left.
func (d *Disk) loadPrograms(spec *ebpf.CollectionSpec) error {
	cache := btf.NewCache()
	var refused []error
	load := func(name string, programs ...string) *ebpf.Collection {
		set := spec.Copy()
		clear(set.Programs)
		for _, p := range programs {
			set.Programs[p] = spec.Programs[p].Copy()
		}
		c, err := ebpf.NewCollectionWithOptions(set, ebpf.CollectionOptions{MapReplacements: d.maps.Maps, Cache: cache})
		if err != nil {
			refused = append(refused, fmt.Errorf("%s: %w", name, err))
			return nil
		}
		c.Variables = nil
		d.sets = append(d.sets, c)
		d.names = append(d.names, name)
		return c
	}
	if load("iomap", gen.DiskProgIomapBegin, gen.DiskProgIomapEnd) != nil {
		d.iomap = true
		d.ext4 |= coveredDirect
		d.xfs |= coveredDirect
	}
	if load("ext4 flushes", gen.DiskProgSyncBegin, gen.DiskProgSyncEnd) != nil {
		d.ext4 |= coveredFlushes
	}
	if load("aio", gen.DiskProgAioEnd, gen.DiskProgUringFileEnd) != nil {
		for _, set := range []struct {
			name     string
			kind     *uint32
			covered  uint32
			programs []string
			needed   bool
		}{
			{"block", &d.block, coveredDirect | coveredBuffered, []string{gen.DiskProgBlockReadBegin, gen.DiskProgBlockReadEnd, gen.DiskProgBlockWriteBegin, gen.DiskProgBlockWriteEnd}, true},
			{"block flushes", &d.block, coveredFlushes, []string{gen.DiskProgBlockFlushBegin, gen.DiskProgBlockFlushEnd}, true},
			{"ext4", &d.ext4, coveredDirect | coveredBuffered, []string{gen.DiskProgExt4ReadBegin, gen.DiskProgExt4ReadEnd, gen.DiskProgExt4WriteBegin, gen.DiskProgExt4WriteEnd}, !d.iomap},
			{"xfs", &d.xfs, coveredDirect | coveredBuffered, []string{gen.DiskProgXfsReadBegin, gen.DiskProgXfsReadEnd, gen.DiskProgXfsWriteBegin, gen.DiskProgXfsWriteEnd}, !d.iomap},
			{"xfs flushes", &d.xfs, coveredFlushes, []string{gen.DiskProgXfsFlushBegin, gen.DiskProgXfsFlushEnd}, true},
		} {
			if set.needed && load(set.name, set.programs...) != nil {
				*set.kind |= set.covered
			}
		}
	}
	if d.uring = load("io_uring", gen.DiskProgUringBeginReq, gen.DiskProgUringEnd); d.uring == nil {
		d.uring = load("io_uring", gen.DiskProgUringBeginSqe, gen.DiskProgUringEnd)
	}
	if len(d.sets) > 0 {
		return nil
	}
	for _, err := range refused {
		if !errors.Is(err, ebpf.ErrNotSupported) {
			return explain(err)
		}
	}
	return fmt.Errorf("%w: %w", ErrNoHook, explain(errors.Join(refused...)))
}

// Sources names the sets of programs that the kernel took.
func (d *Disk) Sources() []string {
	return d.names
}

// Attach makes the programs run; those of io_uring's tracepoints only while a
// process that is followed has requests that no other program counts.
func (d *Disk) Attach() error {
	if d.attached {
		return nil
	}
	d.attached = true
	err := d.clearFlights()
	if err != nil {
		return errors.Join(err, d.Detach())
	}
	for _, set := range d.sets {
		if set != d.uring {
			d.links, err = attach(d.links, set)
		}
		if err != nil {
			return errors.Join(err, d.Detach())
		}
	}
	if err := d.attachUring(); err != nil {
		return errors.Join(err, d.Detach())
	}
	return nil
}

// clearFlights forgets what was in flight when the programs were detached: it has
// ended unseen, and what has the same address now is another request.
func (d *Disk) clearFlights() error {
	if !d.stale {
		return nil
	}
	clear(d.shared.of[0].Flights[:])
	busy := d.maps.Maps[gen.DiskMapBusy]
	for i := range busy.MaxEntries() {
		if err := busy.Put(i, uint64(0)); err != nil {
			return fmt.Errorf("forget what was in flight: %w", err)
		}
	}
	d.stale = false
	return nil
}

func attach(links []link.Link, set *ebpf.Collection) ([]link.Link, error) {
	for name, p := range set.Programs {
		l, err := link.AttachTracing(link.TracingOptions{Program: p})
		if err != nil {
			return links, fmt.Errorf("attach %s: %w", name, err)
		}
		links = append(links, l)
	}
	return links, nil
}

func detach(links []link.Link) error {
	var errs []error
	for _, l := range links {
		errs = append(errs, l.Close())
	}
	return errors.Join(errs...)
}

// attachUring attaches or detaches the programs of io_uring's tracepoints.
func (d *Disk) attachUring() (err error) {
	switch {
	case d.uring == nil:
	case !d.attached || !d.uringNeeded():
		err = detach(d.uringLinks)
		d.uringLinks = nil
	case d.uringLinks == nil:
		d.uringLinks, err = attach(nil, d.uring)
	}
	return err
}

// Detach stops the programs. Requests that are in flight are never counted.
func (d *Disk) Detach() error {
	d.stale = d.stale || d.attached
	d.attached = false
	err := errors.Join(detach(d.links), d.attachUring())
	d.links = nil
	return err
}

// Covers reports whether requests on a file are counted without io_uring's
// tracepoints: direct I/O if direct is set, else buffered, and flushes. magic is
// the type of its file system, as statfs(2) tells it.
func (d *Disk) Covers(f File, magic int64, direct bool) bool {
	want := uint32(coveredBuffered | coveredFlushes)
	if direct {
		want = coveredDirect | coveredFlushes
	}
	return d.covered(f, magic)&want == want
}

// FollowProcess makes the programs look at what the process does: without it
// none of its files is followed, with it requests on other files are told of by
// [Disk.Strangers]. uring says that it may have requests that only io_uring's
// tracepoints tell of.
func (d *Disk) FollowProcess(pid int, uring bool) error {
	d.processes[pid] = uring
	return errors.Join(d.writeProcess(pid), d.attachUring())
}

// ForgetProcess undoes FollowProcess.
func (d *Disk) ForgetProcess(pid int) error {
	delete(d.processes, pid)
	return errors.Join(d.writeProcess(pid), d.attachUring())
}

func (d *Disk) uringNeeded() bool {
	for _, uring := range d.processes {
		if uring {
			return true
		}
	}
	return false
}

// writeProcess makes the programs know what processes says of the process, and
// of those that have the same bits.
func (d *Disk) writeProcess(pid int) error {
	for half := range 2 {
		i, word := d.processWord(half, pid)
		if err := d.maps.Maps[gen.DiskMapProcesses].Put(i, word); err != nil {
			return fmt.Errorf("tell the programs of process %d: %w", pid, err)
		}
	}
	return nil
}

// processWord returns the word of the map processes that has the process's bit
// in one half of it.
func (d *Disk) processWord(half, pid int) (index uint32, word uint64) {
	const words = processBits / 64
	i := pid % processBits / 64
	for other, uring := range d.processes {
		if other%processBits/64 == i && (half == 0 || uring) {
			word |= 1 << (other % 64)
		}
	}
	return uint32(half*words + i), word
}

// golden is GOLDEN in disk.bpf.c.
const golden = 0x9e3779b97f4a7c15

// FollowFile counts the process's requests on the file as the device's from
// now on. magic is the type of its file system.
func (d *Disk) FollowFile(pid int, f File, magic int64, device int) error {
	return d.put(gen.DiskFileKey{Ino: f.Inode, Dev: f.Device, Tgid: uint32(pid)}, uint32(device)|d.covered(f, magic)<<coveredShift)
}

// ForgetFile undoes FollowFile.
func (d *Disk) ForgetFile(pid int, f File) {
	key, _ := d.place(gen.DiskFileKey{Ino: f.Inode, Dev: f.Device, Tgid: uint32(pid)})
	if key != nil {
		atomic.StoreUint32(&key.Tgid, nobody)
		d.entries--
	}
}

func (d *Disk) covered(f File, magic int64) uint32 {
	switch {
	case f.Device == BlockDevice:
		return d.block
	case magic == unix.EXT4_SUPER_MAGIC:
		return d.ext4
	case magic == unix.XFS_SUPER_MAGIC:
		return d.xfs
	case d.iomap && (magic == unix.BTRFS_SUPER_MAGIC || magic == unix.F2FS_SUPER_MAGIC || magic == gfs2Magic):
		return coveredDirect
	}
	return 0
}

// gfs2Magic is GFS2_MAGIC in linux/gfs2_ondisk.h.
const gfs2Magic = 0x01161970

// nobody is the tgid of a file that was taken out: no process has it.
const nobody = ^uint32(0)

// way returns the i-th place where a file may be, and that of its device.
func (d *Disk) way(k gen.DiskFileKey, i int) (*gen.DiskFileKey, *uint32) {
	set := uint32((k.Ino^uint64(k.Tgid)<<32)*golden>>52) + uint32(i/fileWays)
	s := &d.files.of[set%fileSets]
	return &s.Keys[i%fileWays], &s.Devices[i%fileWays]
}

// place returns where a file is, or nil.
func (d *Disk) place(k gen.DiskFileKey) (*gen.DiskFileKey, *uint32) {
	for i := range fileProbes * fileWays {
		if at, device := d.way(k, i); *at == k {
			return at, device
		}
	}
	return nil, nil
}

// put writes a file. The programs may look at any time: it becomes theirs with
// its tgid.
func (d *Disk) put(k gen.DiskFileKey, device uint32) error {
	if _, at := d.place(k); at != nil {
		atomic.StoreUint32(at, device)
		return nil
	}
	for i := range fileProbes * fileWays {
		at, of := d.way(k, i)
		if at.Tgid != 0 && at.Tgid != nobody {
			continue
		}
		atomic.StoreUint64(&at.Ino, k.Ino)
		atomic.StoreUint32(&at.Dev, k.Dev)
		atomic.StoreUint32(of, device)
		atomic.StoreUint32(&at.Tgid, k.Tgid)
		d.entries++
		return nil
	}
	return ErrNoRoom
}

// Read fills c with what was ever counted as the device's.
func (d *Disk) Read(device int, c *DiskCounts) {
	*c = DiskCounts{}
	for i := range 1 << d.shardBits {
		s := &d.devices.of[device<<d.shardBits+i]
		if s.Ns[0] != 0 {
			c.Read.add(s, 0)
		}
		if s.Ns[1] != 0 {
			c.Write.add(s, 1)
		}
		c.Flushes += atomic.LoadUint64(&s.Flushes)
		c.FlushNs += atomic.LoadUint64(&s.FlushNs)
		c.Buffered += atomic.LoadUint64(&s.Buffered)
	}
}

func (c *DirectionCounts) add(s *gen.DiskDevice, direction int) {
	c.Bytes += atomic.LoadUint64(&s.Bytes[direction])
	c.Ns += atomic.LoadUint64(&s.Ns[direction])
	for i := range c.Latency {
		n := atomic.LoadUint64(&s.Latency[direction][i])
		c.Latency[i] += n
		c.Requests += n
	}
}

// Strangers calls yield with the files that followed processes used since the
// last call and that are not followed. There may be more at the next, and some of
// processes that are not followed.
func (d *Disk) Strangers(yield func(Stranger)) {
	for i := range d.shared.of[0].Strangers {
		s := &d.shared.of[0].Strangers[i]
		pid := atomic.LoadUint32(&s.Tgid)
		if pid == 0 {
			continue
		}
		f := Stranger{int(pid), File{s.Dev, s.Ino}, atomic.LoadUint64(&s.Requests)}
		atomic.StoreUint64(&s.Requests, 0)
		atomic.StoreUint32(&s.Tgid, 0)
		yield(f)
	}
}

// Stats returns what was met so far.
func (d *Disk) Stats() DiskStats {
	t := &d.shared.of[0]
	s := DiskStats{
		Lost: atomic.LoadUint64(&t.Lost), Endless: atomic.LoadUint64(&t.Endless),
		Files: d.entries, MaxFiles: fileSets * fileWays,
	}
	for _, set := range d.sets {
		for _, p := range set.Programs {
			if stats, err := p.Stats(); err == nil {
				s.Misses += stats.RecursionMisses
			}
		}
	}
	return s
}

// Close detaches and unloads the programs.
func (d *Disk) Close() error {
	err := d.Detach()
	for _, set := range d.sets {
		set.Close()
	}
	for _, m := range []interface{ unmap() error }{d.shared, d.files, d.devices} {
		err = errors.Join(err, m.unmap())
	}
	if d.maps != nil {
		d.maps.Close()
	}
	return err
}

// mapped is the memory of an array map, shared with the programs.
type mapped[T any] struct {
	of  []T
	raw []byte
}

func mapMemory[T any](m *ebpf.Map) (*mapped[T], error) {
	var t T
	if int(m.ValueSize()) < int(unsafe.Sizeof(t)) {
		return nil, fmt.Errorf("map the memory of %s: its values have %d bytes, not %d", m, m.ValueSize(), unsafe.Sizeof(t))
	}
	size := int(m.MaxEntries()) * int(m.ValueSize())
	page := os.Getpagesize()
	raw, err := unix.Mmap(m.FD(), 0, (size+page-1)/page*page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map the memory of %s: %w", strings.TrimSpace(m.String()), err)
	}
	return &mapped[T]{of: unsafe.Slice((*T)(unsafe.Pointer(&raw[0])), m.MaxEntries()), raw: raw}, nil
}

func (m *mapped[T]) unmap() error {
	if m == nil || m.raw == nil {
		return nil
	}
	raw := m.raw
	m.raw, m.of = nil, nil
	return unix.Munmap(raw)
}
