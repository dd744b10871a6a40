package agent

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// process is a QEMU process that runs a guest.
type process struct {
	pid   int
	start uint64 // clock ticks since boot, field 22 of /proc/PID/stat
	uuid  string // -uuid, in lower case; empty: none was given
	name  string // -name; empty: none was given
	taps  []string
}

// scanner finds QEMU processes. A scan costs a listing of /proc, and a look at
// each new process: one that is not QEMU may still become it, by exec, so that
// it is looked at again, ever less often.
type scanner struct {
	proc  string // normally /proc
	known map[int]*candidate
	scan  uint64
	buf   []byte
}

type candidate struct {
	scan  uint64    // last scan that saw the PID
	since time.Time // first look
	next  time.Time // next look; zero: never, it is a kernel thread
	qemu  *process
}

// maxRecheck bounds how late an exec of QEMU by an old process is noticed,
// where libvirt does not tell.
const maxRecheck = 30 * time.Second

func newScanner(proc string) *scanner {
	return &scanner{proc: proc, known: map[int]*candidate{}, buf: make([]byte, 32<<10)}
}

// refresh calls found with every QEMU process there is now. With all set it
// looks at every process again.
func (s *scanner) refresh(now time.Time, all bool, found func(*process)) error {
	dir, err := unix.Open(s.proc, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("list processes: %w", err)
	}
	defer func() { _ = unix.Close(dir) }()
	s.scan++
	for {
		n, err := unix.Getdents(dir, s.buf)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return fmt.Errorf("list processes: %w", err)
		}
		if n <= 0 {
			break
		}
		for b := s.buf[:n]; len(b) >= direntName; {
			size := int(binary.NativeEndian.Uint16(b[direntReclen:]))
			if size < direntName || size > len(b) {
				return errors.New("list processes: the kernel returned a broken entry")
			}
			if pid, ok := pidOf(b[direntName:size]); ok {
				s.visit(pid, now, all, found)
			}
			b = b[size:]
		}
	}
	for pid, c := range s.known {
		if c.scan != s.scan {
			delete(s.known, pid)
		}
	}
	return nil
}

// Offsets in struct linux_dirent64.
const (
	direntReclen = 16
	direntName   = 19
)

// pidOf reads a name, ended by a NUL, that is a PID.
func pidOf(name []byte) (pid int, ok bool) {
	for _, c := range name {
		switch {
		case c == 0:
			return pid, ok
		case c < '0' || c > '9' || pid > 1<<24:
			return 0, false
		}
		pid, ok = pid*10+int(c-'0'), true
	}
	return pid, ok
}

func (s *scanner) visit(pid int, now time.Time, all bool, found func(*process)) {
	c := s.known[pid]
	if c == nil {
		c = &candidate{since: now, next: now}
		s.known[pid] = c
	}
	c.scan = s.scan
	if c.qemu == nil && !c.next.IsZero() && (all || !c.next.After(now)) {
		s.look(pid, c, now)
	}
	if c.qemu != nil {
		found(c.qemu)
	}
}

// forget makes the next scan look at the PID anew.
func (s *scanner) forget(pid int) { delete(s.known, pid) }

func (s *scanner) look(pid int, c *candidate, now time.Time) {
	c.next = now.Add(min(now.Sub(c.since)/4, maxRecheck))
	dir := filepath.Join(s.proc, strconv.Itoa(pid))
	cmdline, err := os.ReadFile(filepath.Join(dir, "cmdline"))
	if err != nil {
		return
	}
	if len(cmdline) == 0 {
		if _, kernel, err := readStat(dir); err == nil && kernel {
			c.next = time.Time{}
		}
		return
	}
	p, ok := parseCommand(cmdline)
	if !ok {
		return
	}
	p.pid = pid
	if p.start, _, err = readStat(dir); err == nil {
		c.qemu = p
	}
}

// readStat returns a process's start time, and whether it is a kernel thread.
func readStat(dir string) (start uint64, kernel bool, err error) {
	data, err := os.ReadFile(filepath.Join(dir, "stat"))
	if err != nil {
		return 0, false, err
	}
	return parseStat(data)
}

// kernelThread is PF_KTHREAD of include/linux/sched.h.
const kernelThread = 0x200000

