package bmc

import (
	"errors"
	"fmt"
	"strings"
)

// Record types (§43).
const (
	recordFull       = 0x01 // §43.1
	recordCompact    = 0x02 // §43.2
	recordEventOnly  = 0x03 // §43.3
	recordFRU        = 0x11 // §43.8
	recordController = 0x12 // §43.9
	recordOEM        = 0xc0 // §43.12
)

// recordHeader is the size of what each record begins with: id, version, type,
// and the number of bytes that follow (§43).
const recordHeader = 5

// Where the sensor records have their fields, from the record's beginning.
const (
	fullSize      = 48
	compactSize   = 32
	eventOnlySize = 17
	locatorSize   = 16
)

// Records are what a BMC describes.
type Records struct {
	Sensors     []Sensor
	FRUs        []FRULocator
	Controllers []Controller
	OEM         []OEMRecord
	Other       int      // records of a type that says nothing of use here
	Faults      []string // records that could not be read, and why
}

// Sensor is a sensor as its data record describes it.
type Sensor struct {
	Record    uint16 // id of its record
	Owner     Addr   // who has its readings
	Software  bool   // owned by software, which nobody can ask (§5.5)
	Number    byte
	Name      string
	Type      byte // §42.2, Table 42-3
	EventType byte // reading type: 1 is by thresholds (§42.1, Table 42-1)
	Entity    byte // §43.14
	Instance  byte
	EventOnly bool // it has no readings, only events
	Units     Units
	Factors   Factors
	// NormalMax is the raw upper end of the normal range, if HasNormalMax.
	NormalMax    byte
	HasNormalMax bool
}

// FRULocator says where an inventory is (§43.8).
type FRULocator struct {
	Record  uint16
	Owner   Addr
	ID      byte
	Name    string
	Logical bool // read by commands to its owner; else an EEPROM on a bus
}

// Controller is a management controller beside the BMC (§43.9).
type Controller struct {
	Record uint16
	Addr   Addr
	Name   string
}

// OEMRecord is a record of a manufacturer's own (§43.12).
type OEMRecord struct {
	Record       uint16
	Manufacturer uint32
	Data         []byte // after the manufacturer's number
}

// Parse reads records that stand one after the other, as [BMC.ReadRecords]
// returns them and `ipmitool sdr dump` writes them. A record that cannot be read
// is left out and told in Faults; an error means that the rest after it is lost.
func Parse(raw []byte) (Records, error) {
	var all Records
	for at := 0; at < len(raw); {
		if len(raw)-at < recordHeader {
			return all, fmt.Errorf("records: %d bytes at %d are no record", len(raw)-at, at)
		}
		size := recordHeader + int(raw[at+4])
		if size > len(raw)-at {
			return all, fmt.Errorf("records: the one at %d says it has %d bytes, and %d are left", at, size, len(raw)-at)
		}
		r := raw[at : at+size]
		if err := all.add(r); err != nil {
			all.Faults = append(all.Faults, fmt.Sprintf("record %04xh of type %02xh: %v", le16(r), r[3], err))
		}
		at += size
	}
	return all, nil
}

var errShort = errors.New("it is too short")

func (all *Records) add(r []byte) error {
	switch r[3] {
	case recordFull:
		if len(r) < fullSize {
			return errShort
		}
		s, err := sensorOf(r, 47)
		if err != nil {
			return err
		}
		s.Factors = factorsOf(r)
		s.HasNormalMax = r[30]&2 != 0
		s.NormalMax = r[32]
		all.Sensors = append(all.Sensors, s)
	case recordCompact:
		if len(r) < compactSize {
			return errShort
		}
		s, err := sensorOf(r, 31)
		if err != nil {
			return err
		}
		s.Factors.Format = NotAnalog // a compact record has no factors
		all.share(s, r[23], r[24])
	case recordEventOnly:
		if len(r) < eventOnlySize {
			return errShort
		}
		name, err := idString(r, 16)
		if err != nil {
			return err
		}
		all.share(Sensor{
			Record: le16(r), Owner: ownerOf(r), Software: r[5]&1 != 0, Number: r[7], Name: name, Entity: r[8], Instance: r[9],
			Type: r[10], EventType: r[11], EventOnly: true, Factors: Factors{Format: NotAnalog},
		}, r[12], r[13])
	case recordFRU:
		if len(r) < locatorSize {
			return errShort
		}
		name, err := idString(r, 15)
		if err != nil {
			return err
		}
		all.FRUs = append(all.FRUs, FRULocator{
			Record: le16(r), Owner: Addr{Slave: r[5] &^ 1, Channel: r[8] >> 4, LUN: r[7] >> 3 & 3},
			ID: r[6], Name: name, Logical: r[7]&0x80 != 0,
		})
	case recordController:
		if len(r) < locatorSize {
			return errShort
		}
		name, err := idString(r, 15)
		if err != nil {
			return err
		}
		all.Controllers = append(all.Controllers, Controller{Record: le16(r), Addr: Addr{Slave: r[5] &^ 1, Channel: r[6] & 0x0f}, Name: name})
	case recordOEM:
		if len(r) < recordHeader+3 {
			return errShort
		}
		all.OEM = append(all.OEM, OEMRecord{Record: le16(r), Manufacturer: le24(r[5:]), Data: append([]byte(nil), r[8:]...)})
	default:
		all.Other++
	}
	return nil
}

