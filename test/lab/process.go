package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"go.uber.org/zap"
)

// idVariable marks libvirtd, epmd and the broker as the lab's.
const idVariable = "KVMETER_LAB_ID"

// process is one process of a lab.
type process struct {
	pid     int
	args    []string
	environ []byte
}

// has reports whether the environment has the variable with that value.
func (p process) has(variable, value string) bool { return has(p.environ, variable, value) }

func has(environ []byte, variable, value string) bool {
	for _, v := range bytes.Split(environ, []byte{0}) {
		if string(v) == variable+"="+value {
			return true
		}
	}
	return false
}

func (p process) name() string {
	if len(p.args) == 0 {
		return ""
	}
	return filepath.Base(p.args[0])
}

func (l *Lab) isLibvirtd(p process) bool { return p.name() == l.daemon }

func isBroker(p process) bool { return p.name() == "beam.smp" }
func isEPMD(p process) bool   { return p.name() == "epmd" }

// processes finds the lab's processes by their environment and arguments. The
// dead that nobody has waited for yet have neither.
func (l *Lab) processes(want func(process) bool) ([]process, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	var found []process
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		if p, ours := l.process(pid); ours && want(p) {
			found = append(found, p)
		}
	}
	return found, nil
}

// process reads one process and tells whether it is the lab's.
func (l *Lab) process(pid int) (process, bool) {
	cmdline, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil || len(cmdline) == 0 {
		return process{}, false
	}
	environ, _ := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid)) // unreadable: another user's
	p := process{pid: pid, args: strings.Split(strings.TrimRight(string(cmdline), "\x00"), "\x00"), environ: environ}
	return p, belongs(l.id, p.args, environ)
}

func belongs(id string, args []string, environ []byte) bool {
	if has(environ, idVariable, id) {
		return true
	}
	for i, arg := range args {
		if arg == "-uuid" && i+1 < len(args) && strings.HasPrefix(args[i+1], id+"-") {
			return true
		}
	}
	return false
}

// signal sends sig to p if the pid is still the lab's. A process that has
// ended is no error.
func (l *Lab) signal(p process, sig syscall.Signal) error {
	handle, err := os.FindProcess(p.pid) // a pidfd, so the pid cannot change hands
	if err != nil {
		return fmt.Errorf("find process %d: %w", p.pid, err)
	}
	defer func() { _ = handle.Release() }()
	if _, ours := l.process(p.pid); !ours {
		return nil
	}
	if err := handle.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("signal %s (pid %d): %w", p.name(), p.pid, err)
	}
	return nil
}

// end asks the wanted processes to end, kills those that have not after ten
// seconds, and returns when all are gone.
func (l *Lab) end(ctx context.Context, what string, want func(process) bool) error {
	gentle, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	found, err := l.processes(want)
	if err != nil || len(found) == 0 {
		return err
	}
	l.log.Info("ending "+what, zap.Int("processes", len(found)))
	for _, p := range found {
		if err := l.signal(p, syscall.SIGTERM); err != nil {
			return err
		}
	}
	if l.gone(gentle, want) == nil {
		return nil
	}
	return l.kill(ctx, what, want)
}

// kill kills the wanted processes and returns when all are gone.
func (l *Lab) kill(ctx context.Context, what string, want func(process) bool) error {
	found, err := l.processes(want)
	if err != nil {
		return err
	}
	for _, p := range found {
		if err := l.signal(p, syscall.SIGKILL); err != nil {
			return err
		}
	}
	if err := l.gone(ctx, want); err != nil {
		return fmt.Errorf("wait for the end of %s: %w", what, err)
	}
	return nil
}

func (l *Lab) gone(ctx context.Context, want func(process) bool) error {
	return poll(ctx, func() bool {
		left, err := l.processes(want)
		return err == nil && len(left) == 0
	})
}
