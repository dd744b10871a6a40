package bus

import (
	"context"
	"errors"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
)

// list is a source of some deliveries that settles nothing.
type list struct {
	ds      []*Delivery
	settled int
	err     error
}

func (l *list) wait(ctx context.Context) *Delivery {
	if d := l.poll(); d != nil {
		return d
	}
	<-ctx.Done()
	return nil
}

func (l *list) poll() *Delivery {
	if len(l.ds) == 0 {
		return nil
	}
	d := l.ds[0]
	l.ds = l.ds[1:]
	return d
}

func (l *list) settle(context.Context, []*Delivery) error {
	l.settled++
	return l.err
}

func TestPumpGivesBackWhatNobodyTakes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src := &list{ds: []*Delivery{{}, {}, {}}}
		calls := 0
		held, err := pump(t.Context(), zap.NewNop(), src, 2, backoff{min: time.Millisecond, max: time.Millisecond}, 20*time.Millisecond,
			func(_ context.Context, ds []*Delivery) error {
				if calls++; calls == 3 {
					ds[0].Ack() // from now on they are held anew
				}
				return errors.New("no disk")
			})
		if !errors.Is(err, errHeld) || len(held) != 2 || calls < 5 {
			t.Errorf("pump returned %d deliveries and %v after %d calls", len(held), err, calls)
		}
		for _, d := range held {
			if !d.Redelivered || d.verdict != undecided {
				t.Errorf("held %+v", d)
			}
		}
	})
}

func TestPumpEndsWhenItCantSettle(t *testing.T) {
	gone := errors.New("connection lost")
	src := &list{ds: []*Delivery{{}, {}}, err: gone}
	_, err := pump(t.Context(), zap.NewNop(), src, 1, backoff{}, time.Hour, func(_ context.Context, ds []*Delivery) error {
		ds[0].Ack()
		return nil
	})
	if !errors.Is(err, gone) || src.settled != 1 {
		t.Errorf("pump returned %v after %d rounds", err, src.settled)
	}
}

func TestPumpSettlesWhatWasDecidedWhenItsContextEnded(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	src := &list{ds: []*Delivery{{}, {}}}
	held, err := pump(ctx, zap.NewNop(), src, 2, backoff{}, time.Hour, func(_ context.Context, ds []*Delivery) error {
		ds[0].Ack()
		cancel()
		return ctx.Err()
	})
	if err != nil || src.settled != 1 || len(held) != 1 {
		t.Errorf("pump returned %d deliveries and %v, settled %d times", len(held), err, src.settled)
	}
}

func TestWaitsGrowAndAreSpread(t *testing.T) {
	b := backoff{min: 100 * time.Millisecond, max: time.Second}
	for _, top := range []time.Duration{100, 200, 400, 800, 1000, 1000} {
		top *= time.Millisecond
		if d := b.step(); d < top/2 || d > top {
			t.Errorf("waits %v, want between %v and %v", d, top/2, top)
		}
	}
	b.reset()
	if d := b.step(); d > 100*time.Millisecond {
		t.Errorf("waits %v after a reset", d)
	}
}

func TestAComplaintIsSaidOnce(t *testing.T) {
	core, logs := observer.New(zapcore.DebugLevel)
	c := newComplaint(zap.New(core))
	c.over("never said")
	for range 3 {
		c.say("broken", errors.New("a"))
	}
	c.say("broken", errors.New("b"))
	c.over("works")
	c.over("works")
	c.say("broken", errors.New("b")) // comes and goes
	c.over("works")
	c.said = c.said.Add(-sayAgain)
	c.say("broken", errors.New("b"))
	var got []string
	for _, e := range logs.All() {
		text := e.Message
		if err, ok := e.ContextMap()["error"]; ok {
			text += " " + err.(string)
		}
		got = append(got, text)
	}
	if want := []string{"broken a", "broken b", "works", "broken b"}; !slices.Equal(got, want) {
		t.Errorf("said %q, want %q", got, want)
	}
}
