package rtnl

import (
	"context"
	"encoding/binary"
	"errors"
	"os"
	"os/exec"
	"slices"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// captured is the kernel's answer for lo and two taps, of which one has been
// given 2,000 frames of 1,000 bytes and has sent 300 of 500.
func captured(t testing.TB) []byte {
	t.Helper()
	b, err := os.ReadFile("testdata/lo-and-two-taps.bin")
	if err != nil {
		t.Fatal(err)
	}
	return b
}

const capturedSeq = 2

func message(kind, flags uint16, seq uint32, body ...byte) []byte {
	b := make([]byte, headerSize, headerSize+len(body))
	binary.NativeEndian.PutUint32(b, uint32(headerSize+len(body)))
	binary.NativeEndian.PutUint16(b[4:], kind)
	binary.NativeEndian.PutUint16(b[6:], flags)
	binary.NativeEndian.PutUint32(b[8:], seq)
	return append(b, body...)
}

func int32Bytes(n int32) []byte {
	return binary.NativeEndian.AppendUint32(nil, uint32(n))
}

func TestDecode(t *testing.T) {
	taps := []Link{
		{Index: 1},
		{Index: 2, RxPackets: 2000, RxBytes: 2_000_000, TxPackets: 300, TxBytes: 150_000, RxDropped: 2000},
		{Index: 3},
	}
	done := message(unix.NLMSG_DONE, 0, 2, int32Bytes(0)...)
	interrupted := captured(t)
	interrupted[6] |= unix.NLM_F_DUMP_INTR
	noIndex := captured(t)
	clear(noIndex[headerSize+4 : headerSize+8])
	for name, tc := range map[string]struct {
		in    []byte
		seq   uint32
		links []Link
		d     decoder // done and interrupted as wanted
		err   error
	}{
		"an answer of the kernel":                 {in: captured(t), links: taps, d: decoder{done: true}},
		"an answer to another request is skipped": {in: captured(t), seq: 3},
		"what follows the end is not read":        {in: append(done, 1, 2, 3), d: decoder{done: true}},
		"a list that changed says so":             {in: interrupted, links: taps, d: decoder{done: true, interrupted: true}},
		"a refusal is an error":                   {in: message(unix.NLMSG_ERROR, 0, 2, int32Bytes(-int32(unix.EPERM))...), d: decoder{done: true}, err: unix.EPERM},
		"a dump that fails midway is an error":    {in: message(unix.NLMSG_DONE, 0, 2, int32Bytes(-int32(unix.EMSGSIZE))...), d: decoder{done: true}, err: unix.EMSGSIZE},
		"another kind of message is skipped":      {in: message(unix.RTM_NEWLINK, 0, 2, 1, 2, 3, 4)},
		"half a header":                           {in: done[:headerSize-1], err: errTruncated},
		"half a message":                          {in: captured(t)[:100], err: errTruncated},
		"a message without an interface":          {in: message(unix.RTM_NEWSTATS, 0, 2, 1, 2, 3, 4), err: errTruncated},
		"an interface without a number":           {in: noIndex, err: errIndex},
		"an interface without counters":           {in: message(unix.RTM_NEWSTATS, 0, 2, 0, 0, 0, 0, 9, 0, 0, 0, 1, 0, 0, 0)},
		"counters too short": {
			in:  message(unix.RTM_NEWSTATS, 0, 2, 0, 0, 0, 0, 9, 0, 0, 0, 1, 0, 0, 0, 12, 0, 1, 0, 1, 2, 3, 4, 5, 6, 7, 8),
			err: errTruncated,
		},
		"an attribute of no length": {
			in:  message(unix.RTM_NEWSTATS, 0, 2, 0, 0, 0, 0, 9, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1, 0),
			err: errTruncated,
		},
	} {
		t.Run(name, func(t *testing.T) {
			d := decoder{seq: capturedSeq}
			if tc.seq != 0 {
				d.seq = tc.seq
			}
			err := d.decode(tc.in)
			if !errors.Is(err, tc.err) || tc.err == nil && err != nil {
				t.Errorf("got %v, want %v", err, tc.err)
			}
			if err == nil && !slices.Equal(d.links, tc.links) {
				t.Errorf("got  %+v\nwant %+v", d.links, tc.links)
			}
			if d.done != tc.d.done || d.interrupted != tc.d.interrupted {
				t.Errorf("got done %v, interrupted %v; want %v, %v", d.done, d.interrupted, tc.d.done, tc.d.interrupted)
			}
		})
	}
}

func FuzzDecode(f *testing.F) {
	f.Add(captured(f))
	f.Add(message(unix.NLMSG_ERROR, 0, 2, int32Bytes(-1)...))
	f.Fuzz(func(t *testing.T, b []byte) {
		d := decoder{seq: capturedSeq}
		if err := d.decode(b); err != nil {
			return
		}
		for _, l := range d.links {
			if l.Index <= 0 {
				t.Errorf("an interface has index %d", l.Index)
			}
		}
		if len(d.links) > len(b)/(headerSize+statsMsgSize+attrSize+8*counters) {
			t.Errorf("%d interfaces from %d bytes", len(d.links), len(b))
		}
	})
}

func TestFind(t *testing.T) {
	links := []Link{{Index: 1}, {Index: 4, RxBytes: 7}, {Index: 9}}
	for index, want := range map[int]bool{0: false, 1: true, 3: false, 4: true, 9: true, 10: false} {
		if l, ok := Find(links, index); ok != want || ok && l.Index != index {
			t.Errorf("%d: got %+v, %v", index, l, ok)
		}
	}
}

// TestOwnInterfaces needs no root: anyone may read the counters of the
// namespace that the test runs in, which has at least lo.
func TestOwnInterfaces(t *testing.T) {
	c, err := Open()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	lo, err := c.Index("lo")
	if err != nil {
		t.Fatal(err)
	}
	links := []Link{{Index: 77}}
	c.dirty = true // as after an error
	for range 3 {
		if links, err = c.Read(t.Context(), links[:1]); err != nil {
			t.Fatal(err)
		}
		if _, ok := Find(links[1:], lo); !ok || links[0].Index != 77 {
			t.Errorf("lo (%d) is not appended to %+v", lo, links)
		}
	}
	for _, name := range []string{"no-such-link", "a-name-that-is-too-long", ""} {
		if _, err := c.Index(name); !errors.Is(err, ErrNoLink) {
			t.Errorf("%q: got %v, want %v", name, err, ErrNoLink)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := c.Read(ctx, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want %v", err, context.Canceled)
	}
}

func BenchmarkDecode(b *testing.B) {
	in := captured(b)
	var links []Link
	b.ReportAllocs()
	for b.Loop() {
		d := decoder{seq: capturedSeq, links: links[:0]}
		if err := d.decode(in); err != nil {
			b.Fatal(err)
		}
		links = d.links
	}
}

// A process in a network namespace of its own, whose only interface is lo.
func TestElsewhere(t *testing.T) {
	c, err := Open()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	cmd := exec.CommandContext(t.Context(), "sleep", "60")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER | syscall.CLONE_NEWNET}
	if err := cmd.Start(); err != nil {
		t.Skipf("no network namespace can be made: %v", err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	for name, tc := range map[string]struct {
		pid    int
		device string
		want   bool
	}{
		"what the process has itself is another":          {cmd.Process.Pid, "lo", true},
		"what it does not have is opened here":            {cmd.Process.Pid, "tap0", false},
		"a process of this network sees the same":         {os.Getpid(), "lo", false},
		"a process that is no more says nothing about it": {1 << 30, "lo", false},
	} {
		t.Run(name, func(t *testing.T) {
			if got := c.Elsewhere(tc.pid, tc.device); got != tc.want {
				t.Errorf("got %t, want %t", got, tc.want)
			}
		})
	}
}
