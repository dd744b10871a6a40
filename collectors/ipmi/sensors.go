package ipmi

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/collectors/ipmi/bmc"
	"github.com/kvmeter/kvmeter/sample"
)

// use makes the probes of what the BMC describes. What is the same as before
// keeps its health.
func (c *Collector) use(records bmc.Records, stamp bmc.Stamp) {
	c.records, c.stamp, c.node = records, stamp, nil
	old := map[string]*probe{}
	for _, p := range c.probes {
		old[p.key()] = p
	}
	c.probes, c.start = nil, 0
	c.addHost()
	for i := range c.records.Sensors {
		s := &c.records.Sensors[i]
		if s.Readable() {
			c.addSensor(s)
		}
	}
	for _, p := range c.probes {
		o := old[p.key()]
		if o == nil && slices.Contains(c.state.Quarantine, p.key()) {
			p.began, p.fails, p.next = time.Now(), quarantine, time.Now().Add(quarantined)
			p.explain("it failed before the agent was started")
		}
		if o != nil {
			p.latency, p.began, p.ok, p.silent = o.latency, o.began, o.ok, o.silent
			p.fails, p.next, p.err, p.lacks, p.why = o.fails, o.next, o.err, o.lacks, o.why
			if p.sensor != nil && o.sensor != nil && p.sensor.EventType == o.sensor.EventType {
				p.followed, p.told = o.followed, o.told
			}
		}
	}
}

// metadata is {"node": host} and more.
func (c *Collector) metadata(more ...any) []byte {
	m := map[string]any{"node": c.opts.Node}
	for i := 0; i < len(more); i += 2 {
		m[more[i].(string)] = more[i+1]
	}
	b, err := json.Marshal(m)
	if err != nil { // of texts and lists of them: cannot happen
		return nil
	}
	return b
}

// withReading adds why there is no reading to metadata.
func withReading(metadata []byte, why string) []byte {
	var m map[string]any
	if json.Unmarshal(metadata, &m) != nil {
		return metadata
	}
	m["reading"] = why
	b, err := json.Marshal(m)
	if err != nil {
		return metadata
	}
	return b
}

// sensorID is a sensor's id as ipmitool writes it.
func sensorID(s *bmc.Sensor) string { return fmt.Sprintf("%s (0x%x)", s.Name, s.Number) }

// resourceOf is a sensor's resource id, as Ceilometer forms it.
func (c *Collector) resourceOf(s *bmc.Sensor) string {
	return c.opts.Node + "-" + strings.ReplaceAll(strings.ToLower(sensorID(s)), " ", "_")
}

// reading is the meter of a sensor's reading, nil where it is none of its own.
func (c *Collector) reading(s *bmc.Sensor) *sample.Meter {
	switch {
	case !s.Analog():
		return nil
	case c.opts.Shape != Older && s.Units.Watts() && s.Units.Flags>>1 == 0:
		return sample.IPMIPower
	case s.Type == bmc.TypeTemperature:
		return sample.IPMITemperature
	case s.Type == bmc.TypeVoltage:
		return sample.IPMIVoltage
	case s.Type == bmc.TypeCurrent:
		return sample.IPMICurrent
	case s.Type == bmc.TypeFan:
		return sample.IPMIFan
	}
	return nil
}

func (c *Collector) addSensor(s *bmc.Sensor) {
	p := &probe{name: sensorID(s), resource: c.resourceOf(s), sensor: s, remote: !s.Owner.IsBMC()}
	if slices.ContainsFunc(c.probes, func(o *probe) bool { return o.resource == p.resource }) {
		// Another controller or LUN has one of the same name and number.
		p.resource += fmt.Sprintf("@%x.%x.%x", s.Owner.Channel, s.Owner.Slave, s.Owner.LUN)
	}
	meter := c.reading(s)
	var ref sample.MeterRef
	if meter != nil {
		p.meters = append(p.meters, meter)
		ref = meter.MeterRef
		ref.Unit = s.Units.Short()
	}
	p.metadata = c.metadata()
	if meter == sample.IPMIFan && s.HasNormalMax {
		if v, ok := s.Factors.Convert(s.NormalMax); ok {
			p.metadata = c.metadata("maximum_rpm", strconv.FormatFloat(v, 'f', 3, 64))
		}
	}
	if s.ByThreshold() {
		p.meters = append(p.meters, sample.IPMISensorState)
	} else {
		p.meters = append(p.meters, sample.IPMISensorStates)
	}
	p.meters = append(p.meters, sample.IPMISensorAge, sample.IPMISensorEvent)
	p.read = func(ctx context.Context, p *probe) error { return c.readSensor(ctx, p, ref) }
	c.probes = append(c.probes, p)
}

