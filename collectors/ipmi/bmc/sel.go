package bmc

import (
	"context"
	"fmt"
	"time"
)

// SELInfo is the state of the system event log (§31.2).
type SELInfo struct {
	Entries  uint16 `json:"entries"`
	Free     uint16 `json:"free_bytes"` // FFFFh: as many or more
	Added    uint32 `json:"added"`      // time of the last addition, by the BMC's clock
	Erased   uint32 `json:"erased"`     // likewise
	Overflow bool   `json:"overflow"`   // entries were lost for lack of room
}

// SEL asks for the state of the event log: Get SEL Info (§31.2).
func (b *BMC) SEL(ctx context.Context) (SELInfo, error) {
	r, err := b.command(ctx, Addr{}, netStorage, 0x40, 14)
	if err != nil {
		return SELInfo{}, fmt.Errorf("ask for the event log: %w", err)
	}
	return SELInfo{Entries: le16(r[1:]), Free: le16(r[3:]), Added: le32(r[5:]), Erased: le32(r[9:]), Overflow: r[13]&0x80 != 0}, nil
}

// selRecord is the size of an entry (§32).
const selRecord = 16

// Event is an entry of the event log (§32.1 to §32.3).
type Event struct {
	Record    uint16
	Type      byte     // 02h: of a sensor; C0h to DFh: OEM with a time; E0h to FFh: OEM without
	Time      uint32   // by the BMC's clock; below 20000000h since it was started (§37)
	Generator uint16   // who logged it
	Sensor    byte     // number
	Kind      byte     // sensor type
	EventType byte     // reading type
	Asserted  bool     // else the state ended
	Data      [3]byte  // of sensors
	OEM       []byte   // of OEM entries
	Raw       [16]byte // all of it
}

// HasTime reports whether the entry says when it happened.
func (e *Event) HasTime() bool { return e.Type < 0xe0 }

// Offset returns which state of the sensor the event is about (§29.7).
func (e *Event) Offset() int { return int(e.Data[0] & 0x0f) }

// First and last record of the log (§31.5).
const (
	selFirst = 0x0000
	selEnd   = 0xffff // as an entry to read, the newest
)

// ParseEvent reads an entry.
func ParseEvent(raw [selRecord]byte) Event {
	e := Event{Record: le16(raw[:]), Type: raw[2], Raw: raw}
	switch {
	case e.Type >= 0xe0:
		e.OEM = e.Raw[3:]
	case e.Type >= 0xc0:
		e.Time, e.OEM = le32(raw[3:]), e.Raw[7:]
	default:
		e.Time, e.Generator = le32(raw[3:]), le16(raw[7:])
		e.Kind, e.Sensor = raw[10], raw[11]
		e.EventType, e.Asserted = raw[12]&0x7f, raw[12]&0x80 == 0
		copy(e.Data[:], raw[13:])
	}
	return e
}

// Events hands every entry after the one called last to emit, in the log's
// order, and returns the newest. If last is no more in the log, or another has
// its number now, the log was cleared, and all of it is new. The zero Event is
// before all. It stops, too, where emit returns false.
func (b *BMC) Events(ctx context.Context, last Event, emit func(Event) bool) (Event, error) {
	next := uint16(selFirst)
	if last.Record != 0 {
		e, after, err := b.event(ctx, last.Record)
		switch {
		case err == nil && e.Raw == last.Raw:
			next = after
		case err != nil && !Lacks(err):
			return last, err
		}
	}
	for n := 0; next != selEnd; n++ {
		if n >= 1<<16 {
			return last, fmt.Errorf("read the event log: %w: it does not end", ErrReply)
		}
		e, after, err := b.event(ctx, next)
		if next == selFirst && Code(err) == CodeNotPresent {
			return Event{}, nil // it is empty
		}
		if err != nil {
			return last, err
		}
		if after == next {
			return last, fmt.Errorf("read the event log: %w: entry %04xh is followed by itself", ErrReply, next)
		}
		last, next = e, after
		if !emit(e) {
			break
		}
	}
	return last, nil
}

// LastEvent returns the newest entry, or the zero Event of an empty log.
func (b *BMC) LastEvent(ctx context.Context) (Event, error) {
	e, _, err := b.event(ctx, selEnd)
	if Code(err) == CodeNotPresent {
		return Event{}, nil
	}
	return e, err
}

// event reads one entry: Get SEL Entry (§31.5).
func (b *BMC) event(ctx context.Context, id uint16) (Event, uint16, error) {
	// Reservation 0: whole entries need none.
	r, err := b.command(ctx, Addr{}, netStorage, 0x43, 2+selRecord, 0, 0, byte(id), byte(id>>8), 0, 0xff)
	if err != nil {
		return Event{}, 0, fmt.Errorf("read entry %04xh of the event log: %w", id, err)
	}
	return ParseEvent([selRecord]byte(r[2:])), le16(r), nil
}

// unset is the first time that is one: below, BMCs count seconds since they were
// started, and FFFFFFFFh is none (§37).
const unset = 0x20000000

// When says when the event happened by the BMC's clock, or how long after its
// start. It is empty where the entry does not say.
func (e *Event) When() string {
	switch {
	case !e.HasTime() || e.Time == 0xffffffff:
		return ""
	case e.Time < unset:
		return fmt.Sprintf("start + %s", time.Duration(e.Time)*time.Second)
	}
	return time.Unix(int64(e.Time), 0).UTC().Format(time.RFC3339)
}

// SensorName names the sensor that an event is of, by its number where no
// record describes it.
func (all *Records) SensorName(e *Event) string {
	if e.OEM != nil {
		return ""
	}
	for i := range all.Sensors {
		// The generator is the owner's address, or the software's (§32.1).
		if s := &all.Sensors[i]; s.Number == e.Sensor && s.Type == e.Kind && s.Owner.Slave == byte(e.Generator)&^1 {
			return s.Name
		}
	}
	return fmt.Sprintf("%02xh", e.Sensor)
}
