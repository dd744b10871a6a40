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
	light := names(func(m *sample.Meter) bool { return !m.QEMU })
	qemu := names(func(m *sample.Meter) bool { return m.QEMU })
	for name, tc := range map[string]struct {
		file  string
		want  map[string]string
		notes []string // parts
	}{
		"a wildcard asks QEMU slowly, and says so": {
			"sources: [{name: a, interval: 10, meters: ['*']}]",
			map[string]string{"10s qemu=false": light, "5m0s qemu=true": qemu},
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
		"a meter of two sources with one interval is polled once": {
			"sources: [{name: a, interval: 10, meters: [cpu]}, {name: b, interval: 10, meters: ['*', '!cpu.*', '!network.*', '!disk.*', '!check.*']}]",
			map[string]string{"10s qemu=false": "cpu"},
			nil,
		},
		"a meter of two intervals is polled at both": {
			"sources: [{name: a, interval: 10, meters: [cpu]}, {name: b, interval: 20, meters: [cpu]}]",
			map[string]string{"10s qemu=false": "cpu", "20s qemu=false": "cpu"},
			nil,
		},
		"a meter that nobody has is a note": {
			"sources: [{name: a, interval: 10, meters: [cpu, volume.size]}]",
			map[string]string{"10s qemu=false": "cpu"},
			[]string{"volume.size"},
		},
		"a list of exclusions is all the others": {
			"sources: [{name: a, interval: 10, meters: ['!network.*', '!disk.*', '!check.*', '!cpu.*']}]",
			map[string]string{"10s qemu=false": "cpu"},
			nil,
		},
	} {
		t.Run(name, func(t *testing.T) {
			sources, err := parsePolling([]byte(tc.file))
			if err != nil {
				t.Fatal(err)
			}
			plans, notes := makePlans(sources, 300*time.Second)
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
		sources, err := parsePolling(data)
		if err != nil {
			return
		}
		plans, _ := makePlans(sources, 300*time.Second)
		for _, p := range plans {
			if p.interval < minInterval || p.interval > maxInterval || len(p.meters) == 0 {
				t.Errorf("plan %+v", p)
			}
		}
	})
}
