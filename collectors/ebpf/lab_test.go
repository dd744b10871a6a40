//go:build lab

package ebpf

import (
	"errors"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/bpf"
)

func TestOpen(t *testing.T) {
	for origin, want := range map[string]string{"": bpf.OriginWalk, bpf.OriginWalk: bpf.OriginWalk, bpf.OriginIter: bpf.OriginIter} {
		r, err := Open(zap.NewNop(), Options{Origin: origin})
		if errors.Is(err, bpf.ErrNoTaskIterator) {
			t.Skip(err)
		}
		if err != nil {
			t.Fatal(err)
		}
		if r.Origin() != want && !(origin == "" && r.Origin() == bpf.OriginIter) {
			t.Errorf("%q: got %s, want %s", origin, r.Origin(), want)
		}
		out := make([]bpf.Usage, 1)
		if err := r.Read(t.Context(), []bpf.Proc{{PID: os.Getpid()}}, out); err != nil || out[0].Err != nil || out[0].Process == 0 {
			t.Errorf("%s: got %+v, %v", r.Origin(), out[0], err)
		}
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	}
}

// openElsewhere is the environment variable that makes TestOpenElsewhere be
// the process of its other tests.
const openElsewhere = "KVMETER_OPEN_ELSEWHERE"

func TestOpenElsewhere(t *testing.T) {
	if os.Getenv(openElsewhere) != "" {
		_, err := Open(zap.NewNop(), Options{})
		t.Fatalf("Open: %v", err)
	}
	for name, tc := range map[string]struct {
		attr syscall.SysProcAttr
		want error
	}{
		"without capabilities":     {syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}, bpf.ErrNoCapability},
		"in another PID namespace": {syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID}, bpf.ErrPIDNamespace},
	} {
		t.Run(name, func(t *testing.T) {
			cmd := exec.Command("/proc/self/exe", "-test.run=^TestOpenElsewhere$")
			cmd.Env = append(os.Environ(), openElsewhere+"=1")
			cmd.Dir = "/"
			cmd.SysProcAttr = &tc.attr
			out, err := cmd.CombinedOutput()
			if err == nil {
				t.Fatalf("it could be opened:\n%s", out)
			}
			if got := string(out); !strings.Contains(got, tc.want.Error()) || strings.Contains(got, "MEMLOCK") || strings.Count(got, "load ") != 1 {
				t.Errorf("got:\n%s\nwant %q, once", got, tc.want)
			}
		})
	}
}
