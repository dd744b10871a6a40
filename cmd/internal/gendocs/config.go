package main

import (
	"bytes"
	_ "embed"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"path/filepath"
	"reflect"
	"strings"
	"time"

	"github.com/kvmeter/kvmeter/agent"
	"github.com/kvmeter/kvmeter/cmd/internal/config"
	"github.com/kvmeter/kvmeter/cmd/internal/oslo"
	"github.com/kvmeter/kvmeter/cmd/internal/settings/compute"
	"github.com/kvmeter/kvmeter/cmd/internal/settings/control"
	"github.com/kvmeter/kvmeter/collectors/libvirt"
	"github.com/kvmeter/kvmeter/sample"
)

const module = "github.com/kvmeter/kvmeter/"

// configHead is what docs/config.md says before the tables.
//
//go:embed config.head.md
var configHead string

// types says what the values of settings look like.
var types = map[reflect.Type]string{
	reflect.TypeFor[string]():                     "text",
	reflect.TypeFor[bool]():                       "`true` or `false`",
	reflect.TypeFor[int]():                        "whole number",
	reflect.TypeFor[int64]():                      "whole number",
	reflect.TypeFor[uint64]():                     "whole number",
	reflect.TypeFor[float64]():                    "number",
	reflect.TypeFor[time.Duration]():              "duration",
	reflect.TypeFor[[]string]():                   "list of texts",
	reflect.TypeFor[agent.Sockets]():              "path or pattern, list of those, `auto`, or `off`",
	reflect.TypeFor[map[string]any]():             "`{NAME: VALUE, …}`",
	reflect.TypeFor[oslo.Paths]():                 "path, or list of paths",
	reflect.TypeFor[libvirt.Path]():               "path in a domain's XML",
	reflect.TypeFor[agent.Patterns]():             "`true`, `false`, or list of names and patterns",
	reflect.TypeFor[map[string]string]():          "`{NAME: TEXT, …}`",
	reflect.TypeFor[map[string][]sample.Origin](): "`{PATTERN: [ORIGIN, …], …}`",
	reflect.TypeFor[map[string]agent.Tolerance](): "`{PATTERN: {absolute: N, relative: N}, …}`",
}

// hostDefaults says in words what depends on the host, so that the page is the
// same wherever it is made.
var hostDefaults = map[string]string{
	"agent.Config.Node":         "the host's name",
	"notifier.Config.Name":      "the host's name",
	"central.IngestConfig.Name": "the host's name",
}

// file is a program's configuration file.
type file struct {
	name, program string
	defaults      any // pointer to a struct
}

// files returns the files with the defaults that root has.
func files() []file {
	dirs := config.UserDirs(0, func(string) string { return "" })
	a, n, c, u := compute.DefaultAgent(), control.DefaultNotifier(dirs), control.DefaultCentral(dirs), control.DefaultUp(control.UpDirs(dirs))
	return []file{
		{"agent.yaml", "kvmeter-agent", &a},
		{"notifier.yaml", "kvmeter notifier", &n},
		{"central.yaml", "kvmeter central", &c},
		{"up.yaml", "kvmeter up", &u},
	}
}

// configPage is docs/config.md. The source of the settings' comments is below
// root.
func configPage(root string) ([]byte, error) {
	c := comments{root: root}
	b := bytes.NewBufferString(configHead)
	for _, f := range files() {
		settings, err := list(reflect.ValueOf(f.defaults).Elem(), "", c.of)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", f.name, err)
		}
		fmt.Fprintf(b, "\n## %s\n\nThe settings of `%s`.\n\n| key | environment variable | type | default | meaning |\n|---|---|---|---|---|\n", f.name, f.program)
		for _, s := range settings {
			fmt.Fprintf(b, "| `%s` | `%s` | %s | %s | %s |\n", s.key, s.variable(), s.kind, s.value, s.meaning)
		}
	}
	return b.Bytes(), nil
}

// setting is a row of the page.
type setting struct{ key, kind, value, meaning string }

func (s *setting) variable() string {
	return config.Prefix + strings.ToUpper(strings.ReplaceAll(s.key, ".", "__"))
}

