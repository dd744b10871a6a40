package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/kvmeter/kvmeter/agent/state"
	"github.com/kvmeter/kvmeter/bpf"
	"github.com/kvmeter/kvmeter/collectors"
	"github.com/kvmeter/kvmeter/collectors/procfs"
	"github.com/kvmeter/kvmeter/sample"
)

// Lifecycle follows processes from their exec to their end: [bpf.Life].
type Lifecycle interface {
	Next(deadline time.Time) (bpf.LifeEvent, error)
	Wake() error
	Follow(p bpf.Proc) (before *bpf.Lived, err error)
	Lived(p bpf.Proc) (*bpf.Lived, error)
	Forget(p bpf.Proc) error
	Each(each func(p bpf.Proc)) error
	Stats() (bpf.LifeStats, error)
	Unkept() error
}

// Times of the end of a domain.
const (
	// hookScan is between two scans for processes where execs are told.
	hookScan = 10 * time.Second
	// lateThreads is how long the end waits for threads that come after the first
	// one: RCU frees them in any order.
	lateThreads = 100 * time.Millisecond
	// lostAfter is how long a process that is gone may take to be freed, which
	// is 11 to 20 ms on an idle machine, before its end counts as not seen.
	lostAfter = 10 * time.Second
	// soon and later are between two looks at an end that waits for something,
	// later if it does so for long.
	soon, later = 20 * time.Millisecond, time.Second
)

// lives accounts domains at their end. Like the domains it is guarded by the
// agent's lock.
type lives struct {
	Lifecycle // nil: ends are not accounted
	ends      map[bpf.Proc]*end
	late      map[string]lateLink // by name
	task      *task               // makes the last samples
	swept     bool                // what ended while no agent ran is among the ends, if it can be told
	broken    bool                // nobody asks the hook any more
	dir       string              // of what is known of domains; empty: a restart forgets it
	run       run
}

// end is a process that ended, or seems to have, and was not accounted yet.
type end struct {
	d     *domain    // nil: nobody has told who it is
	since time.Time  // told or found
	gone  time.Time  // the process was not there any more; zero: it was
	lived *bpf.Lived // what it used, if the hook can't be asked any more
}

// newLives returns what accounts the ends of domains for all plans.
func newLives(hook Lifecycle, m *metrics, plans []plan, hs *hooks, cfg *Config) *lives {
	l := &lives{Lifecycle: hook, ends: map[bpf.Proc]*end{}, late: map[string]lateLink{}, swept: hook == nil, run: m.collector("lifecycle")}
	if cfg.Counters != "" {
		l.dir = filepath.Join(filepath.Dir(cfg.Counters), "domains")
	}
	l.task = lastTask(plans, hs)
	return l
}

// followProcess has the process accounted at its end.
func (a *Agent) followProcess(d *domain) {
	if a.lives.Lifecycle == nil {
		return
	}
	before, err := a.lives.Follow(d.proc)
	if before != nil {
		a.atEnd(before.Proc, before)
	}
	if d.unseen = err != nil; d.unseen {
		a.log.Warn("the end of the domain will not be accounted", zap.String("domain", d.uuid), zap.Error(err))
	}
}

// watchLives takes in what the hooks tell, until ctx ends.
func (a *Agent) watchLives(ctx context.Context) {
	defer a.closeLives()
	stop := context.AfterFunc(ctx, func() { _ = a.lives.Wake() })
	defer stop()
	// What was told while no agent ran comes first; then what was not.
	_ = a.lives.Wake()
	var next time.Time
	for {
		e, err := a.lives.Next(next)
		start := a.lives.run.begin()
		now := time.Now()
		a.mu.Lock()
		told := errors.Is(err, bpf.ErrWoken) || errors.Is(err, os.ErrDeadlineExceeded) // all that there is
		switch {
		case err == nil:
			a.tellLife(e, now)
		case told:
			err = nil
			if !a.lives.swept {
				err = a.sweepLives(now)
				a.lives.swept = true
			}
		}
		// An event that is not read yet may be the exec of a process that a poll
		// has found gone, or have what one used whose PID was given again.
		if told {
			next = a.settleEnds(now)
		} else if next.IsZero() {
			next = now.Add(soon)
		}
		if err != nil {
			a.fault("lifecycle", fmt.Sprintf("the ends of domains are not accounted any more (%v): restart the agent", err))
			a.lives.broken = true
		}
		a.mu.Unlock()
		a.lives.run.done(start, err)
		if err != nil || told && ctx.Err() != nil {
			return
		}
	}
}

