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

	"github.com/kvmeter/kvmeter/collectors/procfs"
)

// process is a QEMU process that runs a guest.
type process struct {
	pid   int
	start uint64 // clock ticks since boot, field 22 of /proc/PID/stat
	uuid  string // -uuid, in lower case; empty: none was given
	name  string // -name; empty: none was given
	taps  []string
}

// scanner finds QEMU processes. It looks at each new process: one that is not
// QEMU may still become it, by exec, so that it is looked at again, ever less
// often. /proc is listed only where new processes cannot be told by the last PID
// that the kernel gave: a listing costs 2 µs a process.
type scanner struct {
	proc   string               // normally /proc
	ours   func(pid int) bool   // which processes are on this host; nil: all
	uptime func() time.Duration // since boot
	known  map[int]*candidate
	scan   uint64    // number of the last listing
	listed time.Time // when that was
	last   int       // last PID that the kernel had given at the last refresh
	names  []byte    // a part of the listing
	file   []byte    // a file's content
}

type candidate struct {
	scan uint64        // last listing before which or in which the PID was seen
	born time.Duration // when it was started, after boot
	next time.Time     // next look; zero: never, it is a kernel thread
	qemu *process
}

const (
	// maxRecheck bounds how late an exec of QEMU by an old process is noticed,
	// where libvirt does not tell.
	maxRecheck = 30 * time.Second
	// listEvery bounds how long a process that ended is remembered.
	listEvery = 10 * time.Second
	// clockTick is the unit of times in /proc, USER_HZ.
	clockTick = 10 * time.Millisecond
	// maxCommand bounds the command line that is read. libvirt's are some KiB.
	maxCommand = 128 << 10
)

func newScanner(proc string, ours func(pid int) bool) *scanner {
	return &scanner{
		proc: proc, ours: ours, uptime: uptime, known: map[int]*candidate{},
		names: make([]byte, 32<<10), file: make([]byte, 4<<10),
	}
}

func uptime() time.Duration {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &t); err != nil {
		return 0 // never on Linux
	}
	return time.Duration(t.Nano())
}

// refresh calls found with every QEMU process there is now; one that ended less
// than listEvery ago may be among them, unless [scanner.forget] was told. With
// all set it looks at every process again.
func (s *scanner) refresh(now time.Time, all bool, found func(*process)) error {
	dir, err := unix.Open(s.proc, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("list processes: %w", err)
	}
	defer func() { _ = unix.Close(dir) }()
	prev := s.last
	s.last = s.lastPID(dir)
	if few := s.last - prev; all || prev == 0 || few < 0 || few > len(s.known)/2 || now.Sub(s.listed) >= listEvery {
		if err := s.list(dir, now); err != nil {
			s.last = 0
			return fmt.Errorf("list processes: %w", err)
		}
	} else {
		for pid := prev + 1; pid <= s.last; pid++ {
			s.known[pid] = &candidate{next: now, scan: s.scan}
		}
	}
	for pid, c := range s.known {
		if c.scan != s.scan {
			delete(s.known, pid)
			continue
		}
		if c.qemu == nil && !c.next.IsZero() && (all || !c.next.After(now)) {
			s.look(dir, pid, c, now)
		}
		if c.qemu != nil {
			found(c.qemu)
		}
	}
	return nil
}

// lastPID returns the PID that the kernel gave last to a process or thread, or
// 0 if it does not tell.
func (s *scanner) lastPID(dir int) int {
	data, err := s.read(dir, "loadavg")
	if err != nil {
		return 0
	}
	data = bytes.TrimSpace(data)
	pid, err := strconv.Atoi(string(data[bytes.LastIndexByte(data, ' ')+1:]))
	if err != nil {
		return 0
	}
	return pid
}

