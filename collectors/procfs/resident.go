package procfs

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"strconv"

	"github.com/kvmeter/kvmeter/bpf"
)

// statRSS is the field of the resident pages in /proc/PID/stat, counted as
// statStartTime.
const statRSS = 24 - 3

// Resident reads how much memory of the host a process takes. It is for one
// goroutine at a time.
type Resident struct {
	stat *os.File
	pid  int
	page uint64
	buf  [1024]byte // a stat has about 350 bytes
}

// OpenResident opens the process of the /proc at root. The error is [bpf.ErrGone] or
// [bpf.ErrReused] where it is no more.
func OpenResident(root string, p bpf.Proc) (*Resident, error) {
	f, err := os.Open(root + "/" + strconv.Itoa(p.PID) + "/stat")
	if err != nil {
		return nil, gone(err)
	}
	r := &Resident{stat: f, pid: p.PID, page: uint64(os.Getpagesize())}
	if start, _, err := r.read(); err != nil || p.StartTicks != 0 && p.StartTicks != start {
		_ = f.Close()
		return nil, cmp.Or(err, error(bpf.ErrReused))
	}
	return r, nil
}

// Read returns the bytes that are resident now, to a page: the figure that libvirt
// tells as rss. The error is [bpf.ErrGone] where the process is no more.
func (r *Resident) Read() (bytes uint64, err error) {
	_, pages, err := r.read()
	return pages * r.page, err
}

func (r *Resident) read() (start, pages uint64, err error) {
	n, err := r.stat.ReadAt(r.buf[:], 0)
	if n == 0 && err != nil {
		return 0, 0, gone(err)
	}
	if start, pages, err = parseResident(r.buf[:n]); err != nil {
		return 0, 0, fmt.Errorf("/proc/%d/stat: %w", r.pid, err)
	}
	return start, pages, nil
}

// Close frees what the reader holds.
func (r *Resident) Close() error { return r.stat.Close() }

// Stopped reports whether a process of the /proc at root is stopped, by a signal or
// a debugger.
func Stopped(root string, pid int) (bool, error) {
	text, err := os.ReadFile(root + "/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return false, gone(err)
	}
	_, rest, _ := cutLast(text, ')')
	state, _ := nextField(rest)
	return len(state) == 1 && (state[0] == 'T' || state[0] == 't'), nil
}

// parseResident returns the start time, in ticks since boot, and the resident
// pages of a /proc/PID/stat.
func parseResident(text []byte) (start, pages uint64, err error) {
	_, rest, found := cutLast(text, ')')
	if !found {
		return 0, 0, errShort
	}
	var field []byte
	for i := 0; i <= statRSS; i++ {
		if field, rest = nextField(rest); field == nil {
			return 0, 0, errShort
		}
		var to *uint64
		switch i {
		case statStartTime:
			to = &start
		case statRSS:
			to = &pages
		default:
			continue
		}
		v, bad := parseUint(field)
		if bad != nil {
			err = errors.Join(err, fmt.Errorf("field %d: %w", i+3, bad))
		}
		*to = v
	}
	return start, pages, err
}