// closeLives accounts what can be before the agent stops. The rest is the next
// agent's where the hooks are pinned, else it is lost.
func (a *Agent) closeLives() {
	a.mu.Lock()
	defer a.mu.Unlock()
	// As if there had been the time to wait for what is late.
	a.settleEnds(time.Now().Add(lateThreads + grace))
	if a.lives.broken || a.lives.Unkept() != nil {
		for p, e := range a.lives.ends {
			a.unseen(p, e, bpf.ErrAlive)
		}
		clear(a.lives.ends)
	}
	for _, d := range a.domains {
		_ = os.Chtimes(a.lives.path(d.proc), time.Time{}, time.Now()) // up to here it was metered
	}
}

// tellLife takes in one event.
func (a *Agent) tellLife(e bpf.LifeEvent, now time.Time) {
	if e.Lived != nil {
		if partial := a.lives.ends[e.Proc]; !e.Replaced && (partial == nil || partial.lived == nil) {
			a.atEnd(e.Proc, nil) // ask once all threads have come
		} else if e.Lived.Threads > 0 || a.knows(e.Proc) {
			a.atEnd(e.Proc, e.Lived)
		}
		return
	}
	args := e.Args
	p, ok := parseCommand(args)
	if e.Cut && (!ok || p.uuid == "" || p.name == "") {
		if whole := commandOf(a.proc, e.Proc); whole != nil {
			p, ok = parseCommand(whole)
		}
	}
	if !ok || !a.scanner.here(e.Proc.PID) {
		a.metrics.noDomains.Inc()
		if err := a.lives.Forget(e.Proc); err != nil {
			a.log.Warn("a process that is no domain is followed all the same", zap.Error(err))
		}
		return
	}
	p.pid, p.start = e.Proc.PID, e.Proc.StartTicks
	if d := a.domains[p.pid]; d != nil && d.start == p.start {
		return // a scan was first, or QEMU has executed itself anew
	}
	if end := a.lives.ends[e.Proc]; end != nil { // a scan and a poll were first
		if end.d == nil {
			end.d = newDomain(p, a.bootID, now, a.state)
		}
		return
	}
	a.metrics.execLatency.Observe((monotonic() - e.At).Seconds())
	a.scanner.learn(p)
	found := make([]*domain, 0, len(a.domains)+1)
	for _, d := range a.order {
		if d.pid == p.pid {
			a.ended(d, now.UnixMicro())
			continue
		}
		found = append(found, d)
	}
	d := a.newcomer(p, now)
	a.domains[p.pid] = d
	a.setOrder(append(found, d))
}

// commandOf returns the command line of a process that is there, which of one
// that nobody has waited for is empty; nil: there is none.
func commandOf(proc string, p bpf.Proc) []byte {
	dir := filepath.Join(proc, strconv.Itoa(p.PID))
	line, err := os.ReadFile(filepath.Join(dir, "cmdline"))
	if err != nil {
		return nil
	}
	stat, err := os.ReadFile(filepath.Join(dir, "stat"))
	if err != nil {
		return nil
	}
	if start, _, err := procfs.ParseStat(stat); err != nil || start != p.StartTicks {
		return nil
	}
	return line
}

// countLife counts what the hooks have met.
func (a *Agent) countLife() error {
	if a.lives.Lifecycle == nil {
		return nil
	}
	s, err := a.lives.Stats()
	if err == nil {
		a.metrics.countLife(s)
	}
	return err
}

// monotonic is the clock of the hooks' events.
func monotonic() time.Duration { return clock(unix.CLOCK_MONOTONIC) }

