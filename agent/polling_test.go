package agent

import (
	"bufio"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kvmeter/kvmeter/sample"
)

func TestPollingFiles(t *testing.T) {
	good, _ := filepath.Glob("testdata/polling/*.good.yaml")
	bad, _ := filepath.Glob("testdata/polling/*.bad.yaml")
	if len(good) == 0 || len(bad) == 0 {
		t.Fatal("no files in testdata/polling")
	}
	for _, path := range good {
		if _, err := loadPolling(path, time.Second); err != nil {
			t.Errorf("%v", err)
		}
	}
	for _, path := range bad {
		t.Run(filepath.Base(path), func(t *testing.T) {
			f, err := os.Open(path)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = f.Close() }()
			line, err := bufio.NewReader(f).ReadString('\n')
			if err != nil {
				t.Fatal(err)
			}
			want := path + ": " + strings.TrimSpace(strings.TrimPrefix(line, "# "))
			if _, err := loadPolling(path, time.Second); err == nil || err.Error() != want {
				t.Errorf("got  %v\nwant %v", err, want)
			}
		})
	}
}

func TestPollingFileThatIsMissing(t *testing.T) {
	if _, err := loadPolling("/nowhere/polling.yaml", time.Second); err == nil || !strings.Contains(err.Error(), "/nowhere/polling.yaml") {
		t.Errorf("error %v does not name the file", err)
	}
}

// shape shows plans as text.
func shape(plans []plan) map[string]string {
	got := map[string]string{}
	for _, p := range plans {
		names := make([]string, len(p.meters))
		for i, m := range p.meters {
			names[i] = m.Name
		}
		got[fmt.Sprintf("%s qemu=%t", p.interval, p.qemu)] = strings.Join(names, " ")
	}
	return got
}

func names(keep func(*sample.Meter) bool) string {
	var all []string
	for _, m := range sample.Catalogue {
		if keep(m) {
			all = append(all, m.Name)
		}
	}
	return strings.Join(all, " ")
}

