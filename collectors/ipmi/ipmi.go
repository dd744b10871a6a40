// Package ipmi collects what the host's BMC tells: its sensors, chassis and
// event log, and the power meters of DCMI and Intel's Node Manager.
//
// BMCs are slow, and some of their sensors never answer. So unlike other
// collectors this one has a clock: it waits for the BMC no more than a budget
// allows, gives each sensor a deadline of its own, and asks one that goes on
// failing ever more rarely. What does not answer costs only its own samples.
package ipmi

import (
	"context"
	"errors"
	"fmt"
	"time"

	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/collectors/ipmi/bmc"
	"github.com/kvmeter/kvmeter/sample"
)

// Shape says which of Ceilometer's versions the samples look like.
type Shape string

// The shapes.
const (
	// Newer is Ceilometer's since 2024.1: sensors that measure watts are
	// hardware.ipmi.power.
	Newer Shape = "newer"
	// Older is Ceilometer's before: there is no hardware.ipmi.power, and
	// hardware.ipmi.current has all sensors of the type Current, whatever their
	// unit.
	Older Shape = "older"
)

// Options are a collector's settings.
type Options struct {
	Node    string        // name of the host
	Device  string        // path; empty: the kernel's first
	State   string        // file that keeps the records and the place in the event log; empty: none
	Budget  time.Duration // of waiting for the BMC in a second
	Timeout time.Duration // longest wait for one answer
	Shape   Shape

	// Open opens the BMC; nil: the kernel's driver.
	Open func(device string) (bmc.Transport, error)
}

// Point is what was read at one time of one resource. It is good until Emit
// returns.
type Point struct {
	Resource string
	Metadata []byte // a JSON object
	At       time.Time
	Samples  []Sample
}

// Sample is a meter's volume. The unit may be the sensor's own.
type Sample struct {
	Meter  sample.MeterRef
	Volume sample.Volume
}

// Sink takes what a poll reads.
type Sink interface {
	// Emit takes what was read.
	Emit(p *Point)
	// Miss takes what could not be read, and why. The resource may be "*".
	Miss(meter, resource, reason string)
	// Flush is called when all that answered in time is emitted, before those
	// that are known to fail are asked.
	Flush()
}

// Collector reads a BMC. Its methods are for one goroutine at a time, but for
// [Collector.Status].
type Collector struct {
	log    *zap.Logger
	opts   Options
	pacer  pacer
	sink   Sink
	wanted func(*sample.Meter) bool // in the present poll
	point  Point
	room   [4]Sample
	status status

	bmc     *bmc.BMC // nil: not connected
	device  bmc.Device
	stamp   bmc.Stamp
	records bmc.Records
	node    *bmc.NodeManager // nil: none, or not found yet
	// nodeAgain is when to look for Node Manager again; zero: not at all.
	nodeAgain time.Time
	nodeTold  bool // that it does not answer
	state     state
	place     place // ahead of the state's by what this poll told
	probes    []*probe
	start     int           // of the next poll's round
	due       []*probe      // of the present poll
	latency   time.Duration // of answers, smoothed
	mute      int           // probes in a row that the BMC as a whole may have failed

	tried   time.Time // to connect
	again   time.Duration
	present bool // there is a device, which could be opened
	lastErr string
}

// New returns a collector. It opens nothing before its first poll.
func New(log *zap.Logger, opts Options) *Collector {
	if opts.Open == nil {
		opts.Open = func(device string) (bmc.Transport, error) { return bmc.Open(device) }
	}
	return &Collector{log: log, opts: opts, pacer: pacer{budget: opts.Budget}}
}

// Bounds of connecting.
const (
	againFirst = 10 * time.Second
	againLast  = 5 * time.Minute
)

// Poll reads everything that meters are wanted of and hands it to the sink. It
// takes no longer than the interval between polls, but for a walk over the BMC's
// records where those are not known. The error says why the BMC as a whole could
// not be read; there is none where the host has no BMC.
func (c *Collector) Poll(ctx context.Context, interval time.Duration, wanted func(*sample.Meter) bool, sink Sink) error {
	c.settle()
	c.sink, c.wanted = sink, wanted
	begin := time.Now()
	defer func() {
		c.publish(begin)
		c.sink, c.wanted = nil, nil
	}()
	walks := c.status.walks.Load()
	if err := c.prepare(ctx); err != nil {
		return c.lost(ctx, wanted, err)
	}
	left := interval * 9 / 10
	if walks == c.status.walks.Load() {
		left = max(left-time.Since(begin), interval/4)
	}
	ctx, cancel := context.WithTimeout(ctx, left)
	defer cancel()
	if err := c.round(ctx, wanted); err != nil {
		c.disconnect(err)
		return c.lost(ctx, wanted, err)
	}
	sink.Flush()
	err := c.retry(ctx, wanted)
	if err != nil {
		c.disconnect(err)
	}
	c.tell(wanted)
	c.saveState()
	return err
}

// maxPrepare bounds the walk.
const maxPrepare = 5 * time.Minute

// prepare connects, and reads the BMC's records where they have changed.
func (c *Collector) prepare(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, maxPrepare)
	defer cancel()
	if c.bmc == nil {
		return c.connect(ctx)
	}
	c.bmc.Timeout = c.opts.Timeout
	err := patiently(ctx, func() error { return c.refresh(ctx) })
	if err != nil {
		c.disconnect(err)
	}
	return err
}