func clock(id int32) time.Duration {
	var t unix.Timespec
	if err := unix.ClockGettime(id, &t); err != nil {
		return 0 // never on Linux
	}
	return time.Duration(t.Nano())
}

// atEnd notes that a process ended. lived is what it used, or nil if the hook
// still can be asked.
func (a *Agent) atEnd(p bpf.Proc, lived *bpf.Lived) {
	if d := a.domains[p.PID]; d != nil && d.proc == p {
		left := make([]*domain, 0, len(a.order))
		for _, o := range a.order {
			if o != d {
				left = append(left, o)
			}
		}
		delete(a.domains, p.PID)
		a.scanner.forget(p.PID)
		a.setOrder(left)
		a.ended(d, time.Now().UnixMicro())
		if d.unseen {
			return
		}
	}
	e := a.lives.ends[p]
	if e == nil {
		e = &end{since: time.Now()}
		a.lives.ends[p] = e
	}
	switch {
	case lived == nil:
	case e.lived == nil || e.lived.Ended != 0:
		e.lived = lived
	default: // its threads were told before
		e.lived.Join(lived)
	}
}

// knows reports whether the process is or was a domain.
func (a *Agent) knows(p bpf.Proc) bool {
	d := a.domains[p.PID]
	return d != nil && d.proc == p || a.lives.ends[p] != nil
}

// awaitEnd reports whether the hook will tell what a domain that is gone used.
func (a *Agent) awaitEnd(d *domain) bool {
	if a.lives.Lifecycle == nil || a.lives.broken || d.unseen {
		return false
	}
	e := a.lives.ends[d.proc]
	if e == nil {
		e = &end{since: time.Now()}
		a.lives.ends[d.proc] = e
		_ = a.lives.Wake()
	}
	e.d = d
	return true
}

// endsOf reports whether the counters of a process are still needed.
func (a *Agent) endsOf(owner sample.Incarnation) bool {
	for p := range a.lives.ends {
		if ownerOf(p, a.bootID) == owner {
			return true
		}
	}
	return false
}

// settleEnds accounts the ends that are known, once all events were taken in,
// and returns when to look again.
func (a *Agent) settleEnds(now time.Time) (next time.Time) {
	for p, e := range a.lives.ends {
		if a.settleEnd(p, e, now) {
			delete(a.lives.ends, p)
			continue
		}
		again := now.Add(soon)
		if now.Sub(e.since) > lostAfter {
			again = now.Add(later)
		}
		if next.IsZero() || again.Before(next) {
			next = again
		}
	}
	a.flushLast(time.Now().UnixMicro())
	return next
}

// endedUnknown is why devices of a domain are missing from its begin to its end.
const endedUnknown = "the domain ended before libvirt told of it: whose it was is not known, nor what went through its devices"

// settleEnd accounts one end. done is false where something is still to come.
func (a *Agent) settleEnd(p bpf.Proc, e *end, now time.Time) (done bool) {
	late := now.Sub(e.since)
	lived := e.lived
	if lived != nil && lived.Ended == 0 {
		if late < lostAfter {
			return false // its totals come when it is freed
		}
		a.unseen(p, e, bpf.ErrNotFollowed)
		return true
	}
	if lived == nil {
		var err error
		lived, err = a.lives.Lived(p)
		switch {
		case errors.Is(err, bpf.ErrAlive) && commandOf(a.proc, p) != nil:
			e.gone = time.Time{}
			return false // it exits, or nobody has waited for it
		case errors.Is(err, bpf.ErrAlive) && (e.gone.IsZero() || now.Sub(e.gone) < lostAfter):
			if e.gone.IsZero() {
				e.gone = now
			}
			return false
		case err != nil:
			a.unseen(p, e, err)
			return true
		case !lived.Whole() && late < lateThreads:
			return false
		}
	}
	if e.d == nil {
		if e.d = a.recall(p); e.d == nil {
			a.stranger(p, lived)
			return true
		}
	}
	d := e.d
	if !d.ready || d.def == nil { // libvirt may have told meanwhile
		if a.identify(d, now); !d.ready {
			return false
		}
	}
	a.lastOfNICs(d)
	if d.def == nil && a.guest != nil && now.Sub(d.found) < retryTaps { // else it is not libvirt's
		a.lost([]device{{d.uuid, 0}}, d, now.UnixMicro(), endedUnknown)
	}
	a.account(d, lived)
	a.lost(a.devices(d), d, time.Now().UnixMicro(), "the domain ended; what went through the device since its last sample is not counted")
	a.state.Forget(d.owner)
	a.forget(p)
	a.metrics.ends.Inc()
	return true
}

