package bmc

import (
	"context"
	"errors"
	"fmt"
)

// Stamp says which state of the BMC's records is meant: it changes with them.
type Stamp struct {
	Device   bool   `json:"device"` // the records of the sensor device, where there is no repository
	Records  uint16 `json:"records"`
	Added    uint32 `json:"added"`  // as the BMC's clock has it
	Erased   uint32 `json:"erased"` // likewise
	Firmware string `json:"firmware"`
	Product  uint16 `json:"product"`
}

// Bounds of a walk, for BMCs that count wrongly or in circles.
const (
	maxRecords    = 4096
	walkTries     = 4 // of a record whose reservation is lost, and of a walk during which the records changed
	firstChunk    = 32
	smallestChunk = 8
)

// RecordStamp asks for the present state: Get SDR Repository Info (§33.9), or
// Get Device SDR Info (§35.2) of a BMC without a repository.
func (b *BMC) RecordStamp(ctx context.Context, d Device) (Stamp, error) {
	s := Stamp{Firmware: d.Firmware, Product: d.Product}
	if d.Support&SupportRepository != 0 {
		r, err := b.command(ctx, Addr{}, netStorage, 0x20, 14)
		if err == nil {
			s.Records, s.Added, s.Erased = le16(r[1:]), le32(r[5:]), le32(r[9:])
			return s, nil
		}
		if !Lacks(err) {
			return s, fmt.Errorf("ask for the sensor repository: %w", err)
		}
	}
	s.Device = true
	r, err := b.command(ctx, Addr{}, netSensor, 0x20, 2, 1) // 1: count records, not sensors
	switch {
	case Lacks(err):
		return s, ErrNoSDR
	case err != nil:
		return s, fmt.Errorf("ask for the device's sensors: %w", err)
	}
	s.Records = uint16(r[0])
	if r[1]&0x80 != 0 && len(r) >= 6 { // the sensors may change, and this is when they did
		s.Added = le32(r[2:])
	}
	return s, nil
}

// ReadRecords walks the records and returns them one after the other, and the
// stamp they have. It begins anew if they change meanwhile.
func (b *BMC) ReadRecords(ctx context.Context, d Device) ([]byte, Stamp, error) {
	for try := 1; ; try++ {
		before, err := b.RecordStamp(ctx, d)
		if err != nil {
			return nil, before, err
		}
		raw, err := b.walk(ctx, before)
		if err != nil {
			return nil, before, fmt.Errorf("read the sensor data records: %w", err)
		}
		after, err := b.RecordStamp(ctx, d)
		if err != nil {
			return nil, after, err
		}
		if after == before {
			if len(raw) == 0 {
				return nil, after, ErrNoSDR
			}
			return raw, after, nil
		}
		if try == walkTries {
			return nil, after, errors.New("read the sensor data records: they go on changing while they are read")
		}
	}
}

// walker is a walk over the records.
type walker struct {
	b           *BMC
	netFn       byte
	reserve     byte // the command
	get         byte // the command
	reservation uint16
	reserved    bool // else the BMC knows no reservations
	chunk       int
	record      []byte
}

// walk reads all records, by Get SDR (§33.12) or Get Device SDR (§35.3).
func (b *BMC) walk(ctx context.Context, s Stamp) ([]byte, error) {
	w := walker{b: b, netFn: netStorage, reserve: 0x22, get: 0x23, chunk: firstChunk}
	if s.Device {
		w.netFn, w.reserve, w.get = netSensor, 0x22, 0x21
	}
	if s.Records == 0 {
		return nil, nil
	}
	if err := w.takeReservation(ctx); err != nil {
		return nil, err
	}
	var raw []byte
	seen := map[uint16]bool{}
	for id := uint16(0); id != 0xffff; {
		if seen[id] || len(seen) >= maxRecords {
			return nil, fmt.Errorf("%w: the records do not end (%d were read, then again %04xh)", ErrReply, len(seen), id)
		}
		seen[id] = true
		next, err := w.readRecord(ctx, id)
		if err != nil {
			return nil, fmt.Errorf("record %04xh: %w", id, err)
		}
		raw = append(raw, w.record...)
		id = next
	}
	return raw, nil
}

// takeReservation makes partial reads possible: Reserve SDR Repository (§33.11)
// or Reserve Device SDR Repository (§35.4).
func (w *walker) takeReservation(ctx context.Context) error {
	r, err := w.b.command(ctx, Addr{}, w.netFn, w.reserve, 2)
	switch {
	case Code(err) == CodeInvalid:
		w.reservation, w.reserved = 0, false
		return nil
	case err != nil:
		return fmt.Errorf("reserve the records: %w", err)
	}
	w.reservation, w.reserved = le16(r), true
	return nil
}

// readRecord reads one record into w.record and returns the id of the next.
func (w *walker) readRecord(ctx context.Context, id uint16) (next uint16, err error) {
	for try := 1; ; try++ {
		if next, err = w.tryRecord(ctx, id); err == nil || try == walkTries {
			return next, err
		}
		switch code := Code(err); {
		case code == CodeReservation && w.reserved:
			err = w.takeReservation(ctx)
		case code == CodeUpdate || code == CodeInitializing || code == CodeFirmware:
			err = pause(ctx, 10*busyPause)
		case errors.Is(err, ErrTimeout), errors.Is(err, ErrBusy), errors.Is(err, ErrReply), code == CodeTimeout:
			err = nil // once more
		}
		if err != nil {
			return 0, err
		}
	}
}

func (w *walker) tryRecord(ctx context.Context, id uint16) (next uint16, err error) {
	next, part, err := w.part(ctx, id, 0, recordHeader)
	if err != nil {
		return 0, err
	}
	w.record = append(w.record[:0], part...)
	size := recordHeader + int(part[4])
	for len(w.record) < size {
		want := min(w.chunk, size-len(w.record))
		_, part, err := w.part(ctx, id, len(w.record), want)
		switch code := Code(err); {
		case code == 0:
		case w.chunk > smallestChunk && (code == CodeTooMany || code == CodeLength || code == CodeFieldLength || code == CodeRange || code == CodeNoAnswer || code == CodeUnspecified):
			// Too much for its buffers, in the various ways that BMCs say so.
			w.chunk /= 2
			continue
		}
		if err != nil {
			return 0, err
		}
		w.record = append(w.record, part...)
	}
	return next, nil
}

// part reads n bytes of a record.
func (w *walker) part(ctx context.Context, id uint16, at, n int) (next uint16, part []byte, err error) {
	r, err := w.b.command(ctx, Addr{}, w.netFn, w.get, 2+n,
		byte(w.reservation), byte(w.reservation>>8), byte(id), byte(id>>8), byte(at), byte(n))
	if err != nil {
		return 0, nil, err
	}
	if len(r) != 2+n {
		return 0, nil, fmt.Errorf("%w: %d bytes of a record where %d were asked for", ErrReply, len(r)-2, n)
	}
	return le16(r), r[2:], nil
}
