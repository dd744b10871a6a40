package oslo

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.yaml.in/yaml/v3"
)

func read(t *testing.T, files ...string) *Config {
	t.Helper()
	c, err := Read(files...)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// write puts a text into a file.
func write(t *testing.T, text string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "c.conf")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

func TestText(t *testing.T) {
	for name, tc := range map[string]struct{ file, option, want string }{
		"what is set": {"[DEFAULT]\nhost = a\n", "DEFAULT.host", "a"},
		"a colon separates as well, the first counts":    {"[DEFAULT]\nhost: a=b\n", "DEFAULT.host", "a=b"},
		"a value in quotes loses them, not its blanks":   {"[DEFAULT]\nhost = \" a \"\n", "DEFAULT.host", " a "},
		"a quote alone is gone":                          {"[DEFAULT]\nhost = \"\n", "DEFAULT.host", ""},
		"the last value counts":                          {"[DEFAULT]\nhost = a\n[x]\n[DEFAULT]\nhost = b\n", "DEFAULT.host", "b"},
		"sections are the same in upper and lower case":  {"[Polling]\nname = a\n", "polling.name", "a"},
		"but for DEFAULT":                                {"[default]\nhost = a\n", "DEFAULT.host", "none"},
		"lines that are indented go on":                  {"[DEFAULT]\nhost = a\n  b\n\tc\n", "DEFAULT.host", "a\nb\nc"},
		"a comment that is indented goes on, too":        {"[DEFAULT]\nhost = a\n # b\n", "DEFAULT.host", "a\n# b"},
		"lines may end as on other systems":              {"[DEFAULT]\r\nhost = a\r\n", "DEFAULT.host", "a"},
		"a reference is looked for in its section first": {"[DEFAULT]\nname = a\n[polling]\nname = b\nx = $name\n", "polling.x", "b"},
		"then in DEFAULT":                                {"[DEFAULT]\nname = a\n[polling]\nx = <${name}>\n", "polling.x", "<a>"},
		"a reference may name its section":               {"[DEFAULT]\nx = $polling.name\n[polling]\nname = b\n", "DEFAULT.x", "b"},
		"a reference is followed on":                     {"[DEFAULT]\nx = $y\ny = $z\nz = 1\n", "DEFAULT.x", "1"},
		"one that comes back stays":                      {"[DEFAULT]\nx = a$y\ny = b$x\n", "DEFAULT.x", "ab$x"},
		"what refers to nothing stays":                   {"[DEFAULT]\nx = $nothing $ $1\n", "DEFAULT.x", "$nothing $ $1"},
		"a dollar is written in two ways":                {"[DEFAULT]\nx = \\$y $$y\ny = 1\n", "DEFAULT.x", "$y $y"},
		"a default is referred to":                       {"[DEFAULT]\nx = $state_path/x\n", "DEFAULT.x", "/var/lib/x"},
		"a default is nothing that is set":               {"[DEFAULT]\n", "DEFAULT.state_path", "none"},
	} {
		t.Run(name, func(t *testing.T) {
			c := read(t, write(t, tc.file))
			c.Default("DEFAULT.state_path", "/var/lib")
			got := "none"
			if v, ok := c.Text(tc.option); ok {
				got = v.Text
			}
			if got != tc.want {
				t.Errorf("got %q, want %q", got, tc.want)
			}
		})
	}
}

func TestMistakesNameTheirLine(t *testing.T) {
	for text, want := range map[string]error{
		"[DEFAULT]\n\xff = 1\n":          errNoText,
		"[DEFAULT]\n\n  host = a\n":      errContinuation,
		"[DEFAULT]\n\n[polling] # x\n":   errSectionEnd,
		"[DEFAULT]\n\n[]\n":              errSectionName,
		"# first\n\nhost = a\n":          errNoSection,
		"[DEFAULT]\n\nhost\n":            errAssignment,
		"[DEFAULT]\nhost = a\n= b\n":     errNoKey,
		"[DEFAULT]\nhost = a\n\"\" x \n": errAssignment,
	} {
		file := write(t, text)
		_, err := Read(file)
		at := ":3: "
		if want == errNoText {
			at = ": "
		}
		if err == nil || err.Error() != file+at+want.Error() {
			t.Errorf("%q: got %v, want %v", text, err, want)
		}
	}
	if _, err := Read("testdata/none.conf"); err == nil || !strings.Contains(err.Error(), "testdata/none.conf") {
		t.Errorf("a file that is missing: got %v", err)
	}
}

func TestSeveralFiles(t *testing.T) {
	dir := "testdata" // ceilometer.conf, second.conf
	for name, files := range map[string][]string{"named": {dir + "/ceilometer.conf", dir + "/second.conf"}, "of a folder": {dir}} {
		t.Run(name, func(t *testing.T) {
			c := read(t, files...)
			v, _ := c.Text("DEFAULT.debug")
			if got := v.String() + " " + v.Text; got != "testdata/second.conf:2 DEFAULT.debug no" {
				t.Errorf("the last file counts: got %q", got)
			}
			var got []string
			for _, v := range c.Multi("multi.pipeline") {
				got = append(got, v.Text)
			}
			if diff := cmp.Diff([]string{"a", "b other", "c"}, got); diff != "" {
				t.Errorf("all values of all files, -want +got:\n%s", diff)
			}
		})
	}
}

func TestTypes(t *testing.T) {
	c := read(t, write(t, "[DEFAULT]\ntopics = a, b,\n c ,\nnone =\non = Yes\noff = 0\nmaybe = maybe\nn = 7\nold = 1\n"))
	list, _, _ := c.List("DEFAULT.topics")
	empty, _, ok := c.List("DEFAULT.none")
	if diff := cmp.Diff([][]string{{"a", "b", "c"}, {}}, [][]string{list, empty}); diff != "" || !ok {
		t.Errorf("lists, -want +got:\n%s", diff)
	}
	if _, _, ok := c.List("DEFAULT.absent"); ok {
		t.Error("a list that is not there is")
	}
	on, _, _, _ := c.Bool("DEFAULT.on")
	off, _, ok, err := c.Bool("DEFAULT.off")
	if !on || off || !ok || err != nil {
		t.Errorf("got %v and %v, want true and false", on, off)
	}
	if n, _, ok, err := c.Int("DEFAULT.n"); n != 7 || !ok || err != nil {
		t.Errorf("got %d, %v, %v, want 7", n, ok, err)
	}
	if _, v, ok, _ := c.Int("oslo.new", "DEFAULT.old"); !ok || v.Option != "DEFAULT.old" {
		t.Errorf("an older name is found: got %v", v)
	}
	if _, _, ok, err := c.Int("DEFAULT.absent"); ok || err != nil {
		t.Errorf("a number that is not there: got %v, %v", ok, err)
	}
	if _, _, ok, err := c.Bool("DEFAULT.absent"); ok || err != nil {
		t.Errorf("a truth that is not there: got %v, %v", ok, err)
	}
	_, _, _, err = c.Bool("DEFAULT.maybe")
	if err == nil || !strings.HasSuffix(err.Error(), `c.conf:7 DEFAULT.maybe: "maybe" is not true or false`) {
		t.Errorf("got %v", err)
	}
	_, _, _, err = c.Int("DEFAULT.maybe")
	if err == nil || !strings.HasSuffix(err.Error(), `c.conf:7 DEFAULT.maybe: "maybe" is not a whole number`) {
		t.Errorf("got %v", err)
	}
}

func TestPaths(t *testing.T) {
	for text, want := range map[string]Paths{`""`: nil, "a": {"a"}, "[a, b]": {"a", "b"}} {
		var p Paths
		if err := yaml.Unmarshal([]byte(text), &p); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, p); diff != "" {
			t.Errorf("%s: -want +got:\n%s", text, diff)
		}
		out, err := yaml.Marshal(p)
		if err != nil {
			t.Fatal(err)
		}
		var again Paths
		if err := yaml.Unmarshal(out, &again); err != nil || !cmp.Equal(p, again) {
			t.Errorf("%s is written as %s", text, out)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, name := range []string{"ceilometer.conf", "second.conf"} {
		data, err := os.ReadFile(filepath.Join("testdata", name))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(string(data))
	}
	f.Add("[a]\nb = $b $$ ${a.b} ${c\nc=$b$b$d\nd=$c$c$b\n")
	f.Fuzz(func(t *testing.T, text string) {
		c := &Config{values: map[string][]Value{}}
		if err := c.parse("f", []byte(text)); err != nil {
			return
		}
		lines := strings.Count(text, "\n") + strings.Count(text, "\r") + 1
		for name := range c.values {
			v, ok := c.Text(name)
			if !ok || v.Line < 1 || v.Line > lines || v.Option != name {
				t.Errorf("%q: got %+v", name, v)
			}
		}
	})
}

func TestBeside(t *testing.T) {
	dir := t.TempDir()
	folder := filepath.Join(dir, "conf.d")
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.Mkdir(folder, 0o755))
	for _, file := range []string{"x.conf", "polling.yaml", "conf.d/pipeline.yaml"} {
		must(os.WriteFile(filepath.Join(dir, file), nil, 0o644))
	}
	for name, tc := range map[string]struct{ main, file, want string }{
		"beside a file":         {"x.conf", "polling.yaml", "polling.yaml"},
		"beside a folder":       {"conf.d/", "polling.yaml", "polling.yaml"},
		"in a folder":           {"conf.d", "pipeline.yaml", "conf.d/pipeline.yaml"},
		"nowhere":               {"conf.d", "none.yaml", ""},
		"beside one that isn't": {"none.conf", "polling.yaml", "polling.yaml"},
	} {
		want := tc.want
		if want != "" {
			want = filepath.Join(dir, want)
		}
		if got, err := Beside(filepath.Join(dir, tc.main), tc.file); err != nil || got != want {
			t.Errorf("%s: got %q, %v, want %q", name, got, err, want)
		}
	}
}