func parseStat(data []byte) (start uint64, kernel bool, err error) {
	// The second field is the process's name in parentheses, and may hold
	// anything. See proc(5).
	fields := bytes.Fields(data[bytes.LastIndexByte(data, ')')+1:])
	if len(fields) < 20 {
		return 0, false, errors.New("stat of the process is too short")
	}
	flags, err := strconv.ParseUint(string(fields[9-3]), 10, 64)
	if err != nil {
		return 0, false, fmt.Errorf("flags of the process: %w", err)
	}
	start, err = strconv.ParseUint(string(fields[22-3]), 10, 64)
	if err != nil {
		return 0, false, fmt.Errorf("start time of the process: %w", err)
	}
	return start, flags&kernelThread != 0, nil
}

// parseCommand reads the command line of a process, whose arguments end with
// NULs. ok is false unless it is a QEMU that runs a guest: libvirt also starts
// QEMU to ask it what it can do, with -machine none.
func parseCommand(cmdline []byte) (p *process, ok bool) {
	args := strings.Split(strings.TrimSuffix(string(cmdline), "\x00"), "\x00")
	base := path.Base(args[0])
	qemu := strings.HasPrefix(base, "qemu-system-") || base == "qemu-kvm" || base == "kvm"
	p = &process{}
	libvirts := false
	for i := 1; i+1 < len(args); i++ {
		value := args[i+1]
		switch strings.TrimPrefix(args[i], "-") {
		case "-uuid", "uuid":
			p.uuid = strings.ToLower(value)
		case "-name", "name":
			p.name = option(value, "guest", "guest")
			libvirts = strings.HasPrefix(value, "guest=")
		case "-machine", "machine", "-M", "M":
			if option(value, "type", "type") == "none" {
				return nil, false
			}
		case "-netdev", "netdev", "-nic", "nic":
			if tap := tapOf(value); tap != "" {
				p.taps = append(p.taps, tap)
			}
		default:
			continue
		}
		i++
	}
	// libvirt's QEMU may have any name.
	return p, qemu || libvirts && isUUID(p.uuid)
}

// option returns the value of a key in QEMU's syntax, in which the implied key
// may be left out before the first value, and two commas stand for one.
func option(s, key, implied string) string {
	s = strings.ReplaceAll(s, ",,", "\x00")
	for i, part := range strings.Split(s, ",") {
		k, v, has := strings.Cut(part, "=")
		if !has && i == 0 {
			k, v = implied, part
		}
		if k == key {
			return strings.ReplaceAll(v, "\x00", ",")
		}
	}
	return ""
}

// tapOf returns the name of the tap device that a -netdev or -nic asks for.
func tapOf(value string) string {
	if strings.HasPrefix(value, "{") {
		var netdev struct {
			Type   string `json:"type"`
			Ifname string `json:"ifname"`
		}
		if json.Unmarshal([]byte(value), &netdev) != nil || netdev.Type != "tap" {
			return ""
		}
		return netdev.Ifname
	}
	if option(value, "type", "type") != "tap" {
		return ""
	}
	return option(value, "ifname", "type")
}

func isUUID(s string) bool {
	if len(s) != 36 {
		return false
	}
	for i, c := range []byte(s) {
		dash := i == 8 || i == 13 || i == 18 || i == 23
		hex := c >= '0' && c <= '9' || c >= 'a' && c <= 'f'
		if dash != (c == '-') || !dash && !hex {
			return false
		}
	}
	return true
}

// openTaps returns the tap devices whose queues a process holds open. ok is
// false without the right to look, which is that to trace the process.
func openTaps(proc string, pid int) (taps []string, ok bool) {
	dir := filepath.Join(proc, strconv.Itoa(pid))
	fds, err := os.ReadDir(filepath.Join(dir, "fd"))
	if err != nil {
		return nil, false
	}
	for _, fd := range fds {
		if target, err := os.Readlink(filepath.Join(dir, "fd", fd.Name())); err != nil || target != "/dev/net/tun" {
			continue
		}
		info, err := os.ReadFile(filepath.Join(dir, "fdinfo", fd.Name()))
		if err != nil {
			continue
		}
		for line := range strings.Lines(string(info)) {
			if tap, ok := strings.CutPrefix(line, "iff:"); ok {
				if tap = strings.TrimSpace(tap); tap != "" && !slices.Contains(taps, tap) {
					taps = append(taps, tap)
				}
			}
		}
	}
	return taps, true
}

// bootID names this run of the kernel.
func bootID(proc string) (string, error) {
	f, err := os.Open(filepath.Join(proc, "sys/kernel/random/boot_id"))
	if err != nil {
		return "", fmt.Errorf("read the boot id: %w", err)
	}
	defer func() { _ = f.Close() }()
	id, err := io.ReadAll(io.LimitReader(f, 64))
	if err != nil {
		return "", fmt.Errorf("read the boot id: %w", err)
	}
	return strings.TrimSpace(string(id)), nil
}