// forget drops what is kept of a process.
func (a *Agent) forget(p bpf.Proc) {
	a.scanner.forget(p.PID) // a scan may have met it while it exited
	if err := a.lives.Forget(p); err != nil {
		a.log.Warn("a process that ended is followed all the same", zap.Error(err))
	}
	_ = os.Remove(a.lives.path(p))
}

// account makes the last samples of a domain: of when it ended.
func (a *Agent) account(d *domain, lived *bpf.Lived) {
	d.usage.end(lived, func(m int) { a.metrics.heldUsage[m].Inc() })
	t, now := a.lives.task, time.Now()
	ended := now.Add(lived.Ended - clock(unix.CLOCK_BOOTTIME)).UnixMicro()
	ended = max(ended, d.sent+1)
	r, base := d.cpuRow, now.UnixMicro()
	r.Offset = ended - base
	may := a.billing.usage[sample.Free]
	if t.usage&d.usage.has&may != 0 {
		a.row(t, &r, usageCount, base)
	}
	for i, m := range usageMeters {
		switch {
		case t.usage&d.usage.has&(1<<i) == 0:
		case may&(1<<i) != 0:
			t.builder.Add(m.MeterRef, sample.Free, sample.Uint(d.usage.value(i)))
		default:
			a.deliver.AddGap(sample.Gap{Meter: m.Name, Resource: d.uuid, From: orNow(d.sent, ended), To: ended, Reason: notAllowed(sample.Free)})
		}
	}
	d.sent = ended
}

// unseen records that nobody saw the end of a process that is gone.
func (a *Agent) unseen(p bpf.Proc, e *end, why error) {
	if e.d == nil {
		e.d = a.recall(p)
	}
	if e.d != nil {
		a.metrics.endsUnseen.Inc()
		a.unaccounted(e.d, time.Now().UnixMicro())
		a.log.Warn("nobody saw the end of the domain", zap.String("domain", e.d.uuid), zap.Error(why))
	}
	a.forget(p)
}

// stranger records what a process used of which nobody knows who it was: under
// the UUID that a QEMU gets which has none.
func (a *Agent) stranger(p bpf.Proc, lived *bpf.Lived) {
	d := newDomain(&process{pid: p.PID, start: p.StartTicks}, a.bootID, time.Now(), state.Memory())
	now := time.Now().UnixMicro()
	a.metrics.strangers.Inc()
	a.deliver.AddGap(sample.Gap{
		Meter: "*", Resource: d.uuid, From: now - (clock(unix.CLOCK_BOOTTIME) - time.Duration(p.StartTicks)*clockTick).Microseconds(), To: now,
		Reason: fmt.Sprintf("a QEMU process (PID %d) ended before it could be identified; its %d ns of CPU time are no domain's", p.PID, lived.Process),
	})
	a.forget(p)
}

// sweepLives finds what ended while no agent ran and is not told by an event.
func (a *Agent) sweepLives(now time.Time) error {
	var unknown []bpf.Proc
	err := a.lives.Each(func(p bpf.Proc) {
		if d := a.domains[p.PID]; a.lives.ends[p] == nil && (d == nil || d.proc != p) && len(commandOf(a.proc, p)) == 0 {
			unknown = append(unknown, p) // a zombie has no command line
		}
	})
	if err != nil {
		return err
	}
	for _, p := range unknown {
		a.atEnd(p, nil)
	}
	files, err := os.ReadDir(a.lives.dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		a.log.Warn("what was known of domains that ended meanwhile is lost", zap.Error(err))
	}
	for _, f := range files {
		p, ok := procOf(f.Name())
		if !ok || a.lives.ends[p] != nil || commandOf(a.proc, p) != nil {
			continue
		}
		a.atEnd(p, nil)
	}
	return nil
}

