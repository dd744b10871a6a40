package sample

import (
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// AppendTime appends a time, in µs since the Unix epoch, as Ceilometer prints
// it: Python's isoformat in UTC, without a zone, and without a fraction where
// that is 0.
func AppendTime(dst []byte, us int64) []byte { return AppendWall(dst, time.UnixMicro(us).UTC()) }

// AppendWall is AppendTime of a time in its own zone.
func AppendWall(dst []byte, at time.Time) []byte {
	year, month, day := at.Date()
	if year < 0 || year > 9999 {
		return at.AppendFormat(dst, "2006-01-02T15:04:05.000000")
	}
	hour, minute, second := at.Clock()
	two := func(before byte, v int) { dst = append(dst, before, byte('0'+v/10), byte('0'+v%10)) }
	dst = append(dst, byte('0'+year/1000), byte('0'+year/100%10), byte('0'+year/10%10), byte('0'+year%10))
	two('-', int(month))
	two('-', day)
	two('T', hour)
	two(':', minute)
	two(':', second)
	us := at.Nanosecond() / 1000
	if us == 0 {
		return dst
	}
	two('.', us/10_000)
	dst = append(dst, byte('0'+us/1000%10), byte('0'+us/100%10), byte('0'+us/10%10), byte('0'+us%10))
	return dst
}

const hexDigits = "0123456789abcdef"

// AppendRepr appends Python's repr of a string, as Ceilometer prints text within
// metadata.
func AppendRepr(dst []byte, s string) []byte {
	quote := '\''
	if strings.Contains(s, "'") && !strings.Contains(s, `"`) {
		quote = '"'
	}
	hex := func(letter byte, c rune, digits int) {
		dst = append(dst, '\\', letter)
		for shift := 4 * (digits - 1); shift >= 0; shift -= 4 {
			dst = append(dst, hexDigits[c>>shift&15])
		}
	}
	dst = append(dst, byte(quote))
	for _, c := range s {
		switch {
		case c == quote || c == '\\':
			dst = append(dst, '\\', byte(c))
		case c == '\n':
			dst = append(dst, `\n`...)
		case c == '\r':
			dst = append(dst, `\r`...)
		case c == '\t':
			dst = append(dst, `\t`...)
		case unicode.IsPrint(c):
			dst = utf8.AppendRune(dst, c)
		case c < 0x100:
			hex('x', c, 2)
		case c < 0x10000:
			hex('u', c, 4)
		default:
			hex('U', c, 8)
		}
	}
	return append(dst, byte(quote))
}

// AppendText appends a JSON string in ASCII, as Python's json.dumps does.
func AppendText(dst []byte, s string) []byte {
	dst = append(dst, '"')
	from := 0 // what is not yet appended
	for i := 0; i < len(s); {
		if plainText[s[i]] {
			i++
			continue
		}
		dst = append(dst, s[from:i]...)
		c, size := utf8.DecodeRuneInString(s[i:])
		i += size
		from = i
		switch {
		case c == '"' || c == '\\':
			dst = append(dst, '\\', byte(c))
		case c == '\n':
			dst = append(dst, `\n`...)
		case c == '\r':
			dst = append(dst, `\r`...)
		case c == '\t':
			dst = append(dst, `\t`...)
		case c == '\b':
			dst = append(dst, `\b`...)
		case c == '\f':
			dst = append(dst, `\f`...)
		case c > 0xffff:
			dst = appendUnit(dst, 0xd800+(c-0x10000)>>10)
			dst = appendUnit(dst, 0xdc00+(c-0x10000)&0x3ff)
		default:
			dst = appendUnit(dst, c)
		}
	}
	return append(append(dst, s[from:]...), '"')
}

func appendUnit(dst []byte, u rune) []byte {
	return append(dst, '\\', 'u', hexDigits[u>>12&15], hexDigits[u>>8&15], hexDigits[u>>4&15], hexDigits[u&15])
}

// plainText are the bytes that stand for themselves in a JSON string.
var plainText = func() (plain [256]bool) {
	for c := ' '; c <= '~'; c++ {
		plain[c] = c != '"' && c != '\\'
	}
	return plain
}()
