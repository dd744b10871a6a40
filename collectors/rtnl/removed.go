package rtnl

import (
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// ErrMissed says that more interfaces were removed than there was room for, so
// that of some nobody knows what they had counted.
var ErrMissed = errors.New("more interfaces were removed at once than the kernel keeps news of")

// Removed is an interface that was removed, with what it had counted to its end.
type Removed struct {
	Link
	Name string
}

const (
	ifinfoSize  = 16 // struct ifinfomsg
	ifinfoIndex = 4
	// removedRoom is for what is removed between two polls: some 2 KiB each.
	removedRoom = 4 << 20
)

// subscribe opens a socket that the kernel tells of removed interfaces.
func subscribe() (fd int, err error) {
	fd, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
	if err != nil {
		return 0, err
	}
	// A host without CAP_NET_ADMIN has the room that its administrator left.
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, removedRoom) != nil {
		err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, removedRoom)
	}
	if err == nil {
		err = unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, onlyRemovals())
	}
	if err == nil {
		err = unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: 1 << (unix.RTNLGRP_LINK - 1)})
	}
	if err != nil {
		return 0, errors.Join(err, unix.Close(fd))
	}
	return fd, nil
}

// onlyRemovals is a socket filter: of the many messages about interfaces it
// passes RTM_DELLINK, but not those of ports that leave a bridge.
func onlyRemovals() *unix.SockFprog {
	var kind [2]byte // as it is in memory
	binary.NativeEndian.PutUint16(kind[:], unix.RTM_DELLINK)
	code := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_H | unix.BPF_ABS, K: 4},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jf: 3, K: uint32(binary.BigEndian.Uint16(kind[:]))},
		{Code: unix.BPF_LD | unix.BPF_B | unix.BPF_ABS, K: headerSize},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jf: 1, K: unix.AF_UNSPEC},
		{Code: unix.BPF_RET | unix.BPF_K, K: 1<<32 - 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: 0},
	}
	return &unix.SockFprog{Len: uint16(len(code)), Filter: &code[0]}
}

// Removed calls each with the interfaces that were removed since the last call.
// The error is [ErrMissed] if it may not have been all.
func (c *Conn) Removed(each func(Removed)) error {
	missed := false
	for {
		n, err := unix.Read(c.removed, c.buf)
		switch {
		case err == unix.EINTR:
		case err == unix.ENOBUFS:
			missed = true
		case err == unix.EAGAIN && missed:
			return ErrMissed
		case err == unix.EAGAIN:
			return nil
		case err != nil:
			return fmt.Errorf("receive what was removed: %w", err)
		default:
			if err := removals(c.buf[:n], each); err != nil {
				return err
			}
		}
	}
}

// removals decodes what one receive returned: any number of whole messages.
func removals(b []byte, each func(Removed)) error {
	e := binary.NativeEndian
	for len(b) > 0 {
		if len(b) < headerSize {
			return errTruncated
		}
		size := int(e.Uint32(b))
		if size < headerSize || size > len(b) {
			return errTruncated
		}
		kind, msg := e.Uint16(b[4:]), b[headerSize:size]
		b = b[min(align(size), len(b)):]
		if kind != unix.RTM_DELLINK {
			continue
		}
		if len(msg) < ifinfoSize {
			return errTruncated
		}
		r := Removed{Link: Link{Index: int(int32(e.Uint32(msg[ifinfoIndex:])))}}
		counted := false
		err := attributes(msg[ifinfoSize:], func(kind uint16, value []byte) error {
			switch kind {
			case unix.IFLA_IFNAME:
				r.Name = unix.ByteSliceToString(value)
			case unix.IFLA_STATS64:
				if len(value) < 8*counters {
					return errTruncated
				}
				r.Link, counted = link(r.Index, value), true
			}
			return nil
		})
		switch {
		case err != nil:
			return err
		case r.Index <= 0:
			return errIndex
		case counted && msg[0] == unix.AF_UNSPEC:
			each(r)
		}
	}
	return nil
}
