package delivery

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math"
	"path/filepath"
	"time"

	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/bus"
	"github.com/kvmeter/kvmeter/diskqueue"
	"github.com/kvmeter/kvmeter/sample"
	"github.com/kvmeter/kvmeter/sample/failpoint"
)

// Spool is the part of agent.yaml about the spool.
type Spool struct {
	// Path is the folder where batches are kept from before they are sent until
	// the bus has confirmed them. Empty: they wait in memory, and are lost with
	// the agent.
	Path string `yaml:"path"`
	// MaxBytes bounds its size on disk. Beyond it the oldest samples are dropped,
	// which is recorded as a gap of each meter.
	MaxBytes int64 `yaml:"max_bytes"`
	// MaxAge is how long samples wait at most; beyond it they are dropped, which
	// is recorded as a gap of each meter.
	MaxAge time.Duration `yaml:"max_age"`
	// Order is which of the samples that wait are sent first once the bus can be
	// reached again: oldest or newest. New ones are sent at once in either case.
	Order string `yaml:"order"`
	// Drain bounds how fast what waits is sent, in multiples of the bytes of new
	// samples; a batch a second always is.
	Drain float64 `yaml:"drain"`
}

// DefaultSpool returns the configuration of a daemon.
func DefaultSpool() Spool {
	return Spool{Path: "/var/lib/kvmeter/agent/spool", MaxBytes: 256 << 20, MaxAge: 7 * 24 * time.Hour, Order: "oldest", Drain: 20}
}

// Check returns an error that names the first option with an impossible value.
func (s *Spool) Check() error {
	switch {
	case s.Order != "oldest" && s.Order != "newest":
		return fmt.Errorf("spool.order %q: it is oldest or newest", s.Order)
	case s.MaxBytes < 1<<20:
		return fmt.Errorf("spool.max_bytes %d is too small: use at least 1048576", s.MaxBytes)
	case s.MaxAge <= 0:
		return fmt.Errorf("spool.max_age %s: must be more than 0", s.MaxAge)
	case !(s.Drain >= 0) || math.IsInf(s.Drain, 1):
		return fmt.Errorf("spool.drain %v: must be a number that is not negative", s.Drain)
	}
	return nil
}

func (s *Spool) order() diskqueue.Order { return diskqueue.Order(s.Order == "newest") }

// ofBatch is the kind of the spool's records. Their body is the time that the
// batch's samples tell of since, in µs since the epoch (8 bytes), the batch's id (16), the
// length of the node's name (2), the name, and the encoded batch. It is signed when
// it is sent, by the key of that day.
const (
	ofBatch byte = 1
	ofMark  byte = 2 // nothing but its time: the wall clock was set back to it
)

func appendBatch(dst []byte, from int64, id sample.BatchID, node string, body []byte) []byte {
	dst = binary.LittleEndian.AppendUint64(dst, uint64(from))
	dst = append(dst, id[:]...)
	dst = binary.LittleEndian.AppendUint16(dst, uint16(len(node)))
	dst = append(dst, node...)
	return append(dst, body...)
}

// spooledBatch is a record of the spool.
type spooledBatch struct {
	from int64
	id   sample.BatchID
	node string
	body []byte
}

var errNoBatch = errors.New("a record of the spool is no batch")

func readBatch(r *diskqueue.Record) (b spooledBatch, err error) {
	const head = 8 + 16 + 2
	if r.Kind != ofBatch || len(r.Body) < head {
		return b, errNoBatch
	}
	n := int(binary.LittleEndian.Uint16(r.Body[24:]))
	if len(r.Body) < head+n {
		return b, errNoBatch
	}
	b.from = int64(binary.LittleEndian.Uint64(r.Body))
	copy(b.id[:], r.Body[8:])
	b.node, b.body = string(r.Body[head:head+n]), r.Body[head+n:]
	return b, nil
}

// disk is what only the goroutine that writes to the disk uses.
type disk struct {
	dec     *sample.Decoder
	retry   time.Time   // not before, after an error
	restart *sample.Gap // before this start, until it is in the spool
	seen    int64       // by what the state on disk says, or is to say while there is a restart
}

