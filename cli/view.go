package cli

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/mattn/go-runewidth"

	"github.com/kvmeter/kvmeter/agent/client"
)

// view lays a snapshot out in lines.
type view struct {
	width, height int  // of the terminal; a width of 0: as wide as it takes, a height of 0: every domain
	colour        bool // use terminal colours
	sort          int  // index into topColumns
	first         int  // how many domains are scrolled away
	every         time.Duration
	trouble       string // why the snapshot is not new
}

// topColumn is a column of top. Columns but the first are right-aligned.
type topColumn struct {
	name  string
	width int
	keep  int // columns of the lowest number go first where there is no room
	text  func(d *client.Domain) string
	value func(d *client.Domain) float64 // what to sort by, largest first; nil: by text
	hot   func(d *client.Domain) string  // colour of the text, or none
}

// Terminal colours and attributes, ECMA-48 §8.3.117.
const (
	bold   = "1"
	dim    = "2"
	invert = "7"
	red    = "31"
	yellow = "33"
	cyan   = "36"
)

var topColumns = []topColumn{
	{name: "NAME", width: 12, keep: 9, text: displayName},
	{name: "UUID", width: 8, keep: 0, text: func(d *client.Domain) string { return d.UUID[:min(8, len(d.UUID))] }},
	{
		name: "VCPU", width: 4, keep: 1,
		text:  func(d *client.Domain) string { return fmt.Sprint(d.VCPUs) },
		value: func(d *client.Domain) float64 { return float64(d.VCPUs) },
	},
	{
		name: "CPU %", width: 6, keep: 8,
		text:  func(d *client.Domain) string { return percent(d.CPU) },
		value: func(d *client.Domain) float64 { return d.CPU },
		hot:   func(d *client.Domain) string { return heat(d.CPU, 50*float64(d.VCPUs), 90*float64(d.VCPUs)) },
	},
	{
		name: "WAIT %", width: 6, keep: 3,
		text:  func(d *client.Domain) string { return percent(d.Wait) },
		value: func(d *client.Domain) float64 { return d.Wait },
		hot:   func(d *client.Domain) string { return heat(d.Wait, 2, 10) },
	},
	{
		name: "DISK R/s", width: 8, keep: 6,
		text:  func(d *client.Domain) string { return sizeText(d.DiskRead) },
		value: func(d *client.Domain) float64 { return d.DiskRead },
	},
	{
		name: "DISK W/s", width: 8, keep: 7,
		text:  func(d *client.Domain) string { return sizeText(d.DiskWrite) },
		value: func(d *client.Domain) float64 { return d.DiskWrite },
	},
	{name: "IOPS", width: 5, keep: 2, text: requests, value: iops},
	{
		name: "NET IN/s", width: 8, keep: 4,
		text:  func(d *client.Domain) string { return sizeText(d.NetIn) },
		value: func(d *client.Domain) float64 { return d.NetIn },
	},
	{
		name: "NET OUT/s", width: 9, keep: 5,
		text:  func(d *client.Domain) string { return sizeText(d.NetOut) },
		value: func(d *client.Domain) float64 { return d.NetOut },
	},
}

// byCPU is the index of the column that top sorts by at first.
const byCPU = 3

func displayName(d *client.Domain) string {
	if d.Display != "" {
		return printable(d.Display)
	}
	return printable(d.Name)
}

func iops(d *client.Domain) float64 {
	if d.DiskIOPS == nil {
		return -1
	}
	return *d.DiskIOPS
}

// requests prints requests a second, or "-" where nobody has counted them.
func requests(d *client.Domain) string {
	switch n := iops(d); {
	case n < 0:
		return "-"
	case n > 0 && n < 9.95:
		return fmt.Sprintf("%.1f", n)
	case n < 99_999.5:
		return fmt.Sprintf("%.0f", n)
	default:
		return fmt.Sprintf("%.0fk", n/1000)
	}
}

func percent(p float64) string {
	if p >= 9999.5 {
		return fmt.Sprintf("%.0f", p)
	}
	return fmt.Sprintf("%.1f", p)
}

// sizeText prints bytes with three digits and a binary unit, at most 8 columns.
func sizeText(n float64) string {
	unit := "B"
	for _, larger := range []string{"KiB", "MiB", "GiB", "TiB"} {
		if n < 1023.5 {
			break
		}
		n /= 1024
		unit = larger
	}
	switch {
	case unit == "B" || n >= 99.95:
		return fmt.Sprintf("%.0f %s", n, unit)
	case n >= 9.995:
		return fmt.Sprintf("%.1f %s", n, unit)
	}
	return fmt.Sprintf("%.2f %s", n, unit)
}

