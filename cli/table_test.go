package cli

import (
	"fmt"
	"strings"
	"testing"

	"github.com/mattn/go-runewidth"
)

func meters() *table {
	t := newTable("Name", "Type", "Unit", "Resource ID", "User ID", "Project ID")
	t.add(text("network.incoming.packets.error"), text("cumulative"), text("packet"), text("instance-00000001-5e1f7a3c-0d49-4c4e-8ad1-0c5b3a2f6f10-tap3f2a1c0d-5b"), null, text("7f2a4bb1f6c34d1db0f9f3f1a7de4a6e"))
	t.add(text("cpu"), text("cumulative"), text("ns"), text("dom-日本語の名前がここにとても長く続いています"), text("u1"), text("a name with blanks in it, and \x1b[31m colour\n"))
	return t
}

func TestTablesFitTheTerminal(t *testing.T) {
	for _, width := range []int{140, 100, 80, 60, 30} {
		t.Run(fmt.Sprint(width), func(t *testing.T) {
			got := string(meters().append(nil, width))
			for line := range strings.Lines(got) {
				if w := runewidth.StringWidth(strings.TrimSuffix(line, "\n")); w > width {
					t.Errorf("line of %d columns: %s", w, line)
				}
			}
			if strings.ContainsAny(strings.ReplaceAll(got, "\n", ""), "\x1b\r") {
				t.Errorf("control characters got through: %q", got)
			}
			golden(t, fmt.Sprintf("table-%d", width), got)
		})
	}
}

func TestTablesTooWideForTheTerminalBecomeLists(t *testing.T) {
	wide := newTable("Period", "Period Start", "Period End", "Max", "Min", "Avg", "Sum", "Count", "Duration", "Duration Start", "Duration End")
	for range 2 {
		row := []cell{number("3600")}
		for range wide.columns[1:] {
			row = append(row, text("2026-01-01T10:00:00.500000"))
		}
		wide.add(row...)
	}
	golden(t, "table-list", string(wide.append(nil, 80)))
	wide.rows = nil
	golden(t, "table-list-empty", string(wide.append(nil, 80)))
}

func TestTablesAreWholeWhereThereIsNoTerminal(t *testing.T) {
	for line := range strings.Lines(string(meters().append(nil, 0))) {
		if w := runewidth.StringWidth(strings.TrimSuffix(line, "\n")); w != 184 {
			t.Errorf("got a line of %d columns: %s", w, line)
		}
	}
}

func TestWrap(t *testing.T) {
	for name, tc := range map[string]struct {
		in    string
		width int
		want  string
	}{
		"what fits stays":                    {"abc def", 7, "abc def"},
		"words move whole":                   {"abc def ghi", 8, "abc def|ghi"},
		"hyphens end a word":                 {"abc-def-ghi", 8, "abc-def-|ghi"},
		"a long word is broken":              {"abcdefghij kl", 4, "abcd|efgh|ij|kl"},
		"nothing is lost before a long word": {"a bcdefgh", 4, "a|bcde|fgh"},
		"wide runes count twice":             {"日本語", 4, "日本|語"},
		"a rune wider than the column":       {"日本", 1, "日|本"},
		"blanks alone are a line":            {"      ", 3, ""},
	} {
		t.Run(name, func(t *testing.T) {
			if got := strings.Join(wrap(tc.in, tc.width), "|"); got != tc.want {
				t.Errorf("got %q, want %q", got, tc.want)
			}
		})
	}
}
