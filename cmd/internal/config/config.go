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
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"
)

// Prefix of the variables that set a key. KVMETER_STORE__MIN_FREE is min_free
// of the section store.
const Prefix = "KVMETER_"

// Variables of that prefix that commands read which have no configuration; a
// program that has such a key reads it as well.
var other = []string{"KVMETER_ENDPOINT", "KVMETER_SOCKET", "KVMETER_LAB"}

// Origins says where the values of settings are from, by their keys, such as
// amqp.url. Those that have their defaults are not there.
type Origins map[string]string

// Heir is a configuration that takes what neither its file nor a variable sets
// from the files of another program, which it names itself.
type Heir interface {
	// Inherit returns what those files say. It is called when the rest is loaded.
	Inherit(set Origins) ([]Inherited, error)
}

// Inherited is a setting that another program's file gives.
type Inherited struct {
	Key   string
	Value any    // as YAML has it; nil: the configuration has taken it already
	From  string // the place
}

// Load fills v, a pointer to a struct that holds the defaults. An empty path
// reads no file. Unknown keys are errors that name the line or the variable.
func Load(path string, env []string, v any) (Origins, error) {
	origins := Origins{}
	if path != "" {
		data, err := os.ReadFile(path)
		if err != nil {
			return nil, fmt.Errorf("read configuration: %w", err)
		}
		if !utf8.Valid(data) {
			return nil, fmt.Errorf("%s: it is no text in UTF-8", path)
		}
		if err := decode(data, v); err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		origins.note(data, func(n *yaml.Node) string { return fmt.Sprintf("%s:%d", path, n.Line) })
	}
	for _, e := range slices.Sorted(slices.Values(env)) {
		name, value, _ := strings.Cut(e, "=")
		key, ok := strings.CutPrefix(name, Prefix)
		if !ok {
			continue
		}
		doc, err := nest(strings.Split(strings.ToLower(key), "__"), value)
		if err == nil {
			err = decode(doc, v)
		}
		if err != nil && slices.Contains(other, name) && strings.Contains(err.Error(), unknownKey) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("environment variable %s: %s", name, lineNumber.ReplaceAllString(err.Error(), ""))
		}
		origins.note(doc, func(*yaml.Node) string { return name })
	}
	heir, ok := v.(Heir)
	if !ok {
		return origins, nil
	}
	inherited, err := heir.Inherit(origins)
	for _, i := range inherited {
		if err != nil {
			break
		}
		err = origins.inherit(i, v)
	}
	return origins, err
}

// inherit sets what is not set yet.
func (o Origins) inherit(i Inherited, v any) error {
	if o[i.Key] != "" {
		return nil
	}
	if i.Value != nil {
		var n yaml.Node
		err := n.Encode(i.Value)
		if err == nil {
			var doc []byte
			if doc, err = within(strings.Split(i.Key, "."), &n); err == nil {
				err = decode(doc, v)
			}
			o.note(doc, func(*yaml.Node) string { return i.From })
		}
		if err != nil {
			return fmt.Errorf("%s: %s", i.From, lineNumber.ReplaceAllString(err.Error(), ""))
		}
	}
	o[i.Key] = i.From
	return nil
}

// note records the settings of a document that was loaded.
func (o Origins) note(doc []byte, from func(*yaml.Node) string) {
	var n yaml.Node
	if err := yaml.Unmarshal(doc, &n); err == nil && len(n.Content) > 0 { // it was decoded before
		settings(n.Content[0], "", func(path string, key, _ *yaml.Node) { o[path] = from(key) })
	}
}

// settings calls each with the settings of a group, and of those within it, that
// have a value.
func settings(group *yaml.Node, prefix string, each func(path string, key, value *yaml.Node)) {
	for i := 0; i+1 < len(group.Content); i += 2 {
		key, value := group.Content[i], group.Content[i+1]
		if value.Kind == yaml.AliasNode {
			value = value.Alias
		}
		switch path := prefix + key.Value; {
		case value.Tag == "!!null":
		case value.Kind == yaml.MappingNode && len(value.Content) > 0:
			settings(value, path+".", each)
		default:
			each(path, key, value)
		}
	}
}

var lineNumber = regexp.MustCompile(`\b(?:near )?line \d+: `)

// nest makes the document in which the key at the end of the path has a value.
// Only lists, groups and quoted text are read as YAML: elsewhere # and : mean
// themselves. An empty value leaves the default.
func nest(path []string, value string) ([]byte, error) {
	n := &yaml.Node{Kind: yaml.ScalarNode, Value: value}
	if value != "" && strings.ContainsRune(`[{"'`, rune(value[0])) {
		var doc yaml.Node
		if err := yaml.Unmarshal([]byte(value), &doc); err != nil {
			return nil, tidy(err)
		}
		n = doc.Content[0]
	}
	return within(path, n)
}

