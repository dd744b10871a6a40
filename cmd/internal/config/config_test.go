package config

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
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
		"defaults stand where nothing is said":        {"", nil, "default 1 1s", ""},
		"the file goes over the defaults":             {"node: a\nstore:\n  min_free: 5\n", nil, "a 5 1s", ""},
		"the environment goes over the file":          {"store: {min_free: 5}\n", []string{"KVMETER_STORE__MIN_FREE=7", "KVMETER_STORE__EVERY=2m"}, "default 7 2m0s", ""},
		"other variables are not configuration":       {"", []string{"KVMETER_ENDPOINT=http://x", "HOME=/root"}, "default 1 1s", ""},
		"an empty variable leaves the default":        {"node: a\n", []string{"KVMETER_NODE="}, "a 1 1s", ""},
		"a variable's # and : mean themselves":        {"", []string{"KVMETER_NODE=a: b #c"}, "a: b #c 1 1s", ""},
		"a variable may be a group":                   {"", []string{"KVMETER_STORE={min_free: 3, every: 3s}"}, "default 3 3s", ""},
		"a file that is empty leaves every default":   {"# nothing\n", nil, "default 1 1s", ""},
		"an unknown key names its line":               {"node: a\nnoed: b\n", nil, "", "FILE: line 2: unknown key noed"},
		"all unknown keys are named":                  {"noed: b\nstore:\n  min_fre: 5\n", nil, "", "FILE: line 1: unknown key noed; line 3: unknown key min_fre"},
		"an unknown variable names itself":            {"", []string{"KVMETER_STORE__MINFREE=7"}, "", "environment variable KVMETER_STORE__MINFREE: unknown key minfree"},
		"a variable without a key names itself":       {"", []string{"KVMETER_=7"}, "", "environment variable KVMETER_: unknown key "},
		"a broken line names itself":                  {"node: [\n", nil, "", "FILE: near line 2: did not find expected node content"},
		"a tab says what is wrong with it":            {"\tnode: a\n", nil, "", "FILE: line 1: found character that cannot start any token (indent with spaces, not tabs; put text that begins with @, % or a backquote into quotes)"},
		"a key that is there twice names both":        {"node: a\nnode: b\n", nil, "", `FILE: line 2: mapping key "node" already defined at line 1`},
		"a number needs to be one":                    {"store:\n  min_free: many\n", nil, "", `FILE: line 2: "many" is not a whole number`},
		"a duration needs a unit":                     {"store: {every: 5}\n", nil, "", `FILE: line 1: "5" is not a duration such as 500ms, 10s or 1h`},
		"a text is no group":                          {"node: {a: b}\n", nil, "", "FILE: line 1: a group of settings is not text"},
		"a section is no text":                        {"store: x\n", nil, "", `FILE: line 1: "x" is not a group of settings`},
		"a variable of the wrong type names itself":   {"", []string{"KVMETER_STORE__EVERY=soon"}, "", `environment variable KVMETER_STORE__EVERY: "soon" is not a duration such as 500ms, 10s or 1h`},
		"a variable that is broken YAML names itself": {"", []string{"KVMETER_STORE={"}, "", "environment variable KVMETER_STORE: did not find expected node content"},
		"a section's variable must be a group":        {"", []string{"KVMETER_STORE=1"}, "", `environment variable KVMETER_STORE: "1" is not a group of settings`},
		"a document of another shape is not ignored":  {"- a\n- b\n", nil, "", "FILE: line 1: a list is not a group of settings"},
		"a file that is no text says so":              {"\xff\xfe\n", nil, "", "FILE: it is no text in UTF-8"},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "c.yaml")
			if err := os.WriteFile(path, []byte(tc.file), 0o600); err != nil {
				t.Fatal(err)
			}
			c := conf{Node: "default"}
			c.Store.MinFree, c.Store.Every = 1, time.Second
			_, err := Load(path, tc.env, &c)
			if tc.err != "" {
				if want := strings.ReplaceAll(tc.err, "FILE", path); err == nil || err.Error() != want {
					t.Errorf("got error %v, want %s", err, want)
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
	if _, err := Load("", env, &agent); err != nil || agent.Socket != "/run/x.sock" {
		t.Errorf("socket %q and error %v", agent.Socket, err)
	}
}

func TestPrintHidesPasswords(t *testing.T) {
	for url, want := range map[string]string{
		"amqp://localhost:5672/":             "amqp://localhost:5672/",
		"amqp://kvmeter@rabbit/":             "amqp://kvmeter@rabbit/",
		"amqp://kvmeter:secret@rabbit:5672/": "amqp://kvmeter:***@rabbit:5672/",
		"amqp://kvmeter:s:e@cret@rabbit/v@h": "amqp://kvmeter:***@rabbit/v@h",
		"file:///var/log/a@b:c":              "file:///var/log/a@b:c",
	} {
		var b strings.Builder
		if err := Print(&b, &conf{Node: url}, nil); err != nil {
			t.Fatal(err)
		}
		if got := strings.SplitN(b.String(), "\n", 2)[0]; got != "node: "+want {
			t.Errorf("got %s, want %s", got, want)
		}
	}
}

// heir is a configuration that inherits.
type heir struct {
	conf   `yaml:",inline"`
	List   []string `yaml:"list"`
	Secret string   `yaml:"secret_file"`
	will   []Inherited
	err    error
}

func (h *heir) Inherit(Origins) ([]Inherited, error) { return h.will, h.err }

func TestPrintSaysWhereValuesAreFrom(t *testing.T) {
	path := filepath.Join(t.TempDir(), "c.yaml")
	if err := os.WriteFile(path, []byte("# first\nstore:\n  min_free: 5\nsecret_file:\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	h := &heir{will: []Inherited{
		{"store.min_free", 6, "x.conf:1 a.b"}, {"node", "a: b", "x.conf:2 a.c"}, {"list", []string{"x", "y"}, "x.conf:3 a.d"}, {"secret_file", nil, "x.conf:4 a.e"},
	}}
	origins, err := Load(path, []string{"KVMETER_STORE__EVERY=3s"}, h)
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	if err := Print(&b, h, origins); err != nil {
		t.Fatal(err)
	}
	want := `node: 'a: b' # x.conf:2 a.c
store:
  min_free: 5 # ` + path + `:3
  every: 3s # KVMETER_STORE__EVERY
list: # x.conf:3 a.d
  - x
  - "y"
secret_file: "" # x.conf:4 a.e
`
	if got := b.String(); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

func TestWhatIsInheritedMustFit(t *testing.T) {
	for want, h := range map[string]*heir{
		`x.conf:1 a.b: "many" is not a whole number`: {will: []Inherited{{"store.min_free", "many", "x.conf:1 a.b"}}},
		"no such file": {err: errors.New("no such file")},
	} {
		if _, err := Load("", nil, h); err == nil || err.Error() != want {
			t.Errorf("got error %v, want %s", err, want)
		}
	}
}

func TestChanged(t *testing.T) {
	a := conf{Node: "a"}
	b := a
	b.Node, b.Store.Every = "b", time.Second
	got, err := Changed(&a, &b)
	if want := []string{"node", "store.every"}; err != nil || !slices.Equal(got, want) {
		t.Errorf("got %q, %v, want %q", got, err, want)
	}
	type with struct {
		Map map[string]bool `yaml:"map"`
	}
	got, err = Changed(&with{map[string]bool{"x": true, "y": true}}, &with{map[string]bool{"x": true, "z": false}})
	if want := []string{"map.y", "map.z"}; err != nil || !slices.Equal(got, want) {
		t.Errorf("got %q, %v, want %q", got, err, want)
	}
}

func TestUserDirs(t *testing.T) {
	system := Dirs{Config: "/etc/kvmeter", State: "/var/lib/kvmeter", Run: "/run/kvmeter"}
	for name, tc := range map[string]struct {
		uid  int
		env  map[string]string
		want Dirs
	}{
		"root has the system's": {0, map[string]string{"HOME": "/root", "XDG_CONFIG_HOME": "/x"}, system},
		"a user has folders at home": {1000, map[string]string{"HOME": "/home/a"}, Dirs{
			Config: "/home/a/.config/kvmeter", State: "/home/a/.local/state/kvmeter", Run: filepath.Join(os.TempDir(), "kvmeter-1000"),
		}},
		"XDG variables say where they are": {1000, map[string]string{"HOME": "/home/a", "XDG_STATE_HOME": "/s", "XDG_RUNTIME_DIR": "/run/user/1000"}, Dirs{
			Config: "/home/a/.config/kvmeter", State: "/s/kvmeter", Run: "/run/user/1000/kvmeter",
		}},
		"a relative XDG variable is not heeded":          {1000, map[string]string{"HOME": "/home/a", "XDG_CONFIG_HOME": "x", "XDG_STATE_HOME": "/s", "XDG_RUNTIME_DIR": "/r"}, Dirs{"/home/a/.config/kvmeter", "/s/kvmeter", "/r/kvmeter"}},
		"a service without a home has the system's, too": {998, nil, system},
	} {
		t.Run(name, func(t *testing.T) {
			if got := UserDirs(tc.uid, func(name string) string { return tc.env[name] }); got != tc.want {
				t.Errorf("got %+v, want %+v", got, tc.want)
			}
		})
	}
}

func itoa(n int) string { return string(rune('0' + n)) }

func FuzzLoad(f *testing.F) {
	f.Add("node: a\nstore: {min_free: 1}\n", "5s")
	path := filepath.Join(f.TempDir(), "c.yaml") // one for all: what is fuzzed is not the file system
	f.Fuzz(func(t *testing.T, file, value string) {
		if err := os.WriteFile(path, []byte(file), 0o600); err != nil {
			t.Fatal(err)
		}
		var c conf
		_, _ = Load(path, []string{"KVMETER_STORE__EVERY=" + value}, &c) // must not panic
	})
}
