package cli

import (
	"bytes"
	"context"
	"encoding/csv"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/mattn/go-runewidth"
	"github.com/spf13/cobra"
	"golang.org/x/term"
)

// table is what a command prints: rows, or the properties of a single thing,
// which are the columns of its only row.
type table struct {
	columns []string
	rows    [][]cell
	single  bool
	cut     bool                                // there may be more rows than these
	chart   func(width int, colour bool) string // drawn in place of a table of rows
}

func newTable(columns ...string) *table { return &table{columns: columns} }

func (t *table) add(row ...cell) { t.rows = append(t.rows, row) }

// output says how a table is to be printed.
type output struct {
	format  string
	columns []string
	watch   time.Duration // between two askings; 0: one only
}

var formats = []string{"table", "json", "csv", "value"}

func (o *output) flags(cmd *cobra.Command) {
	cmd.Flags().StringVarP(&o.format, "format", "f", "table", "`FORMAT`: table, json, csv or value")
	cmd.Flags().StringArrayVarP(&o.columns, "column", "c", nil, "show only this `COLUMN`; may be repeated")
}

// check refuses a format that does not exist, before anything is asked for.
func (o *output) check() error {
	if !slices.Contains(formats, o.format) {
		return fmt.Errorf("there is no output format %q; there are %s", o.format, strings.Join(formats, ", "))
	}
	return nil
}

func (o *output) print(w io.Writer, t *table) error {
	t, err := t.choose(o.columns)
	if err != nil {
		return err
	}
	var b []byte
	switch o.format {
	case "json":
		b = t.appendJSON(nil)
	case "csv":
		return t.writeCSV(w)
	case "value":
		b = t.appendValues(nil)
	default:
		if width := terminalWidth(w); t.chart != nil {
			b = []byte(t.chart(width, width > 0))
		} else {
			b = t.append(nil, width)
		}
	}
	_, err = w.Write(b)
	return err
}

