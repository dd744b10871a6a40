//go:build lab

package vm

import (
	"flag"
	"regexp"
	"slices"
	"testing"
	"time"

	"go.uber.org/zap/zaptest"
)

var only = flag.String("tests", "", "run only those tests in the guests whose name matches")

func TestKernels(t *testing.T) {
	programs, err := Find(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	match, err := regexp.Compile(*only)
	if err != nil {
		t.Fatal(err)
	}
	tests := 0
	for i := range programs {
		p := &programs[i]
		p.Tests = slices.DeleteFunc(p.Tests, func(name string) bool { return !match.MatchString(name) })
	}
	programs = slices.DeleteFunc(programs, func(p Program) bool { return len(p.Tests) == 0 })
	for _, p := range programs {
		tests += len(p.Tests)
	}
	if *only == "" && (len(programs) < 3 || tests < 10) {
		t.Fatalf("found only %+v", programs)
	}
	b, err := NewBuilder(zaptest.NewLogger(t), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Compile(t.Context(), programs); err != nil {
		t.Fatal(err)
	}
	for _, k := range Kernels {
		t.Run(k.Name, func(t *testing.T) {
			begin := time.Now()
			r, err := b.Run(t.Context(), k, programs, t.Output())
			// QEMU's emulation now and then stops a CPU for good, or has it trip
			// over a breakpoint that is gone, while the kernel changes its own code.
			for boots := 1; err != nil && len(r.Failures) == 0 && boots < 4; boots++ {
				t.Logf("the guest is booted once more, since it ended before its tests: %v", err)
				r, err = b.Run(t.Context(), k, programs, t.Output())
			}
			if err != nil {
				t.Error(err)
			}
			for _, f := range r.Failures {
				t.Error(f)
			}
			if r.Passed+r.Skipped < tests || r.Passed == 0 {
				t.Errorf("of %d tests %d passed and %d were skipped", tests, r.Passed, r.Skipped)
			}
			t.Logf("%d tests of %d programs passed, %d were skipped, in %v", r.Passed, len(programs), r.Skipped, time.Since(begin).Round(time.Second))
		})
	}
}
