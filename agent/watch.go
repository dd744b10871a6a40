package agent

import (
	"context"
	"time"

	"github.com/kvmeter/kvmeter/agent/client"
	"github.com/kvmeter/kvmeter/sample"
)

// watch is what the readers of the local socket share: the newest reading.
type watch struct {
	last  *reading      // nil: nobody watched when it was made
	fresh chan struct{} // closed when there is a newer reading
}

// reading is what all domains had used at one time. It is never changed.
type reading struct {
	at      time.Time
	domains []domainReading
	notes   []string
}

type domainReading struct {
	incarnation                  sample.Incarnation
	pid                          int
	info                         client.Domain // without its rates
	cpu, wait, process           uint64
	diskRead, diskWrite, in, out uint64
	has                          uint32
	iops                         *float64
}

// tell keeps a whole reading for who watches.
func (a *Agent) tell(at time.Time, whole bool) {
	if !whole || a.watchers.Load() == 0 {
		return
	}
	r := &reading{at: at, domains: make([]domainReading, 0, len(a.order)), notes: a.domainNotes()}
	for _, d := range a.order {
		if !d.ready {
			continue
		}
		info := client.Domain{
			UUID: d.uuid, Name: d.name, PID: d.pid, VCPUs: d.vcpus,
			Project: d.row.Project, Origin: string(d.origin), Error: d.fault,
		}
		if d.def != nil {
			info.Display = d.def.Display
		}
		v := domainReading{
			incarnation: d.incarnation, pid: d.pid, info: info, has: d.usage.has,
			cpu: d.usage.last[iCPU], wait: d.usage.last[iWait], process: d.usage.last[iProcess],
			diskRead: d.usage.last[iDiskRead], diskWrite: d.usage.last[iDiskWrite],
		}
		for i := range d.nics {
			v.in += d.nics[i].last[iInBytes]
			v.out += d.nics[i].last[iOutBytes]
		}
		if p, q := d.requests[0], d.requests[1]; !p.at.IsZero() && q.at.After(p.at) && q.n >= p.n {
			rate := float64(q.n-p.n) / q.at.Sub(p.at).Seconds()
			v.iops = &rate
		}
		r.domains = append(r.domains, v)
	}
	a.watch.last = r
	close(a.watch.fresh)
	a.watch.fresh = make(chan struct{})
}

// glance returns a reading that is at most maxAge old, and makes one if need be.
func (a *Agent) glance(ctx context.Context, maxAge time.Duration) *reading {
	a.mu.Lock()
	defer a.mu.Unlock()
	if r := a.watch.last; r != nil && time.Since(r.at) <= maxAge {
		return r
	}
	// What discovery cannot tell, the polls log.
	_ = a.discover(time.Now())
	a.read(ctx, true, true, false, nil)
	return a.watch.last
}

// newer returns the newest reading, and what is closed when there is another.
func (a *Agent) newer() (*reading, <-chan struct{}) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.watch.last, a.watch.fresh
}

// watchEach calls each with a snapshot now and then every interval until ctx
// ends or each fails. Polls that come as often are shared.
func (a *Agent) watchEach(ctx context.Context, interval time.Duration, each func(client.Snapshot) error) error {
	a.watchers.Add(1)
	defer a.watchers.Add(-1)
	prev := a.glance(ctx, 0)
	if err := each(a.snapshot(nil, prev)); err != nil || interval <= 0 {
		return err
	}
	wait := interval
	a.mu.Lock()
	plans := a.plans
	a.mu.Unlock()
	for _, p := range plans {
		if !p.qemu && p.interval <= interval {
			wait = interval + interval/2 // a poll will come
		}
	}
	timer := time.NewTimer(wait)
	defer timer.Stop()
	for {
		r, fresh := a.newer()
		if r.at.Sub(prev.at) < interval*9/10 {
			select {
			case <-ctx.Done():
				return nil
			case <-fresh:
				continue
			case <-timer.C:
				r = a.glance(ctx, interval/2)
			}
		}
		if err := each(a.snapshot(prev, r)); err != nil {
			return err
		}
		prev = r
		timer.Reset(time.Until(r.at.Add(wait)))
	}
}

// snapshot tells what was used between two readings. Without the first there
// are no rates.
func (a *Agent) snapshot(from, to *reading) client.Snapshot {
	s := client.Snapshot{Node: a.cfg.Node, Time: to.at.UTC(), Domains: make([]client.Domain, 0, len(to.domains)), Notes: to.notes}
	before := map[int]*domainReading{}
	if from != nil {
		s.Seconds = to.at.Sub(from.at).Seconds()
		for i := range from.domains {
			before[from.domains[i].pid] = &from.domains[i]
		}
	}
	for i := range to.domains {
		d := &to.domains[i]
		out := d.info
		out.DiskIOPS = d.iops
		if p := before[d.pid]; p != nil && p.incarnation == d.incarnation && s.Seconds > 0 {
			per := func(now, then uint64) float64 { return float64(now-min(then, now)) / s.Seconds }
			const percent = 100 / 1e9
			out.CPU, out.Wait, out.Process = per(d.cpu, p.cpu)*percent, per(d.wait, p.wait)*percent, per(d.process, p.process)*percent
			out.DiskRead, out.DiskWrite = per(d.diskRead, p.diskRead), per(d.diskWrite, p.diskWrite)
			out.NetIn, out.NetOut = per(d.in, p.in), per(d.out, p.out)
		}
		s.Domains = append(s.Domains, out)
	}
	return s
}
