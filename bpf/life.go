package bpf

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/ringbuf"
	"golang.org/x/sys/unix"

	"github.com/kvmeter/kvmeter/gen"
)

// OriginFree is the name under which samples tell that the hook at the end of a
// process counted them.
const OriginFree = "free"

// lifeLayout is the version of what is pinned: of the maps and what their
// fields mean. A program that only counts better keeps it.
const lifeLayout = "v1"

// The values of enum kind and enum drop in life.bpf.c.
const (
	kindExec     = 1
	kindEnd      = 2
	kindReplaced = 3

	dropFollow = 0
	dropExec   = 1
	dropEnd    = 2
	dropHold   = 3
	drops      = 4
)

// Errors of what is asked of [Life].
var (
	// ErrNotFollowed says that the end of the process was not and will not be seen.
	ErrNotFollowed = errors.New("process is not followed")
	// ErrAlive says that the process has not ended.
	ErrAlive = errors.New("process has not ended")
	// ErrWoken says that [Life.Wake] was called.
	ErrWoken = errors.New("woken")
	// ErrFull says that no more processes can be followed.
	ErrFull = errors.New("as many processes are followed as there is room for")
)

// LifeOptions choose how [OpenLife] loads.
type LifeOptions struct {
	// Pins is a folder on a BPF file system (bpffs) that keeps maps and hooks
	// while no agent runs. Empty: nothing is kept.
	Pins string
	// Processes is how many can be followed at once; 0 stands for 4096.
	Processes int
	// EventBytes is the room for events that nobody has read, a power of two; 0
	// stands for 1 MiB. An exec takes a little more than 4 KiB, an end 0.5 KiB.
	EventBytes int
}

// Life follows processes from their exec to the end of their last thread, by two
// hooks that run at each exec and when each thread of the host is freed. [Life.Next]
// is for one goroutine at a time, everything else for any.
type Life struct {
	lives, tasks, events, drops *ebpf.Map     // tasks: nil before Linux 6.2
	exec, exit, free            *ebpf.Program // run as things happen
	hold, read                  *ebpf.Program // run when asked; nil before Linux 6.2
	coll                        *ebpf.Collection

	asking sync.Mutex // guards the next two
	asked  gen.LifeAsk
	attr   progRunAttr

	links   []link.Link
	ring    *ringbuf.Reader
	rec     ringbuf.Record
	dropped *ebpf.Memory
	pins    *os.File // the folder, locked; nil: nothing is pinned
	unkept  error
}

// Lived is what a process has used in all. The times of classes hold the threads
// that were freed since it was followed.
type Lived struct {
	Proc Proc
	// Ended is when it had ended, on CLOCK_BOOTTIME: when that was told or asked
	// after it had been waited for.
	Ended time.Duration
	// Process is the CPU time in ns that its CPU clock came to, threads that had
	// exited included: what wait4 reports.
	Process uint64
	// Run, Wait and Switches are its threads' time on a CPU and runnable off
	// CPU, in ns, and how often they got a CPU. A thread may go on for some µs
	// after its process's clock has ended, which Run has and Process has not;
	// threads whose end comes late are missing until they come: [Lived.Whole]. Of
	// a thread whose end the kernel skipped, the last moments may be missing.
	Run, Wait, Switches [Classes]uint64
	// ReadBytes and WriteBytes are what the process, all threads, caused to be
	// read from and written to block devices. Absent without HasIO.
	ReadBytes, WriteBytes uint64
	// CancelledWriteBytes is the part of WriteBytes that never reached a device.
	CancelledWriteBytes uint64
	// Threads is how many were freed since the process was followed.
	Threads        uint32
	HasWait, HasIO bool
}

// Whole says whether the threads that were seen account for the whole process.
// It stays false for one whose threads exited before it was followed.
func (l *Lived) Whole() bool {
	var sum uint64
	for _, ns := range l.Run {
		sum += ns
	}
	return sum >= l.Process
}