func heat(n, warm, hot float64) string {
	switch {
	case n >= hot && n > 0:
		return red
	case n >= warm && n > 0:
		return yellow
	}
	return ""
}

// lines returns the picture of a snapshot: no more than height lines, none
// wider than width.
func (v *view) lines(s *client.Snapshot) []string {
	domains := slices.Clone(s.Domains)
	v.order(domains)
	columns := v.columns(domains)
	head := []string{v.title(s), v.paint(red, v.cut(v.trouble)), v.header(columns), v.total(s, columns)}
	foot := v.foot(s)
	room := len(domains)
	if v.height > 0 {
		room = max(0, v.height-len(head)-len(foot))
	}
	v.first = max(0, min(v.first, len(domains)-room))
	var rows []string
	for i := v.first; i < min(v.first+room, len(domains)); i++ {
		rows = append(rows, v.row(&domains[i], columns, s.Seconds > 0))
	}
	if len(domains) == 0 && room > 0 {
		rows = append(rows, v.paint(dim, v.cut("no domain runs here")))
	}
	for v.height > 0 && len(head)+len(rows)+len(foot) < v.height {
		rows = append(rows, "")
	}
	all := slices.Concat(head, rows, foot)
	if v.height > 0 {
		all = all[:min(len(all), v.height)]
	}
	return all
}

// order sorts the domains by the chosen column, then by name; those that could
// not be read come last.
func (v *view) order(domains []client.Domain) {
	column := topColumns[v.sort]
	slices.SortStableFunc(domains, func(a, b client.Domain) int {
		c := cmp.Compare(min(len(a.Error), 1), min(len(b.Error), 1))
		if c != 0 {
			return c
		}
		if column.value != nil {
			c = cmp.Compare(column.value(&b), column.value(&a))
		} else {
			c = cmp.Compare(column.text(&a), column.text(&b))
		}
		return cmp.Or(c, cmp.Compare(displayName(&a), displayName(&b)), cmp.Compare(a.UUID, b.UUID))
	})
}

// placed is a column that there is room for.
type placed struct {
	topColumn
	sorted bool
	gap    int // blanks before it
}

// columns chooses the columns that fit. The names get what they need, up to
// what is left.
func (v *view) columns(domains []client.Domain) []placed {
	longest := len("total")
	for i := range domains {
		longest = max(longest, runewidth.StringWidth(displayName(&domains[i])))
	}
	gap := 1
	if v.width == 0 || v.width >= 100 {
		gap = 2
	}
	columns := make([]placed, len(topColumns))
	for i, c := range topColumns {
		columns[i] = placed{c, i == v.sort, gap}
	}
	columns[0].gap = 0
	if v.width == 0 {
		columns[0].width = longest
		return columns
	}
	for {
		used := 0
		for _, c := range columns[1:] {
			used += c.width + c.gap
		}
		left := v.width - used
		if left >= min(longest, 18) || len(columns) == 1 {
			columns[0].width = max(1, min(left, max(longest, columns[0].width)))
			return columns
		}
		least := 1
		for i, c := range columns[1:] {
			if c.keep < columns[least].keep {
				least = i + 1
			}
		}
		columns = slices.Delete(columns, least, least+1)
	}
}

// title names the node, the time and what runs there.
func (v *view) title(s *client.Snapshot) string {
	cpus := 0
	for i := range s.Domains {
		cpus += s.Domains[i].VCPUs
	}
	left := fmt.Sprintf("kvmeter top  %s  %s  %s, %s", printable(s.Node), s.Time.Local().Format("15:04:05"), count(len(s.Domains), "domain"), count(cpus, "vCPU"))
	right := "every " + v.every.String()
	if gap := v.width - runewidth.StringWidth(left) - len(right); gap >= 2 {
		left += strings.Repeat(" ", gap) + right
	}
	return v.paint(bold, v.cut(left))
}

func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