// spoolState is what is known of the spool; mu is held.
type spoolState struct {
	queue *diskqueue.Queue // nil: it could not be opened
	fault error            // why nothing can be written; nil: all is well
	since time.Time        // when the disk was asked for what it has not done yet; zero: it rests
	slow  bool             // it does not answer
}

// takes reports whether new batches are kept on disk.
func (s *spoolState) takes() bool { return s.queue != nil && s.fault == nil }

// Note says in one sentence what is wrong with the spool, or nothing.
func (d *Delivery) Note() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	err := d.spool.fault
	if err == nil && !d.spool.since.IsZero() && d.now().Sub(d.spool.since) > patience {
		err = errors.New("its disk does not answer")
	}
	if err == nil {
		return ""
	}
	return fmt.Sprintf("samples are not kept on disk until they are delivered (%v): they wait in memory, up to queue_bytes, and are lost with the agent; give it a folder that it may write with spool.path, and space", err)
}

// keep writes to the disk until ctx ends.
func (d *Delivery) keep(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		timer.Reset(d.Spool(d.now()))
		select {
		case <-ctx.Done():
			return
		case <-d.wakeDisk:
		case <-timer.C:
		}
	}
}

// Spool does what is to be done on disk, and returns how long there will be
// nothing to do.
func (d *Delivery) Spool(now time.Time) time.Duration {
	d.mu.Lock()
	q, fault := d.spool.queue, d.spool.fault
	if fault != nil && now.Before(d.disk.retry) {
		d.mu.Unlock()
		return d.disk.retry.Sub(now)
	}
	d.spool.since = now
	d.mu.Unlock()
	var err error
	if q == nil {
		q, err = d.open()
	}
	if err == nil {
		err = d.write(q, now)
	}
	d.o.Metrics.spool(q, err == nil)
	d.mu.Lock()
	defer d.mu.Unlock()
	d.spool.since, d.spool.slow = time.Time{}, false
	wait := time.Minute // the age is looked at
	switch {
	case err != nil:
		wait = retryDisk
		d.disk.retry = now.Add(wait)
		if fault == nil || fault.Error() != err.Error() {
			d.o.Log.Warn("samples are not kept on disk until they are delivered; they wait in memory", zap.Error(err))
		}
	case fault != nil:
		d.o.Log.Info("samples are kept on disk again")
	}
	d.spool.fault = err
	wake(d.wakeLive)
	return wait
}