// LifeEvent is one that [Life.Next] returns.
type LifeEvent struct {
	Proc Proc
	// Lived is set where a process ends or has ended. If Replaced it is all there
	// is; else ask [Life.Lived] until it tells.
	Lived *Lived
	// Replaced says that the PID was given to another process before what the
	// one that had it used was read and forgotten. It comes a second time where
	// Ended was 0 the first time, with the totals and without threads; so it may
	// for processes that were never followed.
	Replaced bool
	// Args is the command line at an exec, each argument ended by a NUL, and
	// valid until the next call. It is cut off after 4 KiB.
	Args []byte
	// Cut says that Args is not all of the command line.
	Cut bool
	// At is when the event was, on CLOCK_MONOTONIC. Of an exec only.
	At time.Duration
}

// LifeStats counts what was met by the hooks since they were made, which
// pinned ones were before this agent.
type LifeStats struct {
	NotFollowed uint64 // execs of which the process could not be followed: no room
	ExecsLost   uint64 // execs of which the command line could not be kept: no room
	EndsLost    uint64 // wake-ups at an end that were lost, and ends of processes whose PID was given again: no room
	NotHeld     uint64 // processes that are accounted only if no hook at their end is skipped
	Misses      uint64 // runs of the hooks that the kernel skipped
	Followed    int    // processes that are followed, or ended and not forgotten
	Room        int    // for processes
}