// list returns the settings of a struct of defaults whose keys begin with
// prefix. comment returns a field's comment.
func list(v reflect.Value, prefix string, comment func(t reflect.Type, field string) (string, error)) ([]setting, error) {
	var all []setting
	for i := range v.NumField() {
		field, value := v.Type().Field(i), v.Field(i)
		name := v.Type().String() + "." + field.Name
		key, option, _ := strings.Cut(field.Tag.Get("yaml"), ",")
		if key == "-" {
			continue
		}
		if option == "inline" {
			more, err := list(value, prefix, comment)
			if err != nil {
				return nil, err
			}
			all = append(all, more...)
			continue
		}
		if key == "" {
			return nil, fmt.Errorf("%s has no yaml tag: name its key, or exclude it with \"-\"", name)
		}
		text, err := comment(v.Type(), field.Name)
		if err != nil {
			return nil, err
		}
		if text == "" {
			return nil, fmt.Errorf("%s has no doc comment: say what the setting means", name)
		}
		if value.Kind() == reflect.Struct {
			more, err := list(value, prefix+key+".", comment)
			if err != nil {
				return nil, err
			}
			all = append(all, more...)
			continue
		}
		of := field.Type
		if types[of] == "" && of.Kind() == reflect.Map {
			key, of = key+".NAME", of.Elem()
		}
		kind, ok := types[of]
		if !ok {
			return nil, fmt.Errorf("%s is a %s: say in types what that looks like", name, field.Type)
		}
		shown, ok := hostDefaults[name]
		if !ok {
			shown = show(value.Interface())
		}
		all = append(all, setting{prefix + key, kind, shown, meaning(field.Name, text)})
	}
	return all, nil
}

// show returns a default as one would write it.
func show(v any) string {
	switch v := v.(type) {
	case string:
		if v == "" {
			return "empty"
		}
		return "`" + v + "`"
	case map[string][]sample.Origin:
		return "see [meters.md](meters.md)"
	case map[string]agent.Tolerance:
		return "see [crosscheck.md](crosscheck.md)"
	case oslo.Paths, map[string]any:
		return "empty"
	case agent.Sockets:
		return "`" + strings.Join(v, "`, `") + "`"
	case time.Duration:
		text := v.String()
		for _, zero := range []string{"m0s", "h0m"} {
			if strings.HasSuffix(text, zero) {
				text = text[:len(text)-2]
			}
		}
		return "`" + text + "`"
	case libvirt.Path:
		return "empty"
	case agent.Patterns:
		if len(v) == 0 {
			return "`false`"
		}
	case map[string]string:
		if len(v) == 0 {
			return "empty"
		}
	case map[string]bool:
		return "as other settings say"
	case int64:
		return size(uint64(v))
	case uint64:
		return size(v)
	}
	return fmt.Sprintf("`%v`", v)
}

func size(n uint64) string {
	switch {
	case n > 0 && n%(1<<30) == 0:
		return fmt.Sprintf("`%d` (%d GiB)", n, n>>30)
	case n > 0 && n%(1<<20) == 0:
		return fmt.Sprintf("`%d` (%d MiB)", n, n>>20)
	}
	return fmt.Sprintf("`%d`", n)
}

// meaning makes the cell of a table of a field's comment, without the field's
// name and "is" at its beginning.
func meaning(field, comment string) string {
	text := strings.NewReplacer("|", `\|`, "<", "&lt;").Replace(strings.Join(strings.Fields(comment), " "))
	rest, ok := strings.CutPrefix(text, field+" ")
	verb, after, _ := strings.Cut(rest, " ")
	switch {
	case !ok || !strings.HasSuffix(verb, "s"):
		return text
	case verb == "is":
		rest = after
	}
	return strings.ToUpper(rest[:1]) + rest[1:]
}

// comments reads the comments of structs' fields from the module's source.
type comments struct {
	root   string // folder of the module
	fields map[string]map[string]string
}

// of returns the comment of a field, or "" if it has none.
func (c *comments) of(t reflect.Type, field string) (string, error) {
	pkg := t.PkgPath()
	if c.fields[pkg] == nil {
		fields, err := parseFields(filepath.Join(c.root, strings.TrimPrefix(pkg, module)))
		if err != nil {
			return "", fmt.Errorf("read the comments of %s: %w", pkg, err)
		}
		if c.fields == nil {
			c.fields = map[string]map[string]string{}
		}
		c.fields[pkg] = fields
	}
	return c.fields[pkg][t.Name()+"."+field], nil
}

// parseFields returns the comments of the structs' fields in a folder, by
// "Type.Field".
func parseFields(dir string) (map[string]string, error) {
	paths, err := filepath.Glob(filepath.Join(dir, "*.go"))
	if err != nil {
		return nil, err
	}
	fields := map[string]string{}
	for _, path := range paths {
		if strings.HasSuffix(path, "_test.go") {
			continue
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ParseComments|parser.SkipObjectResolution)
		if err != nil {
			return nil, err
		}
		ast.Inspect(file, func(n ast.Node) bool {
			spec, ok := n.(*ast.TypeSpec)
			if !ok {
				return true
			}
			if t, ok := spec.Type.(*ast.StructType); ok {
				for _, f := range t.Fields.List {
					for _, name := range f.Names {
						fields[spec.Name.Name+"."+name.Name] = f.Doc.Text()
					}
				}
			}
			return false
		})
	}
	return fields, nil
}
