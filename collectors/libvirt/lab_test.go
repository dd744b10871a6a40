//go:build lab

package libvirt

import (
	"context"
	"errors"
	"syscall"
	"testing"
	"time"

	"go.uber.org/zap/zaptest"

	"github.com/kvmeter/kvmeter/collectors"
	"github.com/kvmeter/kvmeter/test/lab"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// eventually waits until done says so.
func eventually(t *testing.T, what string, done func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !done(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within 30 s: %s", what)
		}
	}
}

func TestLabStuckQEMUs(t *testing.T) {
	ctx := t.Context()
	l := lab.Start(t, lab.Options{})
	must(t, l.StartLibvirt(ctx))
	var guests []*lab.Guest
	for range maxStuck + 2 {
		g, err := l.StartGuest(ctx, lab.GuestSpec{Kind: lab.KVM, NICs: -1})
		must(t, err)
		guests = append(guests, g)
	}
	stuck, well, others := guests[0], guests[1], guests[2:]
	c := New(zaptest.NewLogger(t), Options{Sockets: []string{l.ReadOnlySocket()}, Host: "h", Timeout: 3 * time.Second})
	run, stop := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() { c.Run(run); close(done) }()
	t.Cleanup(func() { stop(); <-done })
	groups := collectors.DiskStatistics | collectors.MemoryStatistics
	ask := func(g *lab.Guest) error {
		_, err := c.Stats(ctx, g.UUID, groups)
		return err
	}
	answers := func(t *testing.T, g *lab.Guest) {
		t.Helper()
		eventually(t, "an answer of "+g.Name, func() bool { return c.Err() == nil && ask(g) == nil })
	}
	freeze := func(g *lab.Guest, signal syscall.Signal) { must(t, syscall.Kill(g.PID(), signal)) }
	for _, g := range guests {
		answers(t, g)
	}

	freeze(stuck, syscall.SIGSTOP)
	t.Cleanup(func() { // else the lab's end waits for them
		for _, g := range guests {
			if pid := g.PID(); pid != 0 {
				_ = syscall.Kill(pid, syscall.SIGCONT)
			}
		}
	})
	t.Run("one costs one call, and no other domain anything", func(t *testing.T) {
		if err := ask(stuck); !errors.Is(err, errTimeout) {
			t.Errorf("the first call: %v, want %v", err, errTimeout)
		}
		if err := ask(stuck); !errors.Is(err, ErrBusy) {
			t.Errorf("the second: %v, want %v", err, ErrBusy)
		}
		answers(t, well)
		eventually(t, "all domains are known", func() bool { return c.Err() == nil && len(c.Definitions()) == len(guests) })
	})

	t.Run("events come while it hangs", func(t *testing.T) {
		must(t, well.Pause(ctx))
		eventually(t, "the pause is known", func() bool { return c.Definitions()[well.UUID].State == 3 })
		must(t, well.Resume(ctx))
	})

	t.Run("many are not asked all at once", func(t *testing.T) {
		for _, g := range others[:maxStuck-1] {
			freeze(g, syscall.SIGSTOP)
			if err := ask(g); !errors.Is(err, errTimeout) {
				t.Errorf("%s: %v, want %v", g.Name, err, errTimeout)
			}
		}
		if err := ask(well); !errors.Is(err, ErrManyStuck) {
			t.Errorf("another domain: %v, want %v", err, ErrManyStuck)
		}
		for _, g := range others[:maxStuck-1] {
			freeze(g, syscall.SIGCONT)
		}
		answers(t, well)
	})

	t.Run("a libvirtd that is started again is asked again", func(t *testing.T) {
		must(t, l.KillLibvirt(ctx))
		eventually(t, "the loss is known", func() bool { return c.Err() != nil })
		must(t, l.StartLibvirt(ctx))
		answers(t, well)
	})

	t.Run("it answers again once it runs", func(t *testing.T) {
		freeze(stuck, syscall.SIGCONT)
		answers(t, stuck)
	})

	t.Run("a domain that is off is known with its sizes", func(t *testing.T) {
		must(t, well.PowerOff(ctx))
		eventually(t, "it is off", func() bool {
			off := c.Stopped()
			return len(off) == 1 && off[0].UUID == well.UUID && off[0].State == 5 && c.Definitions()[well.UUID] == nil
		})
		s, err := c.Sizes(ctx, well.UUID, "hda")
		if err != nil || s.Capacity != 64<<20 || s.Physical != 64<<20 {
			t.Errorf("sizes %+v, %v", s, err)
		}
	})
}

func TestLabADomainThatLibvirtIsBusyWith(t *testing.T) {
	ctx := t.Context()
	l := lab.Start(t, lab.Options{})
	must(t, l.StartLibvirt(ctx))
	g, err := l.StartGuest(ctx, lab.GuestSpec{Kind: lab.KVM, NICs: -1})
	must(t, err)
	p := l.Proxy(t)
	c := New(zaptest.NewLogger(t), Options{Sockets: []string{p.Socket}, Host: "h", Timeout: 2 * time.Second})
	run, stop := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() { c.Run(run); close(done) }()
	t.Cleanup(func() { stop(); <-done })
	state := func() int32 {
		def := c.Definitions()[g.UUID]
		if def == nil {
			return -1
		}
		return int32(def.State)
	}
	eventually(t, "the domain is known", func() bool { return state() == 1 })
	const getXMLDesc = 14
	p.Late(getXMLDesc, 6*time.Second)
	p.Calls()
	must(t, g.Pause(ctx))
	eventually(t, "it was given up", func() bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		return c.slow[g.UUID]
	})
	if err := c.Err(); err != nil || state() != 1 {
		t.Errorf("the connection is lost: %v, and the domain is %d", err, state())
	}
	p.Late(0, 0)
	eventually(t, "it is asked for again", func() bool { return state() == 3 })
	const open = 1
	if n := p.Calls()[open]; n > 0 {
		t.Errorf("it has connected again")
	}
}
