package procfs

import (
	"bytes"
	"errors"
	"fmt"
	"math"
)

// pfKthread is PF_KTHREAD of linux/sched.h in the flags of /proc/PID/stat.
const pfKthread = 0x00200000

// Fields of /proc/PID/stat, counted from the one after the name: proc(5).
const (
	statFlags     = 9 - 3
	statStartTime = 22 - 3
)

var (
	errShort     = errors.New("fewer fields than expected")
	errNotNumber = errors.New("not an unsigned number")
)

// ParseStat returns the start time of a /proc/PID/stat, in clock ticks (10 ms)
// since boot, and whether the process is a kernel thread.
func ParseStat(text []byte) (start uint64, kernel bool, err error) {
	// The name may hold anything, so fields count from its last parenthesis.
	_, rest, found := cutLast(text, ')')
	if !found {
		return 0, false, errShort
	}
	var flags uint64
	var field []byte
	for i := 0; i <= statStartTime; i++ {
		if field, rest = nextField(rest); field == nil {
			return 0, false, errShort
		}
		switch i {
		case statFlags:
			flags, err = parseUint(field)
		case statStartTime:
			start, err = parseUint(field)
		}
		if err != nil {
			return 0, false, fmt.Errorf("field %d: %w", i+3, err)
		}
	}
	return start, flags&pfKthread != 0, nil
}

// parseSchedstat returns the ns on a CPU, the ns runnable but off CPU, and the
// times put on a CPU of a /proc/PID/task/TID/schedstat.
func parseSchedstat(text []byte) (run, wait, switches uint64, err error) {
	var v [3]uint64
	for i := range v {
		var field []byte
		if field, text = nextField(text); field == nil {
			return 0, 0, 0, errShort
		}
		if v[i], err = parseUint(field); err != nil {
			return 0, 0, 0, fmt.Errorf("field %d: %w", i+1, err)
		}
	}
	return v[0], v[1], v[2], nil
}

// parseIO returns read_bytes, write_bytes and cancelled_write_bytes of a
// /proc/PID/io.
func parseIO(text []byte) (read, write, cancelled uint64, err error) {
	missing := 3
	for line := range bytes.Lines(text) {
		key, value, _ := bytes.Cut(line, []byte(": "))
		var to *uint64
		switch string(key) {
		case "read_bytes":
			to = &read
		case "write_bytes":
			to = &write
		case "cancelled_write_bytes":
			to = &cancelled
		default:
			continue
		}
		if *to, err = parseUint(bytes.TrimSuffix(value, []byte("\n"))); err != nil {
			return 0, 0, 0, fmt.Errorf("%s: %w", key, err)
		}
		missing--
	}
	if missing > 0 {
		return 0, 0, 0, errShort
	}
	return read, write, cancelled, nil
}

// parseUint is strconv.ParseUint for decimal digits in bytes.
func parseUint(b []byte) (uint64, error) {
	var n uint64
	for _, c := range b {
		d := uint64(c - '0')
		if c < '0' || c > '9' || n > (math.MaxUint64-d)/10 {
			return 0, errNotNumber
		}
		n = n*10 + d
	}
	if len(b) == 0 {
		return 0, errNotNumber
	}
	return n, nil
}

// nextField splits text at its first blanks. The field is nil at the end.
func nextField(text []byte) (field, rest []byte) {
	text = bytes.TrimLeft(text, " \n")
	if len(text) == 0 {
		return nil, nil
	}
	if i := bytes.IndexAny(text, " \n"); i >= 0 {
		return text[:i], text[i:]
	}
	return text, nil
}

func cutLast(text []byte, sep byte) (before, after []byte, found bool) {
	i := bytes.LastIndexByte(text, sep)
	if i < 0 {
		return text, nil, false
	}
	return text[:i], text[i+1:], true
}

func trimNewline(comm []byte) string {
	return string(bytes.TrimSuffix(comm, []byte("\n")))
}
