// Package disk counts what domains do to the files and block devices that are
// their disks on the host, request by request.
package disk

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"time"

	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/bpf"
	"github.com/kvmeter/kvmeter/collectors"
	"github.com/kvmeter/kvmeter/sample"
)

// Indexes into the series.
const (
	iReadRequests = iota
	iReadBytes
	iReadLatency
	iWriteRequests
	iWriteBytes
	iWriteLatency
	iFlushRequests
	iFlushLatency
	iDirect
	iReadBuckets
	iWriteBuckets = iReadBuckets + bpf.LatencyBuckets
	seriesCount   = iWriteBuckets + bpf.LatencyBuckets
)

// maxMet bounds how many files that are not of its disks are remembered of a
// domain.
const maxMet = 64

// Hook is the hook disk: see [collectors.Hook]. To find the files of a domain in
// the mount namespace of its QEMU it needs CAP_SYS_PTRACE; without, it finds
// those that have the same path in its own.
type Hook struct {
	programs *bpf.Disk
	series   []collectors.Series
	domains  map[uint32]*domain
	byPID    map[int]*domain
	disks    []*disk // in the order of the targets
	free     []int   // devices, the one that was freed first first
	follows  uint64
	noRoom   uint64
	strange  uint64 // requests on files of no disk
	meet     func(bpf.Stranger)
	counts   bpf.DiskCounts
	searches []*domain // whose files are being looked for
}

// patience is how long Follow and Read wait for a search that they began. One that
// takes longer is taken over at a later call.
const patience = 100 * time.Millisecond

// domain is a target that is followed.
type domain struct {
	pid     int
	disks   []*disk
	files   map[bpf.File]image
	adopted map[bpf.File]image // those of files that no path leads to
	met     map[bpf.File]*meeting
	follows uint64 // number of the last call of Follow that had it
	search  *search
	again   bool // the disks have changed since the search began
}

// image is a file that is followed.
type image struct {
	disk  *disk
	magic int64 // type of its file system
}

// meeting is what is known of a file that is followed for no disk.
type meeting struct {
	requests uint64
	next     uint64 // number of requests at which to look again whose it is
}

type disk struct {
	collectors.TargetDisk
	device int // of the programs
	base   bpf.DiskCounts
	lost   bool // its image was not found
}

// Open loads the programs that the kernel takes. That takes CAP_BPF and
// CAP_PERFMON.
func Open(log *zap.Logger) (*Hook, error) {
	programs, err := bpf.LoadDisk()
	if err != nil {
		return nil, err
	}
	log.Info("disk requests can be counted", zap.Strings("at", programs.Sources()))
	h := &Hook{programs: programs, series: series(), domains: map[uint32]*domain{}, byPID: map[int]*domain{}}
	h.meet = h.meetStranger
	for i := range bpf.MaxDevices {
		h.free = append(h.free, i)
	}
	return h, nil
}

// requestCost is what beginning and end of a request take, about.
const requestCost = 250 * time.Nanosecond

func series() []collectors.Series {
	all := make([]collectors.Series, seriesCount)
	for i, m := range map[int]*sample.Meter{
		iReadRequests: sample.DiskHostDeviceReadRequests, iReadBytes: sample.DiskHostDeviceReadBytes, iReadLatency: sample.DiskHostDeviceReadLatency,
		iWriteRequests: sample.DiskHostDeviceWriteRequests, iWriteBytes: sample.DiskHostDeviceWriteBytes, iWriteLatency: sample.DiskHostDeviceWriteLatency,
		iFlushRequests: sample.DiskHostDeviceFlushRequests, iFlushLatency: sample.DiskHostDeviceFlushLatency,
	} {
		all[i] = collectors.Series{MeterRef: m.MeterRef, Meter: m}
	}
	for _, i := range []int{iReadRequests, iWriteRequests, iFlushRequests} {
		all[i].Cost = requestCost
	}
	// What the kernel accounts to the process is of direct I/O the same number
	// of bytes.
	all[iDirect] = collectors.Series{Tally: true}
	for i := range bpf.LatencyBuckets {
		power := strconv.Itoa(bpf.FirstLatencyPower + i)
		for first, m := range map[int]*sample.Meter{iReadBuckets: sample.DiskHostDeviceReadBuckets, iWriteBuckets: sample.DiskHostDeviceWriteBuckets} {
			all[first+i] = collectors.Series{MeterRef: m.Part(power), Meter: m}
		}
	}
	return all
}

