package rtnl

import (
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// Sizes and offsets of linux/netlink.h, rtnetlink.h and if_link.h.
const (
	headerSize   = 16 // struct nlmsghdr
	statsMsgSize = 12 // struct if_stats_msg
	attrSize     = 4  // struct nlattr
	counters     = 8  // of struct rtnl_link_stats64, those that Link has
	seqOffset    = 8
	attrTypeMask = 0x3fff
	statsLink64  = 1 // IFLA_STATS_LINK_64
	filterLink64 = 1 << (statsLink64 - 1)
)

var (
	errTruncated = errors.New("netlink answer is truncated")
	errIndex     = errors.New("netlink answer has no interface index")
)

// request is RTM_GETSTATS for all interfaces.
func request() []byte {
	b := make([]byte, headerSize+statsMsgSize)
	e := binary.NativeEndian
	e.PutUint32(b, uint32(len(b)))
	e.PutUint16(b[4:], unix.RTM_GETSTATS)
	e.PutUint16(b[6:], unix.NLM_F_REQUEST|unix.NLM_F_DUMP)
	e.PutUint32(b[headerSize+8:], filterLink64)
	return b
}

func setSeq(req []byte, seq uint32) {
	binary.NativeEndian.PutUint32(req[seqOffset:], seq)
}

// decoder gathers the messages that answer the request with number seq.
type decoder struct {
	seq         uint32
	links       []Link
	done        bool
	interrupted bool // the list of interfaces changed meanwhile
}

// decode takes what one receive returned: any number of whole messages. Those
// that answer an earlier request are skipped.
func (d *decoder) decode(b []byte) error {
	e := binary.NativeEndian
	for len(b) > 0 && !d.done {
		if len(b) < headerSize {
			return errTruncated
		}
		size := int(e.Uint32(b))
		if size < headerSize || size > len(b) {
			return errTruncated
		}
		msg := b[headerSize:size]
		kind, flags, seq := e.Uint16(b[4:]), e.Uint16(b[6:]), e.Uint32(b[seqOffset:])
		b = b[min(align(size), len(b)):]
		if seq != d.seq {
			continue
		}
		if flags&unix.NLM_F_DUMP_INTR != 0 {
			d.interrupted = true
		}
		switch kind {
		case unix.NLMSG_DONE, unix.NLMSG_ERROR:
			d.done = true
			if err := failure(msg); err != nil {
				return err
			}
		case unix.RTM_NEWSTATS:
			if err := d.stats(msg); err != nil {
				return err
			}
		}
	}
	return nil
}

// failure returns the error of a final message, which starts with 0 or a
// negative errno.
func failure(msg []byte) error {
	if len(msg) < 4 {
		return nil
	}
	if errno := int32(binary.NativeEndian.Uint32(msg)); errno < 0 {
		return fmt.Errorf("kernel answered: %w", unix.Errno(-errno))
	}
	return nil
}

// stats decodes one interface: struct if_stats_msg and attributes.
func (d *decoder) stats(msg []byte) error {
	if len(msg) < statsMsgSize {
		return errTruncated
	}
	e := binary.NativeEndian
	index := int(int32(e.Uint32(msg[4:])))
	if index <= 0 {
		return errIndex
	}
	return attributes(msg[statsMsgSize:], func(kind uint16, value []byte) error {
		if kind != statsLink64 {
			return nil
		}
		if len(value) < 8*counters {
			return errTruncated
		}
		d.links = append(d.links, link(index, value))
		return nil
	})
}

// attributes calls each with the attributes that follow the head of a message.
func attributes(b []byte, each func(kind uint16, value []byte) error) error {
	e := binary.NativeEndian
	for len(b) > 0 {
		if len(b) < attrSize {
			return errTruncated
		}
		size := int(e.Uint16(b))
		if size < attrSize || size > len(b) {
			return errTruncated
		}
		if err := each(e.Uint16(b[2:])&attrTypeMask, b[attrSize:size]); err != nil {
			return err
		}
		b = b[min(align(size), len(b)):]
	}
	return nil
}

// link reads the first members of a struct rtnl_link_stats64.
func link(index int, b []byte) Link {
	var v [counters]uint64
	for i := range v {
		v[i] = binary.NativeEndian.Uint64(b[8*i:])
	}
	return Link{
		Index:     index,
		RxPackets: v[0], TxPackets: v[1],
		RxBytes: v[2], TxBytes: v[3],
		RxErrors: v[4], TxErrors: v[5],
		RxDropped: v[6], TxDropped: v[7],
	}
}

// align rounds up to NLMSG_ALIGNTO, which is NLA_ALIGNTO as well.
func align(n int) int {
	return (n + 3) &^ 3
}
