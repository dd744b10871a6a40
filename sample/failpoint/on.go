//go:build failpoints

package failpoint

import (
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
)

// armed is the point at which the program ends, and how often it is passed before:
// FAILPOINT=NAME:TIMES in the environment.
var armed, left = parse(os.Getenv("FAILPOINT"))

func parse(text string) (name string, left *atomic.Int64) {
	name, times, _ := strings.Cut(text, ":")
	n, _ := strconv.ParseInt(times, 10, 64) // 0: the first time
	left = new(atomic.Int64)
	left.Store(n)
	return name, left
}

// At ends the program by SIGKILL if the point is armed and its time has come.
func At(name string) {
	if name == armed && left.Add(-1) < 0 {
		_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
		select {} // the signal may take a moment
	}
}