// lost tells that nothing was read. A host without a BMC, or without the right
// to use it, misses nothing.
func (c *Collector) lost(ctx context.Context, wanted func(*sample.Meter) bool, err error) error {
	if !c.present || errors.Is(ctx.Err(), context.Canceled) {
		return nil
	}
	for _, m := range sample.Catalogue {
		if m.OfBMC() && m != sample.IPMISensorAge && m.Event == "" && wanted(m) {
			c.sink.Miss(m.Name, "*", err.Error())
		}
	}
	return err
}

// errWaiting is why there is no attempt to connect yet.
var errWaiting = errors.New("the BMC failed and is left alone for a while")

// connect opens the BMC and learns what it has.
func (c *Collector) connect(ctx context.Context) error {
	if wait := c.again - time.Since(c.tried); c.again > 0 && wait > 0 {
		return fmt.Errorf("%w (%s): %s", errWaiting, c.again, c.lastErr)
	}
	c.tried = time.Now()
	t, err := c.opts.Open(c.opts.Device)
	if err != nil {
		c.down(err, 0) // to look again costs nothing
		return err
	}
	c.present = true
	b := bmc.New(t)
	b.Timeout, b.Pacer = c.opts.Timeout, &c.pacer
	if c.device, err = b.DeviceID(ctx, bmc.Addr{}); err == nil && c.device.Updating {
		err = errors.New("the BMC's firmware is being updated")
	}
	c.bmc = b
	if err == nil {
		err = c.load(ctx)
	}
	if err != nil {
		c.disconnect(err)
		return err
	}
	c.again, c.lastErr = 0, ""
	c.log.Info("the BMC answers", zap.String("firmware", c.device.Firmware), zap.Int("sensors", len(c.records.Sensors)), zap.Bool("node_manager", c.node != nil))
	return nil
}

// down notes that the BMC can't be asked, and how long it is left alone.
func (c *Collector) down(err error, again time.Duration) {
	c.again = again
	if text := err.Error(); text != c.lastErr && !errors.Is(err, context.Canceled) {
		c.lastErr = text
		c.log.Warn("the host's hardware is not read", zap.Error(err))
	}
}

// disconnect gives the BMC up, to begin anew with the next poll.
func (c *Collector) disconnect(err error) {
	c.count()
	_ = c.bmc.Close() // what it says changes nothing
	c.bmc = nil
	c.mute = 0
	c.down(err, min(max(2*c.again, againFirst), againLast))
}

// Close gives the BMC back. What was told until then must be on its way.
func (c *Collector) Close() error {
	c.settle()
	if c.bmc == nil {
		return nil
	}
	err := c.bmc.Close()
	c.bmc = nil
	return err
}

// load learns what the BMC describes: from the file if that has the present
// state, else by a walk.
func (c *Collector) load(ctx context.Context) error {
	c.loadState()
	stamp, err := c.bmc.RecordStamp(ctx, c.device)
	if errors.Is(err, bmc.ErrNoSDR) {
		c.log.Warn("the BMC describes no sensors; its chassis, event log and power are read")
		c.use(bmc.Records{}, stamp)
		return nil
	}
	if err != nil {
		return err
	}
	raw := c.state.Records
	if len(raw) == 0 || c.state.Stamp != stamp {
		if raw, stamp, err = c.bmc.ReadRecords(ctx, c.device); err != nil && !errors.Is(err, bmc.ErrNoSDR) {
			return err
		}
		c.status.walks.Add(1)
		c.state.Records, c.state.Stamp, c.state.changed = raw, stamp, true
	}
	records, err := bmc.Parse(raw)
	if err != nil {
		records.Faults = append(records.Faults, err.Error())
	}
	for _, f := range records.Faults {
		c.log.Warn("a sensor data record is left out", zap.String("reason", f))
	}
	c.use(records, stamp)
	return c.findNode(ctx)
}

// nodeAgain is how often Node Manager is looked for that does not answer. It may
// start later than the BMC.
const nodeAgain = time.Minute

// findNode looks for Node Manager. One that does not answer is looked for again.
// An error is about the BMC itself.
func (c *Collector) findNode(ctx context.Context) error {
	c.bmc.Timeout = remoteTimeout * c.opts.Timeout
	defer func() { c.bmc.Timeout = c.opts.Timeout }()
	node, err := c.bmc.FindNodeManager(ctx, &c.records)
	c.nodeAgain = time.Time{}
	switch {
	case err == nil:
		c.node = node
		c.addNode()
	case errors.Is(err, bmc.ErrGone), ctx.Err() != nil:
		return err
	case !errors.Is(err, bmc.ErrNoNodeManager):
		c.nodeAgain = time.Now().Add(nodeAgain)
		if !c.nodeTold {
			c.nodeTold = true
			c.log.Warn("Node Manager is not read; it is looked for again each minute", zap.Error(err))
		}
	}
	return nil
}

// refresh looks whether the records have changed, and reads them again if so.
func (c *Collector) refresh(ctx context.Context) error {
	stamp, err := c.bmc.RecordStamp(ctx, c.device)
	if errors.Is(err, bmc.ErrNoSDR) && len(c.records.Sensors) == 0 {
		return nil
	}
	if err != nil {
		return err
	}
	if stamp == c.stamp {
		if !c.nodeAgain.IsZero() && time.Now().After(c.nodeAgain) {
			return c.findNode(ctx)
		}
		return nil
	}
	c.log.Info("the BMC's sensor data records have changed")
	return c.load(ctx)
}
