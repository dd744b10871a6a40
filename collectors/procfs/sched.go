package procfs

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"strconv"

	"golang.org/x/sys/unix"
)

// Sched reads how long threads waited, as libvirt does for its vcpu.N.wait: from
// the line of /proc/PID/task/TID/sched that Linux had before 5.16. Newer kernels
// have another, and libvirt tells 0 there. It is for one goroutine at a time.
type Sched struct {
	root string
	buf  [4096]byte // a sched has about 2 KiB
}

// NewSched returns a reader of the /proc at root, or nil where the kernel does not
// have the line: it is newer, or keeps no such statistics (kernel.sched_schedstats).
func NewSched(root string) *Sched {
	s := &Sched{root: root}
	if _, err := s.read("self/sched"); err != nil {
		return nil
	}
	return s
}

// Wait returns the ns that the thread of a process was runnable and on no CPU.
func (s *Sched) Wait(pid int, tid uint32) (ns uint64, err error) {
	return s.read(strconv.Itoa(pid) + "/task/" + strconv.Itoa(int(tid)) + "/sched")
}

func (s *Sched) read(name string) (uint64, error) {
	fd, err := unix.Open(s.root+"/"+name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, gone(err)
	}
	n, err := unix.Read(fd, s.buf[:])
	_ = unix.Close(fd)
	if err != nil {
		return 0, gone(err)
	}
	return parseSched(s.buf[:n])
}

var errNoWait = errors.New("the kernel does not tell how long threads waited")

// parseSched returns the ns that a /proc/PID/sched has in the line
// se.statistics.wait_sum, or se.wait_sum as it was called once.
func parseSched(text []byte) (uint64, error) {
	for line := range bytes.Lines(text) {
		if !bytes.HasPrefix(line, []byte("se.statistics.wait_sum")) && !bytes.HasPrefix(line, []byte("se.wait_sum")) {
			continue
		}
		_, value, _ := bytes.Cut(line, []byte(":"))
		whole, part, _ := bytes.Cut(bytes.TrimSpace(value), []byte(".")) // ms, and six digits of it
		ms, err := parseUint(whole)
		ns, err2 := parseUint(part)
		if err = errors.Join(err, err2); err != nil || len(part) != 6 || ms > (math.MaxUint64-ns)/1e6 {
			return 0, fmt.Errorf("%q is no time in milliseconds", bytes.TrimSpace(value))
		}
		return ms*1e6 + ns, nil
	}
	return 0, errNoWait
}