// header names the columns and marks the one that is sorted by.
func (v *view) header(columns []placed) string {
	var b strings.Builder
	used := 0
	for i, c := range columns {
		name := c.name
		if i == 0 {
			if c.sorted {
				name += "▾"
			}
			b.WriteString(v.paint(invert, pad(name, c.width)))
			used += c.width
			continue
		}
		if c.value == nil {
			name = pad(name, c.width)
		}
		mark := " "
		if c.sorted {
			mark = "▾"
		}
		blanks := c.gap + c.width - runewidth.StringWidth(name) - 1
		text := strings.Repeat(" ", blanks) + mark + name
		if c.sorted {
			b.WriteString(v.paint(invert+";"+bold, text))
		} else {
			b.WriteString(v.paint(invert, text))
		}
		used += c.gap + c.width
	}
	if v.colour && v.width > used {
		b.WriteString(v.paint(invert, strings.Repeat(" ", v.width-used)))
	}
	return b.String()
}

// total adds the domains up.
func (v *view) total(s *client.Snapshot, columns []placed) string {
	sum := client.Domain{Name: "total"}
	for i := range s.Domains {
		d := &s.Domains[i]
		sum.VCPUs += d.VCPUs
		sum.CPU += d.CPU
		sum.Wait += d.Wait
		sum.DiskRead += d.DiskRead
		sum.DiskWrite += d.DiskWrite
		sum.NetIn += d.NetIn
		sum.NetOut += d.NetOut
		if d.DiskIOPS != nil {
			if sum.DiskIOPS == nil {
				sum.DiskIOPS = new(float64)
			}
			*sum.DiskIOPS += *d.DiskIOPS
		}
	}
	var b strings.Builder
	for i, c := range columns {
		text := ""
		switch {
		case c.name == "VCPU" || i == 0 || s.Seconds > 0:
			text = c.text(&sum)
		case c.value != nil:
			text = "-"
		}
		b.WriteString(v.cell(i, c, text))
	}
	return v.paint(bold, strings.TrimRight(b.String(), " "))
}

// row prints a domain. Rates are not known before a second reading.
func (v *view) row(d *client.Domain, columns []placed, rates bool) string {
	var b strings.Builder
	for i, c := range columns {
		name := c.value == nil || c.name == "VCPU"
		if d.Error != "" && !name {
			break
		}
		text := "-"
		if rates || name {
			text = c.text(d)
		}
		b.WriteString(v.paint(tint(d, &c, text), v.cell(i, c, text)))
	}
	if d.Error == "" {
		return b.String()
	}
	used := 2
	for _, c := range columns {
		if c.value == nil || c.name == "VCPU" {
			used += c.gap + c.width
		}
	}
	text := printable(d.Error)
	if v.width > 0 {
		text = runewidth.Truncate(text, max(0, v.width-used), "…")
	}
	return b.String() + "  " + v.paint(red, text)
}

// tint chooses the colour of a cell.
func tint(d *client.Domain, c *placed, text string) string {
	switch {
	case c.name == "NAME":
		return cyan
	case c.name == "UUID", text == "-", text == "0 B", text == "0", text == "0.0":
		return dim
	case c.hot != nil:
		return c.hot(d)
	}
	return ""
}

// cell aligns a text in its column.
func (v *view) cell(i int, c placed, text string) string {
	if i == 0 {
		return pad(runewidth.Truncate(text, c.width, "…"), c.width)
	}
	return strings.Repeat(" ", max(0, c.gap+c.width-runewidth.StringWidth(text))) + text
}

// foot holds the notes, and what the keys do.
func (v *view) foot(s *client.Snapshot) []string {
	var foot []string
	for _, n := range s.Notes {
		lines := []string{"note: " + printable(n)}
		if v.width > 0 {
			lines = wrap(lines[0], v.width)
		}
		for _, l := range lines {
			foot = append(foot, v.paint(yellow, l))
		}
	}
	if v.height == 0 {
		return foot
	}
	foot = foot[:min(len(foot), max(0, (v.height-6)/3))] // the domains come first
	return append(foot, v.paint(dim, v.cut("q quit   s, ← and → sort (now by "+topColumns[v.sort].name+")   ↑ and ↓ scroll")))
}

// cut shortens a line to the width of the terminal.
func (v *view) cut(s string) string {
	if v.width == 0 {
		return s
	}
	return runewidth.Truncate(s, v.width, "…")
}

func (v *view) paint(attributes, s string) string {
	if !v.colour || attributes == "" || s == "" {
		return s
	}
	return "\x1b[" + attributes + "m" + s + "\x1b[0m"
}

func pad(s string, width int) string {
	return s + strings.Repeat(" ", max(0, width-runewidth.StringWidth(s)))
}
