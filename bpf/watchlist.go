package bpf

import (
	"errors"
	"fmt"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
)

// ErrTooManyDomains says that no more domains can be watched.
var ErrTooManyDomains = fmt.Errorf("%d domains are watched already", maxDomains)

// maxDomains is MAX_DOMAINS in include/domains.h.
const maxDomains = 1024

// watchlist is which domains the programs of an object watch: the other side of
// include/domains.h.
type watchlist struct {
	domains      *ebpf.Map
	epoch, since *ebpf.Variable
	maybe        *maybe
	now          uint32    // what epoch is
	list         []watched // in order of add
	free         []uint32  // slots, longest unused first
	links        []link.Link
}

// watched is a domain that is watched.
type watched struct {
	id, pid, slot uint32
}

// domain is struct domain in include/domains.h.
type domain struct {
	Slot       uint32
	_          uint32
	StartTicks uint64
}

func newWatchlist(domains *ebpf.Map, epoch, since, maybe *ebpf.Variable) watchlist {
	w := watchlist{domains: domains, epoch: epoch, since: since, maybe: newMaybe(maybe), now: 1}
	for slot := range uint32(maxDomains) {
		w.free = append(w.free, slot)
	}
	return w
}

// add watches the process of a domain as id. reset zeroes what its slot's last
// domain has counted. It says whether the domain is new.
func (w *watchlist) add(id uint32, p Proc, reset func(slot uint32) error) (fresh bool, err error) {
	if slices.ContainsFunc(w.list, func(d watched) bool { return d.id == id }) {
		return false, nil
	}
	if len(w.free) == 0 {
		return false, fmt.Errorf("watch process %d: %w", p.PID, ErrTooManyDomains)
	}
	d := watched{id, p.key(), w.free[0]}
	err = reset(d.slot)
	if err == nil {
		err = w.domains.Update(d.pid, domain{Slot: d.slot, StartTicks: p.StartTicks}, ebpf.UpdateNoExist)
	}
	if err != nil {
		return false, fmt.Errorf("watch process %d: %w", p.PID, err)
	}
	w.free = w.free[1:]
	w.list = append(w.list, d)
	return true, errors.Join(w.maybe.add(int(d.pid)), w.changed())
}

// remove forgets id, if it is there.
func (w *watchlist) remove(id uint32) error {
	i := slices.IndexFunc(w.list, func(d watched) bool { return d.id == id })
	if i < 0 {
		return nil
	}
	d := w.list[i]
	w.list = slices.Delete(w.list, i, i+1)
	w.free = append(w.free, d.slot)
	return errors.Join(w.maybe.remove(int(d.pid)), w.domains.Delete(d.pid), w.changed())
}

// changed has the programs look up anew which domain a thread is of.
func (w *watchlist) changed() error {
	w.now++
	return w.epoch.Set(w.now)
}

// begin makes what threads hold so far void: the programs were not attached.
func (w *watchlist) begin() error {
	return errors.Join(w.changed(), w.since.Set(w.now))
}

// attach attaches programs to their tracepoints.
func (w *watchlist) attach(programs ...*ebpf.Program) error {
	for _, p := range programs {
		l, err := link.AttachTracing(link.TracingOptions{Program: p})
		if err != nil {
			return err
		}
		w.links = append(w.links, l)
	}
	return nil
}

func (w *watchlist) attached() bool {
	return w.links != nil
}

func (w *watchlist) detach() error {
	var errs []error
	for _, l := range w.links {
		errs = append(errs, l.Close())
	}
	w.links = nil
	return errors.Join(errs...)
}

// misses returns how many runs the kernel has skipped because the program was
// running already.
func misses(programs ...*ebpf.Program) (uint64, error) {
	var n uint64
	for _, p := range programs {
		stats, err := p.Stats()
		if err != nil {
			return 0, fmt.Errorf("read statistics of %s: %w", p, err)
		}
		n += stats.RecursionMisses
	}
	return n, nil
}
