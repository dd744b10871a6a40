package bus

import (
	"bytes"
	"io"
	"net"
	"testing"
	"time"
)

func TestWhatIsReadCalmlyIsWhatWasSent(t *testing.T) {
	for _, gather := range []time.Duration{0, time.Millisecond} {
		near, far := net.Pipe()
		c := &calmConn{Conn: near}
		c.gather.Store(int64(gather))
		want := bytes.Repeat([]byte("0123456789abcdef"), readBuffer/4)
		go func() {
			for sent, n := 0, 1; sent < len(want); sent, n = sent+n, min(2*n, len(want)-sent-n) {
				if _, err := far.Write(want[sent : sent+n]); err != nil {
					return // the reader says why
				}
			}
			_ = far.Close()
		}()
		got, err := io.ReadAll(io.MultiReader(io.LimitReader(c, 3), c))
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("gather %v: got %d bytes and %v, want the %d that were sent", gather, len(got), err, len(want))
		}
	}
}
