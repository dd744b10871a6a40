package ipmi

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/collectors/ipmi/bmc"
	"github.com/kvmeter/kvmeter/sample"
)

// probe is something that the BMC is asked for, and how that has gone.
type probe struct {
	name     string
	resource string
	metadata []byte // of its samples
	meters   []*sample.Meter
	read     func(ctx context.Context, p *probe) error

	sensor *bmc.Sensor // nil: it is none
	remote bool        // it is asked over the IPMB
	level  bmc.Level   // of the last reading
	states uint16      // likewise
	named  []byte      // metadata that names the states
	// followed says that changes are told from the level or states told on.
	followed bool
	told     uint16

	latency time.Duration // of its answers, smoothed
	began   time.Time     // when it was first asked
	ok      time.Time     // last reading
	silent  bool          // it answers that it has no reading at present
	asked   bool          // in this poll, to the end
	fails   int           // in a row
	next    time.Time     // not to be asked earlier
	err     error         // the last failure
	lacks   bool          // the BMC says that there is no such thing
	why     string        // what is told of it while it has no reading
	failing []byte        // metadata with that
}

// Bounds of what is done with probes that fail.
const (
	// quarantine is after how many failures in a row a probe is asked rarely.
	quarantine  = 4
	backOff     = 10 * time.Second // first pause
	quarantined = time.Minute      // first pause in quarantine
	maxBackOff  = 15 * time.Minute
	// minPatience is the shortest deadline, and patience how many times the
	// usual latency a probe is waited for that has not failed.
	minPatience = 50 * time.Millisecond
	patience    = 16
	ownPatience = 4 // times its own latency
	// muteProbes in a row that are not answered, or told that the BMC is not
	// ready, raise the question whether that is so of the BMC as a whole.
	muteProbes = 3
	// maxBusy is how long an unanswered command may be in the way of others. A
	// driver gives up earlier.
	maxBusy = 10 * time.Second
)

// The health of a probe, for metrics.
const (
	healthOK          = "ok"
	healthNoReading   = "no reading"
	healthFailing     = "failing"
	healthQuarantined = "quarantined"
	healthAbsent      = "absent"
)

var healths = [...]string{healthOK, healthNoReading, healthFailing, healthQuarantined, healthAbsent}

func (p *probe) health() string {
	switch {
	case p.lacks && p.ok.IsZero():
		return healthAbsent
	case p.fails >= quarantine:
		return healthQuarantined
	case p.fails > 0:
		return healthFailing
	case p.silent:
		return healthNoReading
	}
	return healthOK
}

// key names the probe among all.
func (p *probe) key() string { return p.resource + " " + p.name }

// explain sets why the probe has no reading.
func (p *probe) explain(reason string) {
	if why := p.health() + ": " + reason; why != p.why {
		p.why, p.failing = why, nil
	}
}

// since is when the probe was last read, or first asked if never.
func (p *probe) since() time.Time {
	if p.ok.IsZero() {
		return p.began
	}
	return p.ok
}

// remoteTimeout is how many times longer than for the BMC's own an answer over
// the IPMB is waited for: a driver without interrupts looks for it each second.
const remoteTimeout = 3

// timeout is how long the probe is waited for: ever longer as it fails.
func (c *Collector) timeout(p *probe) time.Duration {
	if p.remote {
		return remoteTimeout * c.opts.Timeout
	}
	d := max(minPatience, patience*c.latency, ownPatience*p.latency)
	if c.latency == 0 {
		d = c.opts.Timeout // nothing is known yet
	}
	for range min(p.fails, 8) {
		d = min(4*d, c.opts.Timeout)
	}
	return min(d, c.opts.Timeout)
}

// round asks all probes that do not fail. It begins where the last round
// ended, if that did not come to its end.
func (c *Collector) round(ctx context.Context, wanted func(*sample.Meter) bool) error {
	for _, p := range c.probes {
		p.asked = false
	}
	n := len(c.probes)
	for i := range n {
		p := c.probes[(c.start+i)%n]
		if p.fails > 0 || !p.wanted(wanted) {
			continue
		}
		if err := c.ask(ctx, p, c.timeout(p)); err != nil {
			return err
		}
		if ctx.Err() != nil {
			c.start = (c.start + i) % n
			return nil
		}
	}
	c.start = 0
	return nil
}

// retry asks the probes that fail and are due, those that are due for longest
// first, while their silence would be made up for by the end of the poll.
func (c *Collector) retry(ctx context.Context, wanted func(*sample.Meter) bool) error {
	due := c.due[:0]
	now := time.Now()
	for _, p := range c.probes {
		if p.fails > 0 && !p.next.After(now) && p.wanted(wanted) {
			due = append(due, p)
		}
	}
	c.due = due
	slices.SortStableFunc(due, func(a, b *probe) int { return a.next.Compare(b.next) })
	for _, p := range due {
		timeout := c.timeout(p)
		if end, bounded := ctx.Deadline(); bounded {
			timeout = min(timeout, c.pacer.affords(time.Until(end)))
		}
		if timeout < minPatience || ctx.Err() != nil {
			return nil
		}
		if err := c.ask(ctx, p, timeout); err != nil {
			return err
		}
	}
	return nil
}

func (p *probe) wanted(wanted func(*sample.Meter) bool) bool {
	return slices.ContainsFunc(p.meters, wanted)
}

