//go:build lab

package packages

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// TestToolsTakeTheirFiles has each tool that the machine has read what is there
// for it.
func TestToolsTakeTheirFiles(t *testing.T) {
	repo, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	for _, tool := range []struct {
		args []string
		env  string
	}{
		{args: []string{"vagrant", "validate"}},
		{args: []string{"ansible-lint", "--offline", "packaging/ansible"}},
		{args: []string{"docker-compose", "-f", "packaging/container/compose.yaml", "config", "-q"}, env: "KVMETER_PASSWORD=secret"},
	} {
		t.Run(tool.args[0], func(t *testing.T) {
			if _, err := exec.LookPath(tool.args[0]); err != nil {
				t.Skip(err)
			}
			// They leave files beside what they read.
			dir := t.TempDir()
			for _, name := range []string{"Vagrantfile", "packaging"} {
				if out, err := exec.Command("cp", "-r", filepath.Join(repo, name), dir).CombinedOutput(); err != nil {
					t.Fatalf("%v: %s", err, out)
				}
			}
			if err := os.Mkdir(filepath.Join(dir, "dist"), 0o755); err != nil {
				t.Fatal(err)
			}
			cmd := exec.Command(tool.args[0], tool.args[1:]...)
			cmd.Dir, cmd.Env = dir, append(os.Environ(), tool.env, "HOME="+dir)
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Errorf("%v: %v\n%s", tool.args, err, out)
			}
		})
	}
}
