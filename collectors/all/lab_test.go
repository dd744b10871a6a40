//go:build lab

package all

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kvmeter/kvmeter/bpf"
)

// refused makes TestLifeThatIsRefusedSaysWhy be the process that its other
// self runs.
const refused = "KVMETER_LIFE_REFUSED"

func TestLifeThatIsRefusedSaysWhy(t *testing.T) {
	if os.Getenv(refused) != "" {
		life, notes := Life("")
		fmt.Println(life == nil, notes)
		os.Exit(0)
	}
	for name, tc := range map[string]struct {
		caps []uintptr
		want string
	}{
		"without a capability":     {[]uintptr{unix.CAP_BPF}, "missing: CAP_PERFMON"},
		"without any":              {nil, bpf.ErrNoCapability.Error()},
		"with those that it needs": {[]uintptr{unix.CAP_BPF, unix.CAP_PERFMON}, "false []\n"},
	} {
		t.Run(name, func(t *testing.T) {
			cmd := exec.Command("/proc/self/exe", "-test.run=^TestLifeThatIsRefusedSaysWhy$")
			cmd.Env = append(os.Environ(), refused+"=1")
			cmd.Dir = "/"
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}, AmbientCaps: tc.caps}
			out, err := cmd.CombinedOutput()
			if got := string(out); err != nil || !strings.Contains(got, tc.want) || strings.Contains(got, "MEMLOCK") {
				t.Errorf("got %s, %v, want %q", got, err, tc.want)
			}
		})
	}
}