// Name returns disk.
func (h *Hook) Name() string { return "disk" }

// Origin returns [sample.Iomap].
func (h *Hook) Origin() sample.Origin { return sample.Iomap }

// Series lists what it counts.
func (h *Hook) Series() []collectors.Series { return h.series }

// Sources names the places in the kernel that it could hook into.
func (h *Hook) Sources() []string { return h.programs.Sources() }

// Attach makes the programs run.
func (h *Hook) Attach() error { return h.programs.Attach() }

// Detach stops them.
func (h *Hook) Detach() error { return h.programs.Detach() }

// Close detaches and unloads the programs.
func (h *Hook) Close() error { return h.programs.Close() }

// Follow takes over which domains and disks there are. It looks at the images
// of those that are new, that have changed, or whose images it could not find.
func (h *Hook) Follow(targets []collectors.Target) error {
	var errs []error
	h.follows++
	clear(h.byPID)
	h.disks = h.disks[:0]
	for i := range targets {
		t := &targets[i]
		d := h.domains[t.ID]
		if d == nil {
			d = &domain{pid: t.Proc.PID, files: map[bpf.File]image{}, adopted: map[bpf.File]image{}, met: map[bpf.File]*meeting{}}
			h.domains[t.ID] = d
		}
		d.follows = h.follows
		h.byPID[d.pid] = d
	}
	for id, d := range h.domains {
		if d.follows != h.follows {
			errs = append(errs, h.forget(d))
			delete(h.domains, id)
		}
	}
	for i := range targets {
		d := h.domains[targets[i].ID]
		if err := h.followDomain(d, targets[i].Disks); err != nil {
			errs = append(errs, fmt.Errorf("domain of process %d: %w", d.pid, err))
		}
		h.disks = append(h.disks, d.disks...)
	}
	return errors.Join(append(errs, h.await())...)
}

func (h *Hook) followDomain(d *domain, targets []collectors.TargetDisk) error {
	var errs []error
	same := true // nothing to be looked for
	old := d.disks
	d.disks = make([]*disk, 0, len(targets))
	for _, t := range targets {
		if len(t.Sources) == 0 {
			continue
		}
		i := slices.IndexFunc(old, func(k *disk) bool { return k != nil && k.ID == t.ID })
		if i >= 0 {
			k := old[i]
			old[i] = nil
			same = same && !k.lost && slices.Equal(k.Sources, t.Sources)
			k.TargetDisk = t
			d.disks = append(d.disks, k)
			continue
		}
		same = false
		if len(h.free) == 0 {
			h.noRoom++
			errs = append(errs, fmt.Errorf("disk %s: %d disks are followed, and there is no room for more", t.Device, bpf.MaxDevices))
			continue
		}
		k := &disk{TargetDisk: t, device: h.free[0]}
		h.free = h.free[1:]
		h.programs.Read(k.device, &k.base)
		d.disks = append(d.disks, k)
	}
	for _, k := range old {
		if k != nil {
			same = false
			h.release(d, k)
		}
	}
	maps.DeleteFunc(d.adopted, func(_ bpf.File, i image) bool { return !slices.Contains(d.disks, i.disk) })
	if same {
		return nil
	}
	if len(d.disks) == 0 {
		return errors.Join(append(errs, h.forgetFiles(d))...)
	}
	h.look(d, nil)
	return errors.Join(errs...)
}

// release gives the device of a disk back. What is still in flight is counted
// there; the device is used again last.
func (h *Hook) release(d *domain, k *disk) {
	for f, i := range d.files {
		if i.disk == k {
			h.programs.ForgetFile(d.pid, f)
			delete(d.files, f)
		}
	}
	h.free = append(h.free, k.device)
}

func (h *Hook) forget(d *domain) error {
	for _, k := range d.disks {
		h.release(d, k)
	}
	return h.forgetFiles(d)
}