// OpenLife loads the hooks and makes them run, or finds those that an agent
// before this one has pinned. Where nothing can be pinned they run for as
// long as the process: see [Life.Unkept]. That takes CAP_BPF and CAP_PERFMON and the right to write
// to the folder; what is done afterwards needs none of them (before Linux 5.19
// it needs CAP_BPF where kernel.unprivileged_bpf_disabled is set). The error
// says what is missing, as that of [LoadWalk].
func OpenLife(opts LifeOptions) (*Life, error) {
	if err := checkPIDNamespace(); err != nil {
		return nil, fmt.Errorf("load life: %w", err)
	}
	l := &Life{}
	if err := l.open(opts); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

// CheckLife returns why the hooks that account domains at their end cannot be
// loaded on this host, by this user. It attaches nothing and leaves nothing.
func CheckLife() error {
	if err := checkPIDNamespace(); err != nil {
		return fmt.Errorf("load life: %w", err)
	}
	l := &Life{}
	err := l.load(LifeOptions{}, true)
	if errors.Is(err, ebpf.ErrNotSupported) {
		err = l.load(LifeOptions{}, false)
	}
	if err != nil {
		err = fmt.Errorf("load life: %w", explain(err))
	}
	return errors.Join(err, l.Close())
}

func (l *Life) open(opts LifeOptions) error {
	l.unkept = errors.New("no folder to pin in is set")
	if opts.Pins != "" {
		l.pins, l.unkept = lockPins(opts.Pins)
	}
	err := l.load(opts, true)
	if errors.Is(err, ebpf.ErrNotSupported) {
		err = l.load(opts, false)
	}
	if err != nil {
		return fmt.Errorf("load life: %w", explain(err))
	}
	for name, program := range map[string]**ebpf.Program{"exec": &l.exec, "exit": &l.exit, "free": &l.free} {
		if err := l.attach(name, program); err != nil {
			return fmt.Errorf("attach life's hook at %s: %w", name, explain(err))
		}
	}
	if l.ring, err = ringbuf.NewReader(l.events); err != nil {
		return fmt.Errorf("read life's events: %w", err)
	}
	if l.dropped, err = l.drops.Memory(); err != nil {
		return fmt.Errorf("map the memory of life: %w", err)
	}
	return nil
}

// load loads programs and maps, those maps that are pinned excepted. With hold
// the programs keep the tasks of processes.
func (l *Life) load(opts LifeOptions, hold bool) error {
	spec, err := gen.LoadLife()
	if err != nil {
		return err
	}
	exec := gen.LifeProgLifeExecHold
	if hold {
		delete(spec.Programs, gen.LifeProgLifeExec)
	} else {
		exec = gen.LifeProgLifeExec
		for _, name := range []string{gen.LifeProgLifeExecHold, gen.LifeProgLifeHold, gen.LifeProgLifeRead} {
			delete(spec.Programs, name)
		}
		delete(spec.Maps, gen.LifeMapTasks)
	}
	if opts.Processes > 0 {
		for _, name := range []string{gen.LifeMapLives, gen.LifeMapTasks} {
			if m := spec.Maps[name]; m != nil {
				m.MaxEntries = uint32(opts.Processes)
			}
		}
	}
	if opts.EventBytes > 0 {
		spec.Maps[gen.LifeMapEvents].MaxEntries = uint32(opts.EventBytes)
	}
	var how ebpf.CollectionOptions
	if l.pins != nil {
		how.Maps.PinPath = l.pins.Name()
		for name, m := range spec.Maps {
			if !strings.HasPrefix(name, ".") {
				m.Pinning = ebpf.PinByName
			}
		}
	}
	l.coll, err = ebpf.NewCollectionWithOptions(spec, how)
	if errors.Is(err, ebpf.ErrMapIncompatible) {
		// Another layout under this version's name: what it held can't be read.
		if err = removePins(l.pins.Name()); err == nil {
			l.coll, err = ebpf.NewCollectionWithOptions(spec, how)
		}
	}
	if err != nil {
		return err
	}
	m, p := l.coll.Maps, l.coll.Programs
	l.lives, l.tasks, l.events, l.drops = m[gen.LifeMapLives], m[gen.LifeMapTasks], m[gen.LifeMapEvents], m[gen.LifeMapDrops]
	l.exec, l.exit, l.free = p[exec], p[gen.LifeProgLifeExit], p[gen.LifeProgLifeFree]
	l.hold, l.read = p[gen.LifeProgLifeHold], p[gen.LifeProgLifeRead]
	return nil
}

// attach makes the program run. Where a pinned one does the same already, it
// stands for ours.
func (l *Life) attach(name string, program **ebpf.Program) error {
	if l.pins == nil {
		made, err := link.AttachTracing(link.TracingOptions{Program: *program})
		if err == nil {
			l.links = append(l.links, made)
		}
		return err
	}
	path := filepath.Join(l.pins.Name(), name)
	oldProgram, err := ebpf.LoadPinnedProgram(path+"_program", nil)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("find the pinned program: %w", err)
	}
	old, err := link.LoadPinnedLink(path, nil)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return errors.Join(fmt.Errorf("find the pinned hook: %w", err), oldProgram.Close())
	}
	if old != nil && oldProgram != nil && same(old, oldProgram, *program) {
		l.links = append(l.links, old)
		*program = oldProgram // ours stays in the collection
		return nil
	}
	// Never both at once: each would count.
	err = oldProgram.Close()
	if old != nil {
		err = errors.Join(err, old.Close())
	}
	for _, stale := range []string{path, path + "_program"} {
		if e := os.Remove(stale); !errors.Is(e, os.ErrNotExist) {
			err = errors.Join(err, e)
		}
	}
	if err != nil {
		return fmt.Errorf("end the hook of another version: %w", err)
	}
	made, err := link.AttachTracing(link.TracingOptions{Program: *program})
	if err != nil {
		return err
	}
	l.links = append(l.links, made)
	if err := errors.Join((*program).Pin(path+"_program"), made.Pin(path)); err != nil {
		l.unkept = fmt.Errorf("pin the hook at %s: %w", name, err)
	}
	return nil
}

