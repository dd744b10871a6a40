package lab

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// Proxy stands between a client and libvirtd's read-only socket. It counts the
// client's calls, and holds up libvirtd's answers and events, or cuts them off, if it
// is told to.
type Proxy struct {
	// Socket is where the client connects to.
	Socket string

	target string
	hold   atomic.Int64 // ns
	cut    atomic.Bool
	late   atomic.Pointer[lateAnswers]
	mu     sync.Mutex
	calls  map[uint32]int
	conns  map[net.Conn]bool
	ended  bool
	wg     sync.WaitGroup
}

// Proxy starts one, for as long as the test runs.
func (l *Lab) Proxy(t testing.TB) *Proxy {
	t.Helper()
	p := &Proxy{Socket: filepath.Join(t.TempDir(), "sock"), target: l.ReadOnlySocket(), calls: map[uint32]int{}, conns: map[net.Conn]bool{}}
	listener, err := net.Listen("unix", p.Socket)
	if err != nil {
		t.Fatal(err)
	}
	p.wg.Go(func() {
		for {
			c, err := listener.Accept()
			if err != nil {
				return
			}
			p.wg.Go(func() { p.serve(c) })
		}
	})
	t.Cleanup(func() {
		_ = listener.Close()
		p.mu.Lock()
		p.ended = true
		for c := range p.conns {
			_ = c.Close()
		}
		p.mu.Unlock()
		p.wg.Wait()
	})
	return p
}

// Hold has every packet of libvirtd wait so long; 0: no more.
func (p *Proxy) Hold(d time.Duration) { p.hold.Store(int64(d)) }

// Cut has every connection end in the midst of libvirtd's next packet, or no more.
func (p *Proxy) Cut(on bool) { p.cut.Store(on) }

// lateAnswers are those to one procedure.
type lateAnswers struct {
	procedure uint32
	by        time.Duration
}

// Late has the answers to one procedure, by its number in libvirt's remote
// protocol, come so much later, and all else in time; 0: no more.
func (p *Proxy) Late(procedure uint32, by time.Duration) { p.late.Store(&lateAnswers{procedure, by}) }

// Calls returns how often each of the client's procedures was called since the
// last time that it was asked, by its number in libvirt's remote protocol.
func (p *Proxy) Calls() map[uint32]int {
	p.mu.Lock()
	defer p.mu.Unlock()
	calls := p.calls
	p.calls = map[uint32]int{}
	return calls
}

// keep notes an open connection, and closes it if the test is over.
func (p *Proxy) keep(c net.Conn) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ended {
		_ = c.Close()
		return false
	}
	p.conns[c] = true
	return true
}

func (p *Proxy) serve(client net.Conn) {
	daemon, err := net.Dial("unix", p.target)
	if err != nil || !p.keep(client) || !p.keep(daemon) {
		_ = client.Close()
		return
	}
	var both sync.WaitGroup
	pass := func(from, to net.Conn, each func(packet []byte) (part []byte, later time.Duration)) {
		both.Go(func() {
			for {
				packet, err := readPacket(from)
				if err != nil {
					break
				}
				part, later := each(packet)
				if later > 0 {
					time.AfterFunc(later, func() { _, _ = to.Write(part) })
					continue
				}
				if _, err := to.Write(part); err != nil || len(part) < len(packet) {
					break
				}
			}
			_, _ = client.Close(), daemon.Close()
		})
	}
	pass(client, daemon, p.count)
	pass(daemon, client, func(packet []byte) (part []byte, later time.Duration) {
		time.Sleep(time.Duration(p.hold.Load()))
		if p.cut.Load() {
			return packet[:len(packet)/2], 0
		}
		if late := p.late.Load(); late != nil && remote(packet, 1) && procedureOf(packet) == late.procedure {
			return packet, late.by
		}
		return packet, 0
	})
	both.Wait()
	p.mu.Lock()
	delete(p.conns, client)
	delete(p.conns, daemon)
	p.mu.Unlock()
}

// count counts a call of the program remote.
func (p *Proxy) count(packet []byte) (part []byte, later time.Duration) {
	if remote(packet, 0) {
		p.mu.Lock()
		p.calls[procedureOf(packet)]++
		p.mu.Unlock()
	}
	return packet, 0
}

// remote reports whether a packet is of the program remote and of that type: 0 a
// call, 1 an answer.
func remote(packet []byte, kind uint32) bool {
	return binary.BigEndian.Uint32(packet[4:]) == 0x20008086 && binary.BigEndian.Uint32(packet[16:]) == kind
}

func procedureOf(packet []byte) uint32 { return binary.BigEndian.Uint32(packet[12:]) }

// readPacket reads a packet of libvirt's RPC: its length comes first.
func readPacket(r io.Reader) ([]byte, error) {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return nil, err
	}
	size := binary.BigEndian.Uint32(head[:])
	if size < 28 || size > 32<<20 {
		return nil, fmt.Errorf("a packet of %d bytes", size)
	}
	packet := make([]byte, size)
	copy(packet, head[:])
	_, err := io.ReadFull(r, packet[4:])
	return packet, err
}