// readSensor reads a sensor and emits its reading, if ref names a meter for it,
// and its state.
func (c *Collector) readSensor(ctx context.Context, p *probe, ref sample.MeterRef) error {
	r, err := c.bmc.Read(ctx, p.sensor)
	if err != nil {
		return err
	}
	at := time.Now()
	if p.silent = r.Off || r.Unknown; p.silent {
		return nil
	}
	if p.sensor.Analog() && !r.Valid {
		return errNoValue
	}
	n := 0
	if ref.Name != "" {
		c.room[n] = Sample{ref, sample.Float(r.Value)}
		n++
	}
	metadata, state := p.metadata, r.States
	if p.sensor.ByThreshold() {
		level := r.Level()
		c.room[n] = Sample{sample.IPMISensorState.MeterRef, sample.Uint(uint64(level))}
		if level != p.level {
			c.log.Warn("the state of a sensor has changed", zap.String("sensor", p.name), zap.Stringer("from", p.level), zap.Stringer("to", level), zap.Float64("value", r.Value))
		}
		p.level, state = level, uint16(level)
	} else {
		if p.named == nil || p.states != r.States {
			names := bmc.StateNames(p.sensor, r.States)
			if p.named != nil {
				c.log.Warn("the states of a sensor have changed", zap.String("sensor", p.name), zap.Strings("states", names))
			}
			p.states = r.States
			p.named = c.metadata("sensor_type", bmc.TypeName(p.sensor.Type), "states", slices.Concat([]string{}, names))
		}
		metadata = p.named
		c.room[n] = Sample{sample.IPMISensorStates.MeterRef, sample.Uint(uint64(r.States))}
	}
	c.emit(p.resource, metadata, at, n+1)
	if c.wanted(sample.IPMISensorEvent) {
		c.change(p, state, at)
	}
	return nil
}

// change emits that a sensor's level or states have changed, if they have. What
// the first reading finds is no change.
func (c *Collector) change(p *probe, state uint16, at time.Time) {
	old, followed := p.told, p.followed
	p.told, p.followed = state, true
	if !followed || old == state {
		return
	}
	name := func(state uint16) string {
		if p.sensor.ByThreshold() {
			return bmc.Level(state).String()
		}
		return strings.Join(bmc.StateNames(p.sensor, state), ", ")
	}
	c.room[0] = Sample{sample.IPMISensorEvent.MeterRef, sample.Uint(1)}
	c.emit(p.resource, c.metadata("sensor", p.name, "sensor_type", bmc.TypeName(p.sensor.Type), "old_state", name(old), "state", name(state)), at, 1)
}

// addHost adds what is no sensor.
func (c *Collector) addHost() {
	c.add("chassis", c.opts.Node+"-chassis", c.readChassis, sample.IPMIChassisPower, sample.IPMIChassisFaults)
	c.add("DCMI power", c.opts.Node, c.readDCMI, sample.IPMIDCMIPower, sample.IPMIDCMIPowerMin, sample.IPMIDCMIPowerMax, sample.IPMIDCMIPowerMean)
	c.add("event log", c.opts.Node+"-sel", c.readSEL, sample.IPMISELEntries, sample.IPMISELFree, sample.IPMISELEvent)
}

func (c *Collector) add(name, resource string, read func(context.Context, *probe) error, meters ...*sample.Meter) *probe {
	p := &probe{name: name, resource: resource, metadata: c.metadata(), meters: meters, read: read}
	c.probes = append(c.probes, p)
	return p
}

func (c *Collector) readChassis(ctx context.Context, p *probe) error {
	s, err := c.bmc.Chassis(ctx)
	if err != nil {
		return err
	}
	on := uint64(0)
	if s.On {
		on = 1
	}
	if p.named == nil || p.states != uint16(len(s.Faults)) {
		if p.named != nil {
			c.log.Warn("the faults of the chassis have changed", zap.Strings("faults", s.Faults))
		}
		p.states, p.named = uint16(len(s.Faults)), c.metadata("faults", slices.Concat([]string{}, s.Faults))
	}
	c.room[0] = Sample{sample.IPMIChassisPower.MeterRef, sample.Uint(on)}
	c.room[1] = Sample{sample.IPMIChassisFaults.MeterRef, sample.Uint(uint64(len(s.Faults)))}
	c.emit(p.resource, p.named, time.Now(), 2)
	return nil
}

func (c *Collector) readDCMI(ctx context.Context, p *probe) error {
	s, err := c.bmc.DCMIPower(ctx)
	if err != nil {
		return err
	}
	if p.silent = !s.Active; p.silent {
		return nil
	}
	for i, v := range [...]uint16{s.Current, s.Minimum, s.Maximum, s.Average} {
		c.room[i] = Sample{p.meters[i].MeterRef, sample.Uint(uint64(v))}
	}
	c.emit(p.resource, p.metadata, time.Now(), 4)
	return nil
}