// known is what a file keeps of a domain, so that it can be accounted if it ends
// while no agent runs.
type known struct {
	Boot       string                 `json:"boot"`
	UUID       string                 `json:"uuid"`
	Name       string                 `json:"name"`
	Taps       []string               `json:"taps,omitempty"`
	Definition *collectors.Definition `json:"definition,omitempty"`
}

// path is the file of what is known of a process's domain, or empty.
func (l *lives) path(p bpf.Proc) string {
	if l.dir == "" {
		return ""
	}
	return filepath.Join(l.dir, fmt.Sprintf("%d-%d.json", p.PID, p.StartTicks))
}

// procOf reads the process from its file's name.
func procOf(name string) (bpf.Proc, bool) {
	pid, start, ok := strings.Cut(strings.TrimSuffix(name, ".json"), "-")
	n, err := strconv.Atoi(pid)
	ticks, err2 := strconv.ParseUint(start, 10, 64)
	return bpf.Proc{PID: n, StartTicks: ticks}, ok && err == nil && err2 == nil
}

// remember keeps what is known of a domain.
func (a *Agent) remember(d *domain) {
	if a.lives.Lifecycle == nil || a.lives.dir == "" {
		return
	}
	err := os.MkdirAll(a.lives.dir, 0o700)
	if err == nil {
		var text []byte
		if text, err = json.Marshal(known{a.bootID, d.process.uuid, d.process.name, d.taps, d.def}); err == nil {
			path := a.lives.path(d.proc)
			if err = os.WriteFile(path+".new", text, 0o600); err == nil {
				err = os.Rename(path+".new", path)
			}
		}
	}
	if err != nil {
		a.log.Warn("if the domain ends while no agent runs, nobody will know whose it was", zap.String("domain", d.uuid), zap.Error(err))
	}
}

// recall returns the domain of a process that ended, or nil if nothing is known.
func (a *Agent) recall(p bpf.Proc) *domain {
	path := a.lives.path(p)
	info, err := os.Stat(path)
	if err != nil {
		return nil
	}
	text, err := os.ReadFile(path)
	var k known
	if err == nil {
		err = json.Unmarshal(text, &k)
	}
	if err != nil || k.Boot != a.bootID {
		return nil
	}
	d := newDomain(&process{pid: p.PID, start: p.StartTicks, uuid: k.UUID, name: k.Name, taps: k.Taps}, a.bootID, info.ModTime(), a.state)
	d.define(time.Now(), k.Definition, a.cfg.Source, a.cfg.Node, k.Taps, a.index)
	d.ready = true
	return d
}

// end takes over what the process used in all, so that the classes still add up
// to it. A published number never decreases.
//
// What threads used that exited between two polls was published as exited time
// already and stays so: of a class, the hook's figure takes over as far as there
// is room in the process's total, vCPUs first.
func (s *usageState) end(l *bpf.Lived, held func(meter int)) {
	s.has = 0
	s.set(iProcess, l.Process, held)
	room := s.last[iProcess] - min(s.last[iProcess], s.last[iExited])
	for _, of := range classMeters {
		room -= min(room, s.last[of.run])
	}
	for c, of := range classMeters {
		more := min(room, less(s.last[of.run], l.Run[c]))
		s.set(of.run, s.last[of.run]+more, held)
		room -= more
		if l.HasWait {
			s.set(of.wait, l.Wait[c], held)
			s.set(of.switches, l.Switches[c], held)
		}
	}
	s.set(iExited, s.last[iExited]+room, held)
	if l.HasIO {
		s.set(iDiskRead, l.ReadBytes, held)
		s.set(iDiskWrite, l.WriteBytes, held)
	}
}