func (h *Hook) forgetFiles(d *domain) error {
	for f := range d.files {
		h.programs.ForgetFile(d.pid, f)
	}
	clear(d.files)
	return h.programs.ForgetProcess(d.pid)
}

// watch makes the programs look at what the domain's process does.
func (h *Hook) watch(d *domain) error {
	uring := slices.ContainsFunc(d.disks, func(k *disk) bool { return k.lost })
	for f, i := range d.files {
		uring = uring || !h.programs.Covers(f, i.magic, i.disk.Direct)
	}
	return h.programs.FollowProcess(d.pid, uring)
}

// look begins to look for the files of the domain's disks, and for whose the
// stranger is if there is one. A search that goes on is begun anew when it ends.
func (h *Hook) look(d *domain, stranger *bpf.File) {
	if d.search != nil {
		d.again = true
		return
	}
	d.search, d.again = beginSearch(d.pid, d.disks, stranger), false
	h.searches = append(h.searches, d)
}

// await waits for the searches, for all of them no longer than patience, and
// takes over those that have ended.
func (h *Hook) await() error {
	var errs []error
	enough := time.After(patience)
	for _, d := range h.searches {
		if d.search.slow {
			continue
		}
		select {
		case <-d.search.done:
		case <-enough:
			enough = closed
			select {
			case <-d.search.done:
				continue
			default:
			}
			d.search.slow = true
			errs = append(errs, fmt.Errorf("domain of process %d: looking for the files of its disks takes long (a server that does not answer?)", d.pid))
		}
	}
	return errors.Join(append(errs, h.settle())...)
}

// closed is a time that has come.
var closed = func() <-chan time.Time {
	c := make(chan time.Time)
	close(c)
	return c
}()

// settle takes over the searches that have ended.
func (h *Hook) settle() error {
	var errs []error
	going := h.searches[:0]
	for _, d := range h.searches {
		select {
		case <-d.search.done:
		default:
			going = append(going, d)
			continue
		}
		s := d.search
		d.search = nil
		switch {
		case d.follows != h.follows: // it is gone
		case d.again:
			d.search, d.again = beginSearch(d.pid, d.disks, nil), false
			going = append(going, d)
		default:
			if err := h.takeOver(d, s); err != nil {
				errs = append(errs, fmt.Errorf("domain of process %d: %w", d.pid, err))
			}
		}
	}
	clear(h.searches[len(going):])
	h.searches = going
	return errors.Join(errs...)
}

// takeOver follows the files that were found, no others. A file that is in two
// disks counts for the one whose image it is, or for the first whose chain it is
// in. Its error says which paths lead nowhere.
func (h *Hook) takeOver(d *domain, s *search) error {
	var errs []error
	files := map[bpf.File]image{}
	for _, p := range s.places {
		if p.image {
			p.disk.lost = p.err != nil
		}
		if p.err != nil {
			errs = append(errs, fmt.Errorf("disk %s: %w", p.disk.Device, p.err))
		} else if _, ok := files[p.file]; !ok {
			files[p.file] = image{p.disk, p.magic}
		}
	}
	for f, i := range d.adopted {
		if _, ok := files[f]; ok {
			delete(d.adopted, f)
			continue
		}
		files[f] = i
	}
	if s.stranger != nil {
		if _, ok := files[*s.stranger]; !ok {
			if k, magic := d.owner(s, files); k != nil {
				files[*s.stranger] = image{k, magic}
				d.adopted[*s.stranger] = image{k, magic}
			}
		}
	}
	for f, i := range files {
		delete(d.met, f)
		if d.files[f] == i {
			continue
		}
		if err := h.programs.FollowFile(d.pid, f, i.magic, i.disk.device); err != nil {
			h.noRoom++
			errs = append(errs, fmt.Errorf("disk %s: %w", i.disk.Device, err))
			delete(files, f)
		}
	}
	for f := range d.files {
		if _, ok := files[f]; !ok {
			h.programs.ForgetFile(d.pid, f)
		}
	}
	d.files = files
	return errors.Join(append(errs, h.watch(d))...)
}

