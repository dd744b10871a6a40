package bmctest

import "github.com/kvmeter/kvmeter/collectors/ipmi/bmc"

// Full describes a sensor for a full record (§43.1).
type Full struct {
	Number    byte
	Name      string
	Type      byte
	EventType byte // default 1: by thresholds
	Unit      byte // base unit
	Flags     byte // of the units, without the format
	Factors   bmc.Factors
	NormalMax byte // 0: none
	LUN       byte
}

// Record makes the record.
func (f Full) Record() []byte {
	if f.EventType == 0 {
		f.EventType = 1
	}
	normal := byte(0)
	if f.NormalMax != 0 {
		normal = 2
	}
	x := f.Factors
	body := []byte{
		0x20, f.LUN, f.Number, 0x07, 0x01, 0x7f, 0x68, f.Type, f.EventType, 0x85, 0x72, 0x85, 0x72, 0x3f, 0x3f,
		x.Format<<6 | f.Flags, f.Unit, 0, x.Linearization,
		byte(x.M), byte(uint16(x.M)>>8) << 6, byte(x.B), byte(uint16(x.B)>>8) << 6, 0, byte(x.RExp)<<4 | byte(x.BExp)&0x0f,
		normal, 0, f.NormalMax, 0, 0xff, 0, 0xff, 0xf8, 0xf0, 0, 2, 4, 1, 1, 0, 0, 0,
	}
	return record(1, append(body, name(f.Name)...))
}

// FactorBytes are M to the exponents as records and Get Sensor Reading Factors
// have them.
func FactorBytes(x bmc.Factors) [6]byte {
	r := Full{Factors: x}.Record()
	return [6]byte(r[24:30])
}

// Compact makes the record of a discrete sensor (§43.2).
func Compact(number byte, text string, sensorType, eventType byte) []byte {
	body := []byte{
		0x20, 0, number, 0x0a, 1, 0x63, 0x40, sensorType, eventType, 0xff, 0x0f, 0xff, 0x0f, 0xff, 0x0f, 0xc0, 0, 0,
		1, 0, 0, 0, 0, 0, 0, 0,
	}
	return record(2, append(body, name(text)...))
}

// EventOnly makes the record of a sensor without readings (§43.3).
func EventOnly(number byte, text string, sensorType, eventType byte) []byte {
	return record(3, append([]byte{0x20, 0, number, 0x07, 1, sensorType, eventType, 1, 0, 0, 0}, name(text)...))
}

// FRU makes the record of an inventory of the BMC's (§43.8).
func FRU(id byte, text string) []byte {
	return record(0x11, append([]byte{0x20, id, 0x80, 0, 0, 0x10, 0, 7, 1, 0}, name(text)...))
}

// Controller makes the record of a management controller (§43.9).
func Controller(slave, channel byte, text string) []byte {
	return record(0x12, append([]byte{slave, channel, 0, 0x3f, 0, 0, 0, 0x2e, 1, 0}, name(text)...))
}

// NodeManager makes the record that tells where Node Manager is (NM 3.0, OEM SDR).
func NodeManager(slave, channel byte) []byte {
	return record(0xc0, []byte{0x57, 0x01, 0x00, 0x0d, 0x01, slave, channel << 4, 0x19, 0x18, 0x1a, 0x1b})
}

func name(s string) []byte {
	s = s[:min(len(s), 16)]
	return append([]byte{0xc0 | byte(len(s))}, s...)
}

func record(kind byte, body []byte) []byte {
	return append([]byte{0, 0, 0x51, kind, byte(len(body))}, body...)
}

// Inventory makes an inventory with a board and a product area (FRU Information
// Storage Definition v1.0).
func Inventory(manufacturer, product, serial string) []byte {
	area := func(head []byte, fields ...string) []byte {
		b := head
		for _, f := range fields {
			b = append(append(b, 0xc0|byte(len(f))), f...)
		}
		b = append(b, 0xc1)
		for len(b)%8 != 7 {
			b = append(b, 0)
		}
		b[1] = byte(len(b)+1) / 8
		return append(b, -checksum(b))
	}
	board := area([]byte{1, 0, 25, 0x00, 0x20, 0xb0}, manufacturer, product+" board", serial, "PN-1", "")
	goods := area([]byte{1, 0, 25}, manufacturer, product, "PN-2", "v3", serial, "asset-7", "")
	head := []byte{1, 0, 0, 1, byte(1 + len(board)/8), 0, 0}
	return append(append(append(head, -checksum(head)), board...), goods...)
}

func checksum(b []byte) (s byte) {
	for _, c := range b {
		s += c
	}
	return s
}

// Event makes an entry of a sensor for the event log (§32.1).
func Event(time uint32, sensorType, number, eventType, offset byte, asserted bool) (e [16]byte) {
	e[2], e[3], e[4], e[5], e[6] = 2, byte(time), byte(time>>8), byte(time>>16), byte(time>>24)
	e[7], e[9], e[10], e[11], e[12], e[13], e[14], e[15] = 0x20, 4, sensorType, number, eventType, offset, 0xff, 0xff
	if !asserted {
		e[12] |= 0x80
	}
	return e
}