// same says whether the pinned link runs a program that has the instructions and
// the maps of ours.
func same(old link.Link, theirs, ours *ebpf.Program) bool {
	at, err := old.Info()
	if err != nil {
		return false
	}
	a, err := theirs.Info()
	if err != nil {
		return false
	}
	b, err := ours.Info()
	if err != nil {
		return false
	}
	id, ok := a.ID()
	aMaps, ok2 := a.MapIDs()
	bMaps, ok3 := b.MapIDs()
	slices.Sort(aMaps)
	slices.Sort(bMaps)
	return ok && ok2 && ok3 && id == at.Program && a.Tag == b.Tag && slices.Equal(aMaps, bMaps)
}

// Unkept says why nothing is pinned, or returns nil.
func (l *Life) Unkept() error {
	return l.unkept
}

// lockPins makes the folder of this layout's pins and locks it for this process,
// and removes those of other layouts.
func lockPins(root string) (*os.File, error) {
	if err := os.MkdirAll(root, 0o700); err != nil {
		return nil, fmt.Errorf("make the folder of the pins: %w", err)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(root, &st); err != nil {
		return nil, fmt.Errorf("look at %s: %w", root, err)
	}
	if st.Type != unix.BPF_FS_MAGIC {
		_ = os.Remove(root) // if it is empty
		return nil, fmt.Errorf("%s is on no BPF file system (mount -t bpf bpf /sys/fs/bpf)", root)
	}
	dir := filepath.Join(root, lifeLayout)
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("make the folder of the pins: %w", err)
	}
	pins, err := lockFolder(dir)
	if err != nil {
		return nil, err
	}
	others, err := os.ReadDir(root)
	if err != nil {
		return nil, errors.Join(err, pins.Close())
	}
	for _, o := range others {
		if o.Name() == lifeLayout || !strings.HasPrefix(o.Name(), "v") {
			continue
		}
		stale := filepath.Join(root, o.Name())
		if held, err := lockFolder(stale); err == nil { // else an agent of that version runs
			err = errors.Join(removePins(stale), os.Remove(stale), held.Close())
			if err != nil {
				return nil, errors.Join(fmt.Errorf("remove the pins of another version: %w", err), pins.Close())
			}
		}
	}
	return pins, nil
}

// lockFolder locks a folder for this process.
func lockFolder(dir string) (*os.File, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("open the folder of the pins: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("another agent uses the pins in %s: %w", dir, err)
	}
	return f, nil
}

// removePins unpins everything in the folder.
func removePins(dir string) error {
	pins, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	var errs []error
	for _, p := range pins {
		errs = append(errs, os.Remove(filepath.Join(dir, p.Name())))
	}
	return errors.Join(errs...)
}

// Next waits for the next event until deadline, which the zero value leaves out.
// The error is [os.ErrDeadlineExceeded], [ErrWoken] or, after Close,
// [os.ErrClosed].
func (l *Life) Next(deadline time.Time) (LifeEvent, error) {
	l.ring.SetDeadline(deadline)
	for {
		err := l.ring.ReadInto(&l.rec)
		switch {
		case errors.Is(err, ringbuf.ErrFlushed):
			return LifeEvent{}, ErrWoken
		case err != nil:
			return LifeEvent{}, err
		}
		if e, ok := decodeLife(l.rec.RawSample); ok {
			return e, nil
		}
	}
}

// Wake makes Next return, now or when it is called next, once it has returned
// the events that there are.
func (l *Life) Wake() error {
	return l.ring.Flush()
}

