package bmc

import (
	"context"
	"fmt"
)

// Reading is what a sensor says now (§35.14).
type Reading struct {
	Raw     byte
	Value   float64
	Valid   bool   // Value is one: the sensor is analog, is read and has a value there
	Off     bool   // its scanning is disabled
	Unknown bool   // it is read, but has no reading at present
	States  uint16 // discrete states, one bit each; of a sensor by thresholds, see Level
}

// Level is how far a sensor by thresholds is from normal.
type Level int

// The levels.
const (
	LevelOK Level = iota
	LevelNonCritical
	LevelCritical
	LevelNonRecoverable
)

// String returns what ipmitool calls the level.
func (l Level) String() string { return [...]string{"ok", "nc", "cr", "nr"}[l] }

// ByThreshold reports whether the sensor compares its reading with thresholds.
func (s *Sensor) ByThreshold() bool { return s.EventType == 1 }

// Analog reports whether the sensor has a number.
func (s *Sensor) Analog() bool { return s.Factors.Format != NotAnalog }

// Readable reports whether the sensor can be asked for a reading.
func (s *Sensor) Readable() bool { return !s.EventOnly && !s.Software }

// Read reads a sensor: Get Sensor Reading (§35.14). A sensor whose factors
// depend on the reading is asked for those as well.
func (b *BMC) Read(ctx context.Context, s *Sensor) (Reading, error) {
	r, err := b.command(ctx, s.Owner, netSensor, 0x2d, 2, s.Number)
	if err != nil {
		return Reading{}, err
	}
	v := Reading{Raw: r[0], Off: r[1]&0x40 == 0, Unknown: r[1]&0x20 != 0}
	if len(r) > 2 {
		v.States = uint16(r[2])
		if s.ByThreshold() {
			v.States &= 0x3f
		}
	}
	if len(r) > 3 && !s.ByThreshold() {
		v.States |= uint16(r[3]&0x7f) << 8
	}
	if v.Off || v.Unknown || !s.Analog() {
		return v, nil
	}
	f := s.Factors
	if f.Linearization >= NonLinear {
		if f, err = b.factors(ctx, s, v.Raw); err != nil {
			return v, err
		}
	}
	v.Value, v.Valid = f.Convert(v.Raw)
	return v, nil
}

// factors asks for the factors at a raw reading: Get Sensor Reading Factors
// (§35.5).
func (b *BMC) factors(ctx context.Context, s *Sensor, raw byte) (Factors, error) {
	r, err := b.command(ctx, s.Owner, netSensor, 0x23, 7, s.Number, raw)
	if err != nil {
		return s.Factors, fmt.Errorf("ask for its factors: %w", err)
	}
	f := s.Factors
	f.set(r[1:7])
	return f, nil
}

// Level returns the level of a sensor by thresholds (§35.14, byte 4: at or
// below the lower, at or above the upper thresholds).
func (r *Reading) Level() Level {
	switch {
	case r.States&(1<<2|1<<5) != 0:
		return LevelNonRecoverable
	case r.States&(1<<1|1<<4) != 0:
		return LevelCritical
	case r.States&(1<<0|1<<3) != 0:
		return LevelNonCritical
	}
	return LevelOK
}

// Thresholds are those of a sensor, nil where it has none.
type Thresholds struct {
	LowerNonRecoverable *float64 `json:"lower_non_recoverable,omitempty"`
	LowerCritical       *float64 `json:"lower_critical,omitempty"`
	LowerNonCritical    *float64 `json:"lower_non_critical,omitempty"`
	UpperNonCritical    *float64 `json:"upper_non_critical,omitempty"`
	UpperCritical       *float64 `json:"upper_critical,omitempty"`
	UpperNonRecoverable *float64 `json:"upper_non_recoverable,omitempty"`
}

// List returns the thresholds from the lowest to the highest.
func (t *Thresholds) List() [6]*float64 {
	return [...]*float64{t.LowerNonRecoverable, t.LowerCritical, t.LowerNonCritical, t.UpperNonCritical, t.UpperCritical, t.UpperNonRecoverable}
}

// Thresholds asks for a sensor's thresholds: Get Sensor Thresholds (§35.9).
func (b *BMC) Thresholds(ctx context.Context, s *Sensor) (Thresholds, error) {
	var t Thresholds
	if !s.ByThreshold() || !s.Analog() {
		return t, nil
	}
	r, err := b.command(ctx, s.Owner, netSensor, 0x27, 7, s.Number)
	if err != nil {
		return t, fmt.Errorf("ask for its thresholds: %w", err)
	}
	var raw [7]byte
	copy(raw[:], r)
	for i, to := range [...]**float64{
		&t.LowerNonCritical, &t.LowerCritical, &t.LowerNonRecoverable, &t.UpperNonCritical, &t.UpperCritical, &t.UpperNonRecoverable,
	} {
		if raw[0]&(1<<i) == 0 {
			continue
		}
		f := s.Factors
		if f.Linearization >= NonLinear {
			if f, err = b.factors(ctx, s, raw[1+i]); err != nil {
				return t, err
			}
		}
		if v, ok := f.Convert(raw[1+i]); ok {
			*to = &v
		}
	}
	return t, nil
}
