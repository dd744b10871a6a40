//go:build lab

package bpf_test

import (
	"os"
	"testing"
	"time"

	"github.com/kvmeter/kvmeter/bpf"
)

func TestMeasureCost(t *testing.T) {
	walk := readers(t)[0]
	done := make(chan struct{})
	go func() {
		defer close(done)
		procs, out := []bpf.Proc{{PID: os.Getpid()}}, make([]bpf.Usage, 1)
		for start := time.Now(); time.Since(start) < 500*time.Millisecond; time.Sleep(time.Millisecond) {
			if err := walk.Read(t.Context(), procs, out); err != nil {
				t.Error(err)
			}
		}
	}()
	costs, err := bpf.MeasureCost(t.Context(), os.Getpid(), 300*time.Millisecond)
	<-done
	if err != nil {
		t.Fatal(err)
	}
	// Other tests' programs may still be open, too.
	var sum bpf.ProgramCost
	for _, c := range costs {
		if c.Name == walk.Origin() {
			sum.Runs += c.Runs
			sum.Time += c.Time
		}
	}
	if sum.Runs < 10 || sum.Time/time.Duration(sum.Runs) < 100*time.Nanosecond || sum.Time > 300*time.Millisecond {
		t.Errorf("%d runs took %s, among %+v", sum.Runs, sum.Time, costs)
	}
}