// repeat prints once or, where it is to watch, until ctx ends: on a terminal over
// what it has printed before.
func (o *output) repeat(ctx context.Context, w io.Writer, show func(io.Writer) error) error {
	if o.watch == 0 {
		return show(w)
	}
	if o.watch < 100*time.Millisecond {
		return fmt.Errorf("--watch=%s: at least 100ms", o.watch)
	}
	again := time.NewTicker(o.watch)
	defer again.Stop()
	for {
		if terminalWidth(w) > 0 {
			if _, err := io.WriteString(w, "\x1b[H\x1b[2J"); err != nil {
				return err
			}
		}
		if err := show(w); err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return err
		}
		select {
		case <-again.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// choose returns the table with only the named columns, in that order. Case
// does not matter, nor whether blanks are underscores.
func (t *table) choose(names []string) (*table, error) {
	if len(names) == 0 {
		return t, nil
	}
	plain := func(s string) string { return strings.ReplaceAll(strings.ToLower(s), "_", " ") }
	chosen := &table{single: t.single, rows: make([][]cell, len(t.rows))}
	for _, name := range names {
		i := slices.IndexFunc(t.columns, func(c string) bool { return plain(c) == plain(name) })
		if i < 0 {
			return nil, fmt.Errorf("there is no column %q; there are %s", name, strings.Join(t.columns, ", "))
		}
		chosen.columns = append(chosen.columns, t.columns[i])
		for n, row := range t.rows {
			chosen.rows[n] = append(chosen.rows[n], row[i])
		}
	}
	return chosen, nil
}

// encode returns v as JSON without escapes that only HTML needs.
func encode(v any) json.RawMessage {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(v); err != nil { // not for what tables hold
		return json.RawMessage("null")
	}
	return bytes.TrimSpace(b.Bytes())
}

func (t *table) appendJSON(dst []byte) []byte {
	var compact, indented bytes.Buffer
	if !t.single {
		compact.WriteByte('[')
	}
	for i, row := range t.rows {
		if i > 0 {
			compact.WriteByte(',')
		}
		compact.WriteByte('{')
		for j, c := range row {
			if j > 0 {
				compact.WriteByte(',')
			}
			compact.Write(encode(t.columns[j]))
			compact.WriteByte(':')
			compact.Write(c.json)
		}
		compact.WriteByte('}')
	}
	if !t.single {
		compact.WriteByte(']')
	}
	if err := json.Indent(&indented, compact.Bytes(), "", "  "); err != nil {
		return append(append(dst, compact.Bytes()...), '\n')
	}
	return append(append(dst, indented.Bytes()...), '\n')
}

func (t *table) writeCSV(w io.Writer) error {
	out := csv.NewWriter(w)
	if err := out.Write(t.columns); err != nil {
		return err
	}
	for _, row := range t.rows {
		line := make([]string, len(row))
		for i, c := range row {
			if !c.null() {
				line[i] = c.text
			}
		}
		if err := out.Write(line); err != nil {
			return err
		}
	}
	out.Flush()
	return out.Error()
}

// appendValues prints the values of a row in a line, those of a single thing
// a line each.
func (t *table) appendValues(dst []byte) []byte {
	separator := byte(' ')
	if t.single {
		separator = '\n'
	}
	for _, row := range t.rows {
		for i, c := range row {
			if i > 0 {
				dst = append(dst, separator)
			}
			dst = append(dst, c.text...)
		}
		dst = append(dst, '\n')
	}
	return dst
}

// terminalWidth returns the width of the terminal that w is, or 0.
func terminalWidth(w io.Writer) int {
	f, ok := w.(*os.File)
	if !ok || !term.IsTerminal(int(f.Fd())) {
		return 0
	}
	width, _, err := term.GetSize(int(f.Fd()))
	if err != nil {
		return 0
	}
	return width
}

// showWidth is where the values of a single thing are wrapped.
const showWidth = 72

// append prints the table with borders. Where width is not 0, the widest
// columns are wrapped so that the table fits; where that would leave too little
// of them, each row becomes a table of its own, of names and values.
func (t *table) append(dst []byte, width int) []byte {
	if t.single {
		return t.properties(0, "Property").appendGrid(dst, width)
	}
	if t.nests(width) || t.fits(width) {
		return t.appendGrid(dst, width)
	}
	for r := range t.rows {
		dst = t.properties(r, "Field").appendGrid(dst, width)
	}
	return dst
}

// fits reports whether every column can have its width or minWidth.
func (t *table) fits(width int) bool {
	total := 1
	for i, c := range t.columns {
		w := runewidth.StringWidth(c)
		for _, row := range t.rows {
			w = max(w, runewidth.StringWidth(printable(row[i].text)))
		}
		total += min(w, minWidth) + 3
	}
	return width == 0 || total <= width || len(t.rows) == 0
}

// nests reports whether nested tables can be drawn without being narrowed.
func (t *table) nests(width int) bool {
	if width == 0 {
		return true
	}
	total := 1
	for i, c := range t.columns {
		w := runewidth.StringWidth(c)
		for _, row := range t.rows {
			for _, line := range row[i].lines(true) {
				w = max(w, runewidth.StringWidth(line))
			}
			if t.single && row[i].nested == nil {
				w = min(w, showWidth)
			}
		}
		total += w + 3
	}
	return total <= width
}

// lines are what is printed of a cell before it is wrapped.
func (c *cell) lines(nest bool) []string {
	if nest && c.nested != nil {
		return strings.Split(strings.TrimSuffix(string(c.nested.appendGrid(nil, 0)), "\n"), "\n")
	}
	if c.list != nil {
		all := make([]string, len(c.list))
		for i, line := range c.list {
			all[i] = printable(line)
		}
		return all
	}
	return []string{printable(c.text)}
}

func (t *table) appendGrid(dst []byte, width int) []byte {
	cells := make([][][]string, len(t.rows))
	nest := t.nests(width)
	widths := make([]int, len(t.columns))
	for i, c := range t.columns {
		widths[i] = runewidth.StringWidth(c)
	}
	for r, row := range t.rows {
		cells[r] = make([][]string, len(row))
		for i := range row {
			cells[r][i] = row[i].lines(nest)
			for _, line := range cells[r][i] {
				widths[i] = max(widths[i], runewidth.StringWidth(line))
			}
		}
	}
	if t.single {
		widths[1] = min(widths[1], showWidth)
		for _, row := range t.rows {
			if row[1].nested != nil && nest {
				widths[1] = max(widths[1], runewidth.StringWidth(row[1].lines(true)[0]))
			}
		}
	}
	fit(widths, width)
	dst = appendBorder(dst, widths)
	titles := make([][]string, len(t.columns))
	for i, c := range t.columns {
		titles[i] = []string{c}
	}
	dst = appendRow(dst, titles, widths)
	dst = appendBorder(dst, widths)
	for _, row := range cells {
		dst = appendRow(dst, row, widths)
	}
	return appendBorder(dst, widths)
}

// properties turns a row into a table of names and values.
func (t *table) properties(row int, name string) *table {
	turned := newTable(name, "Value")
	turned.single = true
	for i, c := range t.columns {
		turned.add(text(c), t.rows[row][i])
	}
	return turned
}

// minWidth is how narrow a column may become.
const minWidth = 8

// fit narrows the widest columns until the table is no wider than width, or
// none can be narrower.
func fit(widths []int, width int) {
	if width == 0 {
		return
	}
	total := 1
	for _, w := range widths {
		total += w + 3
	}
	for ; total > width; total-- {
		widest := 0
		for i, w := range widths {
			if w > widths[widest] {
				widest = i
			}
		}
		if widths[widest] <= minWidth {
			return
		}
		widths[widest]--
	}
}

func appendBorder(dst []byte, widths []int) []byte {
	for _, w := range widths {
		dst = append(dst, '+')
		dst = append(dst, strings.Repeat("-", w+2)...)
	}
	return append(dst, "+\n"...)
}

func appendRow(dst []byte, row [][]string, widths []int) []byte {
	lines := make([][]string, len(row))
	height := 1
	for i, cell := range row {
		for _, s := range cell {
			lines[i] = append(lines[i], wrap(s, widths[i])...)
		}
		height = max(height, len(lines[i]))
	}
	for n := range height {
		for i, w := range widths {
			s := ""
			if n < len(lines[i]) {
				s = lines[i][n]
			}
			dst = append(dst, "| "...)
			dst = append(dst, s...)
			dst = append(dst, strings.Repeat(" ", max(0, w-runewidth.StringWidth(s))+1)...)
		}
		dst = append(dst, "|\n"...)
	}
	return dst
}

// wrap breaks s into lines of at most width columns: after blanks and hyphens
// where it can, else anywhere.
func wrap(s string, width int) []string {
	if runewidth.StringWidth(s) <= width {
		return []string{s}
	}
	var lines []string
	line, lineWidth := "", 0
	flush := func() {
		lines = append(lines, strings.TrimRight(line, " "))
		line, lineWidth = "", 0
	}
	for _, word := range words(s) {
		bare := runewidth.StringWidth(strings.TrimRight(word, " "))
		if lineWidth > 0 && lineWidth+bare > width {
			flush()
		}
		for bare > width {
			head := runewidth.Truncate(word, width, "")
			if head == "" { // a rune wider than the column
				_, size := utf8.DecodeRuneInString(word)
				head = word[:size]
			}
			line = head
			flush()
			word = word[len(head):]
			bare = runewidth.StringWidth(strings.TrimRight(word, " "))
		}
		line += word
		lineWidth += runewidth.StringWidth(word)
	}
	if strings.TrimSpace(line) != "" || len(lines) == 0 {
		flush()
	}
	return lines
}

// words splits s after each run of blanks and after each hyphen.
func words(s string) []string {
	var all []string
	start := 0
	for i := 1; i < len(s); i++ {
		if s[i-1] == '-' || s[i-1] == ' ' && s[i] != ' ' {
			all = append(all, s[start:i])
			start = i
		}
	}
	return append(all, s[start:])
}

// printable replaces what would move the cursor or change the terminal: names
// are chosen by whoever owns a domain.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case r == '\n' || r == '\t':
			return ' '
		case unicode.IsControl(r) || unicode.Is(unicode.Cf, r):
			return '?'
		}
		return r
	}, s)
}