// ownerOf reads the sensor's owner (§43.1, bytes 6 and 7).
func ownerOf(r []byte) Addr { return Addr{Slave: r[5] &^ 1, Channel: r[6] >> 4, LUN: r[6] & 3} }

// sensorOf reads what full and compact records have in common.
func sensorOf(r []byte, name int) (Sensor, error) {
	text, err := idString(r, name)
	return Sensor{
		Record: le16(r), Owner: ownerOf(r), Software: r[5]&1 != 0, Number: r[7], Name: text,
		Entity: r[8], Instance: r[9], Type: r[12], EventType: r[13],
		Units: Units{Flags: r[20] & 0x3f, Base: r[21], Modifier: r[22]},
	}, err
}

// share adds the sensors that share a compact or event-only record (§43.2,
// bytes 24 and 25): their numbers follow each other, and their names end in a
// count if the record says so.
func (all *Records) share(s Sensor, how, offset byte) {
	count := max(1, int(how&0x0f))
	name, number, instance := s.Name, s.Number, s.Instance
	for i := range count {
		s.Number = number + byte(i)
		if offset&0x80 != 0 {
			s.Instance = instance + byte(i)
		}
		if count > 1 {
			n := int(offset&0x7f) + i
			switch how >> 4 & 3 {
			case 0:
				s.Name = fmt.Sprintf("%s%d", name, n)
			case 1:
				s.Name = name + alpha(n)
			}
		}
		all.Sensors = append(all.Sensors, s)
	}
}

// alpha counts A to Z, AA, AB and so on.
func alpha(n int) string {
	if n < 26 {
		return string(rune('A' + n))
	}
	return string([]rune{rune('A' + n/26 - 1), rune('A' + n%26)})
}

// idString reads the name at an offset: its type and length, then the text
// (§43.15).
func idString(r []byte, at int) (string, error) {
	if at >= len(r) {
		return "", errShort
	}
	kind, n := r[at]>>6, int(r[at]&0x1f)
	text := r[at+1:]
	if n > len(text) {
		return "", fmt.Errorf("its name of %d bytes goes beyond its end", n)
	}
	return typedText(kind, text[:n]), nil
}

// Encodings of names and inventory fields (§43.15; FRU Information Storage
// Definition v1.0 §13).
const (
	textUnicode = 0 // of names; in inventories: binary
	textBCD     = 1
	textPacked  = 2
	textLatin1  = 3
)

const bcdPlus = "0123456789 -.:,_"

func typedText(kind byte, b []byte) string {
	var s strings.Builder
	switch kind {
	case textBCD:
		for _, c := range b {
			s.WriteByte(bcdPlus[c>>4])
			s.WriteByte(bcdPlus[c&0x0f])
		}
	case textPacked: // 4 characters of 6 bits in 3 bytes, from the lowest bit on
		bits, have := uint(0), 0
		for _, c := range b {
			bits |= uint(c) << have
			for have += 8; have >= 6; have -= 6 {
				s.WriteByte(byte(bits&0x3f) + ' ')
				bits >>= 6
			}
		}
	default:
		for _, c := range b {
			switch {
			case c == 0 || c < ' ' || c == 0x7f || c >= 0x80 && c < 0xa0: // no character
			default:
				s.WriteRune(rune(c)) // Latin-1
			}
		}
	}
	return strings.TrimSpace(s.String())
}