// decodeLife reads an event. ok is false if it is none of ours.
func decodeLife(b []byte) (e LifeEvent, ok bool) {
	if len(b) < 8 {
		return e, false
	}
	switch kind := binary.NativeEndian.Uint32(b); kind {
	case kindExec:
		var x gen.LifeExecEvent
		if len(b) < binary.Size(x) {
			return e, false
		}
		if _, err := binary.Decode(b, binary.NativeEndian, &x); err != nil {
			return e, false
		}
		n := min(x.Bytes, uint32(len(x.Args)))
		args := b[binary.Size(x)-len(x.Args):][:n]
		return LifeEvent{
			Proc: Proc{PID: int(x.Pid), StartTicks: x.StartTicks},
			Args: args, Cut: x.All > n, At: time.Duration(x.AtNs),
		}, true
	case kindEnd, kindReplaced:
		var x gen.LifeEndEvent
		if _, err := binary.Decode(b, binary.NativeEndian, &x); err != nil {
			return e, false
		}
		lived := livedOf(x.Pid, &x.Life)
		return LifeEvent{Proc: lived.Proc, Lived: lived, Replaced: kind == kindReplaced}, true
	}
	return e, false
}

func livedOf(pid uint32, v *gen.LifeLife) *Lived {
	return &Lived{
		Proc:  Proc{PID: int(pid), StartTicks: v.StartTicks},
		Ended: time.Duration(v.EndedNs), Process: v.ProcessNs,
		Run: most(v.Freed.RunNs, v.Exited.RunNs), Wait: most(v.Freed.WaitNs, v.Exited.WaitNs), Switches: most(v.Freed.Switches, v.Exited.Switches),
		ReadBytes: v.ReadBytes, WriteBytes: v.WriteBytes, CancelledWriteBytes: v.CancelledWriteBytes,
		Threads: v.Threads, HasIO: v.Fields&fieldIO != 0, HasWait: v.Fields&fieldWait != 0,
	}
}

// Join adds the totals that came later than what the threads had used.
func (l *Lived) Join(totals *Lived) {
	run, wait, switches, threads := l.Run, l.Wait, l.Switches, l.Threads
	*l = *totals
	l.Run, l.Wait, l.Switches, l.Threads = run, wait, switches, threads
}

// most takes the greater of what threads had used when they were freed, and
// when they exited: the kernel may have skipped some of either.
func most(freed, exited [Classes]uint64) [Classes]uint64 {
	for c := range freed {
		freed[c] = max(freed[c], exited[c])
	}
	return freed
}

// Follow has the process accounted at its end. A process that had the PID before
// and was not forgotten is returned if it has ended: nobody can ask for it again.
func (l *Life) Follow(p Proc) (before *Lived, err error) {
	key, fresh := p.key(), gen.LifeLife{StartTicks: p.StartTicks}
	var old gen.LifeLife
	err = l.lives.Lookup(key, &old)
	switch {
	case err == nil && old.StartTicks == p.StartTicks:
		return nil, nil
	case err == nil:
		if before, err = l.Lived(Proc{PID: p.PID, StartTicks: old.StartTicks}); err != nil && !errors.Is(err, ErrAlive) && !errors.Is(err, ErrNotFollowed) {
			return nil, err
		}
	case err != nil && !errors.Is(err, ebpf.ErrKeyNotExist):
		return nil, fmt.Errorf("follow process %d: %w", p.PID, err)
	}
	if err := l.lives.Put(key, &fresh); err != nil {
		if errors.Is(err, unix.E2BIG) {
			err = ErrFull
		}
		return before, fmt.Errorf("follow process %d: %w", p.PID, err)
	}
	if err := l.ask(l.hold, p); err != nil {
		return before, fmt.Errorf("hold process %d: %w", p.PID, err)
	}
	return before, nil
}

// ask runs a program for a process.
func (l *Life) ask(program *ebpf.Program, p Proc) error {
	if program == nil {
		return nil
	}
	l.asking.Lock()
	defer l.asking.Unlock()
	l.asked.Pid, l.asked.StartTicks = p.key(), p.StartTicks
	l.attr = progRunAttr{
		progFD: uint32(program.FD()), ctxSizeIn: uint32(unsafe.Sizeof(l.asked)),
		ctxIn: uint64(uintptr(unsafe.Pointer(&l.asked))),
	}
	_, _, errno := unix.Syscall(unix.SYS_BPF, unix.BPF_PROG_TEST_RUN, uintptr(unsafe.Pointer(&l.attr)), unsafe.Sizeof(l.attr))
	if errno != 0 {
		return fmt.Errorf("run program: %w", errno)
	}
	return nil
}

