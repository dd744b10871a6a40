package ipmi

import (
	"encoding/binary"
	"errors"
	"io"
	"net"

	"github.com/kvmeter/kvmeter/collectors/ipmi/bmc"
	"github.com/kvmeter/kvmeter/collectors/ipmi/bmc/bmctest"
)

// ServeDummy answers ipmitool's interface "dummy" on l as b does, until l is
// closed. It is a stream of C structures (ipmitool's src/plugins/dummy/dummy.h):
// of a request network function, LUN, command and so on in 16 bytes, of an
// answer 24 bytes, each followed by the data.
func ServeDummy(l net.Listener, b *bmctest.BMC) error {
	for {
		conn, err := l.Accept()
		switch {
		case errors.Is(err, net.ErrClosed):
			return nil
		case err != nil:
			return err
		}
		go func() {
			_ = serveDummy(conn, b) // it ends with ipmitool
			_ = conn.Close()
		}()
	}
}

func serveDummy(conn net.Conn, b *bmctest.BMC) error {
	for {
		var head [16]byte
		if _, err := io.ReadFull(conn, head[:]); err != nil {
			return err
		}
		data := make([]byte, binary.LittleEndian.Uint16(head[4:]))
		if _, err := io.ReadFull(conn, data); err != nil {
			return err
		}
		r := b.Handle(bmc.Addr{LUN: head[1]}, head[0], head[2], data)
		if len(r) == 0 {
			return errors.New("the BMC keeps silent")
		}
		answer := make([]byte, 24, 24+len(r))
		answer[0], answer[1], answer[3], answer[4] = head[0]|1, head[2], head[1], r[0]
		binary.LittleEndian.PutUint32(answer[8:], uint32(len(r)-1))
		if _, err := conn.Write(append(answer, r[1:]...)); err != nil {
			return err
		}
	}
}
