package lab

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kvmeter/kvmeter/collectors/rtnl"
)

// SendUDP sends count UDP frames of 42 + size bytes from the host to the
// guest's first NIC and returns when the guest's device has taken all of them.
// Nothing comes back.
func (g *Guest) SendUDP(ctx context.Context, count, size int) error {
	if len(g.NICs()) == 0 {
		return fmt.Errorf("send to guest %s: it has no NIC", g.Name)
	}
	if err := g.host.Inside(func() error { return sendUDP(ctx, g.NICs()[0], count, size) }); err != nil {
		return fmt.Errorf("send to guest %s: %w", g.Name, err)
	}
	return nil
}

func sendUDP(ctx context.Context, nic NIC, count, size int) error {
	// A tap drops what its queue of 1,000 frames cannot hold.
	const burst = 64
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	frame, err := udpFrame(nic, size)
	if err != nil {
		return err
	}
	dev, err := net.InterfaceByName(nic.Tap)
	if err != nil {
		return err
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("packet socket: %w", err)
	}
	defer func() { _ = unix.Close(fd) }()
	to := &unix.SockaddrLinklayer{Ifindex: dev.Index, Protocol: htons(unix.ETH_P_IP), Halen: 6}
	copy(to.Addr[:], frame[:6])

	links, err := rtnl.Open()
	if err != nil {
		return err
	}
	defer func() { _ = links.Close() }()
	var table []rtnl.Link
	taken := func() (uint64, error) {
		table, err := links.Read(ctx, table[:0])
		if err != nil {
			return 0, err
		}
		l, _ := rtnl.Find(table, dev.Index)
		return l.TxPackets, nil
	}
	base, err := taken()
	if err != nil {
		return err
	}
	for sent := 0; sent < count; {
		for range min(burst, count-sent) {
			if err := unix.Sendto(fd, frame, 0, to); err != nil {
				return err
			}
			sent++
		}
		var now uint64
		var failed error
		err := poll(ctx, func() bool {
			now, failed = taken()
			return failed != nil || now >= base+uint64(sent)
		})
		if failed != nil {
			return failed
		}
		if err != nil {
			return fmt.Errorf("the guest has taken %d of %d frames: %w", now-base, sent, err)
		}
	}
	return nil
}

func htons(v uint16) uint16 { return v<<8 | v>>8 }

// udpFrame is a whole Ethernet frame to the NIC, from an address that nobody
// has, to port 9 (discard).
func udpFrame(nic NIC, size int) ([]byte, error) {
	const headers = 14 + 20 + 8
	if size < 0 || size > 1472 {
		return nil, errors.New("size is the payload in bytes, at most 1472")
	}
	mac, err := net.ParseMAC(nic.MAC)
	if err != nil {
		return nil, err
	}
	be := binary.BigEndian
	f := make([]byte, headers+size)
	copy(f, mac)
	copy(f[6:], []byte{0x52, 0x54, 0, 0, 0, 1})
	be.PutUint16(f[12:], unix.ETH_P_IP)
	ip := f[14:34]
	ip[0], ip[8], ip[9] = 0x45, 64, unix.IPPROTO_UDP
	be.PutUint16(ip[2:], uint16(20+8+size))
	copy(ip[12:], net.IPv4(198, 18, 0, 2).To4())
	copy(ip[16:], net.ParseIP(nic.IP).To4())
	var sum uint32
	for i := 0; i < len(ip); i += 2 {
		sum += uint32(be.Uint16(ip[i:]))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	be.PutUint16(ip[10:], ^uint16(sum))
	udp := f[34:]
	be.PutUint16(udp, 9)
	be.PutUint16(udp[2:], 9)
	be.PutUint16(udp[4:], uint16(8+size))
	return f, nil
}