// within makes the document in which the key at the end of the path has a value.
func within(path []string, n *yaml.Node) ([]byte, error) {
	for _, key := range slices.Backward(path) {
		n = &yaml.Node{Kind: yaml.MappingNode, Content: []*yaml.Node{{Kind: yaml.ScalarNode, Tag: "!!str", Value: key}, n}}
	}
	return yaml.Marshal(n)
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
		text := strings.TrimPrefix(err.Error(), "yaml: ")
		if m := parserError.FindStringSubmatch(text); m != nil {
			line, _ := strconv.Atoi(m[1]) // of where the list or group begins, from 0
			text = fmt.Sprintf("near line %d: %s", line+1, m[2])
		} else if !strings.HasPrefix(text, "line ") {
			text = "line 1: " + text // the library leaves it out
		}
		if strings.Contains(text, "cannot start any token") {
			text += " (indent with spaces, not tabs; put text that begins with @, % or a backquote into quotes)"
		}
		return errors.New(text)
	}
	lines := make([]string, len(types.Errors))
	for i, e := range types.Errors {
		if at := strings.Index(e, " not found in type "); at >= 0 {
			e = strings.Replace(e[:at], "field ", unknownKey+" ", 1)
		}
		lines[i] = wrongType.ReplaceAllStringFunc(e, func(e string) string {
			m := wrongType.FindStringSubmatch(e)
			return got(m[1], m[2]) + " is not " + wanted(m[3])
		})
	}
	return errors.New(strings.Join(lines, "; "))
}

// parserError finds the errors of which the library counts the lines from 0.
var parserError = regexp.MustCompile(`^(?:line (\d+): )?(did not find expected (?:<|key|node content|'-' indicator|',' or).*)`)

var wrongType = regexp.MustCompile("cannot unmarshal !!(\\w+)(?: `(.*)`)? into (.+)$")

func got(tag, value string) string {
	switch tag {
	case "map":
		return "a group of settings"
	case "seq":
		return "a list"
	}
	return strconv.Quote(value)
}

// wanted says what values of a Go type look like.
func wanted(goType string) string {
	switch {
	case goType == "time.Duration":
		return "a duration such as 500ms, 10s or 1h"
	case goType == "bool":
		return "true or false"
	case goType == "string":
		return "text"
	case strings.HasPrefix(goType, "[]"):
		return "a list"
	case strings.HasPrefix(goType, "uint"):
		return "a whole number from 0 up"
	case strings.HasPrefix(goType, "int"):
		return "a whole number"
	}
	return "a group of settings"
}

// Print writes the configuration as YAML, without passwords. Comments say where
// values are from that are not the defaults.
func Print(w io.Writer, v any, origins Origins) error {
	var n yaml.Node
	if err := n.Encode(v); err != nil {
		return err
	}
	settings(&n, "", func(path string, key, value *yaml.Node) {
		from := origins[path]
		if from == "" {
			return
		}
		if value.Kind == yaml.SequenceNode && value.Style&yaml.FlowStyle == 0 && len(value.Content) > 0 {
			key.LineComment = from
		} else {
			value.LineComment = from
		}
	})
	var b bytes.Buffer
	e := yaml.NewEncoder(&b)
	e.SetIndent(2)
	if err := errors.Join(e.Encode(&n), e.Close()); err != nil {
		return err
	}
	_, err := w.Write(password.ReplaceAll(b.Bytes(), []byte("${1}***@")))
	return err
}

// Changed returns the keys of the settings that are not the same in two
// configurations, sorted.
func Changed(a, b any) ([]string, error) {
	values := func(v any) (map[string]string, error) {
		var n yaml.Node
		if err := n.Encode(v); err != nil {
			return nil, err
		}
		all := map[string]string{}
		var err error
		settings(&n, "", func(path string, _, value *yaml.Node) {
			var text []byte
			if err == nil {
				text, err = yaml.Marshal(value)
			}
			all[path] = string(text)
		})
		return all, err
	}
	before, err := values(a)
	if err != nil {
		return nil, err
	}
	after, err := values(b)
	if err != nil {
		return nil, err
	}
	var changed []string
	for key := range before {
		if text, ok := after[key]; !ok || text != before[key] {
			changed = append(changed, key)
		}
	}
	for key := range after {
		if _, ok := before[key]; !ok {
			changed = append(changed, key)
		}
	}
	slices.Sort(changed)
	return changed, nil
}

// password finds the password of a URL.
var password = regexp.MustCompile(`(://[^/:@\s]*:)[^/\s]*@`)

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

// Dirs are the folders of a user: the system's for root and for those who have
// no home, else the XDG ones.
type Dirs struct {
	Config string // files that one edits
	State  string // what must outlive a reboot
	Run    string // sockets
}

// UserDirs returns the folders for the user with the given id.
func UserDirs(uid int, getenv func(string) string) Dirs {
	home := getenv("HOME")
	if uid == 0 || home == "" {
		return Dirs{Config: "/etc/kvmeter", State: "/var/lib/kvmeter", Run: "/run/kvmeter"}
	}
	xdg := func(name, fallback string) string {
		if dir := getenv(name); filepath.IsAbs(dir) {
			return filepath.Join(dir, "kvmeter")
		}
		return fallback
	}
	return Dirs{
		Config: xdg("XDG_CONFIG_HOME", filepath.Join(home, ".config/kvmeter")),
		State:  xdg("XDG_STATE_HOME", filepath.Join(home, ".local/state/kvmeter")),
		Run:    xdg("XDG_RUNTIME_DIR", filepath.Join(os.TempDir(), fmt.Sprintf("kvmeter-%d", uid))),
	}
}