// list marks all processes there are as seen.
func (s *scanner) list(dir int, now time.Time) error {
	s.scan++
	s.listed = now
	for {
		n, err := unix.Getdents(dir, s.names)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || n <= 0 {
			return err
		}
		for b := s.names[:n]; len(b) >= direntName; {
			size := int(binary.NativeEndian.Uint16(b[direntReclen:]))
			if size < direntName || size > len(b) {
				return errors.New("the kernel returned a broken entry")
			}
			if pid, ok := pidOf(b[direntName:size]); ok {
				c := s.known[pid]
				if c == nil {
					c = &candidate{next: now}
					s.known[pid] = c
				}
				c.scan = s.scan
			}
			b = b[size:]
		}
	}
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

// learn makes the next refresh find a process that is known to be a QEMU.
func (s *scanner) learn(p *process) {
	s.known[p.pid] = &candidate{scan: s.scan, qemu: p}
}

// forget makes the next refresh look at the PID anew, if it exists.
func (s *scanner) forget(pid int) {
	delete(s.known, pid)
	s.listed = time.Time{}
}

// look finds out what a process is. One that may go at any time needs no
// error: the next listing will not have it.
func (s *scanner) look(dir, pid int, c *candidate, now time.Time) {
	if c.born == 0 {
		start, kernel, err := s.stat(dir, pid)
		switch {
		case errors.Is(err, unix.ENOENT):
			delete(s.known, pid)
			return
		case err != nil:
			return
		case kernel:
			c.next = time.Time{}
			return
		}
		c.born = time.Duration(start)*clockTick + 1
	}
	// Processes of one age are not looked at all at once.
	wait := min((s.uptime()-c.born)/4, maxRecheck)
	c.next = now.Add(wait - wait/2*time.Duration(pid%16)/16)
	cmdline, err := s.readOf(dir, pid, "cmdline")
	if err != nil || !mayBeQEMU(cmdline) {
		return
	}
	p, ok := parseCommand(cmdline)
	if !ok || !s.leads(dir, pid) || !s.here(pid) {
		return
	}
	p.pid = pid
	if p.start, _, err = s.stat(dir, pid); err == nil {
		c.qemu = p
	}
}

// here reports whether the process is on this host.
func (s *scanner) here(pid int) bool { return s.ours == nil || s.ours(pid) }

// leads reports whether the PID is a process's: /proc also has, hidden, those
// of threads.
func (s *scanner) leads(dir, pid int) bool {
	status, err := s.readOf(dir, pid, "status")
	if err != nil {
		return false
	}
	return bytes.Contains(status, append(strconv.AppendInt([]byte("\nTgid:\t"), int64(pid), 10), '\n'))
}

func (s *scanner) stat(dir, pid int) (start uint64, kernel bool, err error) {
	data, err := s.readOf(dir, pid, "stat")
	if err != nil {
		return 0, false, err
	}
	return procfs.ParseStat(data)
}

func (s *scanner) readOf(dir, pid int, name string) ([]byte, error) {
	return s.read(dir, strconv.Itoa(pid)+"/"+name)
}

// read returns a file, until the next call.
func (s *scanner) read(dir int, path string) ([]byte, error) {
	fd, err := unix.Openat(dir, path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer func() { _ = unix.Close(fd) }()
	for have := 0; ; {
		n, err := unix.Read(fd, s.file[have:])
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || n == 0 {
			return s.file[:have], err
		}
		if have += n; have == len(s.file) {
			if have >= maxCommand {
				return s.file[:have], nil
			}
			s.file = append(s.file, make([]byte, have)...)
		}
	}
}

// mayBeQEMU tells, for most processes at little cost, that it is not.
func mayBeQEMU(cmdline []byte) bool {
	program, _, _ := bytes.Cut(cmdline, []byte{0})
	base := program[bytes.LastIndexByte(program, '/')+1:]
	return bytes.HasPrefix(base, []byte("qemu-")) || string(base) == "kvm" || bytes.Contains(cmdline, []byte("\x00-uuid\x00"))
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
		// In another mount namespace the path may begin with something else.
		if target, err := os.Readlink(filepath.Join(dir, "fd", fd.Name())); err != nil || !strings.HasSuffix(target, "/dev/net/tun") {
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
