// Package ipmi boots guests whose /dev/ipmi0 is backed by QEMU's own BMC, by
// OpenIPMI's ipmi_sim, or by the fake one of package bmctest, for tests that
// compare what kvmeter reads with what other programs read.
package ipmi

import (
	"bufio"
	"errors"
	"net"
	"sync"
	"time"

	"github.com/kvmeter/kvmeter/collectors/ipmi/bmc"
	"github.com/kvmeter/kvmeter/collectors/ipmi/bmc/bmctest"
)

// Bytes of the protocol between QEMU's ipmi-bmc-extern and a BMC (OpenIPMI's
// "VM" codec, README.vm there).
const (
	endMessage = 0xa0
	endCommand = 0xa1
	escape     = 0xaa // the next byte has 10h added to its bits

	commandNoAttention = 0x00
	commandAttention   = 0x02 // with an interrupt
	commandEnableIRQ   = 0x05
	commandVersion     = 0xff
)

// Serve answers what QEMU asks over conn, until it ends, as b does.
func Serve(conn net.Conn, b *bmctest.BMC) error {
	s := vmServer{bmc: b, conn: conn}
	if err := errors.Join(s.frame(endCommand, commandVersion, 1), s.frame(endCommand, commandEnableIRQ)); err != nil {
		return err
	}
	in := bufio.NewReader(conn)
	var message []byte
	escaped := false
	for {
		c, err := in.ReadByte()
		switch {
		case err != nil:
			if errors.Is(err, net.ErrClosed) {
				return nil
			}
			return err
		case c == escape:
			escaped = true
		case c == endCommand: // of QEMU: what it can do, resets
			message = message[:0]
		case c == endMessage:
			if err := s.message(message); err != nil {
				return err
			}
			message = message[:0]
		case escaped:
			message, escaped = append(message, c&^0x10), false
		default:
			message = append(message, c)
		}
	}
}

// vmServer is a BMC at the end of a connection.
type vmServer struct {
	bmc  *bmctest.BMC
	conn net.Conn

	mu     sync.Mutex
	queued [][]byte // messages from the IPMB that wait for Get Message
}

func (s *vmServer) frame(end byte, body ...byte) error {
	var out []byte
	for _, c := range body {
		switch c {
		case endMessage, endCommand, escape:
			out = append(out, escape, c|0x10)
		default:
			out = append(out, c)
		}
	}
	_, err := s.conn.Write(append(out, end))
	return err
}

// message answers a request: sequence, network function and LUN, command,
// data, checksum.
func (s *vmServer) message(m []byte) error {
	if len(m) < 4 || sum(m) != 0 {
		return nil
	}
	sequence, function, command, data := m[0], m[1], m[2], m[3:len(m)-1]
	answer := s.answer(function>>2, command, function&3, data)
	if answer == nil {
		return nil
	}
	out := append([]byte{sequence, function | 1<<2, command}, answer...)
	return s.frame(endMessage, append(out, -sum(out))...)
}

func sum(b []byte) (s byte) {
	for _, c := range b {
		s += c
	}
	return s
}

func (s *vmServer) answer(function, command, lun byte, data []byte) []byte {
	if function != 0x06 {
		return s.bmc.Handle(bmc.Addr{LUN: lun}, function, command, data)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	switch command {
	case 0x31: // Get Message Flags (§22.4)
		if len(s.queued) > 0 {
			return []byte{0, 1}
		}
		return []byte{0, 0}
	case 0x33: // Get Message (§22.6)
		if len(s.queued) == 0 {
			return []byte{0x80}
		}
		m := s.queued[0]
		if s.queued = s.queued[1:]; len(s.queued) == 0 {
			_ = s.frame(endCommand, commandNoAttention) // an error there is one here next
		}
		return append([]byte{0}, m...)
	case 0x34: // Send Message (§22.7)
		return s.send(data)
	}
	return s.bmc.Handle(bmc.Addr{LUN: lun}, function, command, data)
}

// send passes a request on to the IPMB: channel, then the frame of §22.7 and
// IPMB v1.0 §2.11: responder, function and LUN, checksum, requester, sequence
// and LUN, command, data, checksum. The answer comes back by Get Message.
func (s *vmServer) send(d []byte) []byte {
	if len(d) < 8 {
		return []byte{bmc.CodeLength}
	}
	channel, f := d[0]&0x0f, d[1:]
	answer := s.bmc.Handle(bmc.Addr{Slave: f[0], Channel: channel, LUN: f[1] & 3}, f[1]>>2, f[5], f[6:len(f)-1])
	switch {
	case answer == nil: // it keeps silent, which its requester finds out by itself
		return []byte{0}
	case len(answer) == 1 && answer[0] == 0x83:
		return answer
	}
	function := (f[1]>>2|1)<<2 | f[4]&3
	head := []byte{channel, function, -sum([]byte{f[3], function})}
	body := append([]byte{f[0], f[4] &^ 3, f[5]}, answer...)
	m := append(append(head, body...), -sum(body))
	time.AfterFunc(2*time.Millisecond, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.queued = append(s.queued, m)
		_ = s.frame(endCommand, commandAttention)
	})
	return []byte{0}
}
