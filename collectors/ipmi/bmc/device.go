package bmc

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Paths are where the kernel's driver has its first device, by age of udev.
var Paths = []string{"/dev/ipmi0", "/dev/ipmi/0", "/dev/ipmidev/0"}

// The driver's interface (include/uapi/linux/ipmi.h).
const (
	addrSystem    = 0x0c // IPMI_SYSTEM_INTERFACE_ADDR_TYPE
	addrIPMB      = 0x01 // IPMI_IPMB_ADDR_TYPE
	channelSystem = 0x0f // IPMI_BMC_CHANNEL

	ioctlReceive = 3<<30 | unsafe.Sizeof(ipmiRecv{})<<16 | 'i'<<8 | 11 // IPMICTL_RECEIVE_MSG_TRUNC
	ioctlSend    = 2<<30 | unsafe.Sizeof(ipmiReq{})<<16 | 'i'<<8 | 13  // IPMICTL_SEND_COMMAND
)

// ipmiAddr is struct ipmi_ipmb_addr, and struct ipmi_system_interface_addr
// where its lun stands in slave's place.
type ipmiAddr struct {
	kind    int32
	channel int16
	slave   byte
	lun     byte
}

type ipmiMsg struct {
	netFn, cmd byte
	len        uint16
	data       unsafe.Pointer
}

type ipmiReq struct {
	addr    unsafe.Pointer
	addrLen uint32
	id      int64
	msg     ipmiMsg
}

type ipmiRecv struct {
	kind    int32
	addr    unsafe.Pointer
	addrLen uint32
	id      int64
	msg     ipmiMsg
}

// giveUp is how long after its sending a command is no more expected to be
// answered by the driver, which itself gives up after some seconds.
const giveUp = 30 * time.Second

// Linux is a BMC behind the kernel's driver. It sends both to the BMC itself and
// over IPMB, with a time-out of each request's own.
type Linux struct {
	f    *os.File
	conn syscall.RawConn

	id      int64
	pending []pending // commands for the BMC itself that were given up, oldest first

	addr, from ipmiAddr
	req        ipmiReq
	recv       ipmiRecv
	data       [maxRequest]byte
	buf        [maxReply]byte
	errno      syscall.Errno
	send       func(fd uintptr)
	receive    func(fd uintptr) bool
}

type pending struct {
	id   int64
	sent time.Time
}

// Open opens the kernel's first IPMI device, or the one at path. Its errors say
// what to do.
func Open(path string) (*Linux, error) {
	paths := Paths
	if path != "" {
		paths = []string{path}
	}
	var f *os.File
	var err error
	for _, p := range paths {
		if f, err = os.OpenFile(p, os.O_RDWR, 0); !errors.Is(err, os.ErrNotExist) {
			break
		}
	}
	if err != nil {
		return nil, explain(paths[0], err)
	}
	conn, err := f.SyscallConn()
	if err == nil {
		err = f.SetReadDeadline(time.Time{}) // fails unless it can be waited for
	}
	if err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("%s is no IPMI device: %w", f.Name(), err)
	}
	l := &Linux{f: f, conn: conn}
	l.send = func(fd uintptr) {
		_, _, l.errno = unix.Syscall(unix.SYS_IOCTL, fd, ioctlSend, uintptr(unsafe.Pointer(&l.req)))
	}
	l.receive = func(fd uintptr) bool {
		_, _, l.errno = unix.Syscall(unix.SYS_IOCTL, fd, ioctlReceive, uintptr(unsafe.Pointer(&l.recv)))
		return l.errno != unix.EAGAIN && l.errno != unix.EINTR
	}
	return l, nil
}

// explain says what to do about a device that can't be opened.
func explain(path string, err error) error {
	switch {
	case errors.Is(err, os.ErrNotExist):
		return fmt.Errorf("there is no %s: the host has no BMC that speaks IPMI (some speak only Redfish), or the modules ipmi_si and ipmi_devintf are not loaded", path)
	case errors.Is(err, os.ErrPermission):
		return fmt.Errorf("%w: let the agent's group use the device by a udev rule (docs/ipmi.md)", err)
	case errors.Is(err, unix.EBUSY):
		return fmt.Errorf("%w: another program holds the device", err)
	case errors.Is(err, unix.ENXIO), errors.Is(err, unix.ENODEV):
		return fmt.Errorf("%w: the driver found no BMC", err)
	}
	return err
}

