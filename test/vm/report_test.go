package vm

import (
	"reflect"
	"strings"
	"testing"
)

func TestWhatAGuestSaysIsAddedUp(t *testing.T) {
	const good = "@@ begin bpf.test\r\n=== RUN   TestA\n    a_test.go:7: it took 3 ms\n--- PASS: TestA (0.00s)\n=== RUN   TestB\n=== RUN   TestB/one\n" +
		"    --- PASS: TestB/one (0.00s)\n--- PASS: TestB (0.10s)\nPASS\n@@ end bpf.test 0\r\n"
	for name, tc := range map[string]struct {
		said string
		want Report
	}{
		"what passes is counted, subtests too": {good, Report{Passed: 3, ended: []string{"bpf.test"}}},
		"a skip for a reason that the kernel has is none of a failure": {
			"@@ begin bpf.test\n=== RUN   TestA\n    a_test.go:7: the kernel lacks it: really\n--- SKIP: TestA (0.00s)\n@@ end bpf.test 0\n",
			Report{Skipped: 1, ended: []string{"bpf.test"}},
		},
		"any other skip is a failure": {
			"@@ begin bpf.test\n=== RUN   TestA\n    a_test.go:7: no time today\n--- SKIP: TestA (0.00s)\n@@ end bpf.test 0\n",
			Report{Skipped: 1, ended: []string{"bpf.test"}, Failures: []string{"bpf.test: TestA was skipped, which this kernel has no reason for: no time today"}},
		},
		"a test that fails is named, and so is its program": {
			"@@ begin bpf.test\n    --- FAIL: TestA/one (0.00s)\n--- FAIL: TestA (0.00s)\nFAIL\n@@ end bpf.test 256\n",
			Report{ended: []string{"bpf.test"}, Failures: []string{"bpf.test: TestA/one failed", "bpf.test: TestA failed", "bpf.test ended with status 256"}},
		},
	} {
		t.Run(name, func(t *testing.T) {
			var out strings.Builder
			got, err := read(strings.NewReader(tc.said), &out, []string{"the kernel lacks it"})
			if err != nil || !reflect.DeepEqual(got, tc.want) {
				t.Errorf("got  %+v, %v\nwant %+v", got, err, tc.want)
			}
			if want := strings.ReplaceAll(tc.said, "\r", ""); out.String() != want {
				t.Errorf("passed on %q, want %q", out.String(), want)
			}
			programs := []Program{{Package: module + "bpf"}}
			if err := got.complete(programs); err != nil {
				t.Errorf("got %v, want all to have ended", err)
			}
			if err := got.complete(append(programs, Program{Package: module + "agent"})); err == nil {
				t.Errorf("agent is not missed")
			}
		})
	}
}