// meetStranger looks whose a file is that a domain used and that is followed
// for none of its disks: a snapshot or a mirror that libvirt has not told of yet,
// an image that was replaced or deleted. It looks again whenever the domain has
// used the file twice as often.
func (h *Hook) meetStranger(s bpf.Stranger) {
	d := h.byPID[s.PID]
	if d == nil {
		return
	}
	if _, ok := d.files[s.File]; ok {
		return // it was followed since
	}
	h.strange += s.Requests
	m := d.met[s.File]
	if m == nil {
		if len(d.met) >= maxMet {
			clear(d.met)
		}
		m = &meeting{}
		d.met[s.File] = m
	}
	m.requests += s.Requests
	if m.requests < m.next || d.search != nil {
		return
	}
	m.next = max(2*m.requests, 1)
	h.look(d, &s.File)
}

// owner returns the disk that the stranger belongs to, to which no path leads,
// and the type of its file system; nil: nobody knows.
func (d *domain) owner(s *search, files map[bpf.File]image) (*disk, int64) {
	magic := s.folders[s.stranger.Device]
	for f, i := range files {
		// Where stat tells another device than the kernel uses.
		if f.Inode == s.stranger.Inode && i.magic == btrfsMagic {
			return i.disk, i.magic
		}
		if f.Device == s.stranger.Device {
			magic = i.magic
		}
	}
	for _, k := range d.disks {
		if slices.Contains(k.Sources, s.opened) {
			return k, magic
		}
	}
	// The image of the only disk whose image was not found, as one that was
	// deleted.
	var only *disk
	for _, k := range d.disks {
		if !k.lost {
			continue
		}
		if only != nil {
			return nil, 0
		}
		only = k
	}
	for _, i := range d.adopted {
		if i.disk == only {
			return nil, 0
		}
	}
	return only, magic
}

// Read tells what was counted of each disk since it was first followed: of its
// reads, its writes and its flushes each once there was one, so that nothing is
// told of what the programs cannot see.
func (h *Hook) Read(ctx context.Context, emit func(id uint32, series int, count uint64)) error {
	h.programs.Strangers(h.meet)
	if len(h.searches) > 0 {
		_ = h.await() // Follow has told what is not found, and of what is slow the figures lack
	}
	for _, k := range h.disks {
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("read disks: %w", err)
		}
		h.programs.Read(k.device, &h.counts)
		k.tell(&h.counts, emit)
	}
	return nil
}

func (k *disk) tell(c *bpf.DiskCounts, emit func(id uint32, series int, count uint64)) {
	tell := func(first, buckets int, c, base *bpf.DirectionCounts) {
		if c.Requests == base.Requests {
			return
		}
		emit(k.ID, first, c.Requests-base.Requests)
		emit(k.ID, first+1, c.Bytes-base.Bytes)
		emit(k.ID, first+2, c.Ns-base.Ns)
		for i, n := range c.Latency {
			if n != base.Latency[i] {
				emit(k.ID, buckets+i, n-base.Latency[i])
			}
		}
	}
	tell(iReadRequests, iReadBuckets, &c.Read, &k.base.Read)
	tell(iWriteRequests, iWriteBuckets, &c.Write, &k.base.Write)
	if c.Flushes != k.base.Flushes {
		emit(k.ID, iFlushRequests, c.Flushes-k.base.Flushes)
		emit(k.ID, iFlushLatency, c.FlushNs-k.base.FlushNs)
	}
	direct := c.Read.Bytes + c.Write.Bytes - c.Buffered
	emit(k.ID, iDirect, direct-(k.base.Read.Bytes+k.base.Write.Bytes-k.base.Buffered))
}

// Stats counts what the hook has met.
func (h *Hook) Stats() collectors.HookStats {
	s := h.programs.Stats()
	stats := collectors.HookStats{
		Misses: s.Misses, Dropped: s.Lost + h.noRoom, Orphans: s.Endless + h.strange,
		Entries: bpf.MaxDevices - len(h.free), MaxEntries: bpf.MaxDevices,
	}
	if s.Files*stats.MaxEntries > stats.Entries*s.MaxFiles {
		stats.Entries, stats.MaxEntries = s.Files, s.MaxFiles
	}
	return stats
}
