package bus

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

// TestAFullQueueIsAskedWithOneMessage has a queue take nothing for ten minutes, but for
// one message of four.
func TestAFullQueueIsAskedWithOneMessage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		const full = 10 * time.Minute
		type attempt struct{ Sent, Refused int }
		var got []attempt // those that differ from the one before
		last := began
		err := insist(t.Context(), make([]*outgoing, 4), backoff{min: 200 * time.Millisecond, max: askAgain}, func(_ context.Context, out []*outgoing) (again []*outgoing, err error) {
			if pause := time.Since(last); pause > askAgain {
				t.Errorf("a pause of %s", pause)
			}
			last = time.Now()
			switch {
			case len(got) == 0:
				again = append(again, out[1:]...)
			case time.Since(began) < full:
				again = append(again, out...)
			}
			if a := (attempt{len(out), len(again)}); len(got) == 0 || got[len(got)-1] != a {
				got = append(got, a)
			}
			return again, nil
		})
		if diff := cmp.Diff([]attempt{{4, 3}, {1, 1}, {1, 0}, {2, 0}}, got); diff != "" || err != nil {
			t.Errorf("error %v, attempts (-want +got):\n%s", err, diff)
		}
		if late := time.Since(began) - full; late > askAgain {
			t.Errorf("all were taken %s after the queue took some again", late)
		}
	})
}