// patiently does what asks the BMC again while an earlier command is in the way.
func patiently(ctx context.Context, ask func() error) error {
	for start := time.Now(); ; {
		err := ask()
		if !errors.Is(err, bmc.ErrBusy) || time.Since(start) > maxBusy || ctx.Err() != nil {
			return err
		}
	}
}

// ask asks a probe and notes how it went. An error is about the BMC as a whole.
func (c *Collector) ask(ctx context.Context, p *probe, timeout time.Duration) error {
	if p.began.IsZero() {
		p.began = time.Now()
	}
	c.bmc.Timeout = timeout
	before, commands := c.bmc.Waited, c.bmc.Commands
	err := p.read(ctx, p)
	if errors.Is(err, bmc.ErrBusy) {
		err = patiently(ctx, func() error {
			before, commands = c.bmc.Waited, c.bmc.Commands
			return p.read(ctx, p)
		})
	}
	if ctx.Err() != nil { // the time is up, which nobody is to blame for
		return nil
	}
	p.asked = true
	if err != nil {
		return c.failed(ctx, p, err)
	}
	c.learn(p, (c.bmc.Waited-before)/time.Duration(max(1, c.bmc.Commands-commands)))
	return nil
}

// learn notes that a probe answered.
func (c *Collector) learn(p *probe, took time.Duration) {
	if p.fails >= quarantine {
		c.log.Info("a sensor answers again", zap.String("sensor", p.name))
	}
	p.fails, p.err, p.lacks = 0, nil, false
	if p.silent {
		p.explain("the BMC has no reading of it at present")
	} else {
		p.ok = time.Now()
	}
	p.latency = smooth(p.latency, took)
	if !p.remote {
		c.latency = smooth(c.latency, took)
		c.mute = 0
	}
}

func smooth(old, now time.Duration) time.Duration {
	if old == 0 {
		return max(now, 1)
	}
	return (7*old + now) / 8
}

// failed notes that a probe failed.
func (c *Collector) failed(ctx context.Context, p *probe, err error) error {
	switch code := bmc.Code(err); {
	case errors.Is(err, bmc.ErrGone), errors.Is(err, bmc.ErrBusy):
		return err
	case p.remote: // which says nothing of the BMC
	case code == bmc.CodeInitializing, code == bmc.CodeFirmware, code == bmc.CodeUpdate:
		if c.mute++; c.mute >= muteProbes { // it is the BMC that is not ready
			c.acquit()
			return err
		}
	case code == bmc.CodeTimeout, errors.Is(err, bmc.ErrTimeout):
		if c.mute++; c.mute >= muteProbes {
			if err := c.alive(ctx); err != nil {
				return err
			}
		}
	}
	now := time.Now()
	p.fails++
	if p.lacks = bmc.Lacks(err); p.lacks { // to ask again soon is of no use
		p.fails = max(p.fails, quarantine)
	}
	if p.err == nil || p.err.Error() != err.Error() {
		p.err = err
	}
	p.explain(p.err.Error())
	switch {
	case p.fails == 1: // once more in this poll
		p.next = now
	case p.fails < quarantine:
		p.next = now.Add(backOff << (p.fails - 2))
	default:
		if p.fails == quarantine {
			c.log.Warn("a sensor is in quarantine: it is asked rarely", zap.String("sensor", p.name), zap.Error(p.err))
		}
		p.next = now.Add(min(quarantined<<min(p.fails-quarantine, 8), maxBackOff))
	}
	return nil
}

// alive returns an error if the BMC as a whole does not answer.
func (c *Collector) alive(ctx context.Context) error {
	c.bmc.Timeout = c.opts.Timeout
	err := patiently(ctx, func() error {
		_, err := c.bmc.DeviceID(ctx, bmc.Addr{})
		return err
	})
	if err == nil || ctx.Err() != nil {
		c.mute = 0
		return nil
	}
	c.acquit()
	return err
}

// acquit takes back what probes were blamed for that was the BMC's fault.
func (c *Collector) acquit() {
	for _, p := range c.probes {
		if p.fails < quarantine {
			p.fails = 0
		}
	}
}

// tell tells what this poll could not read, and how old its last reading is.
func (c *Collector) tell(wanted func(*sample.Meter) bool) {
	now := time.Now()
	for _, p := range c.probes {
		switch {
		case !p.wanted(wanted), p.lacks && p.ok.IsZero():
			continue
		case p.fails > 0:
		case !p.asked:
			p.explain("the BMC was too slow to be asked for it within the interval")
		case p.silent && !p.ok.IsZero():
		default:
			continue
		}
		for _, m := range p.meters {
			if m != sample.IPMISensorAge && m.Event == "" && wanted(m) {
				c.sink.Miss(m.Name, p.resource, p.why)
			}
		}
		since := p.since()
		if p.sensor == nil || since.IsZero() || !wanted(sample.IPMISensorAge) {
			continue
		}
		if p.failing == nil {
			p.failing = withReading(p.metadata, p.why)
		}
		c.room[0] = Sample{sample.IPMISensorAge.MeterRef, sample.Float(now.Sub(since).Round(time.Millisecond).Seconds())}
		c.emit(p.resource, p.failing, now, 1)
	}
}

// emit hands the first n samples of c.room to the sink.
func (c *Collector) emit(resource string, metadata []byte, at time.Time, n int) {
	c.point = Point{Resource: resource, Metadata: metadata, At: at, Samples: c.room[:n]}
	c.sink.Emit(&c.point)
}

// errNoValue is why an analog sensor has a reading and no value.
var errNoValue = fmt.Errorf("%w: its reading has no value by its factors", bmc.ErrReply)
