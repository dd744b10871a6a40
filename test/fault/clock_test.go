//go:build lab

package fault

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// stepper is compiled into the programs: it sets their wall clock as a file says.
const stepper = `package failpoint

import (
	"os"
	"strconv"
	"time"
)

func init() {
	file := os.Getenv("FAILPOINT_CLOCK")
	if file == "" {
		return
	}
	set := func() {
		text, _ := os.ReadFile(file)
		time.Step, _ = strconv.ParseInt(string(text), 10, 64)
	}
	set()
	go func() {
		for ; ; time.Sleep(10 * time.Millisecond) {
			set()
		}
	}()
}
`

// overlay returns a file for go build -overlay that makes programs whose wall
// clock can be set, and their monotonic clock not: the kernel has one of each, for
// all processes.
func overlay(t *testing.T, dir string) string {
	t.Helper()
	root, err := exec.Command("go", "env", "GOROOT").Output()
	if err != nil {
		t.Fatal(err)
	}
	library := filepath.Join(strings.TrimSpace(string(root)), "src", "time", "time.go")
	source, err := os.ReadFile(library)
	if err != nil {
		t.Fatal(err)
	}
	const read = "\tsec, nsec, mono := runtimeNow()\n"
	if strings.Count(string(source), read) != 1 {
		t.Fatalf("%s reads the clock otherwise than by %q: tell this test how", library, read)
	}
	text := strings.Replace(string(source), read, read+"\tsec += Step\n", 1) + "\n// Step is added to the wall clock, in seconds.\nvar Step int64\n"
	points, err := filepath.Abs("../../sample/failpoint/stepper.go")
	if err != nil {
		t.Fatal(err)
	}
	replace := map[string]string{library: filepath.Join(dir, "time.go"), points: filepath.Join(dir, "stepper.go")}
	list, err := json.Marshal(map[string]any{"Replace": replace})
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "overlay.json")
	for name, content := range map[string]string{replace[library]: text, replace[points]: stepper, file: string(list)} {
		if err := os.WriteFile(name, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return file
}

// step sets the agent's wall clock off by so much, while its programs run, and
// waits until samples of that time flow.
func (w *world) step(by time.Duration) {
	w.t.Helper()
	next := filepath.Join(w.dir, "clock.next")
	w.check(os.WriteFile(next, []byte(strconv.FormatInt(int64(by/time.Second), 10)), 0o644))
	w.check(os.Rename(next, filepath.Join(w.dir, "clock")))
	time.Sleep(50 * time.Millisecond) // the agent looks each 10 ms
	w.ahead = by
	w.flows()
}
