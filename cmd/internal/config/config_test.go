package config

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

type conf struct {
	Node  string `yaml:"node"`
	Store struct {
		MinFree int           `yaml:"min_free"`
		Every   time.Duration `yaml:"every"`
	} `yaml:"store"`
}

func TestLoad(t *testing.T) {
	for name, tc := range map[string]struct {
		file string
		env  []string
		want string // Node, MinFree, Every
		err  string
	}{
		"defaults stand where nothing is said":       {"", nil, "default 1 1s", ""},
		"the file goes over the defaults":            {"node: a\nstore:\n  min_free: 5\n", nil, "a 5 1s", ""},
		"the environment goes over the file":         {"store: {min_free: 5}\n", []string{"KVMETER_STORE__MIN_FREE=7", "KVMETER_STORE__EVERY=2m"}, "default 7 2m0s", ""},
		"other variables are not configuration":      {"", []string{"KVMETER_ENDPOINT=http://x", "HOME=/root"}, "default 1 1s", ""},
		"an unknown key names its line":              {"node: a\nnoed: b\n", nil, "", "line 2: unknown key noed"},
		"an unknown variable names itself":           {"", []string{"KVMETER_STORE__MINFREE=7"}, "", "KVMETER_STORE__MINFREE: line 2: unknown key minfree"},
		"a broken line names itself":                 {"node: [\n", nil, "", "line 1"},
		"a value of the wrong type names its line":   {"store:\n  min_free: many\n", nil, "", "line 2"},
		"a variable of the wrong type names itself":  {"", []string{"KVMETER_STORE__EVERY=soon"}, "", "KVMETER_STORE__EVERY"},
		"a file that is empty leaves every default":  {"# nothing\n", nil, "default 1 1s", ""},
		"a document of another shape is not ignored": {"- a\n- b\n", nil, "", "line 1"},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "c.yaml")
			if err := os.WriteFile(path, []byte(tc.file), 0o600); err != nil {
				t.Fatal(err)
			}
			c := conf{Node: "default"}
			c.Store.MinFree, c.Store.Every = 1, time.Second
			err := Load(path, tc.env, &c)
			if tc.err != "" {
				if err == nil || !strings.Contains(err.Error(), tc.err) {
					t.Errorf("got error %v, want one with %q", err, tc.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if got := strings.Join([]string{c.Node, itoa(c.Store.MinFree), c.Store.Every.String()}, " "); got != tc.want {
				t.Errorf("got %s, want %s", got, tc.want)
			}
		})
	}
}

func TestVariablesOfCommandsAreReadWhereThereIsSuchAKey(t *testing.T) {
	env := []string{"KVMETER_ENDPOINT=http://x", "KVMETER_SOCKET=/run/x.sock"}
	var agent struct {
		Socket string `yaml:"socket"`
	}
	if err := Load("", env, &agent); err != nil || agent.Socket != "/run/x.sock" {
		t.Errorf("socket %q and error %v", agent.Socket, err)
	}
}

func itoa(n int) string { return string(rune('0' + n)) }

func FuzzLoad(f *testing.F) {
	f.Add("node: a\nstore: {min_free: 1}\n", "5s")
	f.Fuzz(func(t *testing.T, file, value string) {
		path := filepath.Join(t.TempDir(), "c.yaml")
		if err := os.WriteFile(path, []byte(file), 0o600); err != nil {
			t.Fatal(err)
		}
		var c conf
		_ = Load(path, []string{"KVMETER_STORE__EVERY=" + value}, &c) // must not panic
	})
}
