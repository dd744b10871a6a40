//go:build lab

package e2e

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// TestSecretsStayOutOfSight gives the programs a secret of its own in each place
// that takes one, has them fail in the usual ways, and looks for the secrets in
// whatever they show.
func TestSecretsStayOutOfSight(t *testing.T) {
	dir, err := os.MkdirTemp("", "kvmeter-secrets-")
	check(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	check(t, os.Chmod(dir, 0o755))
	away := freeAddress(t) // nobody listens there
	file := func(name, text string) string {
		t.Helper()
		path := filepath.Join(dir, name)
		check(t, os.MkdirAll(filepath.Dir(path), 0o755))
		check(t, os.WriteFile(path, []byte(text), 0o644))
		return path
	}
	secret := func(of string) string { return "canary-0123456789-" + of }
	file("keys/compute-1.key", secret("key")+"\n"+secret("old-key")+"\n")
	file("keys/notifier-1.key", secret("notifier-key")+"\n")
	file("pipeline.yaml", fmt.Sprintf(`
sources: [{name: all, meters: ["*"], sinks: [out]}]
sinks: [{name: out, publishers: ["store://", "https://billing:%s@%s/samples", "notifier://user:%s@%s/"]}]
`, secret("publisher"), away, secret("foreign"), away))
	run := filepath.Join(dir, "run")
	check(t, os.Mkdir(run, 0o755))
	check(t, os.Chown(run, 65534, 65534))
	metrics := map[string]string{"agent": freeAddress(t), "notifier": freeAddress(t), "central": freeAddress(t)}
	configs := map[string]string{
		"agent": file("agent.yaml", fmt.Sprintf(`
node: compute-1
libvirt: /run/no-such-socket
interval: 1s
spread: false
socket: ""
counters: ""
pins: ""
key_file: %[1]s/keys/compute-1.key
amqp: {urls: ["amqp://kvmeter:%[2]s@%[3]s/one", "amqp://kvmeter:%[2]s@%[3]s/two"]}
metrics: %[4]s
shutdown_timeout: 1ms
`, dir, secret("url"), away, metrics["agent"])),
		"notifier": file("notifier.yaml", fmt.Sprintf(`
name: notifier-1
pipeline: %[1]s/pipeline.yaml
spool: %[5]s/spool
state: %[5]s/state
keys: %[1]s/keys
telemetry_secret_file: %[6]s
amqp: {url: "amqp://kvmeter@%[3]s/", password_file: %[7]s}
notifications: {enabled: true, messaging_urls: ["rabbit://openstack:%[2]s@%[3]s/"]}
metrics: %[4]s
`, dir, secret("messaging"), away, metrics["notifier"], run, file("telemetry", secret("telemetry")), file("password", secret("password")))),
		"central": file("central.yaml", fmt.Sprintf(`
keys: %[1]s/keys
amqp: {url: "amqp://kvmeter@%[2]s/", password_file: %[1]s/password}
store: {path: %[3]s/store, min_free: 0}
api: {listen: "%[4]s"}
metrics: %[5]s
`, dir, away, run, freeAddress(t), metrics["central"])),
	}
	// Configurations that are refused, with a secret in what is refused.
	bad := map[string]string{
		"agent":    file("bad-agent.yaml", "amqp: {url: \"amqp://kvmeter:"+secret("bad-url")+"%zz@rabbit/\"}\n"),
		"notifier": file("bad-notifier.yaml", "allow_unsigned: true\namqp: {urls: [\"ampq://kvmeter:"+secret("bad-scheme")+"@rabbit/\"]}\n"),
		"central":  file("bad-central.yaml", "keys: "+filepath.Dir(file("bad/n.key", "canary-short"))+"\n"),
	}
	programs := map[string][]string{
		"agent":    {binary(t, "kvmeter-agent"), "--without-bpf"},
		"notifier": {binary(t, "kvmeter"), "notifier"},
		"central":  {binary(t, "kvmeter"), "central"},
	}
	clean := func(where, text string) {
		t.Helper()
		for line := range strings.Lines(text) {
			if strings.Contains(line, "canary-") {
				t.Errorf("%s shows a secret: %s", where, line)
			}
		}
	}
	for name, words := range programs {
		t.Run(name, func(t *testing.T) {
			try := func(args ...string) string {
				cmd := exec.CommandContext(t.Context(), words[0], append(words[1:len(words):len(words)], args...)...)
				cmd.Env = append(os.Environ(), "KVMETER_AMQP__TLS_CA=") // the environment is read, too
				out, _ := cmd.CombinedOutput()
				clean(strings.Join(args, " "), string(out))
				return string(out)
			}
			try("--help")
			if out := try("--check-config", "--config", configs[name]); !strings.Contains(out, away) {
				t.Errorf("--check-config does not show the broker:\n%s", out)
			}
			if out := try("--check-config", "--config", bad[name]); !strings.Contains(out, "Error:") {
				t.Errorf("a bad configuration is not refused:\n%s", out)
			}

			var out safeBuffer
			cmd := exec.Command(words[0], append(words[1:len(words):len(words)], "--config", configs[name], "--log-level", "debug")...)
			cmd.Stdout, cmd.Stderr = &out, &out
			cmd.Env = []string{"KVMETER_AMQP__HEARTBEAT=5s", "GOTRACEBACK=all", "SECRET_OF_ANOTHER=" + secret("environment")}
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
			check(t, cmd.Start())
			ended := false
			defer func() {
				if !ended {
					_ = cmd.Process.Kill()
					_ = cmd.Wait()
				}
			}()
			for deadline := time.Now().Add(30 * time.Second); !strings.Contains(out.String(), "does not answer (connection refused)"); time.Sleep(10 * time.Millisecond) {
				if time.Now().After(deadline) {
					t.Fatalf("it never said that the broker is away:\n%s", out.String())
				}
			}
			answer, err := http.Get("http://" + metrics[name] + "/metrics")
			check(t, err)
			page, err := io.ReadAll(answer.Body)
			check(t, err)
			_ = answer.Body.Close()
			clean("/metrics", string(page))
			for _, f := range []string{"cmdline", "comm", "status"} {
				text, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", cmd.Process.Pid, f))
				check(t, err)
				clean("/proc/PID/"+f, string(text))
			}
			// Its environment and memory are none of its user's business; root may.
			for _, f := range []string{"environ", "mem"} {
				look := exec.Command("head", "-c", "1", fmt.Sprintf("/proc/%d/%s", cmd.Process.Pid, f))
				look.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
				if text, err := look.CombinedOutput(); err == nil || !strings.Contains(string(text), "Permission denied") {
					t.Errorf("another process of its user reads /proc/PID/%s: %q, %v", f, text, err)
				}
			}
			// A crash shows the stacks of all goroutines, and leaves no core.
			check(t, cmd.Process.Signal(syscall.SIGQUIT))
			err = cmd.Wait()
			ended = true
			if status, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); !ok || status.CoreDump() {
				t.Errorf("it left a core: %v", err)
			}
			if !strings.Contains(out.String(), "goroutine ") {
				t.Errorf("no stacks are shown:\n%s", out.String())
			}
			clean("the log", out.String())
		})
	}
}

// safeBuffer is a buffer that is read while it is written.
type safeBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *safeBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *safeBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}
