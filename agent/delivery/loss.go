package delivery

import (
	"cmp"
	"fmt"
	"slices"

	"github.com/kvmeter/kvmeter/sample"
)

// Why samples are dropped.
const (
	lostInMemory = "the bus could not be reached and the agent's queue was full (queue_bytes)"
	lostFull     = "the bus could not be reached and the agent's spool was full (spool.max_bytes)"
	lostOld      = "the bus could not be reached for longer than the agent keeps samples (spool.max_age)"
	lostDamaged  = "the agent's spool was damaged on its disk"
)

// span is a stretch of time with samples that are lost.
type span struct {
	from, to int64 // µs since the Unix epoch
	samples  int
}

// losses adds up what is lost by meter and reason, as spans of time.
type losses struct{ by map[loss][]span }

type loss struct{ meter, reason string }

// maxSpans bounds the spans of one meter; beyond it they become one.
const maxSpans = 64

func (l *losses) add(meter, reason string, s span) {
	if l.by == nil {
		l.by = map[loss][]span{}
	}
	key := loss{meter, reason}
	spans := l.by[key]
	for i := range spans {
		if o := &spans[i]; s.from <= o.to && o.from <= s.to {
			o.from, o.to, o.samples = min(o.from, s.from), max(o.to, s.to), o.samples+s.samples
			return
		}
	}
	if spans = append(spans, s); len(spans) > maxSpans {
		all := spans[0]
		for _, o := range spans[1:] {
			all = span{min(all.from, o.from), max(all.to, o.to), all.samples + o.samples}
		}
		spans = append(spans[:0], all)
	}
	l.by[key] = spans
}

func (l *losses) join(o losses) {
	for key, spans := range o.by {
		for _, s := range spans {
			l.add(key.meter, key.reason, s)
		}
	}
}

// gaps returns what is lost as gaps, sorted by meter and time.
func (l *losses) gaps() []sample.Gap {
	var gaps []sample.Gap
	for key, spans := range l.by {
		for _, s := range spans {
			reason := key.reason
			if s.samples > 0 {
				reason = fmt.Sprintf("%d samples were dropped: %s", s.samples, reason)
			}
			gaps = append(gaps, sample.Gap{Meter: key.meter, Resource: "*", From: s.from, To: s.to, Reason: reason})
		}
	}
	slices.SortFunc(gaps, func(a, b sample.Gap) int {
		return cmp.Or(cmp.Compare(a.Meter, b.Meter), cmp.Compare(a.From, b.From), cmp.Compare(a.Reason, b.Reason))
	})
	return gaps
}