// Name returns the path of the device.
func (l *Linux) Name() string { return l.f.Name() }

// Close closes the device.
func (l *Linux) Close() error { return l.f.Close() }

// Send implements [Transport].
func (l *Linux) Send(ctx context.Context, r *Request, buf []byte) (int, error) {
	start := time.Now()
	if err := l.f.SetReadDeadline(start.Add(r.Timeout)); err != nil {
		return 0, fmt.Errorf("wait for %s: %w", l.f.Name(), err)
	}
	// Whatever ends ctx ends the waiting.
	defer context.AfterFunc(ctx, func() { _ = l.f.SetReadDeadline(start) })()
	if ctx.Err() != nil {
		return 0, ctx.Err()
	}
	if r.To.IsBMC() {
		if err := l.settle(start); err != nil {
			return 0, l.why(ctx, err, ErrBusy)
		}
	}
	l.id++
	id := l.id
	if err := l.submit(r, id); err != nil {
		return 0, err
	}
	for {
		got, n, err := l.next(buf)
		if err != nil {
			if r.To.IsBMC() && errors.Is(err, os.ErrDeadlineExceeded) {
				l.pending = append(l.pending, pending{id, start})
			}
			return 0, l.why(ctx, err, ErrTimeout)
		}
		if got == id {
			return n, nil
		}
		l.answered(got)
	}
}

// why says why waiting ended: late where its time was up.
func (l *Linux) why(ctx context.Context, err, late error) error {
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.Is(err, os.ErrDeadlineExceeded):
		return late
	}
	return err
}

// fault says what failed.
func (l *Linux) fault(what string, err error) error {
	if errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENXIO) || errors.Is(err, unix.EBADF) || errors.Is(err, os.ErrClosed) {
		return fmt.Errorf("%s %s: %w: %w", what, l.f.Name(), ErrGone, err)
	}
	return fmt.Errorf("%s %s: %w", what, l.f.Name(), err)
}

// settle waits for the answers of commands that were given up: the interface
// takes one at a time, and what is sent now would wait behind them.
func (l *Linux) settle(now time.Time) error {
	for len(l.pending) > 0 {
		if now.Sub(l.pending[0].sent) > giveUp {
			l.pending = l.pending[1:]
			continue
		}
		id, _, err := l.next(nil)
		if err != nil {
			return err
		}
		l.answered(id)
	}
	return nil
}

func (l *Linux) answered(id int64) {
	l.pending = slices.DeleteFunc(l.pending, func(p pending) bool { return p.id == id })
}

func (l *Linux) submit(r *Request, id int64) error {
	l.addr = ipmiAddr{kind: addrSystem, channel: channelSystem, slave: r.To.LUN}
	if !r.To.IsBMC() {
		l.addr = ipmiAddr{kind: addrIPMB, channel: int16(r.To.Channel), slave: r.To.Slave, lun: r.To.LUN}
	}
	n := copy(l.data[:], r.Data)
	l.req = ipmiReq{
		addr: unsafe.Pointer(&l.addr), addrLen: uint32(unsafe.Sizeof(l.addr)), id: id,
		msg: ipmiMsg{netFn: r.NetFn, cmd: r.Cmd, len: uint16(n), data: unsafe.Pointer(&l.data)},
	}
	err := l.conn.Control(l.send)
	runtime.KeepAlive(l)
	if err == nil && l.errno != 0 {
		err = l.errno
	}
	if err != nil {
		return l.fault("send to", err)
	}
	return nil
}

// next returns the id of the driver's next message and puts its data into buf.
func (l *Linux) next(buf []byte) (id int64, n int, err error) {
	l.recv = ipmiRecv{
		addr: unsafe.Pointer(&l.from), addrLen: uint32(unsafe.Sizeof(l.from)),
		msg: ipmiMsg{len: maxReply, data: unsafe.Pointer(&l.buf)},
	}
	err = l.conn.Read(l.receive)
	runtime.KeepAlive(l)
	if err == nil && l.errno != 0 && l.errno != unix.EMSGSIZE { // the latter: it was cut
		err = l.errno
	}
	if err != nil {
		return 0, 0, l.fault("receive from", err)
	}
	return l.recv.id, copy(buf, l.buf[:min(int(l.recv.msg.len), maxReply)]), nil
}
