// Package procfs reads what QEMU processes use without BPF: the whole process
// from its CPU clock, the split by thread from /proc/PID/task.
//
// It costs some 20 µs a thread and poll, where the BPF walk costs less than one a
// process. Its figures are the kernel's as of the last tick.
package procfs

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/kvmeter/kvmeter/bpf"
)

// Reader reads processes from their CPU clocks and /proc. It is for one
// goroutine at a time.
type Reader struct {
	log    *zap.Logger
	root   string // /proc
	clock  func(pid int) (uint64, error)
	exited map[bpf.Proc]uint64 // the most known of Usage.Exited, ns
	stats  bpf.Stats
	saidIO bool
	file   []byte // one file's content
	names  []byte // one directory's entries
	tids   []string
	vcpus  [][]bpf.VCPUUsage // of the processes of the last read
}

// maxRemembered bounds Reader.exited.
const maxRemembered = 4096

// New returns a reader of /proc. Disk bytes need the right to read
// /proc/PID/io (CAP_SYS_PTRACE or QEMU's uid); log is told once if it lacks.
func New(log *zap.Logger) *Reader {
	return &Reader{
		log:    log,
		root:   "/proc",
		clock:  bpf.ProcessCPUClock,
		exited: map[bpf.Proc]uint64{},
		file:   make([]byte, 8192),
		names:  make([]byte, 8192),
	}
}

// Origin returns [bpf.OriginCPUClock].
func (r *Reader) Origin() string {
	return bpf.OriginCPUClock
}

// Read fills out[i] with what procs[i] has used up to now. A process that can't
// be read has its Err set and costs no other.
func (r *Reader) Read(ctx context.Context, procs []bpf.Proc, out []bpf.Usage) error {
	if len(out) < len(procs) {
		return fmt.Errorf("read /proc: room for %d of %d processes", len(out), len(procs))
	}
	for len(r.vcpus) < len(procs) {
		r.vcpus = append(r.vcpus, nil)
	}
	r.stats.Reads++
	for i, p := range procs {
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("read /proc: %w", err)
		}
		r.stats.Processes++
		out[i] = bpf.Usage{}
		r.vcpus[i] = r.vcpus[i][:0]
		if err := r.read(p, &out[i], &r.vcpus[i]); err != nil {
			r.vcpus[i] = r.vcpus[i][:0]
			r.stats.Failed++
			delete(r.exited, p)
			out[i] = bpf.Usage{Err: err}
		}
	}
	return nil
}

// read reads one process. The order matters: a thread that exits after the
// clock was read is in the clock's figure either way, so what the threads lack
// of it has certainly exited.
func (r *Reader) read(p bpf.Proc, u *bpf.Usage, vcpus *[]bpf.VCPUUsage) error {
	total, err := r.clock(p.PID)
	if err != nil {
		return unwrapGone(err)
	}
	// The directory stays this process's, even if its PID is used again.
	dir, err := openDir(unix.AT_FDCWD, r.root+"/"+strconv.Itoa(p.PID))
	switch {
	case err == unix.ENOENT:
		if _, err := r.clock(p.PID); err != nil {
			return bpf.ErrGone
		}
		// It lives, but /proc hides it (hidepid): its clock is all there is.
		u.Process, u.Exited = total, total
		return nil
	case err != nil:
		return fmt.Errorf("open /proc/%d: %w", p.PID, err)
	}
	defer unix.Close(dir)

	text, err := r.readFile(dir, "stat")
	if err != nil {
		return gone(err)
	}
	start, kernel, err := ParseStat(text)
	switch {
	case err != nil:
		return fmt.Errorf("/proc/%d/stat: %w", p.PID, err)
	case p.StartTicks != 0 && p.StartTicks != start:
		return bpf.ErrReused
	case kernel:
		return bpf.ErrKernelThread
	}
	if err := r.readThreads(dir, u, vcpus); err != nil {
		return err
	}
	r.readIO(dir, u)
	r.complete(p, total, u)
	return nil
}

// complete sets what follows from the clock's figure and the threads' times.
func (r *Reader) complete(p bpf.Proc, total uint64, u *bpf.Usage) {
	var live uint64
	for _, ns := range u.Run {
		live += ns
	}
	// Without the scheduler's statistics all threads read 0.
	u.HasSplit = u.HasWait || live > 0 || total == 0
	if !u.HasSplit {
		u.Process, u.Exited = total, total
		return
	}
	// The threads ran on while they were read, so this may be too little, and
	// the next read may say more; never too much.
	exited := r.exited[p]
	if total > live {
		exited = max(exited, total-live)
	}
	if exited > 0 {
		r.remember(p, exited)
	}
	u.Exited = exited
	u.Process = live + exited
}

