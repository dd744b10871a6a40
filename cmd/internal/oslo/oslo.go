// Package oslo reads configuration files of OpenStack's services, such as
// ceilometer.conf, as oslo.config does. An option is named GROUP.OPTION, such as
// DEFAULT.host.
package oslo

import (
	"bytes"
	"errors"
	"fmt"
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

// Value is what a file says of an option.
type Value struct {
	// Option is its name, which may be an older one than was asked for.
	Option string
	// Text is the value, with what stands for other options replaced. Lines are
	// joined by newlines.
	Text string
	// File and Line are where it begins.
	File string
	Line int
}

// String says where the value is from, such as "/etc/ceilometer/ceilometer.conf:12
// DEFAULT.host".
func (v *Value) String() string { return fmt.Sprintf("%s:%d %s", v.File, v.Line, v.Option) }

// Config is what some files say together. Of an option that is there several
// times the last value of the last file counts.
type Config struct {
	values   map[string][]Value
	defaults map[string]string
}

// Read reads files in the given order; of a folder, all its *.conf in the order
// of their names.
func Read(paths ...string) (*Config, error) {
	c := &Config{values: map[string][]Value{}, defaults: map[string]string{}}
	for _, path := range paths {
		files := []string{path}
		info, err := os.Stat(path)
		if err != nil {
			return nil, err
		}
		if info.IsDir() {
			if files, err = filepath.Glob(filepath.Join(path, "*.conf")); err != nil { // sorted
				return nil, err
			}
		}
		for _, file := range files {
			data, err := os.ReadFile(file)
			if err != nil {
				return nil, err
			}
			if err := c.parse(file, data); err != nil {
				return nil, err
			}
		}
	}
	return c, nil
}

// Mistakes of a file.
var (
	errNoText       = errors.New("it is no text in UTF-8")
	errContinuation = errors.New("the line is indented but continues no option; remove the blanks at its start")
	errSectionEnd   = errors.New("a section must end with ]")
	errSectionName  = errors.New("the section has no name")
	errNoSection    = errors.New("the option stands before the first section, such as [DEFAULT]")
	errAssignment   = errors.New("the line is neither a section nor OPTION = VALUE")
	errNoKey        = errors.New("there is no option before the =")
)

// parse adds what a file says. A mistake in it is an error, as in oslo.config:
// the services would not start with such a file either.
func (c *Config) parse(file string, data []byte) error {
	if !utf8.Valid(data) {
		return fmt.Errorf("%s: %w", file, errNoText)
	}
	group := ""
	var open *Value // takes lines that are indented
	flush := func() {
		if open != nil {
			c.values[open.Option] = append(c.values[open.Option], *open)
			open = nil
		}
	}
	data = bytes.TrimPrefix(data, []byte("\ufeff"))
	data = bytes.ReplaceAll(bytes.ReplaceAll(data, []byte("\r\n"), []byte("\n")), []byte("\r"), []byte("\n"))
	for n, line := range strings.Split(string(data), "\n") {
		wrong := func(err error) error { return fmt.Errorf("%s:%d: %w", file, n+1, err) }
		line = strings.TrimRight(line, " \t\v\f")
		if line == "" {
			flush()
			continue
		}
		if line[0] == ' ' || line[0] == '\t' {
			if open == nil {
				return wrong(errContinuation)
			}
			open.Text += "\n" + strings.TrimLeft(line, " \t\v\f")
			continue
		}
		flush()
		switch line[0] {
		case '[':
			switch {
			case line[len(line)-1] != ']':
				return wrong(errSectionEnd)
			case len(line) == 2:
				return wrong(errSectionName)
			}
			group = normal(line[1 : len(line)-1])
		case '#', ';':
		default:
			at := strings.IndexAny(line, ":=")
			if at < 0 {
				return wrong(errAssignment)
			}
			key, text := strings.TrimSpace(line[:at]), strings.TrimSpace(line[at+1:])
			switch {
			case key == "":
				return wrong(errNoKey)
			case group == "":
				return wrong(errNoSection)
			}
			if text != "" && (text[0] == '"' || text[0] == '\'') && text[len(text)-1] == text[0] {
				text = text[1:max(1, len(text)-1)]
			}
			open = &Value{Option: group + "." + key, Text: text, File: file, Line: n + 1}
		}
	}
	flush()
	return nil
}

// normal returns the name of a group: upper and lower case are the same but for
// DEFAULT.
func normal(group string) string {
	if group == "DEFAULT" {
		return group
	}
	return strings.ToLower(group)
}

// Default sets what stands for an option in others' values where no file sets it.
func (c *Config) Default(option, text string) { c.defaults[option] = text }

// Text returns the value of an option, or of the first of its older names that is
// set. ok is false if none is.
func (c *Config) Text(names ...string) (v Value, ok bool) {
	for _, name := range names {
		if all := c.values[name]; len(all) > 0 {
			v := all[len(all)-1]
			v.Text = c.replace(v.Text, v.Option, nil)
			return v, true
		}
	}
	return Value{}, false
}

// Multi returns the values of an option that may be there several times, in the
// order of the files.
func (c *Config) Multi(name string) []Value {
	all := slices.Clone(c.values[name])
	for i := range all {
		all[i].Text = c.replace(all[i].Text, name, nil)
	}
	return all
}

// List returns the parts of an option's value, which commas separate.
func (c *Config) List(names ...string) (list []string, v Value, ok bool) {
	if v, ok = c.Text(names...); !ok {
		return nil, v, false
	}
	list = []string{}
	if text := strings.TrimRight(strings.TrimSpace(v.Text), ","); text != "" {
		for part := range strings.SplitSeq(text, ",") {
			list = append(list, strings.TrimSpace(part))
		}
	}
	return list, v, true
}

// Int returns the value of an option that is a whole number.
func (c *Config) Int(names ...string) (n int64, v Value, ok bool, err error) {
	if v, ok = c.Text(names...); !ok {
		return 0, v, false, nil
	}
	if n, err = strconv.ParseInt(strings.TrimSpace(v.Text), 10, 64); err != nil {
		err = fmt.Errorf("%s: %q is not a whole number", v.String(), v.Text)
	}
	return n, v, true, err
}

// Bool returns the value of an option that is true or false.
func (c *Config) Bool(names ...string) (b bool, v Value, ok bool, err error) {
	if v, ok = c.Text(names...); !ok {
		return false, v, false, nil
	}
	switch strings.ToLower(v.Text) {
	case "true", "1", "on", "yes":
		b = true
	case "false", "0", "off", "no":
	default:
		err = fmt.Errorf("%s: %q is not true or false", v.String(), v.Text)
	}
	return b, v, true, err
}

// reference finds what stands for another option, and a dollar that is one.
var reference = regexp.MustCompile(`(?i)\\\$|\$\$|\$[_a-z][._a-z0-9]*|\$\{[_a-z][._a-z0-9]*\}`)

// replace puts options' values where text refers to them. What refers to nothing
// that is known, or to itself, stays as it is.
func (c *Config) replace(text, option string, within []string) string {
	if !strings.Contains(text, "$") {
		return text
	}
	within = append(slices.Clip(within), option)
	group, _, _ := strings.Cut(option, ".")
	return reference.ReplaceAllStringFunc(text, func(ref string) string {
		if ref == `\$` || ref == "$$" {
			return "$"
		}
		name := strings.Trim(ref, "${}")
		names := []string{group + "." + name, "DEFAULT." + name}
		if other, rest, dotted := strings.Cut(name, "."); dotted {
			names = []string{normal(other) + "." + rest}
		}
		for _, name := range names {
			if slices.Contains(within, name) {
				continue
			}
			if all := c.values[name]; len(all) > 0 {
				return c.replace(all[len(all)-1].Text, name, within)
			}
			if text, ok := c.defaults[name]; ok {
				return text
			}
		}
		return ref
	})
}

// Beside returns the path of a file that lies where a configuration file does, or in or
// beside a folder of them, such as ceilometer.conf.d; empty: it is not there.
func Beside(main, file string) (string, error) {
	dirs := []string{filepath.Dir(main)}
	if info, err := os.Stat(main); err == nil && info.IsDir() {
		dirs = []string{main, filepath.Dir(filepath.Clean(main))}
	}
	for _, dir := range dirs {
		path := filepath.Join(dir, file)
		if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
			return path, err
		}
	}
	return "", nil
}

// Paths are files and folders as a setting names them: one, or a list.
type Paths []string

// UnmarshalYAML implements yaml.Unmarshaler.
func (p *Paths) UnmarshalYAML(n *yaml.Node) error {
	*p = nil
	if n.Kind == yaml.ScalarNode {
		if n.Value != "" {
			*p = Paths{n.Value}
		}
		return nil
	}
	return n.Decode((*[]string)(p))
}

// MarshalYAML implements yaml.Marshaler.
func (p Paths) MarshalYAML() (any, error) {
	switch len(p) {
	case 0:
		return "", nil
	case 1:
		return p[0], nil
	}
	return []string(p), nil
}
