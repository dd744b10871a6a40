package ipmi

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/collectors/ipmi/bmc"
)

// state is what is kept in the file.
type state struct {
	Stamp   bmc.Stamp `json:"stamp"`   // of the records
	Records []byte    `json:"records"` // sensor data records, one after the other
	Events  place     `json:"events"`
	// Quarantine are the resources and names of the probes that go on failing,
	// so that a new start need not find them again.
	Quarantine []string `json:"quarantine"`

	loaded, changed bool
}

// place is how far the event log was told.
type place struct {
	Told bool         `json:"told"` // Last is the newest entry that was
	Last [16]byte     `json:"last"`
	SEL  *bmc.SELInfo `json:"sel"` // the log's state when all of it was told
}

// maxState bounds the file.
const maxState = 4 << 20

// loadState reads the file, once. One that can't be used is as good as none.
func (c *Collector) loadState() {
	if c.state.loaded || c.opts.State == "" {
		return
	}
	c.state.loaded = true
	data, err := os.ReadFile(c.opts.State)
	if errors.Is(err, os.ErrNotExist) {
		return
	}
	if err == nil && len(data) > maxState {
		err = fmt.Errorf("it has %d bytes", len(data))
	}
	read := state{loaded: true}
	if err == nil {
		err = json.Unmarshal(data, &read)
	}
	if err == nil {
		_, err = bmc.Parse(read.Records)
	}
	if err != nil {
		c.log.Warn("what is kept of the BMC can't be used and is read anew", zap.String("file", c.opts.State), zap.Error(err))
		return
	}
	c.state, c.place = read, read.Events
}

// settle takes it that what earlier polls told has arrived, unless the agent ends
// before the next one: then it is told again.
func (c *Collector) settle() {
	if c.place != c.state.Events {
		c.state.Events, c.state.changed = c.place, true
	}
	c.keepQuarantine()
	c.saveState()
}

// keepQuarantine puts those that are in quarantine into the state.
func (c *Collector) keepQuarantine() {
	n, same := 0, len(c.probes) > 0
	for _, p := range c.probes {
		if p.fails >= quarantine {
			same = same && n < len(c.state.Quarantine) && c.state.Quarantine[n] == p.key()
			n++
		}
	}
	if len(c.probes) == 0 || same && n == len(c.state.Quarantine) {
		return
	}
	c.state.Quarantine, c.state.changed = nil, true
	for _, p := range c.probes {
		if p.fails >= quarantine {
			c.state.Quarantine = append(c.state.Quarantine, p.key())
		}
	}
}

// saveState writes the file if something has changed, in one step.
func (c *Collector) saveState() {
	if !c.state.changed || c.opts.State == "" {
		return
	}
	c.state.changed = false
	err := c.writeState()
	if err != nil && !c.status.unsaved.Swap(true) {
		c.log.Warn("what is known of the BMC can't be kept: a restart reads it anew and misses events meanwhile", zap.Error(err))
	}
	if err == nil {
		c.status.unsaved.Store(false)
	}
}

func (c *Collector) writeState() error {
	data, err := json.Marshal(&c.state)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(c.opts.State), 0o755); err != nil {
		return err
	}
	tmp := c.opts.State + ".new"
	f, err := os.OpenFile(tmp, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	return os.Rename(tmp, c.opts.State)
}

// Status is how the collector is doing.
type Status struct {
	Connected bool
	Commands  uint64         // sent to the BMC
	Busy      uint64         // answered with busy
	Waited    time.Duration  // for answers
	Walks     uint64         // over all records
	Oldest    time.Duration  // age of the oldest reading
	Health    map[string]int // probes by their health
	Fault     string         // why the BMC is not read; empty: it is, or was never asked
}

// status is what other goroutines see.
type status struct {
	walks    atomic.Uint64
	unsaved  atomic.Bool
	seen     atomic.Pointer[Status]
	commands uint64
	busy     uint64
	waited   time.Duration
}

// count adds what the present connection counted to what earlier ones did.
func (c *Collector) count() {
	c.status.commands += c.bmc.Commands
	c.status.busy += c.bmc.Busy
	c.status.waited += c.bmc.Waited
}

// publish makes the status of now, at the end of a poll that began at begin.
func (c *Collector) publish(begin time.Time) {
	s := Status{Commands: c.status.commands, Busy: c.status.busy, Waited: c.status.waited, Walks: c.status.walks.Load(), Fault: c.lastErr}
	if c.bmc != nil {
		s.Connected = true
		s.Commands += c.bmc.Commands
		s.Busy += c.bmc.Busy
		s.Waited += c.bmc.Waited
	}
	s.Health = make(map[string]int, len(healths))
	for _, p := range c.probes {
		s.Health[p.health()]++
		if since := p.since(); p.sensor != nil && !since.IsZero() && !(p.ok.IsZero() && (p.lacks || p.silent)) {
			s.Oldest = max(s.Oldest, begin.Sub(since))
		}
	}
	c.status.seen.Store(&s)
}

// Status returns how the collector was doing at the end of its last poll. It may
// be called at any time.
func (c *Collector) Status() Status {
	if s := c.status.seen.Load(); s != nil {
		return *s
	}
	return Status{}
}

// Healths are the keys of [Status.Health].
func Healths() []string { return healths[:] }
