package bmc

// Units are the units of a sensor (§43.1, bytes 21 to 23).
type Units struct {
	Flags    byte // bit 0: percent; bits 2:1: how the modifier belongs; bits 5:3: rate; 7:6 are the format's
	Base     byte
	Modifier byte
}

// units are the names of §43.17, Table 43-15.
var units = [...]string{
	"unspecified", "degrees C", "degrees F", "degrees K", "Volts", "Amps", "Watts", "Joules", "Coulombs", "VA",
	"Nits", "lumen", "lux", "Candela", "kPa", "PSI", "Newton", "CFM", "RPM", "Hz",
	"microsecond", "millisecond", "second", "minute", "hour", "day", "week", "mil", "inches", "feet",
	"cu in", "cu feet", "mm", "cm", "m", "cu cm", "cu m", "liters", "fluid ounce", "radians",
	"steradians", "revolutions", "cycles", "gravities", "ounce", "pound", "ft-lb", "oz-in", "gauss", "gilberts",
	"henry", "millihenry", "farad", "microfarad", "ohms", "siemens", "mole", "becquerel", "PPM", "reserved",
	"Decibels", "DbA", "DbC", "gray", "sievert", "color temp deg K", "bit", "kilobit", "megabit", "gigabit",
	"byte", "kilobyte", "megabyte", "gigabyte", "word", "dword", "qword", "line", "hit", "miss",
	"retry", "reset", "overflow", "underrun", "collision", "packets", "messages", "characters", "error", "correctable error",
	"uncorrectable error",
}

// Codes of the base units that meters name.
const (
	unitVolts = 4
	unitWatts = 6
)

// rates are the rate units of §43.1, byte 21, bits 5:3.
var rates = [8]string{"", "us", "ms", "s", "min", "h", "day", ""}

func unitName(code byte) string {
	if int(code) < len(units) {
		return units[code]
	}
	return units[0]
}

// Watts reports whether the base unit is watt.
func (u Units) Watts() bool { return u.Base == unitWatts }

// String returns the units in words: "degrees C", "Volts", "percent", "CFM",
// "packets per s".
func (u Units) String() string {
	s := unitName(u.Base)
	switch u.Flags >> 1 & 3 {
	case 1:
		s += "/" + unitName(u.Modifier)
	case 2:
		s += " * " + unitName(u.Modifier)
	}
	if u.Flags&1 != 0 {
		if u.Base == 0 {
			s = "percent"
		} else {
			s = "% " + s
		}
	}
	if r := rates[u.Flags>>3&7]; r != "" {
		s += " per " + r
	}
	return s
}

// Short returns the unit of samples as Ceilometer names it: the last word, "W"
// for watts and "V" for volts.
func (u Units) Short() string {
	if u.Flags>>1 != 0 { // a compound or a rate is one of its parts no more
		return u.String()
	}
	switch u.Base {
	case 0:
		if u.Flags&1 != 0 {
			return "percent"
		}
		return "unspecified"
	case 1:
		return "C"
	case 2:
		return "F"
	case 3:
		return "K"
	case unitVolts:
		return "V"
	case unitWatts:
		return "W"
	}
	return unitName(u.Base)
}
