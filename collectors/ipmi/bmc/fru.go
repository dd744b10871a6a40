package bmc

import (
	"context"
	"encoding/hex"
	"fmt"
	"time"
)

// FRU is the inventory of a field-replaceable unit (Platform Management FRU
// Information Storage Definition v1.0; its sections are meant below).
type FRU struct {
	ID     byte       `json:"id"`
	Name   string     `json:"name"`
	Fields []FRUField `json:"fields"`
	Faults []string   `json:"faults,omitempty"` // areas that could not be read
}

// FRUField is a fact of an inventory.
type FRUField struct {
	Name  string `json:"name"` // "Board Serial"
	Value string `json:"value"`
}

// fruChunk is what is read at once; every BMC can return so much.
const fruChunk = 16

// FRU reads an inventory: Get FRU Inventory Area Info (§34.1) and Read FRU Data
// (§34.2).
func (b *BMC) FRU(ctx context.Context, l FRULocator) (FRU, error) {
	f := FRU{ID: l.ID, Name: l.Name}
	to := l.Owner
	r, err := b.command(ctx, to, netStorage, 0x10, 3, l.ID)
	if err != nil {
		return f, fmt.Errorf("ask for inventory %d: %w", l.ID, err)
	}
	size, unit := int(le16(r)), 1
	if r[2]&1 != 0 {
		unit = 2 // addressed by words
	}
	var data []byte
	for len(data) < size {
		n := min(fruChunk, size-len(data))
		at := len(data) / unit
		r, err := b.command(ctx, to, netStorage, 0x11, 1, l.ID, byte(at), byte(at>>8), byte(max(1, n/unit)))
		if err != nil {
			if len(data) > 0 && (Code(err) == CodeRange || Code(err) == CodeLength || Code(err) == CodeTooMany) {
				break // it has less than it says
			}
			return f, fmt.Errorf("read inventory %d: %w", l.ID, err)
		}
		got := int(r[0]) * unit
		if got == 0 || got > len(r)-1 {
			return f, fmt.Errorf("read inventory %d: %w: %d bytes are announced and %d there", l.ID, ErrReply, got, len(r)-1)
		}
		data = append(data, r[1:1+got]...)
	}
	f.parse(data)
	return f, nil
}

// fruAreas says what the areas hold: the names of the fields that have a fixed
// order, and where those begin (§10 to §12).
var fruAreas = []struct {
	name   string
	offset int // of the area's offset in the common header (§8)
	first  int
	fields []string
}{
	{"Chassis", 2, 3, []string{"Part Number", "Serial"}},
	{"Board", 3, 6, []string{"Mfg", "Product", "Serial", "Part Number", "FRU File"}},
	{"Product", 4, 3, []string{"Manufacturer", "Name", "Part Number", "Version", "Serial", "Asset Tag", "FRU File"}},
}

// fruEpoch is what manufacturing dates count minutes from (§11).
var fruEpoch = time.Date(1996, 1, 1, 0, 0, 0, 0, time.UTC)

func (f *FRU) parse(data []byte) {
	if len(data) < 8 || data[0]&0x0f != 1 || sum(data[:8]) != 0 {
		f.fault("it has no valid header")
		return
	}
	for _, a := range fruAreas {
		at := int(data[a.offset]) * 8
		if at == 0 {
			continue
		}
		if at+2 > len(data) || data[at+1] == 0 || at+int(data[at+1])*8 > len(data) {
			f.fault("its %s area goes beyond its end", a.name)
			continue
		}
		area := data[at : at+int(data[at+1])*8]
		if sum(area) != 0 {
			f.fault("its %s area has a wrong checksum", a.name)
			continue
		}
		switch a.name {
		case "Chassis":
			f.add("Chassis Type", fmt.Sprint(area[2]))
		case "Board":
			if minutes := le24(area[3:]); minutes != 0 {
				f.add("Board Mfg Date", fruEpoch.Add(time.Duration(minutes)*time.Minute).Format("2006-01-02 15:04")+" UTC")
			}
		}
		f.fields(a.name, a.fields, area[a.first:])
	}
}

// fruEnd ends the fields of an area (§10).
const fruEnd = 0xc1

func (f *FRU) fields(area string, names []string, b []byte) {
	for i := 0; len(b) > 0 && b[0] != fruEnd; i++ {
		kind, n := b[0]>>6, int(b[0]&0x3f)
		if 1+n > len(b) {
			f.fault("a field of its %s area goes beyond its end", area)
			return
		}
		value := ""
		if kind == textUnicode {
			value = hex.EncodeToString(b[1 : 1+n])
		} else {
			value = typedText(kind, b[1:1+n])
		}
		name := "Extra"
		if i < len(names) {
			name = names[i]
		}
		if value != "" {
			f.add(area+" "+name, value)
		}
		b = b[1+n:]
	}
}

func (f *FRU) add(name, value string) { f.Fields = append(f.Fields, FRUField{name, value}) }

func (f *FRU) fault(format string, args ...any) {
	f.Faults = append(f.Faults, fmt.Sprintf(format, args...))
}

func sum(b []byte) (s byte) {
	for _, c := range b {
		s += c
	}
	return s
}
