package bus

import (
	"net"
	"sync/atomic"
	"time"
)

// calmConn is a connection that is read rarely and much at once. A broker that
// hands out small messages one by one wakes its consumer for each of them, which
// costs more CPU time than reading them.
type calmConn struct {
	net.Conn
	gather atomic.Int64 // ns that a read waits for more; 0: not at all

	buf   [readBuffer]byte
	ready []byte // of buf, what was not asked for yet
	last  int    // how much the last read from the connection gave
}

// readBuffer is how much is read from a connection at once, in bytes: the library
// asks for 4 KiB, which is one or two messages a system call.
const readBuffer = 64 << 10

// Read implements [net.Conn]. After a read that gave much the next one is not
// delayed: there is more already.
func (c *calmConn) Read(p []byte) (int, error) {
	if len(c.ready) == 0 {
		if gather := time.Duration(c.gather.Load()); gather > 0 && c.last < readBuffer/2 {
			time.Sleep(gather)
		}
		n, err := c.Conn.Read(c.buf[:])
		c.ready, c.last = c.buf[:n], n
		if n == 0 {
			return 0, err
		}
	}
	n := copy(p, c.ready)
	c.ready = c.ready[n:]
	return n, nil
}
