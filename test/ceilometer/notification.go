package ceilometer

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// StartNotification starts Debian's ceilometer-agent-notification for as long as the
// test runs, with more in its configuration. It writes all samples to a file, a line
// of JSON each.
func StartNotification(t testing.TB, broker, secret, more string) (conf, file string) {
	t.Helper()
	dir := t.TempDir()
	conf, file = filepath.Join(dir, "ceilometer.conf"), filepath.Join(dir, "samples")
	for name, text := range map[string]string{
		"pipeline.yaml": fmt.Sprintf("sources: [{name: s, meters: ['*'], sinks: [k]}]\nsinks: [{name: k, publishers: ['file://%s?json']}]\n", file),
		"ceilometer.conf": fmt.Sprintf("[DEFAULT]\ntransport_url = %s\nlog_file = %s/log\npipeline_cfg_file = %s/pipeline.yaml\nstate_path = %s\n[publisher]\ntelemetry_secret = %s\n"+
			"[notification]\npipelines = meter\nworkers = 1\n%s", strings.Replace(broker, "amqp:", "rabbit:", 1), dir, dir, dir, secret, more),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command("/usr/bin/python3", "/usr/bin/ceilometer-agent-notification", "--config-file", conf)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // its workers go with it
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		_ = cmd.Wait()
		if log, err := os.ReadFile(filepath.Join(dir, "log")); t.Failed() && err == nil {
			t.Logf("its log:\n%s", log)
		}
	})
	return conf, file
}
