package value

import (
	"errors"
	"fmt"
	"time"

	"github.com/kvmeter/kvmeter/sample"
)

// ErrTime is wrapped by the errors of [ParseTime].
var ErrTime = errors.New("not a time of the form 2006-01-02T15:04:05.000000+00:00")

// ParseTime reads a time as the services write it: ISO 8601 with T or a blank
// before the time of day, or without one; what has no zone is UTC. A fraction
// is read to the microsecond.
func ParseTime(s string) (time.Time, error) {
	fail := func() (time.Time, error) { return time.Time{}, fmt.Errorf("%.60q is %w", s, ErrTime) }
	p := timeReader{s, true}
	year := p.digits(4)
	month, day := 1, 1
	if p.skip('-') {
		month = p.upTo2()
		if p.skip('-') || p.digit() {
			day = p.upTo2()
		}
	} else if p.digit() {
		month, day = p.digits(2), p.digits(2)
	}
	var hour, minute, second, micros int
	zone := time.UTC
	if p.skip('T') || p.skip(' ') {
		hour = p.digits(2)
		if colon := p.skip(':'); colon || p.digit() {
			minute = p.digits(2)
			if p.skip(':') || !colon && p.digit() {
				second = p.upTo2()
				if p.skip('.') || p.skip(',') {
					micros = p.fraction()
				}
			}
		}
		zone = p.zone()
	}
	if !p.ok || p.rest != "" || month < 1 || month > 12 || day < 1 || hour > 23 || minute > 59 || second > 59 || year < 1 {
		return fail()
	}
	at := time.Date(year, time.Month(month), day, hour, minute, second, micros*1000, zone)
	if at.Day() != day {
		return fail()
	}
	return at, nil
}

// timeReader reads the parts of a time; ok turns false where one is missing.
type timeReader struct {
	rest string
	ok   bool
}

func (p *timeReader) skip(c byte) bool {
	if p.rest == "" || p.rest[0] != c {
		return false
	}
	p.rest = p.rest[1:]
	return true
}

func (p *timeReader) digit() bool { return p.rest != "" && p.rest[0]-'0' <= 9 }

// digits reads exactly n digits.
func (p *timeReader) digits(n int) int {
	v := 0
	for range n {
		if !p.digit() {
			p.ok = false
			return 0
		}
		v = v*10 + int(p.rest[0]-'0')
		p.rest = p.rest[1:]
	}
	return v
}

// upTo2 reads one or two digits.
func (p *timeReader) upTo2() int {
	v := p.digits(1)
	if p.digit() {
		v = v*10 + p.digits(1)
	}
	return v
}

func (p *timeReader) fraction() int {
	if !p.digit() {
		p.ok = false
	}
	v, unit := 0, 100_000
	for p.digit() {
		v += unit * int(p.rest[0]-'0')
		unit /= 10
		p.rest = p.rest[1:]
	}
	return v
}

func (p *timeReader) zone() *time.Location {
	if p.rest == "" || p.skip('Z') {
		return time.UTC
	}
	sign := 1
	switch {
	case p.skip('-'):
		sign = -1
	case !p.skip('+'):
		p.ok = false
		return time.UTC
	}
	hours, minutes := p.digits(2), 0
	if p.skip(':') || p.digit() {
		minutes = p.digits(2)
	}
	offset := sign * (hours*3600 + minutes*60)
	if offset == 0 {
		return time.UTC
	}
	if offset <= -86400 || offset >= 86400 {
		p.ok = false
	}
	return time.FixedZone("", offset)
}

// AppendISO appends a time as Python's isoformat does: with its zone's offset,
// without a fraction where that is 0.
func AppendISO(dst []byte, at time.Time) []byte {
	dst = sample.AppendWall(dst, at)
	if _, offset := at.Zone(); offset != 0 {
		return at.AppendFormat(dst, "-07:00")
	}
	return append(dst, "+00:00"...)
}
