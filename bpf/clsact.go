package bpf

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// What linux/pkt_sched.h and pkt_cls.h name so.
const (
	tcHClsact     = 0xfffffff1 // TC_H_CLSACT, as a parent
	tcHHandle     = 0xffff0000 // TC_H_MAKE(TC_H_CLSACT, 0)
	tcaKind       = 1          // TCA_KIND
	tcaOptions    = 2          // TCA_OPTIONS
	tcaBPFFD      = 6          // TCA_BPF_FD
	tcaBPFName    = 7          // TCA_BPF_NAME
	tcaBPFFlags   = 8          // TCA_BPF_FLAGS
	tcaActDirect  = 1          // TCA_BPF_FLAG_ACT_DIRECT
	nlHeaderSize  = 16         // struct nlmsghdr
	tcMessageSize = 20         // struct tcmsg
)

// Our filters have this priority, late among others, and this handle: whatever
// an earlier run left there is replaced.
const (
	tcPriority = 49000
	tcHandle   = 1
)

// parents are where a direction is counted: TC_H_MAKE(TC_H_CLSACT,
// TC_H_MIN_EGRESS) and TC_H_MIN_INGRESS. The guest's is the other way round.
var parents = [directions]uint32{incoming: 0xfffffff3, outgoing: 0xfffffff2}

// tcSocket attaches programs to interfaces of the network namespace that it was
// opened in, by a filter below the clsact queueing discipline.
type tcSocket struct {
	fd  int
	seq uint32
	buf [4096]byte
}

func openTC() (*tcSocket, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open netlink socket: %w", err)
	}
	tv := unix.NsecToTimeval((5 * time.Second).Nanoseconds())
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("set deadline of netlink socket: %w", err)
	}
	return &tcSocket{fd: fd}, nil
}

func (s *tcSocket) close() error {
	return unix.Close(s.fd)
}

// add runs the program for the interface's packets. The clsact that it may
// have to add stays there: others may have come to use it.
func (s *tcSocket) add(index int, parent uint32, prog int) error {
	qdisc := tcMessage(unix.RTM_NEWQDISC, unix.NLM_F_CREATE|unix.NLM_F_EXCL, index, tcHHandle, tcHClsact, 0)
	qdisc = text(qdisc, tcaKind, "clsact")
	if err := s.do(qdisc); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("add clsact: %w", err)
	}
	filter := tcFilter(unix.RTM_NEWTFILTER, unix.NLM_F_CREATE|unix.NLM_F_REPLACE, index, parent)
	filter = text(filter, tcaKind, "bpf")
	start := len(filter)
	filter = attribute(filter, tcaOptions, 0)
	filter = number(filter, tcaBPFFD, uint32(prog))
	filter = text(filter, tcaBPFName, "kvmeter")
	filter = number(filter, tcaBPFFlags, tcaActDirect)
	binary.NativeEndian.PutUint16(filter[start:], uint16(len(filter)-start))
	if err := s.do(filter); err != nil {
		return fmt.Errorf("add filter: %w", err)
	}
	return nil
}

func (s *tcSocket) remove(index int, parent uint32) error {
	filter := text(tcFilter(unix.RTM_DELTFILTER, 0, index, parent), tcaKind, "bpf")
	if err := s.do(filter); err != nil {
		return fmt.Errorf("remove filter: %w", err)
	}
	return nil
}

// tcFilter starts a message about our filter, which is for every protocol.
func tcFilter(kind, flags uint16, index int, parent uint32) []byte {
	var all [2]byte
	binary.BigEndian.PutUint16(all[:], unix.ETH_P_ALL)
	return tcMessage(kind, flags, index, tcHandle, parent, tcPriority<<16|uint32(binary.NativeEndian.Uint16(all[:])))
}

// tcMessage starts a message: struct nlmsghdr and struct tcmsg.
func tcMessage(kind, flags uint16, index int, handle, parent, info uint32) []byte {
	b := make([]byte, nlHeaderSize+tcMessageSize, 128)
	e := binary.NativeEndian
	e.PutUint16(b[4:], kind)
	e.PutUint16(b[6:], unix.NLM_F_REQUEST|unix.NLM_F_ACK|flags)
	e.PutUint32(b[nlHeaderSize+4:], uint32(index))
	e.PutUint32(b[nlHeaderSize+8:], handle)
	e.PutUint32(b[nlHeaderSize+12:], parent)
	e.PutUint32(b[nlHeaderSize+16:], info)
	return b
}

// attribute appends the head of an attribute with size bytes.
func attribute(b []byte, kind uint16, size int) []byte {
	b = binary.NativeEndian.AppendUint16(b, uint16(4+size))
	return binary.NativeEndian.AppendUint16(b, kind)
}

func number(b []byte, kind uint16, n uint32) []byte {
	return binary.NativeEndian.AppendUint32(attribute(b, kind, 4), n)
}

func text(b []byte, kind uint16, s string) []byte {
	b = append(attribute(b, kind, len(s)+1), s...)
	b = append(b, 0)
	for len(b)%4 != 0 {
		b = append(b, 0)
	}
	return b
}

// do sends a message and waits for the kernel's answer to it.
func (s *tcSocket) do(msg []byte) error {
	s.seq++
	e := binary.NativeEndian
	e.PutUint32(msg, uint32(len(msg)))
	e.PutUint32(msg[8:], s.seq)
	if _, err := unix.Write(s.fd, msg); err != nil {
		return fmt.Errorf("send request: %w", err)
	}
	for {
		n, err := unix.Read(s.fd, s.buf[:])
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return fmt.Errorf("receive answer: %w", err)
		}
		if err, done := tcAnswer(s.buf[:n], s.seq); done {
			return err
		}
	}
}

var errTCAnswer = errors.New("netlink answer is truncated")

// tcAnswer looks for the answer to the message with number seq: an error
// message with 0 or a negative errno.
func tcAnswer(b []byte, seq uint32) (err error, done bool) {
	e := binary.NativeEndian
	for len(b) > 0 {
		if len(b) < nlHeaderSize {
			return errTCAnswer, true
		}
		size := int(e.Uint32(b))
		if size < nlHeaderSize || size > len(b) {
			return errTCAnswer, true
		}
		if e.Uint32(b[8:]) == seq && e.Uint16(b[4:]) == unix.NLMSG_ERROR {
			if size < nlHeaderSize+4 {
				return errTCAnswer, true
			}
			if errno := int32(e.Uint32(b[nlHeaderSize:])); errno < 0 {
				return unix.Errno(-errno), true
			}
			return nil, true
		}
		b = b[min((size+3)&^3, len(b)):]
	}
	return nil, false
}
