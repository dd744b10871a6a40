package bpf

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// hooks are where a direction is counted: the guest's is the other way round.
var hooks = [directions]ebpf.AttachType{incoming: ebpf.AttachTCXEgress, outgoing: ebpf.AttachTCXIngress}

// attacher attaches programs to interfaces, one after the other, in a goroutine
// of its own. It is for one goroutine at a time beside that.
type attacher struct {
	progs [directions]*ebpf.Program
	tc    *tcSocket // nil: by TCX
	netns *os.File  // of the interfaces

	mu      sync.Mutex
	changed sync.Cond // on mu
	on      bool
	closing bool
	all     []*attachment
	done    chan struct{}
}

// attachment is an interface, and whether the programs are attached to it.
type attachment struct {
	index   int
	counted atomic.Bool // the programs have been attached

	// Guarded by the attacher's mu.
	removed  bool // it is to be detached and forgotten
	attached bool
	err      error // of the last attempt; it is tried again when asked to
	links    [directions]link.Link
	filters  [directions]bool // attached by clsact
}

func newAttacher(progs [directions]*ebpf.Program, clsact bool) (*attacher, error) {
	a := &attacher{progs: progs, done: make(chan struct{})}
	a.changed.L = &a.mu
	var err error
	if a.netns, err = os.Open("/proc/thread-self/ns/net"); err != nil {
		return nil, fmt.Errorf("open the network namespace: %w", err)
	}
	if clsact || !a.hasTCX() {
		if a.tc, err = openTC(); err != nil {
			a.netns.Close()
			return nil, err
		}
	}
	entered := make(chan error)
	go a.run(entered)
	if err := <-entered; err != nil {
		return nil, errors.Join(fmt.Errorf("enter the network namespace: %w", err), a.free())
	}
	return a, nil
}

// hasTCX tries to attach to an interface that there can't be.
func (a *attacher) hasTCX() bool {
	l, err := link.AttachTCX(link.TCXOptions{Interface: 1<<31 - 1, Program: a.progs[0], Attach: hooks[0]})
	if err == nil {
		l.Close()
	}
	return !errors.Is(err, ebpf.ErrNotSupported)
}

// turn says whether programs are to be attached.
func (a *attacher) turn(on bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.on == on {
		return
	}
	a.on = on
	for _, at := range a.all {
		at.err = nil
	}
	a.changed.Broadcast()
}

func (a *attacher) add(index int) *attachment {
	at := &attachment{index: index}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.all = append(a.all, at)
	a.changed.Broadcast()
	return at
}

func (a *attacher) remove(at *attachment) {
	a.mu.Lock()
	defer a.mu.Unlock()
	at.removed, at.err = true, nil
	a.changed.Broadcast()
}

// retry has at tried again, if it failed.
func (a *attacher) retry(at *attachment) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if at.err != nil {
		at.err = nil
		a.changed.Broadcast()
	}
}

// wait returns when all is as asked, but for what failed, or after limit.
func (a *attacher) wait(limit time.Duration) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	late := false
	timer := time.AfterFunc(limit, func() {
		a.mu.Lock()
		defer a.mu.Unlock()
		late = true
		a.changed.Broadcast()
	})
	defer timer.Stop()
	for a.next() != nil && !late {
		a.changed.Wait()
	}
	var errs []error
	for _, at := range a.all {
		errs = append(errs, at.err)
	}
	return errors.Join(errs...)
}

// next returns what is not as asked, or nil.
func (a *attacher) next() *attachment {
	for _, at := range a.all {
		if at.err == nil && (at.removed || at.attached != a.on) {
			return at
		}
	}
	return nil
}

// run is the goroutine. It enters the namespace of the interfaces if its
// thread is in another, and then keeps the thread to itself.
func (a *attacher) run(entered chan<- error) {
	defer close(a.done)
	runtime.LockOSThread()
	err := a.enter()
	entered <- err
	if err != nil {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	for {
		at := a.next()
		if at == nil && a.closing {
			return
		}
		if at == nil {
			a.changed.Wait()
			continue
		}
		attach := a.on && !at.removed
		a.mu.Unlock()
		var err error
		if attach {
			err = a.attach(at)
		} else {
			err = a.detach(at)
		}
		a.mu.Lock()
		at.attached = attach && err == nil
		at.err = err
		if at.removed && !attach {
			a.all = slices.DeleteFunc(a.all, func(other *attachment) bool { return other == at })
		}
		a.changed.Broadcast()
	}
}

func (a *attacher) enter() error {
	var own, want unix.Stat_t
	if err := unix.Stat("/proc/thread-self/ns/net", &own); err != nil {
		return err
	}
	if err := unix.Fstat(int(a.netns.Fd()), &want); err != nil {
		return err
	}
	if own.Ino == want.Ino && own.Dev == want.Dev {
		return nil
	}
	return unix.Setns(int(a.netns.Fd()), unix.CLONE_NEWNET)
}

// attach attaches both programs to the interface, or none.
func (a *attacher) attach(at *attachment) error {
	for way, prog := range a.progs {
		var err error
		if a.tc != nil {
			err = a.tc.add(at.index, parents[way], prog.FD())
			at.filters[way] = err == nil
		} else {
			at.links[way], err = link.AttachTCX(link.TCXOptions{Interface: at.index, Program: prog, Attach: hooks[way]})
		}
		if err != nil {
			return errors.Join(fmt.Errorf("attach to interface %d: %w", at.index, explainAttach(err)), a.detach(at))
		}
	}
	at.counted.Store(true)
	return nil
}

// detach detaches from the interface, which may be gone.
func (a *attacher) detach(at *attachment) error {
	var errs []error
	for way := range directions {
		if l := at.links[way]; l != nil {
			at.links[way] = nil
			errs = append(errs, l.Close())
		}
		if !at.filters[way] {
			continue
		}
		at.filters[way] = false
		switch err := a.tc.remove(at.index, parents[way]); {
		case err == nil, errors.Is(err, unix.ENODEV), errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOENT):
			// Or the interface, its clsact or our filter was not there any more.
		default:
			errs = append(errs, fmt.Errorf("detach from interface %d: %w", at.index, explainAttach(err)))
		}
	}
	return errors.Join(errs...)
}

// close detaches from all interfaces and ends the goroutine.
func (a *attacher) close() error {
	a.turn(false)
	a.mu.Lock()
	a.closing = true
	a.changed.Broadcast()
	a.mu.Unlock()
	<-a.done
	var errs []error
	for _, at := range a.all {
		errs = append(errs, at.err)
	}
	return errors.Join(append(errs, a.free())...)
}

func (a *attacher) free() error {
	err := a.netns.Close()
	if a.tc != nil {
		err = errors.Join(err, a.tc.close())
	}
	return err
}