// open opens the spool, and takes over the numbers that are kept there.
func (d *Delivery) open() (*diskqueue.Queue, error) {
	o := &d.o.Spool
	q, err := diskqueue.Open(diskqueue.Options{
		Dir: o.Path, FS: d.o.FS, SegmentBytes: min(max(o.MaxBytes/16, 64<<10), 4<<20), Damaged: d.damaged,
	})
	if err != nil {
		return nil, fmt.Errorf("open the spool: %w", err)
	}
	kept, err := readState(d.o.FS, d.statePath())
	known := err == nil
	last := kept.seen
	if newest := q.Stats().Newest; newest > 0 && !kept.clean {
		last = newest
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.disk.seen = last
	if known {
		d.numbers = numbers{epoch: kept.epoch, next: kept.reserved, reserved: kept.reserved, kept: true}
	}
	// What the disk does not know of may have been made, and lost with its maker.
	if t := d.o.Wall().UnixMicro(); last > 0 && (!kept.clean || t-last > d.o.Interval.Microseconds()*3/2) {
		gap := sample.Gap{Meter: "*", Resource: "*", From: last, To: t, Reason: "the agent was not running, and what it had not delivered or kept on disk is lost"}
		if last > t { // the wall clock was set back
			around := 2 * d.o.Interval.Microseconds()
			gap.From, gap.To = t-around, last+around
		}
		d.disk.restart = &gap
		d.o.Metrics.gaps.Inc()
		d.keepGaps(gap) // should the disk fail: two that are equal are one
	}
	d.spool.queue = q
	return q, nil
}

// damaged is told what is lost on the disk.
func (d *Delivery) damaged(what diskqueue.Damage) {
	d.o.Log.Error("the spool is damaged: samples that waited there are lost, which is recorded as a gap",
		zap.String("file", what.File), zap.Int("batches", what.Records))
	d.o.Metrics.damaged.Add(float64(max(1, what.Records)))
	s := span{what.From, what.To, max(0, what.N)}
	if s.to == 0 {
		s.to = d.o.Wall().UnixMicro()
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.losses.add("*", lostDamaged, span{min(s.from, s.to), s.to, s.samples})
}

// write brings the disk up to date.
func (d *Delivery) write(q *diskqueue.Queue, now time.Time) error {
	if err := d.reserve(); err != nil {
		return err
	}
	if d.disk.restart != nil {
		if err := d.putGaps(q, []sample.Gap{*d.disk.restart}, d.disk.seen); err != nil {
			return fmt.Errorf("write to the spool: %w", err)
		}
		d.disk.restart = nil
	}
	d.mu.Lock()
	var fresh []*queued
	var rs []diskqueue.Record
	size := int64(0)
	for _, b := range d.queue {
		if !b.spooled {
			fresh = append(fresh, b)
			n := 0
			for _, m := range b.samples {
				n += m.n
			}
			rs = append(rs, diskqueue.Record{Kind: ofBatch, Time: b.to, N: n})
			size += int64(len(b.msg.Body))
		}
	}
	settled := d.settled
	d.settled.done, d.settled.returned = nil, nil
	wall := d.o.Wall().UnixMicro() // all batches of before are on disk, or fresh
	d.mu.Unlock()
	q.Return(settled.returned...)
	err := q.Done(settled.done...)
	if err == nil {
		err = d.bounds(q, now, size)
	}
	if len(settled.returned) > 0 {
		wake(d.wakeSpool)
	}
	if err == nil && len(fresh) == 0 {
		err = d.mark(q, wall)
	}
	if err != nil || len(fresh) == 0 {
		return err
	}
	for i, b := range fresh {
		rs[i].Body = appendBatch(nil, b.from, b.id, d.o.Node, b.msg.Body)
	}
	// What was lost before these batches is on disk with them: a start after a
	// kill tells of the time after them only.
	d.mu.Lock()
	told := append(d.gaps, d.losses.gaps()...)
	d.gaps, d.losses = nil, losses{}
	if len(told) > 0 {
		var r diskqueue.Record
		r, err = d.gapRecord(told, rs[len(fresh)-1].Time)
		rs = append(rs, r)
	}
	d.mu.Unlock()
	var refs []diskqueue.Ref
	if err == nil {
		failpoint.At(failpoint.SpoolPut)
		if refs, err = q.Put(true, rs...); err == nil {
			failpoint.At(failpoint.SpoolKept)
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if err != nil {
		d.keepGaps(told...)
		return fmt.Errorf("write to the spool: %w", err)
	}
	if len(told) > 0 {
		d.settled.returned = append(d.settled.returned, refs[len(fresh)])
		wake(d.wakeDisk)
	}
	for i, b := range fresh {
		b.ref, b.spooled = refs[i], true
		if b.confirmed { // meanwhile: it had waited for too long
			d.settled.done = append(d.settled.done, b.ref)
			wake(d.wakeDisk)
		}
	}
	return nil
}

// mark keeps it on disk that the wall clock was set back, so that a start after a
// kill knows since when it misses batches.
func (d *Delivery) mark(q *diskqueue.Queue, wall int64) error {
	last := q.Stats().Newest
	if last == 0 { // nothing was put yet, and the state is what a start goes by
		last = d.disk.seen
	}
	if last <= wall {
		return nil
	}
	refs, err := q.Put(true, diskqueue.Record{Kind: ofMark, Time: wall})
	if err != nil {
		return fmt.Errorf("write to the spool: %w", err)
	}
	return q.Done(refs...)
}

// marginBytes is kept free within the bound, for the gaps of what is dropped.
const marginBytes = 64 << 10

// bounds drops the oldest of the spool, so that size more bytes fit and nothing is
// too old. The gaps of what is dropped are on disk before it goes.
func (d *Delivery) bounds(q *diskqueue.Queue, now time.Time, size int64) error {
	for {
		st := q.Stats()
		why := ""
		switch {
		case st.Records == 0 || st.Files <= marginBytes:
			return nil
		case st.Files+size+marginBytes > d.o.Spool.MaxBytes:
			why = lostFull
		case st.Oldest < now.Add(d.ahead-d.o.Spool.MaxAge).UnixMicro():
			why = lostOld
		default:
			return nil
		}
		if err := d.dropOldest(q, why); err != nil {
			return fmt.Errorf("drop the oldest of the spool: %w", err)
		}
	}
}

// dropOldest drops the oldest segment.
func (d *Delivery) dropOldest(q *diskqueue.Queue, why string) error {
	var lost losses
	var gaps []sample.Gap
	batches := 0
	refs, damage, err := q.TakeOldestSegment(func(r *diskqueue.Record) {
		if r.Kind == ofMark {
			return
		}
		batches++
		b, err := readBatch(r)
		var batch *sample.Batch
		if err == nil {
			batch, err = d.disk.dec.Decode(b.body)
		}
		if err != nil {
			lost.add("*", lostDamaged, span{r.Time, r.Time, r.N})
			return
		}
		for i := range batch.Columns {
			c := &batch.Columns[i]
			meter := batch.Meters[c.Meter].Name
			lost.add(meter, why, span{b.from, batch.Base, len(c.Values)})
			d.o.Metrics.dropped.WithLabelValues(meter).Add(float64(len(c.Values)))
		}
		gaps = boundGaps(append(gaps, batch.Gaps...))
	})
	if err != nil {
		q.Return(refs...)
		return err
	}
	if damage.Records > 0 {
		lost.add("*", lostDamaged, span{damage.From, damage.To, damage.N})
	}
	if err := d.putGaps(q, append(gaps, lost.gaps()...), q.Stats().Newest); err != nil {
		q.Return(refs...)
		return err
	}
	d.o.Log.Warn("samples that waited for the bus are dropped", zap.String("reason", why), zap.Int("batches", batches))
	return q.Done(refs...)
}

// putGaps puts a batch of gaps into the spool. at is the time of the newest batch
// there, which stays that: others are still in memory only.
func (d *Delivery) putGaps(q *diskqueue.Queue, gaps []sample.Gap, at int64) error {
	d.mu.Lock()
	r, err := d.gapRecord(gaps, at)
	d.mu.Unlock()
	if err == nil {
		_, err = q.Put(false, r)
	}
	wake(d.wakeSpool)
	return err
}

// gapRecord makes a batch of gaps for the spool, as a record of a time; mu is held.
func (d *Delivery) gapRecord(gaps []sample.Gap, at int64) (diskqueue.Record, error) {
	b := sample.NewBuilder()
	for _, g := range boundGaps(gaps) {
		b.Gap(g)
	}
	base := d.o.Wall().UnixMicro()
	batch := b.Build()
	msg, err := d.seal(batch, base)
	return diskqueue.Record{Kind: ofBatch, Time: at, Body: appendBatch(nil, base, batch.ID, d.o.Node, msg.Body)}, err
}

// Backlog returns some of what waits in the spool, or how long to wait. It is to
// be settled before it is called again.
func (d *Delivery) Backlog(now time.Time) (*Group, time.Duration) {
	d.mu.Lock()
	q := d.spool.queue
	n, bytes := maxInFlight, min(int64(d.credit), maxBytes)
	if wait := drainEvery - now.Sub(d.drained); bytes <= 0 && wait > 0 && q != nil {
		d.mu.Unlock()
		return nil, wait
	} else if bytes <= 0 {
		n, bytes = 1, 1
	}
	if q == nil || d.draining {
		d.mu.Unlock()
		return nil, never
	}
	d.mu.Unlock()
	taken, err := q.Take(nil, d.o.Spool.order(), n, bytes)
	if err != nil {
		d.o.Log.Warn("the spool cannot be read", zap.Error(err))
	}
	if len(taken) == 0 {
		if err != nil {
			return nil, retryDisk
		}
		return nil, never
	}
	g := &Group{}
	d.mu.Lock()
	defer d.mu.Unlock()
	for i := range taken {
		if taken[i].Kind == ofMark { // what was done with it was lost
			d.settled.done = append(d.settled.done, taken[i].Ref)
			continue
		}
		b, err := readBatch(&taken[i].Record)
		if err != nil { // its checksum holds: it was written by another version
			d.o.Log.Error("a batch of the spool is lost", zap.Error(err))
			d.losses.add("*", lostDamaged, span{taken[i].Time, taken[i].Time, taken[i].N})
			d.settled.done = append(d.settled.done, taken[i].Ref)
			continue
		}
		g.refs = append(g.refs, taken[i].Ref)
		g.bytes += len(b.body)
		g.Messages = append(g.Messages, bus.Seal(bus.SamplesKey(b.node, d.o.Partitions), &sample.Batch{ID: b.id, Node: b.node}, b.body, d.o.Keys.Secret(d.o.Node)))
	}
	if len(g.refs) == 0 {
		wake(d.wakeDisk)
		return nil, drainEvery
	}
	d.drained, d.draining = now, true
	return g, 0
}

// Close keeps on disk what is left, and ends the use of the spool. It is called
// after Run has returned.
func (d *Delivery) Close() error {
	d.mu.Lock()
	q := d.spool.queue
	d.mu.Unlock()
	if q == nil {
		return nil
	}
	d.disk.retry = time.Time{}
	d.Spool(d.now())
	d.Spool(d.now()) // what the first has found to be confirmed
	d.mu.Lock()
	err := d.spool.fault
	keep := state{epoch: d.numbers.epoch, reserved: d.numbers.next, seen: d.o.Wall().UnixMicro(), clean: len(d.queue) == 0 || err == nil}
	kept := d.numbers.kept
	d.mu.Unlock()
	if err == nil && kept {
		err = writeState(d.o.FS, d.statePath(), keep)
	}
	return errors.Join(err, q.Close())
}

// state is what the spool's folder says of the node's numbers.
type state struct {
	epoch    uint64
	reserved uint64 // no seq from here on was given
	seen     int64  // an agent was running, µs since the epoch
	clean    bool   // and it lost nothing at its end
}

// block is how many seqs are reserved at once: at one batch a second for an hour.
const block = 4096

func (d *Delivery) statePath() string { return filepath.Join(d.o.Spool.Path, "epoch") }

// reserve sees to it that there are numbers.
func (d *Delivery) reserve() error {
	d.mu.Lock()
	n := d.numbers
	d.mu.Unlock()
	if n.kept && n.reserved-n.next > block/2 {
		return nil
	}
	keep := state{epoch: n.epoch, reserved: n.next + block, seen: d.o.Wall().UnixMicro()}
	if d.disk.restart != nil {
		keep.seen = d.disk.seen
	}
	if err := writeState(d.o.FS, d.statePath(), keep); err != nil {
		return fmt.Errorf("keep the numbers of batches: %w", err)
	}
	d.disk.seen = keep.seen
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.numbers.epoch == n.epoch { // else they ran out meanwhile
		d.numbers.reserved, d.numbers.kept = keep.reserved, true
	}
	return nil
}

const stateFormat = "kvmeter agent epoch %016x reserved %d seen %d clean %t"

// writeState keeps a state, with its checksum.
func writeState(fsys diskqueue.FS, path string, s state) error {
	line := fmt.Sprintf(stateFormat, s.epoch, s.reserved, s.seen, s.clean)
	return diskqueue.WriteFile(fsys, path, fmt.Appendf(nil, "%s %08x\n", line, crc32.ChecksumIEEE([]byte(line))))
}

var errNoState = errors.New("the numbers of batches are damaged")

func readState(fsys diskqueue.FS, path string) (s state, err error) {
	text, err := diskqueue.ReadFile(fsys, path, 1<<10)
	if err != nil {
		return s, err
	}
	return parseState(text)
}

func parseState(text []byte) (s state, err error) {
	var sum uint32
	if _, err := fmt.Sscanf(string(text), stateFormat+" %08x\n", &s.epoch, &s.reserved, &s.seen, &s.clean, &sum); err != nil {
		return state{}, errNoState
	}
	line := fmt.Sprintf(stateFormat, s.epoch, s.reserved, s.seen, s.clean)
	if fmt.Sprintf("%s %08x\n", line, sum) != string(text) || crc32.ChecksumIEEE([]byte(line)) != sum {
		return state{}, errNoState
	}
	return s, nil
}