func TestMakePlans(t *testing.T) {
	light := names(func(m *sample.Meter) bool { return !m.QEMU && m.Check == nil && !m.OfBMC() && !m.Legacy })
	single := names(func(m *sample.Meter) bool {
		return !m.QEMU && m.Check == nil && (m.Parts == "" || m.Total) && !m.OfBMC() && !m.Legacy
	})
	families := names(func(m *sample.Meter) bool { return m.Parts != "" && !m.Total })
	qemu := names(func(m *sample.Meter) bool { return m.QEMU && !m.Legacy })
	for name, tc := range map[string]struct {
		file  string
		want  map[string]string
		notes []string // parts
	}{
		"a wildcard asks QEMU slowly, and says so": {
			"sources: [{name: a, interval: 10, meters: ['*']}]",
			map[string]string{"10s qemu=false": single, "1m0s qemu=false": families, "5m0s qemu=true": qemu},
			[]string{"every 5m0s"},
		},
		"a wildcard that is slower than that stays as slow": {
			"sources: [{name: a, interval: 600, meters: ['*']}]",
			map[string]string{"10m0s qemu=false": light, "10m0s qemu=true": qemu},
			nil,
		},
		"a meter that is named is polled as often as asked": {
			"sources: [{name: a, interval: 10, meters: [disk.device.read.bytes, cpu]}]",
			map[string]string{"10s qemu=false": "cpu", "10s qemu=true": "disk.device.read.bytes"},
			nil,
		},
		"comparisons have a cadence of their own, which is said where they are named": {
			"sources: [{name: a, interval: 10, meters: [cpu, check.cpu, check.cpu.verdict]}]",
			map[string]string{"10s qemu=false": "cpu"},
			[]string{"check.cpu, check.cpu.verdict: comparisons with libvirt come every crosscheck_interval"},
		},
		"a meter of two sources with one interval is polled once": {
			"sources: [{name: a, interval: 10, meters: [cpu]}, {name: b, interval: 10, meters: ['*', '!cpu.*', '!network.*', '!disk.*', '!check.*', '!vcpu*', '!kvm.*', '!memory*', '!perf.*', '!power.*']}]",
			map[string]string{"10s qemu=false": "cpu"},
			nil,
		},
		"a meter of two intervals is polled at both": {
			"sources: [{name: a, interval: 10, meters: [cpu]}, {name: b, interval: 20, meters: [cpu]}]",
			map[string]string{"10s qemu=false": "cpu", "20s qemu=false": "cpu"},
			nil,
		},
		"a meter that nobody has is a note": {
			"sources: [{name: a, interval: 10, meters: [cpu, volume.size, 'disk.devices.*']}]",
			map[string]string{"10s qemu=false": "cpu"},
			[]string{`polling.yaml: line 1: source "a" asks for what this agent does not have: volume.size, disk.devices.* (`},
		},
		"seconds may have a fraction": {
			"sources: [{name: a, interval: 0.25, meters: [cpu]}]",
			map[string]string{"250ms qemu=false": "cpu"},
			nil,
		},
		"what is merged in holds where the source says nothing": {
			"x: &x {interval: 10, meters: [cpu]}\nsources: [{<<: *x, name: a}, {<<: [*x], name: b, interval: 20}]",
			map[string]string{"10s qemu=false": "cpu", "20s qemu=false": "cpu"},
			[]string{`line 1: unknown key "x"`},
		},
		"static resources are no domains": {
			"sources: [{name: a, interval: 10, meters: [cpu, check.cpu], resources: ['snmp://10.0.0.1']}]",
			map[string]string{},
			[]string{"polls its own resources, and no domains"},
		},
		"the host is no domain": {
			"sources: [{name: a, interval: 10, meters: [cpu], discovery: [local_node]}]",
			map[string]string{},
			[]string{"polls its own resources, and no domains"},
		},
		"domains are polled beside static resources where the discovery says so": {
			"sources: [{name: a, interval: 10, meters: [cpu], resources: [x], discovery: ['local_instances://here', local_node]}]",
			map[string]string{"10s qemu=false": "cpu"},
			nil,
		},
		"a discovery that finds nothing leaves the usual one": {
			"sources: [{name: a, interval: 10, meters: [cpu], discovery: ['endpoint:image', tenants]}]",
			map[string]string{"10s qemu=false": "cpu"},
			[]string{`"endpoint:image" is of Ceilometer's namespace central`, `there is no discovery "tenants"`},
		},
		"sources of one name are both polled, and unknown keys ignored": {
			"x: 1\nsources: [{name: a, interval: 10, meters: [cpu], y: 2},\n {name: a, interval: 20, meters: [cpu]}]",
			map[string]string{"10s qemu=false": "cpu", "20s qemu=false": "cpu"},
			[]string{`line 1: unknown key "x"`, `line 2: unknown key "y"`, `line 3: source "a" exists already, in line 2`},
		},
		"meters of older releases are polled where they are named": {
			"sources: [{name: a, interval: 10, meters: [instance, 'cpu_ut*']}]",
			map[string]string{"10s qemu=false": "instance"},
			nil,
		},
		"a list of exclusions is all the others": {
			"sources: [{name: a, interval: 10, meters: ['!network.*', '!disk.*', '!check.*', '!cpu.*', '!vcpu*', '!kvm.*', '!memory*', '!perf.*', '!power.*']}]",
			map[string]string{"10s qemu=false": "cpu"},
			nil,
		},
	} {
		t.Run(name, func(t *testing.T) {
			sources, wrong := parsePolling([]byte(tc.file))
			if len(wrong) > 0 {
				t.Fatal(wrong)
			}
			plans, notes := makePlans(sources, &Config{QEMUInterval: 300 * time.Second, HistogramInterval: time.Minute})
			if diff := cmp.Diff(tc.want, shape(plans)); diff != "" {
				t.Errorf("plans (-want +got):\n%s", diff)
			}
			if len(notes) != len(tc.notes) {
				t.Fatalf("notes %q, want %d", notes, len(tc.notes))
			}
			for i, part := range tc.notes {
				if !strings.Contains(notes[i], part) {
					t.Errorf("note %q does not say %q", notes[i], part)
				}
			}
		})
	}
}

// FuzzPolling: whatever the file holds, what is accepted can be scheduled.
func FuzzPolling(f *testing.F) {
	files, _ := filepath.Glob("testdata/polling/*.yaml")
	for _, path := range files {
		data, err := os.ReadFile(path)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		sources, wrong := parsePolling(data)
		for _, text := range wrong {
			if !strings.Contains(text, "line ") {
				t.Errorf("%q names no line", text)
			}
		}
		if len(wrong) > 0 {
			return
		}
		plans, _ := makePlans(sources, &Config{QEMUInterval: 300 * time.Second, HistogramInterval: time.Minute})
		for _, p := range plans {
			if p.interval < minInterval || p.interval > maxInterval || len(p.meters) == 0 {
				t.Errorf("plan %+v", p)
			}
		}
	})
}