func (r *Reader) remember(p bpf.Proc, exited uint64) {
	if len(r.exited) >= maxRemembered {
		clear(r.exited)
	}
	r.exited[p] = exited
}

// readThreads adds up the live threads. One that exits meanwhile is skipped:
// its time is in the process's clock.
func (r *Reader) readThreads(dir int, u *bpf.Usage, vcpus *[]bpf.VCPUUsage) error {
	task, err := openDir(dir, "task")
	if err != nil {
		return gone(err)
	}
	defer unix.Close(task)
	if err := r.listThreads(task); err != nil {
		return gone(err)
	}
	for _, tid := range r.tids {
		comm, err := r.readFile(task, tid+"/comm")
		if exited(err) {
			continue
		}
		if err != nil {
			return fmt.Errorf("thread %s: %w", tid, err)
		}
		name := trimNewline(comm)
		class := bpf.ClassOf(name)
		text, err := r.readFile(task, tid+"/schedstat")
		if exited(err) {
			// Either the thread or the file (CONFIG_SCHED_INFO) is not there.
			continue
		}
		if err != nil {
			return fmt.Errorf("thread %s: %w", tid, err)
		}
		run, wait, switches, err := parseSchedstat(text)
		if err != nil {
			return fmt.Errorf("schedstat of thread %s: %w", tid, err)
		}
		u.Run[class] += run
		u.Wait[class] += wait
		u.Switches[class] += switches
		u.HasWait = u.HasWait || switches > 0
		u.Threads++
		if class == bpf.VCPU {
			u.VCPUs++
			id, _ := strconv.ParseUint(tid, 10, 32) // the kernel's own
			*vcpus = append(*vcpus, bpf.VCPUUsage{Index: bpf.VCPUOf(name), TID: uint32(id), Run: run, Wait: wait, Switches: switches})
		}
	}
	return nil
}

// listThreads sets r.tids to the names in the directory task.
func (r *Reader) listThreads(task int) error {
	r.tids = r.tids[:0]
	for {
		n, err := unix.Getdents(task, r.names)
		if err != nil {
			return err
		}
		if n == 0 {
			return nil
		}
		_, _, r.tids = unix.ParseDirent(r.names[:n], -1, r.tids)
	}
}

// readIO sets the bytes, if they may be read.
func (r *Reader) readIO(dir int, u *bpf.Usage) {
	text, err := r.readFile(dir, "io")
	if err == nil {
		u.ReadBytes, u.WriteBytes, u.CancelledWriteBytes, err = parseIO(text)
	}
	u.HasIO = err == nil
	if err != nil && !exited(err) && !r.saidIO {
		r.saidIO = true
		r.log.Debug("no disk bytes without BPF: /proc/PID/io can't be read; it takes CAP_SYS_PTRACE or QEMU's uid",
			zap.Error(err))
	}
}

// VCPUs returns what the vCPU threads of the i-th process have used, as of the
// last Read and until the next one.
func (r *Reader) VCPUs(i int) []bpf.VCPUUsage {
	return r.vcpus[i]
}

// Stats returns what the reader has met so far.
func (r *Reader) Stats() bpf.Stats {
	return r.stats
}

// Close does nothing: the reader holds nothing open between reads.
func (r *Reader) Close() error {
	return nil
}

// StartTicks returns the start time of process pid as [bpf.Proc] takes it: in
// clock ticks (10 ms) since boot. The error is [bpf.ErrGone] if there is no
// such process.
func StartTicks(pid int) (uint64, error) {
	text, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return 0, fmt.Errorf("read start time of process %d: %w", pid, gone(err))
	}
	start, _, err := ParseStat(text)
	if err != nil {
		return 0, fmt.Errorf("/proc/%d/stat: %w", pid, err)
	}
	return start, nil
}

// readFile returns what the file name under dir holds, until the next call.
func (r *Reader) readFile(dir int, name string) ([]byte, error) {
	fd, err := unix.Openat(dir, name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	n, err := unix.Read(fd, r.file)
	if err != nil {
		return nil, err
	}
	return r.file[:n], nil
}

func openDir(at int, name string) (int, error) {
	return unix.Openat(at, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
}

// exited says whether err is how /proc tells that a task is no more.
func exited(err error) bool {
	return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESRCH)
}

// gone turns such an error into [bpf.ErrGone].
func gone(err error) error {
	if exited(err) {
		return bpf.ErrGone
	}
	return err
}

// unwrapGone returns [bpf.ErrGone] itself if err is one.
func unwrapGone(err error) error {
	if errors.Is(err, bpf.ErrGone) {
		return bpf.ErrGone
	}
	return err
}
