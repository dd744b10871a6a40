// Package config loads a program's configuration: defaults in code, a YAML
// file over them, and KVMETER_SECTION__KEY variables over that.
package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"
)

// Prefix of the variables that set a key. KVMETER_STORE__MIN_FREE is min_free
// of the section store.
const Prefix = "KVMETER_"

// Variables of that prefix that commands read which have no configuration; a
// program that has such a key reads it as well.
var other = []string{"KVMETER_ENDPOINT", "KVMETER_SOCKET", "KVMETER_LAB"}

// Load fills v, a pointer to a struct that holds the defaults. An empty path
// reads no file. Unknown keys are errors that name the line or the variable.
func Load(path string, env []string, v any) error {
	if path != "" {
		data, err := os.ReadFile(path)
		if err != nil {
			return fmt.Errorf("read configuration: %w", err)
		}
		if err := decode(data, v); err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
	}
	for _, e := range slices.Sorted(slices.Values(env)) {
		name, value, _ := strings.Cut(e, "=")
		key, ok := strings.CutPrefix(name, Prefix)
		if !ok {
			continue
		}
		err := decode(nest(strings.Split(strings.ToLower(key), "__"), value), v)
		if err != nil && slices.Contains(other, name) && strings.Contains(err.Error(), unknownKey) {
			continue
		}
		if err != nil {
			return fmt.Errorf("environment variable %s: %w", name, err)
		}
	}
	return nil
}

// nest makes the document in which the key at the end of the path has a value.
func nest(path []string, value string) []byte {
	var b bytes.Buffer
	for depth, key := range path {
		if depth > 0 {
			b.WriteString("\n" + strings.Repeat(" ", depth))
		}
		b.WriteString(key + ":")
	}
	b.WriteString(" " + value + "\n")
	return b.Bytes()
}

const unknownKey = "unknown key"

func decode(data []byte, v any) error {
	d := yaml.NewDecoder(bytes.NewReader(data))
	d.KnownFields(true)
	if err := d.Decode(v); err != nil && !errors.Is(err, io.EOF) {
		return tidy(err)
	}
	return nil
}

// tidy says what the YAML library means in the words of a configuration file.
func tidy(err error) error {
	var types *yaml.TypeError
	if !errors.As(err, &types) {
		return errors.New(strings.TrimPrefix(err.Error(), "yaml: "))
	}
	lines := make([]string, len(types.Errors))
	for i, e := range types.Errors {
		if at := strings.Index(e, " not found in type "); at >= 0 {
			e = strings.Replace(e[:at], "field ", unknownKey+" ", 1)
		}
		lines[i] = e
	}
	return errors.New(strings.Join(lines, "; "))
}

// Print writes the configuration as YAML.
func Print(w io.Writer, v any) error {
	e := yaml.NewEncoder(w)
	e.SetIndent(2)
	if err := e.Encode(v); err != nil {
		return err
	}
	return e.Close()
}

// Find returns the first of the paths that exists, or "" if none does.
func Find(paths ...string) (string, error) {
	for _, p := range paths {
		_, err := os.Stat(p)
		if err == nil {
			return p, nil
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return "", err
		}
	}
	return "", nil
}

// Dirs are the folders of a user: the system's for root, else the XDG ones.
type Dirs struct {
	Config string // files that one edits
	State  string // what must outlive a reboot
	Run    string // sockets
}

// UserDirs returns the folders for the user with the given id.
func UserDirs(uid int, getenv func(string) string) Dirs {
	if uid == 0 {
		return Dirs{Config: "/etc/kvmeter", State: "/var/lib/kvmeter", Run: "/run/kvmeter"}
	}
	xdg := func(name, fallback string) string {
		if dir := getenv(name); filepath.IsAbs(dir) {
			return filepath.Join(dir, "kvmeter")
		}
		return filepath.Join(fallback, "kvmeter")
	}
	home := getenv("HOME")
	return Dirs{
		Config: xdg("XDG_CONFIG_HOME", filepath.Join(home, ".config")),
		State:  xdg("XDG_STATE_HOME", filepath.Join(home, ".local/state")),
		Run:    xdg("XDG_RUNTIME_DIR", filepath.Join(os.TempDir(), fmt.Sprintf("kvmeter-%d", uid))),
	}
}