// addNode adds what Node Manager measures.
func (c *Collector) addNode() {
	for _, m := range []struct {
		what  bmc.Measurement
		meter *sample.Meter
	}{
		{bmc.NMPower, sample.IPMINodePower},
		{bmc.NMInlet, sample.IPMINodeInlet},
		{bmc.NMOutlet, sample.IPMINodeOutlet},
		{bmc.NMAirflow, sample.IPMINodeAirflow},
	} {
		if !c.node.Has(m.what) {
			continue
		}
		c.add("Node Manager, "+m.meter.Name, c.opts.Node, func(ctx context.Context, p *probe) error {
			s, err := c.bmc.NodeManagerStatistics(ctx, c.node, m.what)
			if err != nil {
				return err
			}
			c.room[0] = Sample{m.meter.MeterRef, sample.Uint(uint64(s.Current))}
			c.emit(p.resource, p.metadata, time.Now(), 1)
			return nil
		}, m.meter).remote = true
	}
	if !c.node.HasCUPS() {
		return
	}
	c.add("Node Manager, CUPS index", c.opts.Node, func(ctx context.Context, p *probe) error {
		v, err := c.bmc.CUPSIndex(ctx, c.node)
		if err != nil {
			return err
		}
		c.room[0] = Sample{sample.IPMINodeCUPS.MeterRef, sample.Uint(uint64(v))}
		c.emit(p.resource, p.metadata, time.Now(), 1)
		return nil
	}, sample.IPMINodeCUPS).remote = true
	c.add("Node Manager, utilization", c.opts.Node, func(ctx context.Context, p *probe) error {
		u, err := c.bmc.CUPSUtilization(ctx, c.node)
		if err != nil {
			return err
		}
		for i, v := range [...]uint64{u.CPU, u.Memory, u.IO} {
			c.room[i] = Sample{p.meters[i].MeterRef, sample.Uint(v)}
		}
		c.emit(p.resource, p.metadata, time.Now(), 3)
		return nil
	}, sample.IPMINodeCPUUtil, sample.IPMINodeMemoryUtil, sample.IPMINodeIOUtil).remote = true
}

// maxEvents bounds the entries that one poll reads; the rest comes with the next.
const maxEvents = 64

// readSEL reads the state of the event log, and the entries that are new. Those
// that were there before the first poll ever are not.
func (c *Collector) readSEL(ctx context.Context, p *probe) error {
	info, err := c.bmc.SEL(ctx)
	if err != nil {
		return err
	}
	c.room[0] = Sample{sample.IPMISELEntries.MeterRef, sample.Uint(uint64(info.Entries))}
	c.room[1] = Sample{sample.IPMISELFree.MeterRef, sample.Uint(uint64(info.Free))}
	c.emit(p.resource, p.metadata, time.Now(), 2)
	if !c.wanted(sample.IPMISELEvent) || c.place.SEL != nil && *c.place.SEL == info {
		return nil
	}
	if !c.place.Told {
		last, err := c.bmc.LastEvent(ctx)
		if err != nil {
			return err
		}
		c.log.Info("the event log is followed from here on", zap.Uint16("entries", info.Entries))
		c.place = place{true, last.Raw, &info}
		return nil
	}
	n := 0
	_, err = c.bmc.Events(ctx, bmc.ParseEvent(c.place.Last), func(e bmc.Event) bool {
		c.event(&e)
		c.place = place{true, e.Raw, nil}
		n++
		return n < maxEvents
	})
	if err == nil && n < maxEvents {
		c.place.SEL = &info
	}
	return err
}

// event emits an entry of the event log.
func (c *Collector) event(e *bmc.Event) {
	name, state, kind := c.records.SensorName(e), e.State(), "OEM"
	if e.OEM == nil {
		kind = bmc.TypeName(e.Kind)
	}
	c.log.Warn("the BMC logged an event", zap.Uint16("record", e.Record), zap.String("sensor", name), zap.String("type", kind),
		zap.String("state", state), zap.Bool("asserted", e.Asserted), zap.String("time", e.When()))
	c.room[0] = Sample{sample.IPMISELEvent.MeterRef, sample.Uint(1)}
	c.emit(c.opts.Node+"-sel-event", c.metadata(
		"record", e.Record, "time", e.When(), "sensor", name, "sensor_type", kind, "state", state, "asserted", e.Asserted,
		"raw", hex.EncodeToString(e.Raw[:]),
	), time.Now(), 1)
}