// Lived returns what the process used. The error is [ErrAlive] if it has not
// ended, [ErrNotFollowed] if it is not known. Since Linux 6.2 it
// tells that of every process that was followed, whatever hooks were skipped.
func (l *Life) Lived(p Proc) (*Lived, error) {
	var v gen.LifeLife
	err := l.lives.Lookup(p.key(), &v)
	if err == nil && v.StartTicks == p.StartTicks && v.EndedNs == 0 {
		if err := l.ask(l.read, p); err != nil {
			return nil, fmt.Errorf("read the task of process %d: %w", p.PID, err)
		}
		err = l.lives.Lookup(p.key(), &v)
	}
	switch {
	case errors.Is(err, ebpf.ErrKeyNotExist), err == nil && v.StartTicks != p.StartTicks:
		return nil, ErrNotFollowed
	case err != nil:
		return nil, fmt.Errorf("read what process %d used: %w", p.PID, err)
	case v.EndedNs == 0:
		return nil, ErrAlive
	}
	return livedOf(p.key(), &v), nil
}

// Forget makes room for another process. One that has the PID meanwhile stays.
func (l *Life) Forget(p Proc) error {
	var v gen.LifeLife
	key := p.key()
	err := l.lives.Lookup(key, &v)
	if err == nil && v.StartTicks == p.StartTicks {
		err = l.lives.Delete(key)
		if l.tasks != nil {
			if e := l.tasks.Delete(key); !errors.Is(e, ebpf.ErrKeyNotExist) {
				err = errors.Join(err, e)
			}
		}
	}
	if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("forget process %d: %w", p.PID, err)
	}
	return nil
}

// Each calls each with every process that is followed or has ended and was not
// forgotten. It is not called for those that come meanwhile.
func (l *Life) Each(each func(p Proc)) error {
	var pid uint32
	var v gen.LifeLife
	all := l.lives.Iterate()
	for all.Next(&pid, &v) {
		each(Proc{PID: int(pid), StartTicks: v.StartTicks})
	}
	if err := all.Err(); err != nil {
		return fmt.Errorf("list the followed processes: %w", err)
	}
	return nil
}

// Stats returns what was met so far.
func (l *Life) Stats() (LifeStats, error) {
	var n [drops]uint64
	if _, err := l.dropped.ReadAt(bytesOf(n[:]), 0); err != nil {
		return LifeStats{}, fmt.Errorf("read what life's hooks dropped: %w", err)
	}
	s := LifeStats{
		NotFollowed: n[dropFollow], ExecsLost: n[dropExec], EndsLost: n[dropEnd], NotHeld: n[dropHold],
		Room: int(l.lives.MaxEntries()),
	}
	for _, p := range []*ebpf.Program{l.exec, l.exit, l.free} {
		stats, err := p.Stats()
		if err != nil {
			return s, fmt.Errorf("read what life's hooks missed: %w", err)
		}
		s.Misses += stats.RecursionMisses
	}
	err := l.Each(func(Proc) { s.Followed++ })
	return s, err
}

// Close ends what is not pinned.
func (l *Life) Close() error {
	var errs []error
	if l.ring != nil {
		errs = append(errs, l.ring.Close())
	}
	for _, k := range l.links {
		errs = append(errs, k.Close())
	}
	// A pinned program that stands for ours is in no collection.
	for _, p := range []*ebpf.Program{l.exec, l.exit, l.free} {
		errs = append(errs, p.Close())
	}
	if l.coll != nil {
		l.coll.Close()
	}
	if l.pins != nil {
		errs = append(errs, l.pins.Close())
	}
	return errors.Join(errs...)
}
